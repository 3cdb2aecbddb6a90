"""INT8 files of this project beside those of two quantisers, in two runtimes.

    python benchmarks/quantizers.py RUN [--data ROOT] [--images 512] [--rounds 200]
    python benchmarks/quantizers.py --smoke

The dense and the pruned network of a run are exported in FP32 and quantised with the same training
images: by this project in both of its forms, and by ``onnxruntime.quantization.quantize_static``
(Q/DQ, weights per channel) with signed and unsigned activations and two ways to find ranges, and by
OpenVINO's NNCF in both of its presets, with its fast and its full correction of biases, where it is
installed. All files read the whole validation set in ONNX Runtime, and in OpenVINO where it is
installed. Their times at batch 1 on one core are medians of calls in turn, against the FP32 file in
the same runtime.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from int8_accuracy import Calibration, copied
from onnxruntime import quantization
from smoke import finished_run, parsed_with_run

from compress.checkpoints.checkpoint import load_checkpoint
from compress.config.targets import load_target
from compress.data.batches import ImageData, eval_batches
from compress.errors import CompressError
from compress.runs.launch import existing
from compress.runs.request import Request
from export.onnx.check import INPUT
from export.onnx.trace import onnx_from_network
from export.precision.calibration import calibrate
from export.precision.int8 import quantised_tensors, to_int8
from export.precision.placement import FORMS

PRESETS = ("PERFORMANCE", "MIXED")
"""Of NNCF: symmetric ranges, and ranges that are not for activations alone."""
Run = Callable[[np.ndarray], np.ndarray]
"""Takes images, (N, 3, H, W), and returns logits, (N, classes)."""


@dataclass
class File:
    """One network in one form."""

    network: str
    form: str
    path: Path


@dataclass(frozen=True)
class Figure:
    """What a file does in a runtime."""

    top1: float
    milliseconds: float


class Images(quantization.CalibrationDataReader):
    """The calibration images as ONNX Runtime's quantiser reads them."""

    def __init__(self, calibration: Calibration) -> None:
        self.batches = calibration.batches()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch by the name of the input; None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the quantiser prints of its work, and its advice, which is followed."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)


