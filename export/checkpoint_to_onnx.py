"""A checkpoint becomes an ONNX file that is proven to compute the same, and its sidecar.

``model.onnx`` and ``model.json`` appear together, after parity with torch, or not at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import ExportConfig
from compress.config.targets import Target
from compress.errors import CompressError, ConfigError, DataError, ParityError
from compress.files.atomic import write_json
from export.onnx.check import OnnxFacts, standard_opset
from export.onnx.sidecar import SCHEMA_VERSION, network_facts, pruning_facts
from export.onnx.trace import onnx_from_network, staged_onnx
from export.runners import OnnxRunner, TorchRunner
from export.verify import ParityResult, check_parity, judging

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn

    from compress.checkpoints.checkpoint import Checkpoint
    from compress.config import RunConfig
    from compress.data.batches import ImageData
    from compress.data.loading import Batch
    from compress.terminal.progress import Progress

log = logging.getLogger("compress")

LOOKED_AT = 4
"""Images by which the tensors of a file are found in torch."""
RUNTIMES_FAULT = (
    "without its optimisations it agrees, so what is wrong is not the file but how ONNX Runtime "
    "rewrites it"
)


@dataclass(frozen=True)
class Samples:
    """Real images, normalised as the network expects them."""

    validation: np.ndarray
    """(N, C, H, W) float32, for parity."""
    training: Callable[[], Iterable[Batch]]
    """Returns the batches anew from which the ranges of INT8 are measured; not augmented."""


def samples_of(data: ImageData, config: RunConfig) -> Samples:
    """Take images that lie evenly over a data set, so that every class has its part.

    Raises:
        DataError: not one validation image can be read.
    """
    import torch

    from compress.data.batches import require_images, spread_batches

    size, workers = config.data.eval_batch_size, config.data.workers
    found = list(spread_batches(data.val, config.export.parity_images, batch_size=size))
    images = torch.cat([batch.images for batch in found])
    require_images(len(images), sum(batch.skipped for batch in found), purpose="parity")

    def training() -> Iterable[Batch]:
        count = config.export.calibration_images
        return spread_batches(data.train, count, batch_size=min(size, 32), workers=workers)

    return Samples(images.numpy(), training)


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    target: Target,
    config: ExportConfig,
    samples: Samples,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a checkpoint for a target, prove it against torch and write both files.

    Parity is that of ONNX Runtime on the CPU with torch on the CPU in float32.

    Args:
        checkpoint: the network and what is known of it.
        path: the file, ``*.onnx``; its sidecar is ``*.json`` beside it.
        target: what the file must fit.
        config: precision, calibration and the limits of parity.
        samples: images for parity and for calibration.
        progress: told about the slow steps.

    Returns:
        The sidecar's document; docs/export.md describes it.

    Raises:
        ModelError: the network cannot be expressed for the target or in the precision.
        DataError: the images cannot calibrate, or are not of the network's shape.
        ParityError: ONNX Runtime computes something else.
        OutputError: a file cannot be written.
        ConfigError: ``path`` does not end in ``.onnx``.
    """
    if path.suffix != ".onnx":
        raise ConfigError(f"an ONNX file is named *.onnx, not {path.name!r}")
    tell = progress or (lambda step, share: None)
    network = {**network_facts(checkpoint), "target": target.name, "precision": config.precision}
    proto = onnx_from_network(checkpoint.model, target=target, input_size=checkpoint.input_size)
    conversion = _convert(proto, checkpoint, target, config=config, samples=samples, tell=tell)
    with staged_onnx(proto, path, target=target, metadata=_as_metadata(network)) as facts:
        tell("parity with torch", 0.0)
        with judging(path.name, config.precision):
            trained = conversion is not None and conversion.get("calibration") == "trained"
            reference = _rounding(checkpoint, target, samples) if trained else checkpoint.model
            parity = _prove(reference, facts, config=config, images=samples.validation)
        tell("parity with torch", 1.0)
        document = {
            "schema_version": SCHEMA_VERSION,
            "onnx": _file_facts(facts, path.name),
            **network,
            "macs": checkpoint.costs["macs"],
            "params": checkpoint.costs["params"],
            "conversion": conversion,
            "parity": [result.to_dict() for result in parity],
            **pruning_facts(checkpoint.description, checkpoint.structure),
            "tools": _tools(),
        }
        write_json(path.with_suffix(".json"), document)
    return document


def _convert(
    proto: onnx.ModelProto,
    checkpoint: Checkpoint,
    target: Target,
    *,
    config: ExportConfig,
    samples: Samples,
    tell: Progress,
) -> dict[str, Any] | None:
    """Bring a float32 graph to the precision asked for, in place; return how that was done."""
    if config.precision == "fp16":
        from export.precision.fp16 import to_fp16

        largest = _largest_activation(proto, samples, tell)
        return {"largest_activation": largest, **asdict(to_fp16(proto))}
    if config.precision == "int8":
        return _quantise(proto, checkpoint, target, config=config, samples=samples, tell=tell)
    return None


