"""What FP16 and INT8 cost in accuracy, for the dense and the pruned network of a run.

    python benchmarks/int8_accuracy.py RUN [--data ROOT] [--images 512] [--json]
    python benchmarks/int8_accuracy.py --smoke

Every network is exported for the target of its run, in float32 (fp32), in half precision (fp16)
and with Q/DQ pairs (int8), in the form of that target, whose ranges are the largest magnitudes
(max) or those of the least squared rounding error (mse) on training images that lie evenly over
the training set; a network that was finetuned in 8 bits also has ranges of its own (trained). All
of them read the same batches of the whole validation set, in ONNX Runtime on the CPU, in one walk.
A drop is fp32 minus the other, in percentage points. The time of a calibration includes decoding.

ONNX Runtime has few float16 operators on the CPU and drops roundings between float32 ones, so the
fp16 row runs a float32 graph that rounds all weights and the result of every operator, as a GPU
does that sums in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from smoke import finished_run, parsed_with_run

from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.permission import Permission
from compress.config.targets import Target, load_target
from compress.data.batches import ImageData, eval_batches, spread_batches
from compress.errors import CompressError
from compress.runs.launch import existing
from compress.runs.request import Request
from export.checkpoint_to_onnx import trained_ranges
from export.onnx.check import INPUT
from export.onnx.trace import onnx_from_network
from export.precision.calibration import calibrate, require_calibration
from export.precision.fp16 import to_fp16
from export.precision.int8 import quantised_tensors, to_int8
from export.precision.placement import FORMS, Form
from export.runners import OnnxRunner

FLOAT = onnx.TensorProto.FLOAT


@dataclass
class Row:
    """One network in one number format."""

    network: str
    precision: str
    calibration_s: float | None
    """Seconds of the calibration; None where there is none."""
    right: int = 0
    images: int = 0

    @property
    def top1(self) -> float:
        """Share of images classified right, in percent."""
        return 100 * self.right / max(self.images, 1)


class Calibration:
    """The training images that ranges are measured on."""

    def __init__(self, data: ImageData, images: int, batch_size: int) -> None:
        self._data, self._images, self._batch_size = data, images, batch_size
        labels = [
            int(label)
            for batch in spread_batches(data.train, images, batch_size=batch_size)
            for label in batch.labels
        ]
        require_calibration(labels, data.num_classes, images)

    def batches(self) -> Iterator[np.ndarray]:
        """Return the images anew."""
        chosen = spread_batches(self._data.train, self._images, batch_size=self._batch_size)
        return (batch.images.numpy() for batch in chosen)

    def quantised(
        self, proto: onnx.ModelProto, form: Form, method: Literal["max", "mse"]
    ) -> tuple[onnx.ModelProto, float]:
        """Return the network with Q/DQ pairs, and the seconds of its calibration."""
        model, start = copied(proto), time.perf_counter()
        tensors = quantised_tensors(model, form)
        ranges = calibrate(model.SerializeToString(), tensors, self.batches, method=method)
        seconds = time.perf_counter() - start
        to_int8(model, ranges, form=form)
        return model, seconds


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def rounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 network that computes as its half-precision self does."""
    to_fp16(copied(proto))  # which refuses what half precision cannot hold
    types = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    floats = {value.name for value in types if value.type.tensor_type.elem_type == FLOAT}
    model = copied(proto)
    nodes: list[onnx.NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half.astype(np.float32), tensor.name))
    floats.add(INPUT)
    nodes.extend(rounding(INPUT))
    for node in model.graph.node:
        node.input[:] = [f"{name}/rounded" if name in floats else name for name in node.input]
        nodes.append(node)
        for name in floats & set(node.output):
            nodes.extend(rounding(name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def rounding(name: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Return what rounds a tensor to half precision and back."""
    return (
        helper.make_node("Cast", [name], [f"{name}/half"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{name}/half"], [f"{name}/rounded"], to=FLOAT),
    )


def variants(
    path: Path, permission: Permission, target: Target, calibration: Calibration
) -> Iterator[tuple[Row, onnx.ModelProto]]:
    """Yield a network in every number format."""
    checkpoint, form = load_checkpoint(path, permission), FORMS[target.int8_form]
    proto = onnx_from_network(checkpoint.model, target=target, input_size=checkpoint.input_size)
    yield Row(path.stem, "fp32", None), proto
    yield Row(path.stem, "fp16", None), rounded(proto)
    for method in ("max", "mse"):
        model, seconds = calibration.quantised(proto, form, method)
        yield Row(path.stem, f"int8({method})", seconds), model
    if ranges := trained_ranges(proto, checkpoint, target):
        model = copied(proto)
        to_int8(model, ranges, form=form)
        yield Row(path.stem, "int8(trained)", None), model


def measure(models: list[tuple[Row, onnx.ModelProto]], data: ImageData, batch_size: int) -> None:
    """Count in every row the images that its network classifies right."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runners = []
        for number, (row, model) in enumerate(models):
            path = Path(folder) / f"{number}.onnx"
            path.write_bytes(model.SerializeToString())
            runners.append((row, stack.enter_context(OnnxRunner(path))))
        for batch in eval_batches(data.val, batch_size=batch_size):
            if not len(batch.images):
                continue
            images, labels = batch.images.numpy(), batch.labels.numpy()
            for row, runner in runners:
                row.right += int((runner.infer(images).argmax(axis=1) == labels).sum())
                row.images += len(labels)


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"top-1 on {rows[0].images} validation images")
    for column in ("network", "precision", "top-1", "drop", "calibration"):
        shown.add_column(column, justify="left" if column in ("network", "precision") else "right")
    for row, drop in zip(rows, drops(rows), strict=True):
        seconds = "" if row.calibration_s is None else f"{row.calibration_s:.1f} s"
        fall = "" if row.precision == "fp32" else f"{drop:+.2f} pp"
        shown.add_row(row.network, row.precision, f"{row.top1:.2f} %", fall, seconds)
    return shown


def drops(rows: list[Row]) -> list[float]:
    """Return how far every row's accuracy lies below its network's in float32, in points."""
    full = {row.network: row.top1 for row in rows if row.precision == "fp32"}
    return [full[row.network] - row.top1 for row in rows]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--images", type=int, help="calibration images, default of the run")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parsed_with_run(parser, arguments, images=32)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with finished_run(options.run) as run:
        compare(run, options)


def compare(directory: Path, options: argparse.Namespace) -> None:
    """Measure both networks of a run and print the table."""
    run, config, data = existing(directory, Request(data=options.data))
    target, batch_size = load_target(config.export.target), config.data.eval_batch_size
    asked = options.images or config.export.calibration_images
    calibration = Calibration(data, asked, batch_size)
    models = [
        variant
        for path in (run.dense, run.pruned)
        for variant in variants(path, Permission(config.model), target, calibration)
    ]
    measure(models, data, batch_size)
    rows = [row for row, _ in models]
    if options.json:
        documents = [
            {**asdict(row), "top1": row.top1, "drop_pp": drop}
            for row, drop in zip(rows, drops(rows), strict=True)
        ]
        print(json.dumps(documents, indent=2))
    else:
        Console().print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(f"error: {error}")
