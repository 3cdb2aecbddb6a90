"""The graph of a network (torch.fx), the operations in it, and the shape of every value."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from compress.distributed.batchnorm import JoinedBatchNorm
from compress.errors import ModelError
from compress.networks.architectures import ChannelPad, FitTo

Shapes = dict[fx.Node, torch.Size]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FrozenBatchNorm2d)
ELEMENTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold),
)
POOLING_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d),
    *(nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool2d, nn.Upsample, nn.ZeroPad2d),
    *(nn.ReflectionPad2d, nn.ReplicationPad2d),
)
ELEMENTWISE_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh", "hardsigmoid", "hardswish"),
    *("abs", "neg", "exp", "sqrt", "square", "clamp", "clamp_"),
    *("dropout", "dropout2d", "dropout3d", "contiguous", "clone", "detach"),
    *("float", "half", "double", "type", "to"),
}
POOLING_NAMES = {
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"),
}
ADDITIONS = {"add", "add_", "iadd"}
BINARY_NAMES = {
    *ADDITIONS,
    *("sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv"),
    *("maximum", "minimum"),
}
RESHAPES = {"flatten", "view", "reshape", "squeeze"}
SHAPE_QUERIES = {"size", "dim", "ndimension", "numel", "getattr"}
"""What may be asked of a tensor without reading its channels; their answers are no tensors."""


class Tracer(fx.Tracer):
    """torch.fx's tracer, with this project's and torchvision's channelwise layers as leaves."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is analysed as one operation."""
        own = isinstance(module, ChannelPad | FitTo | FrozenBatchNorm2d | JoinedBatchNorm)
        return own or super().is_leaf_module(module, qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a network; the result shares its modules and parameters.

    Raises:
        ModelError: torch.fx cannot follow it, for instance past data-dependent control flow.
    """
    before = set(vars(model))
    try:
        return fx.GraphModule(model, Tracer().trace(model))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be traced by torch.fx: {_first_line(error)}"
        ) from error
    finally:
        for constant in set(vars(model)) - before:  # torch.fx leaves tensors of forward behind
            delattr(model, constant)


def infer_shapes(traced: fx.GraphModule, input_size: Sequence[int]) -> Shapes:
    """Return the shape of every tensor in the graph for a batch of two images.

    Runs on the meta device: no memory, no arithmetic, and nothing in the network changes.

    Raises:
        ModelError: the network does not accept images of ``input_size``, (C, H, W).
    """
    interpreter = _ShapeInterpreter(traced)
    image = torch.empty(2, *input_size, device="meta")
    try:
        with torch.no_grad():
            interpreter.run(image)
    except Exception as error:  # shapes are checked by every operation in its own way
        raise ModelError(
            f"the network does not accept images of size {'x'.join(map(str, input_size))}: "
            f"{_first_line(error)}"
        ) from error
    return interpreter.shapes


def operation(node: fx.Node) -> str:
    """Return the name of what a node calls: of a module, a method or a function."""
    if node.op in ("call_method", "call_module"):
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "__name__", str(node.target))


def opaque_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules whose tensors are not their own to cut.

    They share a parameter with another module, or compute a tensor from others before each call
    (parametrizations, and the older hooks of torch.nn.utils).
    """
    holders: dict[int, set[nn.Module]] = defaultdict(set)
    opaque = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].add(module)
        computed = any(isinstance(value, torch.Tensor) for value in vars(module).values())
        if computed or parametrize.is_parametrized(module):
            opaque.add(module)
    return opaque.union(*(found for found in holders.values() if len(found) > 1))


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph on the meta device: shapes without memory or arithmetic."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = result.shape
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _on_meta(value) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        on_meta = {name: _on_meta(tensor) for name, tensor in tensors.items()}
        training = module.training
        module.training = False
        try:
            return functional_call(module, on_meta, args, kwargs)
        finally:
            module.training = training


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's shape without its memory, in the precision of the probing image."""
    on_meta = tensor.detach().to("meta")
    return on_meta.float() if on_meta.is_floating_point() else on_meta


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
