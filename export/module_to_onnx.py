"""Any network as an ONNX file, for users whose networks and training loops are their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import Int8Limits, ParityLimits
from compress.config.targets import load_target
from compress.errors import CheckpointError, ConfigError, ModelError, first_line
from export.onnx.check import standard_opset
from export.onnx.signature import BATCH, Call, Shape, Signature, checked_names, named_tensors
from export.onnx.signature import output_names as names_of_outputs
from export.onnx.trace import TRACED_BATCH, onnx_from_call, staged_onnx
from export.runners import OnnxRunner
from export.verify import largest_error

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from torch import nn

    from compress.config.targets import Target
    from compress.quantization.plan import Plan

COMPARED_BATCHES = (1, 3)
"""Batch sizes of the proof; neither is that of the trace."""
Outputs = list["torch.Tensor"]


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote."""

    path: Path
    """The file."""
    sha256: str
    """Its digest, in hexadecimal."""
    bytes: int
    """Its size."""
    opset: int
    """Version of the standard operator set that it imports."""
    inputs: Mapping[str, Shape]
    """Shape of each input by its name; a dimension of any length has a name itself."""
    outputs: Mapping[str, Shape]
    """Shape of each output by its name."""
    relative_error: float | None
    """Largest difference from torch over the largest magnitude of an output, the worst output;
    None where parity was not asked for."""


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Any,
    target: str = "cpu",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    parity: bool = True,
) -> OnnxExport:
    """Write a network as ONNX, in evaluation mode, whole or not at all.

    It is float32, but for a network of ``quantized``, which is written in 8 bits with the scales
    that it was trained with. BatchNorm is folded into the convolution before it, constants are
    computed, the file is what the target reads, and ONNX Runtime computes on the CPU what torch
    computes. An input that the network does not use is left out of the file.

    Args:
        model: any network; it is as it was afterwards, its modes too. Wrappers
            (``torch.compile``, ``DistributedDataParallel``) are taken off.
        path: the file, ``*.onnx``.
        example: what ``forward`` is given: a tensor, a tuple of arguments, a dictionary of
            arguments by keyword, or an ``Example`` of both.
        target: name or path of a deployment target; its opset and IR version bound the file's.
        input_names: one for each tensor of the example; by default those of the arguments of
            ``forward``, with a path inside one, as ``batch.image``.
        output_names: one for each tensor that the network returns; by default ``output`` for one
            alone, the keys of a dictionary, the fields of a named tuple or a dataclass, and
            ``output.0``, ``output.1`` otherwise.
        dynamic_batch: let the first dimension of every input, the batch, have any length.
        parity: prove each output against torch, at two batch sizes where the batch is dynamic.

    Raises:
        ModelError: the network does not take the example, decides by values, or cannot be
            expressed for the target.
        ParityError: ONNX Runtime computes something else.
        ConfigError: a name, the path or the target is none.
        UsageError: the example holds no tensor.
        OutputError: the file cannot be written; an earlier one is kept.
    """
    from compress.quantization.network import QuantizedNetwork

    path, aim = Path(path), load_target(target)
    if path.suffix != ".onnx":
        raise ConfigError(f"an ONNX file is named *.onnx, not {path.name!r}")
    traced = traced_call(
        *(model, example, aim),
        input_names=input_names,
        output_names=output_names,
        dynamic_batch=dynamic_batch,
    )
    proto, signature, limit = traced.proto, traced.signature, ParityLimits().relative_error
    if isinstance(traced.network, QuantizedNetwork):
        ranges = {traced.renamed.get(n, n): r for n, r in traced.network.ranges.items()}
        _quantise(proto, traced.network.plan, ranges, aim)
        limit = Int8Limits().relative_error
    with staged_onnx(proto, path, target=aim, metadata={}, signature=signature) as facts:
        error = None
        if parity:
            sizes = [len(tensors[0]) if tensors[0].dim() else 1 for tensors in traced.batches]
            found = _in_onnx_runtime(facts.path, traced.inputs, traced.batches)
            expected = list(map(_arrays, traced.expected))
            error = largest_error(traced.outputs, expected, found, sizes, limit)
    return OnnxExport(
        *(path, facts.sha256, facts.bytes, facts.opset),
        *(dict(signature.inputs), dict(signature.outputs), error),
    )


