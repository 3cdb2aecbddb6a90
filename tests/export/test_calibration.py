from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_models import exported, handmade
from torch import nn

from compress.errors import DataError, ModelError
from export.precision.calibration import best_clip, calibrate, histogram, require_calibration
from export.precision.int8 import quantised_tensors

node = helper.make_node
Images = Callable[[], Iterator[np.ndarray]]


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cut(everything: np.ndarray, size: int) -> Images:
    return lambda: (everything[at : at + size] for at in range(0, len(everything), size))


def doubling() -> bytes:
    """Return a model whose ``double`` is twice its input and whose ``logits`` are the negative."""
    nodes = [
        node("Add", ["input", "input"], ["double"]),
        node("Neg", ["double"], ["logits"]),
    ]
    return handmade(nodes, {}, ("batch", 1, 2, 5)).SerializeToString()


def squared_error(values: np.ndarray, clip: float) -> float:
    step = clip / 127
    return float(np.square(values - np.clip(np.rint(values / step), -127, 127) * step).sum())


def test_max_is_what_forward_hooks_see() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    ).eval()
    seen: list[float] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, read: seen.append(read[0].abs().max().item()))
        for layer in network
        if isinstance(layer, nn.Conv2d | nn.AdaptiveAvgPool2d | nn.Linear)
    ]
    x = images(7, 3, 9, 9)
    with torch.inference_mode():
        network(torch.from_numpy(x))
    for hook in hooks:
        hook.remove()
    model = exported(network, (3, 9, 9))
    tensors = quantised_tensors(model)
    found = calibrate(model.SerializeToString(), tensors, cut(x, 3), method="max")
    assert tuple(found) == tensors
    assert list(found.values()) == pytest.approx(seen, rel=1e-5)


def test_a_negative_number_counts_by_its_magnitude() -> None:
    x = np.zeros((3, 1, 2, 5), np.float32)
    x[1, 0, 1, 2], x[2, 0, 0, 0] = -7, 3
    found = calibrate(doubling(), ("input", "double", "logits"), cut(x, 1), method="max")
    assert found == {"input": 7, "double": 14, "logits": 14}


@pytest.mark.parametrize("method", ["max", "mse"])
def test_the_cut_into_batches_does_not_matter(method: str) -> None:
    x = images(12, 1, 2, 5)
    whole, parts = (
        calibrate(doubling(), ("double",), cut(x, size), method=method) for size in (12, 5)
    )
    assert whole == parts


