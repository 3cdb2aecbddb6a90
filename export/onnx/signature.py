"""The inputs and outputs of any network as named tensors, which is what ONNX knows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.networks.capture import Example

BATCH = "batch"
"""Name of the dimension along which examples lie."""
Shape = tuple[int | str | None, ...]
"""Lengths: a number, the name of a dimension of any length, or None where it does not matter."""


@dataclass(frozen=True)
class Signature:
    """What a network reads and returns.

    Attributes:
        inputs: shape of each input by its name, in the order of ``forward``.
        outputs: shape of each output by its name, in the order in which they are returned.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """The named dimensions, as torch's exporter wants them."""
        return {
            name: {i: length for i, length in enumerate(shape) if isinstance(length, str)}
            for name, shape in (*self.inputs.items(), *self.outputs.items())
        }


class Call:
    """How a network is called: the arguments of an example with the tensors taken out.

    Args:
        model: the network.
        example: its arguments.

    Raises:
        ConfigError: they are not those of ``forward``, or hold no tensor.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        from torch.utils import _pytree as pytree

        name = type(model).__name__
        self._signature = inspect.signature(model.forward)
        try:
            bound = self._signature.bind(*example.args, **example.kwargs)
        except TypeError as error:
            raise ConfigError(
                f"the example does not fit {name}.forward{self._signature}: {error}"
            ) from error
        leaves, self._tree = pytree.tree_flatten(dict(bound.arguments))
        self._constants = [None if _is_tensor(leaf) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if _is_tensor(leaf)]
        self.tensors: list[torch.Tensor] = [leaves[i] for i in self._places]
        """The tensors of the example."""
        self.names = [path for path, _ in named_tensors(self._named(bound.arguments))]
        """A name for each: that of the argument, with a path inside it."""
        if not self.tensors or len(self.names) != len(self.tensors):
            raise ConfigError(
                f"the example of {name} must hold its tensors alone or in tuples, lists and "
                "dictionaries"
            )

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional arguments and those by keyword, with other tensors in their places."""
        from torch.utils import _pytree as pytree

        leaves = list(self._constants)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        arguments: Any = pytree.tree_unflatten(leaves, self._tree)
        bound = inspect.BoundArguments(self._signature, arguments)
        return bound.args, bound.kwargs

    def _named(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by name; those of a ``**kwargs`` stand beside the others."""
        named: dict[str, Any] = {}
        for name, value in arguments.items():
            many = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named.update(value if many else {name: value})
        return named


def output_names(model: nn.Module, output: Any, taken: Iterable[str]) -> list[str]:
    """Return a name for each tensor that a network returned.

    A tensor alone is ``output``. A part of a dictionary, a named tuple or a dataclass has its key;
    what has a number, or a key that an input has too, is ``output.KEY``. A part of a part has a
    path, as ``boxes.0``.

    Raises:
        ModelError: the network returned no tensor.
    """
    paths = [path for path, _ in named_tensors(output)]
    if not paths:
        raise ModelError(
            f"{type(model).__name__} returns {type(output).__name__}, in which there is no tensor"
        )
    taken = set(taken)
    return [
        path if path[:1].isalpha() and path not in taken else f"output.{path}".rstrip(".")
        for path in paths
    ]


def checked_names(role: str, given: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """Return the names that were asked for, or the default where none were.

    Raises:
        ConfigError: too few, too many, or one twice.
    """
    names = list(default if given is None else given)
    if isinstance(given, str) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{role}_names is a list of names, not {given!r}")
    if len(names) != len(default):
        raise ConfigError(
            f"{role}_names has {len(names)} names and the network has {len(default)} {role}s: "
            f"{', '.join(default)}"
        )
    return names


def named_tensors(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a tree with their paths, in the order of ``tensors_of``."""
    if _is_tensor(value):
        return [(path, value)]
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif dataclasses.is_dataclass(value):
        parts = vars(value).items()
    elif isinstance(value, list | tuple):
        parts = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    return [
        found
        for key, part in parts
        for found in named_tensors(part, f"{path}.{key}" if path else str(key))
    ]


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