def _quantise(
    proto: onnx.ModelProto,
    checkpoint: Checkpoint,
    target: Target,
    *,
    config: ExportConfig,
    samples: Samples,
    tell: Progress,
) -> dict[str, Any]:
    from export.precision.int8 import rest_for, to_int8
    from export.precision.placement import FORMS

    form = FORMS[target.int8_form]
    ranges, images = trained_ranges(proto, checkpoint, target), 0
    method = "trained" if ranges else config.calibration
    if ranges is None:
        ranges, images = measured_ranges(
            *(proto, target, samples), config=config, num_classes=checkpoint.num_classes, tell=tell
        )
    rest = rest_for(form, standard_opset(proto))
    largest = _largest_activation(proto, samples, tell) if rest == "fp16" else None
    return {
        "calibration": method,
        "images": images,
        "largest_activation": largest,
        "form": target.int8_form,
        **asdict(to_int8(proto, ranges, rest=rest, form=form)),
    }


def measured_ranges(
    proto: onnx.ModelProto,
    target: Target,
    samples: Samples,
    *,
    config: ExportConfig,
    num_classes: int,
    tell: Progress = lambda step, share: None,
) -> tuple[dict[str, float], int]:
    """Measure the ranges of the activations that INT8 rounds; return them and how many images.

    Raises:
        DataError: there are too few images, or all are of one class.
    """
    from export.precision.calibration import calibrate, require_calibration
    from export.precision.int8 import quantised_tensors
    from export.precision.placement import FORMS

    labels = [int(label) for batch in samples.training() for label in batch.labels]
    require_calibration(labels, num_classes, config.calibration_images)
    ranges = calibrate(
        proto.SerializeToString(),
        quantised_tensors(proto, FORMS[target.int8_form]),
        lambda: (batch.images.numpy() for batch in samples.training()),
        method=config.calibration,
        images=len(labels),
        progress=lambda share: tell("calibrating", share),
    )
    return ranges, len(labels)


def trained_ranges(
    proto: onnx.ModelProto, checkpoint: Checkpoint, target: Target
) -> dict[str, float] | None:
    """Return the ranges that a network was trained with; None if it was not, or for another form.

    Those for another form are passed over with a warning.
    """
    from export.precision.int8 import quantised_tensors
    from export.precision.placement import FORMS

    trained = checkpoint.description.quantization
    if trained is None:
        return None
    form = target.int8_form
    if trained.form == form and set(trained.ranges) == set(quantised_tensors(proto, FORMS[form])):
        return dict(trained.ranges)
    log.warning(
        "the network was trained in 8 bits of the form %s, and the file for %s rounds other "
        "tensors, in the form %s: its ranges are measured",
        *(trained.form, target.name, form),
    )
    return None


def _largest_activation(proto: onnx.ModelProto, samples: Samples, tell: Progress) -> float:
    """Return the largest activation on the validation images, if half precision can hold it."""
    from export.precision.calibration import calibrate
    from export.precision.fp16 import activations, require_range

    images = samples.validation
    if not len(images):
        raise DataError("parity is checked on real images and none were given")
    largest = calibrate(
        proto.SerializeToString(),
        activations(proto),
        # All activations are held at once, so few images at a time.
        lambda: (images[start : start + 4] for start in range(0, len(images), 4)),
        method="max",
        images=len(images),
        progress=lambda share: tell("range of activations", share),
    )
    return require_range(largest)


def _as_metadata(values: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


def _file_facts(facts: OnnxFacts, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "sha256": facts.sha256,
        "bytes": facts.bytes,
        "opset": facts.opset,
        "ir_version": facts.ir_version,
    }


def _prove(
    network: nn.Module, facts: OnnxFacts, *, config: ExportConfig, images: np.ndarray
) -> list[ParityResult]:
    with TorchRunner(network, "cpu") as reference:

        def judged(*, optimised: bool) -> list[ParityResult]:
            with OnnxRunner(facts.path, optimised=optimised) as candidate:
                return check_parity(
                    reference,
                    candidate,
                    images,
                    batch_sizes=config.parity_batches,
                    limits=getattr(config.limits, config.precision),
                )

        try:
            return judged(optimised=True)
        except ParityError as error:
            try:
                judged(optimised=False)
            except CompressError:
                raise error from None
            raise ParityError(f"{error}; {RUNTIMES_FAULT}") from error


def _rounding(checkpoint: Checkpoint, target: Target, samples: Samples) -> nn.Module:
    """Return the network that rounds as it did in training."""
    import torch

    from compress.networks.capture import Example
    from compress.quantization.network import QuantizedNetwork
    from export.precision.planning import plan_rounding

    trained = checkpoint.description.quantization
    assert trained is not None
    size = checkpoint.input_size
    proto = onnx_from_network(checkpoint.model, target=target, input_size=size)
    images = Example((torch.from_numpy(samples.validation[:LOOKED_AT]),))
    plan = plan_rounding(checkpoint.model, proto, images, form=target.int8_form).plan
    return QuantizedNetwork(checkpoint.model, plan, trained.ranges).eval()


def _tools() -> dict[str, str]:
    import onnx
    import onnxruntime
    import torch

    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
