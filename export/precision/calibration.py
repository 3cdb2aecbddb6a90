"""The range of every activation, measured on real images.

The network runs in ONNX Runtime on the CPU, in float32, with the activations as further outputs.
``max`` takes the largest magnitude. ``mse`` takes the magnitude c at which symmetric 8-bit
quantisation of what was seen has the least squared error, the sum of (x - q(x))^2 with
q(x) = clip(round(x 127 / c), -127, 127) c / 127: a smaller c rounds finer and clips more. It is
read off a histogram of |x|, so it takes a second pass over the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from compress.errors import DataError, ModelError
from compress.quantization.plan import LEVELS
from export.runners.protocol import check_images

BINS = 2048
"""Bins of the histogram between 0 and the largest magnitude."""
FEWEST_IMAGES = 8
"""With fewer, ranges say more about these images than about the network."""
_UNUSED = 1.0  # the range of a tensor that is always 0: any positive one keeps it exact
_ERRORS_ONLY = 3  # ONNX Runtime's severity scale

Method = Literal["max", "mse"]
Batches = Callable[[], Iterable[np.ndarray]]


def calibrate(
    model: bytes,
    tensors: Sequence[str],
    batches: Batches,
    *,
    method: Method,
    progress: Callable[[float], None] | None = None,
    images: int | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Measure the range of tensors of a float32 model on real images.

    One batch of all these tensors is held in memory at a time.

    Args:
        model: the serialised ONNX model.
        tensors: names of float32 tensors: of its input, activations or output.
        batches: returns the same (N, C, H, W) float32 images anew at every call.
        method: ``max`` or ``mse``.
        progress: told after every batch which share of the work is done, 0 to 1.
        images: how many there are; without it ``progress`` is told after every pass only.
        threads: of ONNX Runtime; default all physical cores.

    Returns:
        The range of each tensor, positive, in the order of ``tensors``; 1.0 for one that is always
        zero.

    Raises:
        DataError: there are no images, or they are not what the network reads.
        ModelError: a tensor is not in the model, or is NaN or infinite on these images.
        EnvironmentUnfitError: ONNX Runtime is not installed.
    """
    network = _Observed(model, tensors, threads)
    passes = _Passes(batches, 2 if method == "mse" else 1, images, progress)
    largest = dict.fromkeys(tensors, 0.0)
    for batch in passes.next():
        for name, values in network.observe(batch):
            magnitude = max(float(values.max(initial=0)), -float(values.min(initial=0)))
            if not np.isfinite(magnitude):
                raise ModelError(f"activation {name!r} is NaN or infinite on a calibration image")
            largest[name] = max(largest[name], magnitude)
    if not passes.images:
        raise DataError("calibration needs images and none were given")
    if method == "max":
        return {name: top or _UNUSED for name, top in largest.items()}
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for batch in passes.next():
        for name, values in network.observe(batch):
            counts[name] += histogram(values, largest[name])
    return {name: best_clip(counts[name], top) or _UNUSED for name, top in largest.items()}


def histogram(values: np.ndarray, largest: float) -> np.ndarray:
    """Count magnitudes in ``BINS`` equal bins from 0 to ``largest``: int64 of shape (BINS,)."""
    if largest == 0:
        return np.bincount([0], minlength=BINS) * values.size
    places = np.abs(values).ravel() / np.float32(largest) * BINS
    return np.bincount(np.minimum(places, BINS - 1).astype(np.intp), minlength=BINS)


def best_clip(counts: np.ndarray, largest: float) -> float:
    """Return the magnitude at which quantisation to 8 bits has the least squared error.

    Every number counts as the middle of its bin. Tried is the upper edge of every bin from the
    127th on; below it a step of the quantiser is finer than a bin, and its error cannot be seen.

    Args:
        counts: (bins,) numbers of magnitudes between 0 and ``largest``, in equal bins.
        largest: the upper edge of the last bin; 0 gives 0.
    """
    bins = len(counts)
    middles = np.arange(bins) + 0.5  # in units of one bin
    errors = [
        float(counts @ np.square(middles - np.minimum(np.rint(middles / step), LEVELS) * step))
        for step in np.arange(LEVELS, bins + 1) / LEVELS
    ]
    return largest * (LEVELS + int(np.argmin(errors))) / bins


def range_of(values: np.ndarray) -> float:
    """Return the range with the least squared rounding error for numbers that are all at hand."""
    largest = float(np.abs(values).max(initial=0))
    return best_clip(histogram(values, largest), largest) or _UNUSED


def require_calibration(labels: Sequence[int], num_classes: int, asked: int) -> None:
    """Refuse images that cannot stand for a data set.

    Args:
        labels: the class of every image that was read.
        num_classes: classes of the data set.
        asked: how many images were asked for.

    Raises:
        DataError: there are fewer than 8, or all are of one class although there are more.
    """
    if len(labels) < FEWEST_IMAGES:
        raise DataError(
            f"calibration needs at least {FEWEST_IMAGES} images and has {len(labels)} "
            f"of the {asked} asked for: raise export.calibration_images or give more data"
        )
    if num_classes > 1 and len(Counter(labels)) == 1:
        raise DataError(
            f"all {len(labels)} calibration images are of class {labels[0]} and there are "
            f"{num_classes} classes: take images of several classes"
        )


class _Passes:
    """Walks over the same batches a known number of times and reports progress."""

    def __init__(
        self,
        batches: Batches,
        passes: int,
        images: int | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._batches = batches
        self._passes = passes
        self._expected = images
        self._tell = progress or (lambda share: None)
        self._done = 0
        self.images = 0
        """Images of the latest pass."""

    def next(self) -> Iterator[np.ndarray]:
        self.images = 0
        for batch in self._batches():
            if not len(batch):  # no image of it could be read
                continue
            yield batch
            self.images += len(batch)
            if self._expected:
                self._tell((self._done + min(1.0, self.images / self._expected)) / self._passes)
        self._done += 1
        self._tell(self._done / self._passes)


class _Observed:
    """A model in ONNX Runtime that shows some of its tensors."""

    def __init__(self, model: bytes, tensors: Sequence[str], threads: int | None) -> None:
        import onnx

        proto = onnx.load_model_from_string(model)
        graph = proto.graph
        known = {name for node in graph.node for name in node.output}
        known.update(value.name for value in graph.input)
        unknown = sorted(set(tensors) - known)
        if unknown:
            raise ModelError(f"the model has no tensor {unknown[0]!r} to calibrate")
        ends = {value.name for value in (*graph.input, *graph.output)}
        graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in tensors
            if name not in ends
        )
        self._session = _session(proto.SerializeToString(), threads)
        (self._input,) = self._session.get_inputs()
        self._computed = [name for name in tensors if name != self._input.name]
        self._shows_input = len(self._computed) < len(tensors)

    def observe(self, batch: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Run a batch and yield each tensor's name and values."""
        check_images(batch, self._input.shape)
        if self._shows_input:
            yield self._input.name, batch
        if self._computed:
            values = self._session.run(self._computed, {self._input.name: batch})
            yield from zip(self._computed, values, strict=True)


def _session(model: bytes, threads: int | None) -> Any:
    from export.runners.onnx_runner import import_onnxruntime

    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or 0  # 0 is its word for all physical cores
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