@dataclass(frozen=True)
class TracedCall:
    """A network as a graph, and what it computed."""

    network: nn.Module
    """On the CPU; what rounds around it too."""
    proto: onnx.ModelProto
    """In float32."""
    signature: Signature
    """Of the graph."""
    inputs: tuple[str, ...]
    """Names of the example's tensors."""
    outputs: tuple[str, ...]
    """Names of what is returned."""
    renamed: Mapping[str, str]
    """Names of both by those that they have where nobody gives one."""
    call: Call
    """How the network is called, with the example."""
    batches: list[Outputs]
    """Inputs."""
    expected: list[Outputs]
    """What is returned for each of them."""


def traced_call(
    model: nn.Module,
    example: Any,
    aim: Target,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
) -> TracedCall:
    """Trace a network, without what rounds around it; the arguments are those of ``export_onnx``.

    Raises:
        ModelError, ConfigError, UsageError: see ``export_onnx``.
    """
    from compress.networks.capture import Example, in_mode, unchanged
    from compress.networks.wrappers import unwrapped
    from compress.quantization.network import QuantizedNetwork

    network = _in_float32(unwrapped(model))
    rounds = isinstance(network, QuantizedNetwork)
    inner = network.network if isinstance(network, QuantizedNetwork) else network
    aim.require("int8" if rounds else "fp32")
    call = Call(inner, Example.of(example).beside(network))
    with in_mode(network), unchanged(network):
        batches = _batches(call, COMPARED_BATCHES) if dynamic_batch else [call.tensors]
        traced = _batches(call, (TRACED_BATCH,))[0] if dynamic_batch else call.tensors
        *computed, _ = [_computed(network, call, tensors) for tensors in (*batches, traced)]
        paths = [place for place, _ in named_tensors(computed[0])]
        expected = [[tensor for _, tensor in named_tensors(output)] for output in computed]
        ins = checked_names("input", input_names, call.names)
        own = names_of_outputs(network, computed[0], taken=ins)
        outs = checked_names("output", output_names, own)
        _require_unlike(ins, outs)
        signature = Signature(_shapes(network, ins, batches), _shapes(network, outs, expected))
        proto = onnx_from_call(
            *(inner, call, traced), target=aim, signature=signature, returned=paths
        )
    return TracedCall(
        *(network, proto, _stated(proto, signature), tuple(ins), tuple(outs)),
        dict(zip((*call.names, *own), (*ins, *outs), strict=True)),
        *(call, batches, expected),
    )


def _quantise(proto: onnx.ModelProto, plan: Plan, ranges: Mapping[str, float], aim: Target) -> None:
    """Have a graph round as a network did in training, in place."""
    from export.precision.int8 import rest_for, to_int8
    from export.precision.placement import FORMS

    if plan.form != aim.int8_form:
        raise ConfigError(
            f"the network was trained in 8 bits of the form {plan.form}, and target "
            f"{aim.name} reads the form {aim.int8_form}: give that target to quantized, and train"
        )
    form = FORMS[aim.int8_form]
    to_int8(proto, ranges, rest=rest_for(form, standard_opset(proto)), form=form)


