"""The profile of a torch network: two marks around every module that holds no other.

On the CPU a mark is a look at the clock. On a GPU it is an event on the stream: the host queues
modules and marks while the stream is held, so the device runs them one after the other as fast as
it can, and what the host needs to launch them does not count. A queue is finite (about a thousand
entries): of networks that do not fit, the last layers may still wait for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from export.profiling import WARMUPS, Profile, profile_from_calls

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from export.runners.stages import Stages

OUTSIDE = "outside of modules"
"""Name of what a network computes without a module, such as residual additions."""

Key = tuple[str, str, tuple[str, ...]]

_LONGEST_HOLD_MS = 500.0


def profile_module(
    model: nn.Module,
    device: str,
    images: np.ndarray,
    *,
    calls: int,
    threads: int | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
    channels_last: bool = False,
) -> Profile:
    """Return the profile of a network in eager mode; see ``profile_network``.

    A module that is called twice is two layers of one name.

    Raises:
        ConfigError: half precision is asked of the CPU, or the device is none that torch knows.
        EnvironmentUnfitError: torch finds no such device.
        DataError: the images are not of the shape or type that the network reads.
        ModelError: the network cannot be computed on them.
    """
    from export.runners.torch_runner import TorchRunner

    clock = _Clock()
    handles = clock.watch(model)
    taken = []
    try:
        with TorchRunner(
            model, device, channels_last=channels_last, precision=precision, threads=threads
        ) as runner:
            clock.stages = runner.stages
            for number in range(WARMUPS + calls):
                clock.ahead = number >= WARMUPS - 1
                clock.spans.clear()
                runner.infer(images)
                taken.append(clock.layers())
    finally:
        for handle in handles:
            handle.remove()
    counted = taken[WARMUPS:]
    return profile_from_calls(
        [key for key, _ in counted[0]], [[ms for _, ms in call] for call in counted]
    )


class _Mark(Protocol):
    def elapsed_time(self, later: Any) -> float:
        """Return the milliseconds from this mark to a later one."""


class _Look:
    """A look at the clock of the host."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, later: _Look) -> float:
        return 1000 * (later._seconds - self._seconds)


class _Clock:
    """Marks the start and the end of each module; its hooks survive a copy of the network."""

    def __init__(self) -> None:
        self.spans: list[tuple[Key, _Mark, _Mark]] = []
        """What was run since the last ``clear``; the whole network is its last, as OUTSIDE."""
        self.stages: Stages | None = None
        """On a GPU, the steps of the runner."""
        self.ahead = False
        """Whether the stream is held until the host has queued the network."""
        self._queued_in_ms = float("inf")
        """The shortest time in which the host queued the network, its stream not held."""
        self._began = _Look()

    def watch(self, model: nn.Module) -> list[Any]:
        """Hook into a network; return the handles of the hooks."""
        handles = [model.register_forward_pre_hook(self._hook(self._begin))]
        if not _is_leaf(model):
            handles += self._around(model, (OUTSIDE, "functions", ()))
        for path, module in model.named_modules():
            if _is_leaf(module):
                kind = type(module).__name__
                handles += self._around(module, (path or kind, kind, (path,) if path else ()))
        return [*handles, model.register_forward_hook(self._hook(self._end))]

    def layers(self) -> list[tuple[Key, float]]:
        """Return the milliseconds of what was run; the device must be done with it."""
        found = [(key, start.elapsed_time(end)) for key, start, end in self.spans]
        if found and found[-1][0][0] == OUTSIDE:  # it holds the modules, and so their time
            key, whole = found.pop()
            found.append((key, max(0.0, whole - sum(ms for _, ms in found))))
        return found

    def _around(self, module: nn.Module, key: Key) -> list[Any]:
        starts: list[_Mark] = []

        def before() -> None:
            starts.append(self._mark())

        def after() -> None:
            self.spans.append((key, starts.pop(), self._mark()))

        return [
            module.register_forward_pre_hook(self._hook(before)),
            module.register_forward_hook(self._hook(after)),
        ]

    def _hook(self, act: Callable[[], None]) -> Callable[..., None]:
        """Return a closure: a copied bound method would belong to a copied clock."""

        def hook(*_: Any) -> None:
            act()

        return hook

    def _mark(self) -> _Mark:
        return _Look() if self.stages is None else self.stages.mark()

    def _begin(self) -> None:
        if self.stages is not None and self.ahead:
            self.stages.hold(min(2 * self._queued_in_ms + 1, _LONGEST_HOLD_MS))
        self._began = _Look()

    def _end(self) -> None:
        if not self.ahead:
            self._queued_in_ms = min(self._queued_in_ms, self._began.elapsed_time(_Look()))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
