"""The graph of a network (torch.fx) and the shape of every value in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torchvision.ops import FrozenBatchNorm2d

from compress.errors import ModelError
from compress.models import ChannelPad


class Tracer(fx.Tracer):
    """torch.fx's tracer, with this project's and torchvision's channelwise layers as leaves."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is analysed as one operation."""
        return isinstance(module, ChannelPad | FrozenBatchNorm2d) or super().is_leaf_module(
            module, qualified_name
        )


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a network; the result shares its modules and parameters.

    Raises:
        ModelError: torch.fx cannot follow it, for instance past data-dependent control flow.
    """
    try:
        return fx.GraphModule(model, Tracer().trace(model))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot be traced by torch.fx: {_first_line(error)}"
        ) from error


def infer_shapes(traced: fx.GraphModule, input_size: Sequence[int]) -> dict[fx.Node, torch.Size]:
    """Return the shape of every tensor in the graph for a batch of two images.

    Runs on the meta device: no memory, no arithmetic, and nothing in the network changes.

    Raises:
        ModelError: the network does not accept images of ``input_size``, (C, H, W).
    """
    interpreter = _Shapes(traced)
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


class _Shapes(fx.Interpreter):
    """Runs the graph on the meta device: shapes without memory or arithmetic."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, torch.Size] = {}

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
