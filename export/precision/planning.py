"""Where a network rounds while it is trained for 8 bits: where its exported file will.

The places are decided on the ONNX graph, behind folding and simplification, and training runs the
torch module. What the two call the same tensor is found by its numbers: both compute one example,
and a tensor of the graph is the result in torch that has the same shape and values. So no rule
about placement is written twice, and whatever the exporter does to names is of no consequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import ModelError
from compress.quantization.calls import Run, Value, watch
from compress.quantization.network import folded, norm_of
from compress.quantization.plan import Activation, Call, Layer, Plan
from export.onnx.check import INPUT, standard_opset
from export.precision.fp16 import activations
from export.precision.int8 import rest_for
from export.precision.placement import (
    FORMS,
    never_negative,
    quantised_layers,
    quantised_places,
    rounded_at_once,
)

if TYPE_CHECKING:
    import onnx

    from compress.networks.capture import Example

SAME = 1e-4
"""Difference of two tensors over their largest magnitude, up to which they are one."""
LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""The operators of torch whose weights can be rounded."""
NORM = "batch_norm"


@dataclass(frozen=True)
class Planned:
    """A plan, and what its activations were on the example."""

    plan: Plan
    values: Mapping[str, np.ndarray]
    """By name."""


def plan_rounding(
    network: nn.Module,
    proto: onnx.ModelProto,
    example: Example,
    *,
    form: str,
    names: Sequence[str] = (INPUT,),
) -> Planned:
    """Find the operators of a network that read what its 8-bit file rounds.

    Args:
        network: on the CPU, in float32.
        proto: its float32 ONNX graph, as ``onnx_from_call`` returns it.
        example: inputs of which tensors must not look alike: noise or real images, and not zeros.
        form: name of the form in which the file will be quantised.
        names: of the example's tensors in the graph, which may lack some.

    Raises:
        ModelError: a tensor or layer that the file rounds is none of the network's own, or cannot
            be told from another.
    """
    return _Planning(network, proto, example, form, names).run()