SHAPES = {
    "normal": lambda rng: rng.standard_normal(60_000),
    "laplace": lambda rng: rng.laplace(size=60_000),
    "after a ReLU": lambda rng: np.maximum(rng.standard_normal(60_000), 0),
    "one outlier": lambda rng: np.append(rng.standard_normal(59_999), -12.0),
    "heavy tail": lambda rng: rng.standard_t(4, 60_000),
    "uniform": lambda rng: rng.uniform(-1, 1, 60_000),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_as_good_as_the_best_of_all_clips(shape: str) -> None:
    x = SHAPES[shape](np.random.default_rng(1)).astype(np.float32)
    largest = float(np.abs(x).max())
    tensors = x.reshape(-1, 1, 2, 5)
    (clip,) = calibrate(doubling(), ["input"], cut(tensors, 4096), method="mse").values()
    assert 0 < clip <= largest
    best = min(squared_error(x, largest * share) for share in np.arange(0.1, 1.0005, 0.005))
    assert squared_error(x, clip) <= 1.005 * best


def test_mse_clips_an_outlier_and_max_does_not() -> None:
    x = SHAPES["one outlier"](np.random.default_rng(1)).astype(np.float32)
    tensors = x.reshape(-1, 1, 2, 5)
    for method, range_ in (("max", 24.0), ("mse", pytest.approx(2 * 8.5, rel=0.15))):
        found = calibrate(doubling(), ["double"], cut(tensors, 4096), method=method)
        assert found == {"double": range_}
    assert squared_error(x, 8.5) < 0.8 * squared_error(x, 12)


def test_numbers_of_one_magnitude_are_kept_to_a_bin() -> None:
    counts = np.zeros(1000, np.int64)
    counts[499] = 10  # magnitudes from 4.99 to 5.00
    clip = best_clip(counts, 10.0)
    step = clip / 127
    assert abs(round(4.995 / step) * step - 4.995) < 1e-4


def test_a_histogram_counts_magnitudes_in_equal_bins() -> None:
    values = np.array([[0, -1, 0.25, 0.9999], [1, 0.5, -0.0001, -0.75]], np.float32)
    counts = histogram(values, 1.0)
    assert counts.sum() == values.size
    assert {int(place): int(counts[place]) for place in np.flatnonzero(counts)} == {
        0: 2,
        512: 1,
        1024: 1,
        1536: 1,
        2047: 3,
    }


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize(("value", "range_"), [(0.0, 1.0), (1e-41, 2e-41)])
def test_a_tensor_of_zeros_has_a_harmless_range(method: str, value: float, range_: float) -> None:
    x = np.full((4, 1, 2, 5), value, np.float32)
    found = calibrate(doubling(), ["double"], cut(x, 2), method=method)
    assert found["double"] == pytest.approx(range_, rel=0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_is_named(value: float) -> None:
    x = images(4, 1, 2, 5)
    x[3, 0, 1, 1] = value
    with pytest.raises(ModelError, match="'double' is NaN or infinite on a calibration image"):
        calibrate(doubling(), ["double"], cut(x, 2), method="mse")


def test_a_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="no tensor 'triple' to calibrate"):
        calibrate(doubling(), ["double", "triple"], cut(images(4, 1, 2, 5), 2), method="max")


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 1, 2, 5), np.float32)]])
def test_no_images_are_refused(batches: list[np.ndarray]) -> None:
    with pytest.raises(DataError, match="calibration needs images and none were given"):
        calibrate(doubling(), ["double"], lambda: batches, method="max")


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=re.escape("not (2, 1, 5, 2)")):
        calibrate(doubling(), ["double"], cut(images(2, 1, 5, 2), 2), method="max")


@pytest.mark.parametrize(("method", "passes"), [("max", 1), ("mse", 2)])
def test_batches_are_read_one_at_a_time(method: str, passes: int) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive, started = [], 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal started
        started += 1
        for seed in range(6):
            batch = images(2, 1, 2, 5, seed=seed)
            made.append(weakref.ref(batch))
            alive.append(sum(reference() is not None for reference in made))
            yield batch

    calibrate(doubling(), ["input", "double"], batches, method=method)
    assert started == passes
    assert max(alive) <= 2  # this one and the one before


@pytest.mark.parametrize(
    ("method", "known", "told"),
    [
        ("max", 8, [0.25, 0.5, 0.75, 1, 1]),
        ("mse", 8, [0.125, 0.25, 0.375, 0.5, 0.5, 0.625, 0.75, 0.875, 1, 1]),
        ("mse", None, [0.5, 1]),
        ("max", 4, [0.5, 1, 1, 1, 1]),
    ],
)
def test_progress_is_the_share_that_is_done(
    method: str, known: int | None, told: list[float]
) -> None:
    shares: list[float] = []
    calibrate(
        doubling(),
        ["double"],
        cut(images(8, 1, 2, 5), 2),
        method=method,
        progress=shares.append,
        images=known,
    )
    assert shares == told


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([], 10, "at least 8 images and has 0 of the 512 asked for"),
        ([0, 1, 2, 3, 4, 5, 6], 10, "at least 8 images and has 7 of the 512 asked for"),
        ([3] * 40, 10, "all 40 calibration images are of class 3 and there are 10 classes"),
    ],
)
def test_images_that_cannot_stand_for_a_data_set_are_refused(
    labels: list[int], classes: int, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        require_calibration(labels, classes, 512)


@pytest.mark.parametrize(("labels", "classes"), [([0] * 7 + [1], 2), ([0] * 8, 1)])
def test_few_images_are_enough(labels: list[int], classes: int) -> None:
    require_calibration(labels, classes, 8)
