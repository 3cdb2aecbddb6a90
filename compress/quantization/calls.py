"""The operators that a network calls, one after another, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from compress.networks.capture import Example, in_mode, unchanged
from compress.quantization.plan import Call

Value = tuple[int, int]
"""The call that made a tensor, and which of its results it is; call -1 are the inputs."""
Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Instead = Callable[[Call, Function, Arguments], Any]
"""Calls an operator in another way than it was asked to be; returns what it returns."""
_LOOKS = frozenset({"__get__"})


def tensors_in(result: Any) -> list[torch.Tensor]:
    """Return the tensors that an operator returned."""
    leaves = result if isinstance(result, list | tuple) else [result]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class _Counting(TorchFunctionMode):
    """Counts the calls that return tensors, and hands on those that are planned."""

    def __init__(self, planned: Mapping[int, Call], instead: Instead) -> None:
        super().__init__()
        self._planned, self._instead = planned, instead
        self.number = 0

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator, or what is planned in its place."""
        call, given = self._planned.get(self.number), dict(kwargs or {})
        if call is not None and call.operator == operator_of(func):
            result = self._instead(call, func, (args, given))
        else:
            result = func(*args, **given)
        self.number += is_counted(func, result)
        return result


@contextmanager
def calling(planned: Mapping[int, Call], instead: Instead) -> Iterator[Callable[[], int]]:
    """Have operators of the block called in another way; yield what counts the calls so far."""
    with _Counting(planned, instead) as counting:
        yield lambda: counting.number


def operator_of(func: Function) -> str:
    """Return the name of an operator."""
    return str(getattr(func, "__name__", func))


def is_counted(func: Function, result: Any) -> bool:
    """Whether a call is counted: it returns a tensor, and is no look at an attribute."""
    return operator_of(func) not in _LOOKS and bool(tensors_in(result))


@dataclass(frozen=True)
class Seen:
    """One call of an operator, as it was seen."""

    operator: str
    reads: Mapping[int, Value]
    """Which tensor each argument is, by the argument's number."""
    arguments: tuple[Any, ...]
    """All of them, those within lists too."""


@dataclass(frozen=True)
class Run:
    """One run of a network."""

    calls: tuple[Seen, ...]
    values: Mapping[Value, torch.Tensor]
    """Copies of the inputs and of every result, as they were when they were made."""


class _Watching(TorchFunctionMode):
    """Notes every call that is counted."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[Seen] = []
        self.values: dict[Value, torch.Tensor] = {}
        self._kept: list[Any] = []  # so that no other tensor gets the address of an earlier one
        self._made: dict[int, Value] = {}
        self._note(-1, inputs)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator and note what it reads and returns."""
        leaves = pytree.tree_leaves((args, dict(kwargs or {})))
        reads = {
            place: self._made[id(leaf)]
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._made
        }
        result = func(*args, **dict(kwargs or {}))
        if is_counted(func, result):
            self.calls.append(Seen(operator_of(func), reads, tuple(leaves)))
            self._note(len(self.calls) - 1, tensors_in(result))
        return result

    def _note(self, call: int, results: list[torch.Tensor]) -> None:
        for part, tensor in enumerate(results):
            self._made[id(tensor)] = call, part
            self._kept.append(tensor)
            self.values[call, part] = tensor.detach().clone()


@torch.no_grad()
def watch(network: nn.Module, example: Example) -> Run:
    """Run a network in evaluation mode, and return what it called."""
    inputs = example.beside(network)
    with unchanged(network), in_mode(network), _Watching(inputs.tensors) as watching:
        network(*inputs.args, **inputs.kwargs)
    return Run(tuple(watching.calls), watching.values)
