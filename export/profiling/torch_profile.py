"""The profile of a torch network: a clock around every module that holds no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from export.profiling import WARMUPS, Profile, profile_from_calls

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

OUTSIDE = "outside of modules"
"""Name of what a network computes without a module, such as residual additions."""

Key = tuple[str, str, tuple[str, ...]]


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

    A module that is called twice is two layers of one name. On a GPU the host waits for the device
    before it reads the clock, so a small layer takes at least what its launch does.

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
            if runner.stages is not None:
                clock.settle = runner.stages.synchronize
            for _ in range(WARMUPS + calls):
                clock.layers.clear()
                runner.infer(images)
                taken.append(list(clock.layers))
    finally:
        for handle in handles:
            handle.remove()
    counted = taken[WARMUPS:]
    return profile_from_calls(
        [key for key, _ in counted[0]], [[ms for _, ms in call] for call in counted]
    )


class _Clock:
    """Reads the time before and after each module; its hooks survive a copy of the network."""

    def __init__(self) -> None:
        self.layers: list[tuple[Key, float]] = []
        """What was run since the last ``clear``, in milliseconds."""
        self.settle: Callable[[], None] = _nothing
        """Waits for the device."""

    def watch(self, model: nn.Module) -> list[Any]:
        """Hook into a network; return the handles of the hooks."""
        handles = [] if _is_leaf(model) else self._around(model, self._finish)
        for path, module in model.named_modules():
            if _is_leaf(module):
                kind = type(module).__name__
                key = (path or kind, kind, (path,) if path else ())
                handles += self._around(module, partial(self._take, key))
        return handles

    def _around(self, module: nn.Module, tell: Callable[[float], None]) -> list[Any]:
        starts: list[float] = []

        # Closures, because a copied bound method would belong to a copied clock.
        def before(*_: Any) -> None:
            self.settle()
            starts.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.settle()
            tell(1000 * (time.perf_counter() - starts.pop()))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _take(self, key: Key, milliseconds: float) -> None:
        self.layers.append((key, milliseconds))

    def _finish(self, milliseconds: float) -> None:
        """Take what the whole network took, once its modules have told what they did."""
        rest = milliseconds - sum(ms for _, ms in self.layers)
        self._take((OUTSIDE, "functions", ()), max(0.0, rest))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _nothing() -> None:
    """On the CPU there is nothing to wait for."""