class _Planning:
    def __init__(
        self,
        network: nn.Module,
        proto: onnx.ModelProto,
        example: Example,
        form: str,
        names: Sequence[str],
    ) -> None:
        self._network, self._form_name = network, form
        self._graph, self._form = proto.graph, FORMS[form]
        self._half = rest_for(self._form, standard_opset(proto)) == "fp16"
        self._places = quantised_places(proto, self._form)
        self._layers = quantised_layers(proto.graph, self._form)
        self._torch = watch(network, example)
        arrays = [tensor.detach().numpy() for tensor in example.tensors]
        self._values = _computed(proto, dict(zip(names, arrays, strict=True)))
        self._same = _matched(self._values, self._torch)
        self._numbers: dict[str, int] = {}

    def run(self) -> Planned:
        names = list(
            dict.fromkeys(
                node.input[place]
                for index, node in enumerate(self._graph.node)
                for place in self._places[index]
            )
        )
        self._numbers = {name: number for number, name in enumerate(names)}
        positive = never_negative(self._graph) if self._form.unsigned else frozenset[str]()
        layers = self._planned_layers()
        reads = self._planned_reads(names, layers)
        norms = {norm for _, norm in layers.values() if norm is not None}
        calls = {
            number: Call(
                self._torch.calls[number].operator,
                reads.get(number, {}),
                layers[number][0] if number in layers else None,
                folded=number in norms,
            )
            for number in sorted({*reads, *layers, *norms})
        }
        plan = Plan(
            self._form_name,
            self._form.weight_levels,
            self._half,
            tuple(Activation(name, name in positive) for name in names),
            calls,
            len(self._torch.calls),
        )
        return Planned(plan, {name: self._values[name] for name in names})

    def _planned_layers(self) -> dict[int, tuple[Layer, int | None]]:
        """Return the layers by the numbers of their calls, with that of a BatchNorm behind one."""
        wide = rounded_at_once(self._graph, self._places, self._layers) if self._half else set()
        inputs: dict[str, list[int]] = {}
        for index in self._layers:
            node = self._graph.node[index]
            inputs.setdefault(node.input[1], []).append(self._numbers[node.input[0]])
        found: dict[int, tuple[Layer, int | None]] = {}
        for index in self._layers:
            node = self._graph.node[index]
            half = self._half and node.output[0] not in wide
            for number, norm in self._layers_behind(node).items():
                layer = Layer(tuple(inputs[node.input[1]]), self._norm_name(norm), half)
                self._require_same_weight(node, number, layer.norm)
                found[number] = layer, norm
        return found

    def _layers_behind(self, node: onnx.NodeProto) -> dict[int, int | None]:
        """Return the call of a layer, and that of the BatchNorm whose result is the node's.

        There are several where the network computes the same more than once: its file does not.
        """
        found: dict[int, int | None] = {}
        for number, part in self._same.get(node.output[0], ()):
            call = self._torch.calls[number] if number >= 0 else None
            if call is None or part:
                continue
            before = call.reads.get(0, (-1, 0))[0]
            if call.operator in LAYERS:
                found[number] = None
            elif call.operator == NORM and self._torch.calls[before].operator in LAYERS:
                found[before] = number
        if found:
            return found
        raise ModelError(
            f"{self._title} cannot be trained in 8 bits: no layer of it, with or without a "
            f"BatchNorm behind it, computes what {node.name or node.output[0]!r} of its file does"
        )

    def _norm_name(self, number: int | None) -> str | None:
        if number is None:
            return None
        held = {id(argument) for argument in self._torch.calls[number].arguments}
        for name, module in self._network.named_modules():
            if isinstance(module, _BatchNorm) and id(module.running_var) in held:
                return name
        raise ModelError(
            f"{self._title} cannot be trained in 8 bits: the statistics of a BatchNorm behind a "
            "layer belong to none of its modules"
        )

    def _require_same_weight(self, node: onnx.NodeProto, number: int, norm: str | None) -> None:
        """Compare a layer's weight with the file's: it may hold more than a BatchNorm."""
        from onnx import numpy_helper

        call = self._torch.calls[number]
        tensors = [a for a in call.arguments[:3] if isinstance(a, torch.Tensor)]
        weight, bias = tensors[1].detach(), tensors[2].detach() if len(tensors) > 2 else None
        if norm is not None:
            with torch.no_grad():
                weight, _ = folded(norm_of(self._network, norm), weight, bias)
        held = {tensor.name: tensor for tensor in self._graph.initializer}[node.input[1]]
        written = numpy_helper.to_array(held)
        ours = weight.numpy()
        if written.shape != ours.shape:  # of a Gemm that does not transpose
            written = written.T
        if not _alike(written, ours):
            raise ModelError(
                f"{self._title} cannot be trained in 8 bits: the weight of "
                f"{node.name or node.output[0]!r} in its file is not that of the layer"
            )

    def _planned_reads(
        self, names: Sequence[str], layers: Mapping[int, tuple[Layer, int | None]]
    ) -> dict[int, dict[int, int]]:
        """Return, for each call, which of its arguments are which activation."""
        readers: dict[Value, list[tuple[int, int]]] = {}
        for number, call in enumerate(self._torch.calls):
            for place, value in call.reads.items():
                readers.setdefault(value, []).append((number, place))
        folded_norms = {norm for _, norm in layers.values()}
        reads: dict[int, dict[int, int]] = {}
        for name in names:
            values = self._same.get(name, ())
            if not values:
                raise ModelError(
                    f"{self._title} cannot be trained in 8 bits: its file rounds {name!r}, which "
                    "is no tensor of the network, or looks like another"
                )
            apart = self._read_as_it_is(name)
            for value in values:
                for number, place in readers.get(value, ()):
                    if number not in folded_norms and number not in apart:
                        reads.setdefault(number, {})[place] = self._numbers[name]
        return reads

    def _read_as_it_is(self, name: str) -> frozenset[int]:
        """Return the calls that read an activation without rounding."""
        nodes = enumerate(self._graph.node)
        apart = [
            node
            for index, node in nodes
            for place, read in enumerate(node.input)
            if read == name and place not in self._places[index]
        ]
        return frozenset(
            number for node in apart for out in node.output for number, _ in self._same.get(out, ())
        )

    @property
    def _title(self) -> str:
        return type(self._network).__name__


def _computed(proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every float32 tensor of a graph, in the order of its nodes."""
    import onnx

    from export.runners.onnx_runner import import_onnxruntime

    onnxruntime = import_onnxruntime()
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    names = [*activations(proto)]
    ends = {value.name for value in shown.graph.output}
    shown.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in ends
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    fed = {value.name: inputs[value.name] for value in proto.graph.input}
    results = session.run(names, fed)
    return {**fed, **dict(zip(names, results, strict=True))}


def _matched(values: Mapping[str, np.ndarray], run: Run) -> dict[str, tuple[Value, ...]]:
    """Return, for each tensor of a graph, the values of torch that it is.

    Several may be one: torch keeps what changes nothing, such as dropout. Where several tensors of
    the graph look alike too (a branch that adds zeros), they are told apart by their order, if
    there are as many of them on both sides, and by nothing if there are not.
    """
    arrays = {value: tensor.numpy() for value, tensor in run.values.items()}
    alike = {
        name: tuple(value for value, other in arrays.items() if _alike(array, other))
        for name, array in values.items()
    }
    groups: dict[tuple[Value, ...], list[str]] = {}
    for name, found in alike.items():
        groups.setdefault(found, []).append(name)
    matched: dict[str, tuple[Value, ...]] = {}
    for found, names in groups.items():
        if len(names) == 1:
            matched[names[0]] = found
        elif len(names) == len(found):
            matched.update((name, (value,)) for name, value in zip(names, found, strict=True))
    return matched


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape or second.dtype != np.float32:
        return False
    scale = max(float(np.abs(second).max(initial=0)), float(np.finfo(np.float32).tiny))
    return bool(np.abs(first - second).max(initial=0) <= SAME * scale)
