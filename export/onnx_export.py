"""ONNX from a torch network, for a named target.

The TorchScript exporter is used on purpose: up to opset 17 it writes IR 8, GlobalAveragePool where
the newer exporter writes a two-input ReduceMean that TensorRT 8 misreads, and one single file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError, writing
from compress.files import staged, write_flushed
from export.adaptive_pool import exportable_pools
from export.onnx_check import INPUT, OUTPUT, OnnxFacts, first_line, inspect_onnx
from export.onnx_fold import fold_constants

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from compress.config.targets import Target

NEWEST_OPSET = 20
"""The newest opset that torch's TorchScript exporter writes; a target's ceiling may be higher."""
_TRACED_BATCH = 2  # at 1 an exporter may take the batch for a dimension to squeeze away


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    target: Target,
    input_size: tuple[int, int, int],
    metadata: Mapping[str, str],
) -> OnnxFacts:
    """Write a network as float32 ONNX in evaluation mode and verify the written file.

    Args:
        model: the network; its mode and that of every submodule are put back.
        path: the file; it is written whole or not at all.
        target: whose ceilings the file must respect.
        input_size: (C, H, W) of one image.
        metadata: stored in the file's ``metadata_props``.

    Raises:
        ModelError: the network cannot be traced, or not expressed for the target.
        OutputError: the file cannot be written.
    """
    proto = onnx_from_network(model, target=target, input_size=input_size)
    with staged_onnx(proto, path, target=target, metadata=metadata) as facts:
        return replace(facts, path=path)


def onnx_from_network(
    model: nn.Module, *, target: Target, input_size: tuple[int, int, int]
) -> onnx.ModelProto:
    """Return a network as float32 ONNX in evaluation mode, in memory.

    The graph reads ``input``, float32 of shape (batch, C, H, W), and returns ``logits``, float32
    of shape (batch, classes); the batch is symbolic and BatchNorm is folded into convolutions.

    Raises:
        ModelError: the network cannot be traced, or not with the target's opset.
    """
    import onnx

    proto = onnx.load_model_from_string(_trace(model, target=target, input_size=input_size))
    fold_constants(proto)
    _lower_ir_version(proto, target.ir_version)
    return proto


@contextmanager
def staged_onnx(
    proto: onnx.ModelProto, path: Path, *, target: Target, metadata: Mapping[str, str]
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
        yield inspect_onnx(temporary, target=target)


def _trace(model: nn.Module, *, target: Target, input_size: tuple[int, int, int]) -> bytes:
    import torch

    from compress.networks.capture import in_mode

    weight = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_TRACED_BATCH, *input_size, generator=generator).to(weight.device)
    stream = io.BytesIO()
    try:
        with in_mode(model), exportable_pools(), _quiet_exporter():
            torch.onnx.export(
                model,
                (images,),
                stream,  # type: ignore[arg-type]  # documented for the TorchScript exporter only
                dynamo=False,
                opset_version=min(target.opset, NEWEST_OPSET),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            )
    except RuntimeError as error:  # the base of every error of the exporter and of the tracer
        raise ModelError(
            f"this network cannot be expressed for target {target.name}: {first_line(error)}"
        ) from error
    return stream.getvalue()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide notes that no user can act on, and keep its dumps of a failed graph off stdout."""
    import torch

    torch._C._jit_set_onnx_log_output_stream("stderr")  # torch has no public switch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # It folds no strided slice, says so for each, and fold_constants does it afterwards.
            warnings.filterwarnings("ignore", "Constant folding", UserWarning)
            yield
    finally:
        torch._C._jit_set_onnx_log_output_stream("stdout")


def _lower_ir_version(model: onnx.ModelProto, ceiling: int) -> None:
    """Claim an older file format where the model's opsets need no newer one."""
    import onnx

    needed = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    if needed <= ceiling < model.ir_version:
        model.ir_version = ceiling
