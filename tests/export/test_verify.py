from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper
from onnx_models import export_classifier
from torch import nn

from compress.config import ParityLimits
from compress.config.targets import load_target
from compress.errors import ConfigError, DataError, ParityError
from export.runners import OnnxRunner, TorchRunner
from export.verify import ParityResult, check_parity

ONE = np.zeros((1, 3, 8, 8), np.float32)


class Fixed:
    """A runner whose answer is given, one row of logits per image."""

    def __init__(self, name: str, logits: Any) -> None:
        self.name = name
        self.logits = np.asarray(logits, dtype=np.float32)
        self.seen: list[np.ndarray] = []

    def __enter__(self) -> Fixed:
        return self

    def __exit__(self, *_: object) -> None: ...

    def infer(self, images: np.ndarray) -> np.ndarray:
        self.seen.append(images)
        return self.logits


def allow(relative_error: float, **more: float) -> ParityLimits:
    return ParityLimits(relative_error=relative_error, **more)


def compare(expected: Any, actual: Any, tolerance: float, **more: float) -> ParityResult:
    size = len(expected)
    (result,) = check_parity(
        Fixed("reference", expected),
        Fixed("candidate", actual),
        ONE,
        batch_sizes=[size],
        limits=allow(tolerance, **more),
    )
    return result


def test_the_numbers_by_hand() -> None:
    result = compare([[3.0, -4.0]], [[3.0, -3.5]], tolerance=0.2)
    assert result.relative_error == 0.125  # 0.5 of 4
    assert result.cosine == pytest.approx(23 / (5 * np.sqrt(9 + 12.25)))
    assert result.top1_agreement == 1.0
    assert result.to_dict() == {
        "reference": "reference",
        "candidate": "candidate",
        "batch_size": 1,
        "images": 1,
        "relative_error": 0.125,
        "cosine": result.cosine,
        "top1_agreement": 1.0,
        "limits": {"relative_error": 0.2, "cosine": -1.0, "top1_agreement": 0.0},
    }


def test_the_sentence_names_everything() -> None:
    with pytest.raises(ParityError) as caught:
        compare([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]], tolerance=1e-4)
    assert str(caught.value) == (
        "candidate disagrees with reference at batch size 2: relative error 2.0e+00 exceeds the "
        "limit 1.0e-04 (error 2.0e+00, cosine 0.57735, top-1 agrees on 50% of 2 images)"
    )
    assert caught.value.exit_code == 6


def test_every_limit_is_judged() -> None:
    swapped = [[1.00, 1.01], [3.0, 0.0]], [[1.01, 1.00], [3.0, 0.0]]
    assert compare(*swapped, tolerance=0.01, cosine=0.999).top1_agreement == 0.5
    with pytest.raises(ParityError, match="top-1 agreement 50% is below the limit 60%"):
        compare(*swapped, tolerance=0.01, top1_agreement=0.6)
    with pytest.raises(ParityError, match=r"cosine 0\.707\d* is below the limit 0\.8 \(error"):
        compare([[1.0, 0.0]], [[1.0, 1.0]], tolerance=1.0, cosine=0.8)


def test_zero_logits() -> None:
    assert compare([[0.0, 0.0]], [[0.0, 0.0]], tolerance=1e-4).relative_error == 0.0
    with pytest.raises(ParityError, match="relative error inf"):
        compare([[0.0, 0.0]], [[0.0, 1e-9]], tolerance=1e-4)


def test_a_single_logit() -> None:
    assert compare([[2.0]], [[2.0]], tolerance=1e-4).top1_agreement == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails_on_either_side(bad: float) -> None:
    with pytest.raises(ParityError, match="candidate gives NaN or infinity"):
        compare([[0.0, 1.0]], [[bad, 1.0]], tolerance=1e9)
    with pytest.raises(ParityError, match="reference gives NaN or infinity"):
        compare([[bad, 1.0]], [[bad, 1.0]], tolerance=1e9)


def test_another_number_of_classes() -> None:
    with pytest.raises(ParityError, match=r"shape \(1, 3\) instead of \(1, 2\)"):
        compare([[0.0, 1.0]], [[0.0, 1.0, 2.0]], tolerance=1.0)


def test_every_image_is_seen_and_batches_are_full() -> None:
    images = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    runner = Fixed("a", [[1.0]])
    check_parity(runner, Fixed("b", [[1.0]]), images, batch_sizes=(1, 2, 4), limits=allow(1e-4))
    seen = [batch.ravel().tolist() for batch in runner.seen]
    assert seen == [[0], [1], [2], [0, 1], [2, 0], [0, 1, 2, 0]]


def test_nothing_to_compare_is_no_proof() -> None:
    runner = Fixed("a", [[1.0]])
    with pytest.raises(DataError, match="none were given"):
        check_parity(runner, runner, ONE[:0], limits=allow(1e-4))
    for sizes in ((), (1, 0)):
        with pytest.raises(ConfigError, match="parity_batches"):
            check_parity(runner, runner, ONE, batch_sizes=sizes, limits=allow(1e-4))


LOGITS = arrays(np.float32, (4, 5), elements=st.floats(-8, 8, width=16))


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_never_carries_the_cosine_past_its_ends(sign: int) -> None:
    for value in np.linspace(0.1, 3, 97, dtype=np.float32):  # some round up, wherever it runs
        logits = np.full((4, 5), value)
        found = compare(logits, sign * np.float32(1.875) * logits, tolerance=9, cosine=-1.0)
        assert -1 <= found.cosine <= 1
        assert found.cosine == pytest.approx(sign)


@given(LOGITS, LOGITS)
def test_the_figures_against_their_formulas(expected: np.ndarray, actual: np.ndarray) -> None:
    try:
        result = compare(expected, actual, tolerance=1e9)
    except ParityError:  # a reference of zeros has no scale
        assert not expected.any()
        return
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    if a.any() and b.any():
        assert result.relative_error == pytest.approx(abs(a - b).max() / abs(a).max())
        assert result.cosine == pytest.approx((a * b).sum() / ((a**2).sum() * (b**2).sum()) ** 0.5)
    same = [int(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True)]
    assert result.top1_agreement == sum(same) / 4


def test_one_perturbed_weight_is_detected(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = tmp_path / "model.onnx"
    export_classifier(model, path, target=load_target("cpu"), input_size=(3, 8, 8), metadata={})
    images = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    with TorchRunner(model) as reference:
        with OnnxRunner(path) as candidate:
            results = check_parity(reference, candidate, images, limits=allow(1e-4))
        assert [result.batch_size for result in results] == [1, 3, 8]

        proto = onnx.load(path)
        kernel = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
        array = numpy_helper.to_array(kernel).copy()
        array[0, 0, 0, 0] += 0.1
        kernel.CopyFrom(numpy_helper.from_array(array, kernel.name))
        onnx.save(proto, path)
        with OnnxRunner(path) as candidate, pytest.raises(ParityError, match="batch size 1"):
            check_parity(reference, candidate, images, limits=allow(1e-4))
