"""The graph of a network: what torch.export captures in evaluation mode, and where it was written.

The graph holds ATen operators. Parameters and buffers are inputs of it, under their qualified
names, wherever the network uses them; sizes are plain numbers.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from compress.errors import ModelError, UsageError, first_sentence
from compress.networks.copies import copied

_CAPTURING = threading.Lock()
"""torch.export keeps what it is doing in places that all threads share."""
TORCH = str(Path(torch.__file__).parent)
STANDARD = str(Path(io.__file__).parent)
OURS = str(Path(__file__).parent)


@dataclass(frozen=True)
class Example:
    """Inputs that a network is captured with: any number, each a tensor or a tree of tensors.

    Attributes:
        args: positional inputs of ``forward``.
        kwargs: inputs by keyword.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def images(input_size: Sequence[int], count: int = 2, seed: int = 0) -> Example:
        """Return random images, (count, C, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        return Example((torch.randn(count, *input_size, generator=generator),))

    @staticmethod
    def of(inputs: Any) -> Example:
        """Return inputs as people write them: a tensor, arguments as a tuple, keywords as a dict.

        Anything else, such as a list of images, is the one argument of ``forward``.

        Raises:
            UsageError: there is no tensor in it.
        """
        if isinstance(inputs, Example):
            example = inputs
        elif isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
            example = Example((), dict(inputs))
        else:
            example = Example(inputs if isinstance(inputs, tuple) else (inputs,))
        if not example.tensors:
            raise UsageError(
                f"the example ({type(inputs).__name__}) holds no tensor: give what forward "
                "takes, a tensor, a tuple of arguments or a dictionary of keywords"
            )
        return example

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    @property
    def batch(self) -> int:
        """Rows of the first input, by which costs are divided."""
        first = next((t for t in self.tensors if t.dim()), None)
        return 1 if first is None else max(1, len(first))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Example:
        """Return inputs with a function of every tensor in its place."""

        def mapped(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = pytree.tree_map(mapped, (self.args, dict(self.kwargs)))
        return Example(args, kwargs)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Example:
        """Return copies on a device; of another precision where they are floating."""
        return self.map(
            lambda tensor: tensor.detach().to(
                device, dtype if tensor.is_floating_point() else None, copy=True
            )
        )

    def beside(self, model: nn.Module) -> Example:
        """Return copies where a network lies, as precise as it is."""
        tensors = [*model.parameters(), *model.buffers()]
        floating = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        return self.to(tensors[0].device if tensors else torch.device("cpu"), floating)

    def row(self) -> Example:
        """Return the first row of every input, where all have as many."""
        return self.first(1)

    def first(self, count: int) -> Example:
        """Return the first rows of every input, where all have as many."""
        return self.map(lambda tensor: tensor[:count]) if self._in_rows else self

    def pair(self) -> Example:
        """Return two rows, the second mirrored, where every input has one: BatchNorm wants two."""
        if not self._in_rows or self.batch > 1:
            return self
        return self.map(lambda tensor: torch.cat([tensor, tensor.flip(-1)]))

    @property
    def _in_rows(self) -> bool:
        return {len(t) if t.dim() else 0 for t in self.tensors} == {self.batch}

    def __str__(self) -> str:
        return " and ".join("x".join(map(str, t.shape)) for t in self.tensors) or "no tensors"


@dataclass(frozen=True)
class Captured:
    """A captured network.

    Attributes:
        graph: ATen operators; every node's ``meta["val"]`` tells shape and precision.
        named: the qualified name of the parameter or buffer that a placeholder stands for.
        inputs: placeholders of the example's tensors, in order.
        outputs: the tensors that the network returns.
        batch: rows of the example.
    """

    graph: fx.Graph
    named: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, torch.Tensor]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    batch: int


@torch.no_grad()
def capture(model: nn.Module, example: Example, *, training: bool = False) -> Captured:
    """Capture what a network computes in evaluation mode.

    Nothing in the network changes; no value is computed.

    Args:
        model: the network.
        example: inputs that it accepts; they are moved to its device and precision.
        training: capture training mode instead.

    Raises:
        ModelError: it does not accept such inputs, or does what no graph can hold, for instance
            take a decision by a value; the message names the place in its source.
    """
    _require_shapes(model)
    example = example.beside(model)
    whole = _Whole(copied(model).train(training))  # forward, and train too, may change the network
    with _CAPTURING, _quiet():
        try:
            exported = torch.export.export(whole, example.args, dict(example.kwargs), strict=False)
        except Exception as error:  # the user's forward may raise anything
            raise ModelError(_refusal(model, example, error)) from error
    _inline_(exported.graph)
    _require_sizes(model, exported.graph)
    signature = exported.graph_signature
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    named: dict[fx.Node, str] = {}
    constants: dict[fx.Node, torch.Tensor] = {}
    inputs: list[fx.Node] = []
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind.name in ("PARAMETER", "BUFFER"):
            named[node] = inner_name(str(spec.target))
        elif spec.kind.name == "USER_INPUT":
            inputs.append(node)
        elif spec.kind.name == "CONSTANT_TENSOR":
            constants[node] = exported.constants[str(spec.target)]
    results = exported.graph.output_node().args[0]
    outputs = [
        node
        for node, spec in zip(results, signature.output_specs, strict=True)
        if spec.kind.name == "USER_OUTPUT" and isinstance(node, fx.Node)
    ]
    return Captured(exported.graph, named, constants, tuple(inputs), tuple(outputs), example.batch)


def _inline_(graph: fx.Graph) -> None:
    """Put the operators of a region, as that of an autocast, in place of the region's call."""
    while region := next(filter(_is_region, graph.nodes), None):
        arguments = iter(region.args)
        attribute = next(a for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(graph.owning_module, str(attribute.target)).graph
        given = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
        with graph.inserting_before(region):
            results: Any = graph.graph_copy(inner, given)
        for user in list(region.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(region)


def _is_region(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name in ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def _require_shapes(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{type(model).__name__} has a lazy module, so {name} has no shape yet: run the "
                "network once on an input before it is pruned"
            )


def _require_sizes(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        leaves = pytree.tree_leaves(node.meta.get("val"))
        sizes = [n for leaf in leaves if isinstance(leaf, torch.Tensor) for n in leaf.shape]
        if not all(isinstance(size, int) for size in sizes):
            raise ModelError(
                f"{type(model).__name__} cannot be captured: the shape of a tensor depends on the "
                f"values of another at {source_of(node)}"
            )


class _Whole(nn.Module):
    """A network whose outputs are tensors in a tuple, whatever type holds them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Inputs of the network."""
        return tuple(tensors_of(self.network(*args, **kwargs)))


def inner_name(name: str) -> str:
    """Return the name that a tensor or module of ``_Whole`` has in the network."""
    return name.removeprefix("network").removeprefix(".")


def module_of(node: fx.Node) -> str:
    """Return the innermost module whose forward calls an operator, by its qualified name."""
    stack = node.meta.get("nn_module_stack") or {}
    path: str = next(reversed(stack.values()), ("",))[0] if stack else ""
    return inner_name(path)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return all tensors of what a network returns: a tensor, or a tree of them.

    The tree may hold lists, tuples, mappings and dataclasses of any kind.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give every module back what it held: forward may have kept a tensor of the capture."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, held in before:
            for name in vars(module).keys() - held.keys():
                del vars(module)[name]
            vars(module).update(held)


@contextmanager
def in_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put a network into evaluation mode, or training mode, and every module back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)  # which a network may have its own word in
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)  # what it did for the other mode, it may have to undo
        for module, mode in modes:
            module.training = mode


def source_of(node: fx.Node) -> str:
    """Return the place in the user's own source where an operator was called."""
    places = re.findall(
        r'File "(.+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or ""
    )
    own = [place for place in places if _is_own(place[0])]
    if not own:
        return node.name
    file, line, text = own[-1]
    return f"{Path(file).name}:{line}: {text.strip()}"


def place_of(error: BaseException) -> str | None:
    """Return the innermost line of the user's own source that an exception passed, or None."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_own(frame.filename) and frame.line:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line.strip()}"
    return None


def _is_own(file: str) -> bool:
    """Whether a file is neither torch's, nor Python's own, nor one of compress.networks."""
    standard = file.startswith(STANDARD) and "-packages" not in file
    return not (standard or file.startswith((TORCH, OURS, "<")))


def _refusal(model: nn.Module, example: Example, error: Exception) -> str:
    name, place = type(model).__name__, place_of(error)
    where = f" at {place}" if place else ""
    if type(error).__name__.startswith("GuardOnDataDependent") or "data-dependent" in str(error):
        return f"{name} cannot be captured: it takes a decision by the value of a tensor{where}"
    return (
        f"{name} cannot be captured with inputs of {example}: "
        f"{type(error).__name__}: {first_sentence(error)}{where}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from telling users about its own inner workings."""
    level, unseen = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(unseen), redirect_stderr(unseen):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
