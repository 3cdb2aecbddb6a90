"""ONNX from a torch network, for a named target.

The TorchScript exporter is used on purpose: up to opset 17 it writes IR 8, GlobalAveragePool where
the newer exporter writes a two-input ReduceMean that TensorRT 8 misreads, and one single file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError, first_line, writing
from compress.files.atomic import staged, write_flushed
from export.onnx.adaptive_pool import exportable_pools
from export.onnx.check import CLASSIFIER, OnnxFacts, inspect_onnx
from export.onnx.signature import Call, Signature, named_tensors
from export.onnx.simplify import simplify

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

    from compress.config.targets import Target

NEWEST_OPSET = 20
"""The newest opset that torch's TorchScript exporter writes; a target's ceiling may be higher."""
TRACED_BATCH = 2  # at 1 an exporter may take the batch for a dimension to squeeze away


def onnx_from_network(
    model: nn.Module, *, target: Target, input_size: tuple[int, int, int]
) -> onnx.ModelProto:
    """Return a classifier as float32 ONNX in evaluation mode, in memory.

    The graph reads ``input``, float32 of shape (batch, C, H, W), and returns ``logits``, float32
    of shape (batch, classes); the batch is symbolic and BatchNorm is folded into convolutions.

    Raises:
        ModelError: the network cannot be traced, or not with the target's opset.
    """
    from compress.networks.capture import Example

    images = Example.images(input_size, count=TRACED_BATCH).beside(model)
    call = Call(model, images)
    return onnx_from_call(model, call, call.tensors, target=target, signature=CLASSIFIER)


def onnx_from_call(
    model: nn.Module,
    call: Call,
    inputs: Sequence[torch.Tensor],
    *,
    target: Target,
    signature: Signature,
    returned: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Return any network as ONNX in evaluation mode, in memory.

    Args:
        model: the network; it is as it was afterwards.
        call: how it is called.
        inputs: with what it is traced; a batch of 1 might be taken for a dimension to squeeze away.
        target: whose opset and IR version bound the file's.
        signature: the names of inputs and outputs, and the dimensions that are symbolic. An input
            that is not used is left out.
        returned: paths of the tensors that it returns, as ``named_tensors`` gives them; a number
            in its output would be traced as one more. By default whatever there is.

    Raises:
        ModelError: the network cannot be traced, takes a decision by a value, or cannot be
            expressed with the target's opset.
    """
    import onnx

    proto = onnx.load_model_from_string(
        _trace(model, call, inputs, returned, target=target, signature=signature)
    )
    _name_constant_outputs(proto.graph, list(signature.outputs))
    simplify(proto)
    _lower_ir_version(proto, target.ir_version)
    return proto


@contextmanager
def staged_onnx(
    proto: onnx.ModelProto,
    path: Path,
    *,
    target: Target,
    metadata: Mapping[str, str],
    signature: Signature = CLASSIFIER,
) -> Iterator[OnnxFacts]:
    """Write and verify a network; the file is renamed to ``path`` only if the block succeeds.

    The facts name the temporary file, for proofs that a final name should wait for.

    Raises:
        ModelError: the written file does not fit the target.
        OutputError: it cannot be written.
    """
    import onnx

    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    with staged(path) as temporary:
        with writing(path):
            write_flushed(temporary, proto.SerializeToString(deterministic=True))
        yield inspect_onnx(temporary, target=target, signature=signature)


def _trace(
    model: nn.Module,
    call: Call,
    inputs: Sequence[torch.Tensor],
    returned: Sequence[str] | None,
    *,
    target: Target,
    signature: Signature,
) -> bytes:
    import torch

    from compress.networks.capture import Example, capture, in_mode, unchanged

    stream = io.BytesIO()
    try:
        with in_mode(model), unchanged(model), exportable_pools(), _quiet_exporter() as said:
            torch.onnx.export(
                _flat(model, call, returned),
                tuple(inputs),
                stream,  # type: ignore[arg-type]  # documented for the TorchScript exporter only
                dynamo=False,
                opset_version=min(target.opset, NEWEST_OPSET),
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_axes=signature.dynamic_axes,
            )
    except (RuntimeError, AssertionError) as error:  # what the exporter and the tracer raise
        raise ModelError(
            f"this network cannot be expressed for target {target.name}: {first_line(error)}"
        ) from error
    tracer: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
    if any(issubclass(warning.category, tracer) for warning in said):
        capture(model, Example(*call.arguments(inputs)))  # which refuses what values decide
    for warning in said:
        if not issubclass(warning.category, tracer):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return stream.getvalue()


def _flat(model: nn.Module, call: Call, returned: Sequence[str] | None) -> nn.Module:
    """Return a module of the network's own tensors and children that maps tensors to tensors.

    It has them under the names that they have in the network, which are those of the ONNX file.
    """
    from torch import nn

    class Flat(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = call.arguments(tensors)
            found = dict(named_tensors(model(*args, **kwargs)))
            return tuple(found[path] for path in (found if returned is None else returned))

    flat = Flat().eval()
    for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(flat)[held] = vars(model)[held]
    return flat


@contextmanager
def _quiet_exporter() -> Iterator[list[warnings.WarningMessage]]:
    """Yield the warnings of the exporter but for those that no user can act on.

    Its dumps of a failed graph are kept off stdout.
    """
    import torch

    tracer: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
    torch._C._jit_set_onnx_log_output_stream("stderr")  # torch has no public switch
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", category=tracer, module=r"torch\.")  # of its own code
            # Weights that are standardised by batch_norm, which is no mode of the network.
            warnings.filterwarnings("ignore", "ONNX export mode is set to", UserWarning)
            # It folds no strided slice, says so for each, and fold_constants does it afterwards.
            warnings.filterwarnings("ignore", "Constant folding", UserWarning)
            yield said
    finally:
        torch._C._jit_set_onnx_log_output_stream("stdout")


def _name_constant_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Give outputs that the exporter folded into constants the names that were asked for."""
    import onnx

    constants = {tensor.name for tensor in graph.initializer}
    for value, name in zip(graph.output, names, strict=False):
        if value.name != name and value.name in constants:
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
            value.name = name


def _lower_ir_version(model: onnx.ModelProto, ceiling: int) -> None:
    """Claim an older file format where the model's opsets need no newer one."""
    import onnx

    needed = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    if needed <= ceiling < model.ir_version:
        model.ir_version = ceiling