def _in_float32(model: nn.Module) -> nn.Module:
    """Return the network, or its copy on the CPU, where ONNX Runtime is asked for the same."""
    import torch
    from torch.nn.parameter import is_lazy

    from compress.networks.copies import copied

    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name} is scripted: export the network that it was scripted from")
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if is_lazy(tensor):
            raise ModelError(
                f"{name} has a lazy module, which has no weights yet: run the network once first"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(
                f"{name} holds numbers of {str(tensor.dtype).removeprefix('torch.')} and the file "
                "float32: export a copy of it, copy.deepcopy(model).float()"
            )
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return model
    return copied(model, "cpu")


def _batches(call: Call, sizes: Sequence[int]) -> list[Outputs]:
    """Return the example's tensors at other batch sizes.

    Raises:
        ConfigError: they do not share a first dimension.
    """
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in call.tensors}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(
            f"{name} of {_written(tensor.shape)}"
            for name, tensor in zip(call.names, call.tensors, strict=True)
        )
        raise ConfigError(
            f"the inputs have no batch in common ({shapes}): give each as many rows, or set "
            "dynamic_batch=False"
        )
    return [[_rows(tensor, size) for tensor in call.tensors] for size in sizes]


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return so many rows; those that come again are scaled, which keeps signs and zeros."""
    import torch

    number = torch.arange(count, device=tensor.device)
    rows = tensor[number % len(tensor)]
    if not tensor.is_floating_point():
        return rows
    scale = 1 / (1 + (number // len(tensor)) / 8)
    return rows * scale.to(tensor.dtype).view(-1, *(1,) * (tensor.dim() - 1))


def _computed(model: nn.Module, call: Call, tensors: Outputs) -> Any:
    """Return what the network returns for inputs.

    Raises:
        ModelError: it does not take the example, or not at this batch size.
    """
    try:
        return _returned(model, call, tensors)
    except Exception as error:  # the user's forward may raise anything
        size = None if tensors is call.tensors else len(tensors[0])
        raise ModelError(_refusal(model, call, error, size)) from error


def _returned(model: nn.Module, call: Call, tensors: Outputs) -> Any:
    import torch

    args, kwargs = call.arguments([tensor.clone() for tensor in tensors])
    with torch.no_grad():
        return model(*args, **kwargs)


def _in_onnx_runtime(
    path: Path, names: Sequence[str], batches: Sequence[Outputs]
) -> list[list[np.ndarray]]:
    """Return all outputs of an ONNX file for each batch of inputs.

    Raises:
        ModelError: ONNX Runtime cannot compute it.
    """
    try:
        with OnnxRunner(path) as runner:
            read = {spec.name for spec in runner.inputs or ()}
            fed = [
                {name: array for name, array in zip(names, arrays, strict=True) if name in read}
                for arrays in map(_arrays, batches)
            ]
            return [list(runner.run(feeds).values()) for feeds in fed]
    except CheckpointError as error:
        why = first_line(error.__cause__ or error)
        raise ModelError(f"ONNX Runtime cannot compute this network: {why}") from error


def _arrays(tensors: Outputs) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _refusal(model: nn.Module, call: Call, error: Exception, size: int | None) -> str:
    """Return what is wrong with an example, or with another batch size than its own."""
    from compress.networks.capture import place_of

    name, place = type(model).__name__, place_of(error)
    why = f"{type(error).__name__}: {first_line(error)}{f' at {place}' if place else ''}"
    if size is not None:
        try:
            _returned(model, call, call.tensors)
        except Exception:  # then it is not the batch size
            size = None
    if size is not None:
        return f"{name} does not compute a batch of {size} ({why}): set dynamic_batch=False"
    shapes = " and ".join(_written(tensor.shape) for tensor in call.tensors)
    return f"{name} does not accept inputs of {shapes}: {why}"


def _written(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "no dimensions"


def _shapes(model: nn.Module, names: Sequence[str], batches: Sequence[Outputs]) -> dict[str, Shape]:
    """Return shapes by name, in which what differs from batch to batch has a name itself.

    Raises:
        ModelError: not the lengths alone differ.
    """
    sizes, shapes = COMPARED_BATCHES, {}
    if {len(batch) for batch in batches} != {len(names)}:
        raise ModelError(_unlike(model))
    for i, name in enumerate(names):
        found = [tuple(batch[i].shape) for batch in batches]
        if len({len(shape) for shape in found}) != 1:
            raise ModelError(_unlike(model))
        shapes[name] = tuple(
            lengths[0]
            if len(set(lengths)) == 1
            else (BATCH if lengths == sizes else f"{name}_{dim}")
            for dim, lengths in enumerate(zip(*found, strict=True))
        )
    return shapes


def _unlike(model: nn.Module) -> str:
    one, other = COMPARED_BATCHES
    return (
        f"{type(model).__name__} returns tensors of other dimensions for a batch of {one} than for "
        f"one of {other}: set dynamic_batch=False"
    )


def _require_unlike(ins: Sequence[str], outs: Sequence[str]) -> None:
    names = [*ins, *outs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{name!r} names more than one input or output: give input_names or output_names"
            )


def _stated(proto: onnx.ModelProto, signature: Signature) -> Signature:
    """Write the shapes into a graph, in place; return its signature, without unused inputs."""
    from onnx import helper

    read = {value.name for value in proto.graph.input}
    found = Signature(
        {name: shape for name, shape in signature.inputs.items() if name in read},
        signature.outputs,
    )
    for value in proto.graph.output:
        if value.name in found.outputs:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(
                helper.make_tensor_value_info(value.name, kind, found.outputs[value.name])
            )
    return found