def by_onnxruntime(
    source: Path, path: Path, calibration: Calibration, *, unsigned: bool, method: str
) -> None:
    """Quantise with ONNX Runtime's tool; unsigned with weights of 7 bits, as it advises here."""
    kinds = quantization.QuantType
    with quiet():
        quantization.quantize_static(
            source,
            path,
            Images(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=unsigned,
            activation_type=kinds.QUInt8 if unsigned else kinds.QInt8,
            weight_type=kinds.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
            extra_options={"ActivationSymmetric": not unsigned},
        )


def by_nncf(source: Path, path: Path, calibration: Calibration, *, preset: str, fast: bool) -> None:
    """Quantise for a processor with NNCF, which corrects biases as well; fast is its default."""
    import nncf

    images = [{INPUT: image[None]} for batch in calibration.batches() for image in batch]
    with quiet():
        quantised = nncf.quantize(
            onnx.load(source),
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset[preset],
            target_device=nncf.TargetDevice.CPU,
            fast_bias_correction=fast,
            subset_size=len(images),
        )
    onnx.save(quantised, path)


def files(
    network: str, proto: onnx.ModelProto, calibration: Calibration, folder: Path
) -> Iterator[File]:
    """Yield a network in all forms; the first is FP32."""
    source = folder / f"{network}.onnx"
    source.write_bytes(proto.SerializeToString())
    yield File(network, "fp32", source)
    for name, form in FORMS.items():
        model = copied(proto)
        tensors = quantised_tensors(model, form)
        ranges = calibrate(model.SerializeToString(), tensors, calibration.batches, method="mse")
        to_int8(model, ranges, form=form)
        path = folder / f"{network}-{name}.onnx"
        path.write_bytes(model.SerializeToString())
        yield File(network, f"ours, for {name}", path)
    for unsigned in (False, True):
        for method in ("MinMax", "Entropy"):
            kind = "U8" if unsigned else "S8"
            path = folder / f"{network}-{kind}-{method}.onnx"
            by_onnxruntime(source, path, calibration, unsigned=unsigned, method=method)
            yield File(network, f"ONNX Runtime, {kind} {method}", path)
    for preset, fast in product(PRESETS, (True, False)) if find_spec("nncf") else ():
        path = folder / f"{network}-nncf-{preset}-{fast}.onnx"
        by_nncf(source, path, calibration, preset=preset, fast=fast)
        yield File(network, f"NNCF, {preset.lower()}, {'fast' if fast else 'full'}", path)


def in_onnxruntime(path: Path) -> Run:
    """Return what runs a file in ONNX Runtime on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def in_openvino(path: Path) -> Run:
    """Return what runs a file in OpenVINO on one core."""
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: compiled(images)[0]


def runtimes() -> dict[str, Callable[[Path], Run]]:
    """Return the runtimes that are installed."""
    known: dict[str, Callable[[Path], Run]] = {"ONNX Runtime": in_onnxruntime}
    if find_spec("openvino"):
        known["OpenVINO"] = in_openvino
    return known


def figures(runs: Sequence[Run], data: ImageData, batch_size: int, rounds: int) -> list[Figure]:
    """Return accuracy on the validation set and median time at batch 1 of each."""
    right, images, one = [0] * len(runs), 0, None
    for batch in eval_batches(data.val, batch_size=batch_size):
        if not len(batch.images):
            continue
        pixels, labels = batch.images.numpy(), batch.labels.numpy()
        one = pixels[:1] if one is None else one
        images += len(labels)
        for number, run in enumerate(runs):
            right[number] += int((run(pixels).argmax(axis=1) == labels).sum())
    assert one is not None
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for taken, run in zip(times, runs, strict=True):
            run(one)  # whoever was last leaves the caches to others
            start = time.perf_counter()
            run(one)
            taken.append(1e3 * (time.perf_counter() - start))
    return [
        Figure(100 * count / images, statistics.median(taken))
        for count, taken in zip(right, times, strict=True)
    ]


def compare(directory: Path, options: argparse.Namespace) -> None:
    """Measure both networks of a run and print the tables."""
    run, config, data = existing(directory, Request(data=options.data))
    target, batch_size = load_target(config.export.target), config.data.eval_batch_size
    asked = options.images or config.export.calibration_images
    calibration = Calibration(data, asked, batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        for path in (run.dense, run.pruned):
            network = load_checkpoint(path)
            size = network.input_size
            proto = onnx_from_network(network.model, target=target, input_size=size)
            known = list(files(path.stem, proto, calibration, Path(scratch)))
            for name, opened in runtimes().items():
                runs = [opened(file.path) for file in known]
                found = figures(runs, data, batch_size, options.rounds)
                tell(f"{path.stem}, in {name}", known, found)


def tell(title: str, known: Sequence[File], found: Sequence[Figure]) -> None:
    """Print one table; drops and times are against the first row."""
    print(f"\n| {title} | top-1 | drop | ms, batch 1 | of FP32's time |")
    print("|---|---:|---:|---:|---:|")
    full = found[0]
    for file, figure in zip(known, found, strict=True):
        drop, share = full.top1 - figure.top1, figure.milliseconds / full.milliseconds
        cells = f"{figure.top1:.2f} % | {drop:+.2f} pp | {figure.milliseconds:.3f} | {share:.2f}"
        print(f"| {file.form} | {cells} |")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--images", type=int, help="calibration images, default of the run")
    parser.add_argument("--rounds", type=int, default=200, help="calls of each at batch 1")
    return parsed_with_run(parser, arguments, images=32, rounds=3)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with finished_run(options.run) as run:
        compare(run, options)


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(f"error: {error}")
