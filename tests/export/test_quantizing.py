"""The library: a network is trained in 8 bits in its user's loop, and written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lived_in
from onnx.numpy_helper import to_array
from onnx_models import rounds_half_precision
from torch import nn
from torch.nn import functional as F

import compress
from compress.errors import ConfigError, ModelError


class TwoInputs(nn.Module):
    """An image and a row of numbers, one of which is of no use; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mix, self.head = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, row: torch.Tensor, unused: torch.Tensor) -> Any:
        x = F.relu(self.norm(self.stem(image))).mean((2, 3))
        x = F.relu(self.mix(torch.cat([x, row], 1)))
        return {"logits": self.head(x), "features": x}


def example(rows: int = 32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 3, 8, 8), (rows, 4), (rows, 2)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def trained(target: str) -> Any:
    """Train three steps."""
    torch.manual_seed(0)
    network = compress.quantized(lived_in(TwoInputs()).train(), example(), target=target)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    labels = torch.arange(32) % 4
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network(*example())["logits"], labels).backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("target", ["cpu", "v100", "t4"])
def test_what_was_trained_is_what_the_file_computes(target: str, tmp_path: Path) -> None:
    before = compress.quantized(lived_in(TwoInputs()), example(), target=target).ranges
    network = trained(target)
    assert any(network.ranges[name] != largest for name, largest in before.items())
    path = tmp_path / "small.onnx"
    written = compress.export_onnx(network, path, example=example(), target=target)
    assert list(written.inputs) == ["image", "row"]
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    # Half precision rounds weights before they are rounded to 8 bits.
    halves = target == "t4" and rounds_half_precision()
    assert written.relative_error is not None
    assert written.relative_error < (0.02 if halves else 0.006)


def test_ranges_bring_back_what_was_trained() -> None:
    network = trained("cpu").eval()
    again = compress.quantized(network.network, example(), ranges=network.ranges).eval()
    with torch.no_grad():
        expected, found = network(*example()), again(*example())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert again.ranges == network.ranges


def test_a_target_of_another_form_is_refused(tmp_path: Path) -> None:
    network = trained("cpu")
    with pytest.raises(ConfigError, match="of the form onnxruntime, and target v100 reads the"):
        compress.export_onnx(network, tmp_path / "x.onnx", example=example(), target="v100")
    assert not list(tmp_path.iterdir())


def test_the_network_itself_is_written_in_float32(tmp_path: Path) -> None:
    network = trained("cpu")
    path = tmp_path / "x.onnx"
    compress.export_onnx(network.network, path, example=example())
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(path).graph.node}


class ReadAgain(nn.Module):
    """A result is read before and behind the activation that changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        gate = torch.sigmoid(y + self.second(x))
        self.act(y)
        return self.head((y * gate).mean((2, 3)))


class CalledTwice(nn.Module):
    """The file computes the features once and training twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.features(x).mean((2, 3))), self.features(x).amax((2, 3))


def images(rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def computed_by_file(path: Path, given: torch.Tensor) -> list[np.ndarray]:
    """Run a file as it is written, without what a runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    return found


@pytest.mark.parametrize("target", ["cpu", "v100"])
@pytest.mark.parametrize("kind", [ReadAgain, CalledTwice])
def test_every_call_rounds_as_the_file_does(
    kind: type[nn.Module], target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = compress.quantized(lived_in(kind()), images(), target=target)
    compress.export_onnx(network, tmp_path / "x.onnx", example=images(), target=target)
    with torch.no_grad():
        expected = network(images())
    expected = expected if isinstance(expected, tuple) else (expected,)
    for found, wanted in zip(
        computed_by_file(tmp_path / "x.onnx", images()), expected, strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "v100"])
def test_names_may_be_given_to_what_was_trained(target: str, tmp_path: Path) -> None:
    network = trained(target)
    files = {}
    for name, names in (
        ("own", {}),
        ("given", {"input_names": ["row", "image", "c"], "output_names": ["features", "e"]}),
    ):
        path = tmp_path / f"{name}.onnx"
        compress.export_onnx(network, path, example=example(), target=target, **names)
        files[name] = onnx.load(path).graph
    assert [value.name for value in files["given"].input] == ["row", "image"]
    for first, second in zip(files["own"].initializer, files["given"].initializer, strict=True):
        np.testing.assert_array_equal(to_array(first), to_array(second))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_sum_within_an_activation_is_not_rounded(approximate: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 16, 3), nn.GELU(approximate), nn.Conv2d(16, 4, 3), nn.Flatten())
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.mul_(16)  # so that x^3 of the tanh form is far larger than x
        expected = model(images())
    network = compress.quantized(model, images(), target="cpu")
    assert len(network.ranges) == 4  # the images, and what the convolutions give and read
    compress.export_onnx(network, tmp_path / "x.onnx", example=images(), target="cpu")
    (found,) = computed_by_file(tmp_path / "x.onnx", images())
    assert np.abs(found - expected.numpy()).max() < 0.05 * expected.abs().max()


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten())
    vars(model)["lock"] = threading.Lock()
    with pytest.raises(ModelError, match="Sequential cannot be copied: cannot pickle"):
        compress.quantized(model, images())


def test_a_first_range_has_the_least_rounding_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    images = torch.randn(64, 3, 8, 8)
    images[0, 0, 0, 0] = 40.0  # which a range of 40 would round everything else coarsely for
    (largest,) = compress.quantized(network, images, target="v100").ranges.values()

    def error(bound: float) -> float:
        values = images.double().numpy()
        steps = np.clip(np.rint(values * 127 / bound), -127, 127)
        return float(np.square(values - steps * bound / 127).sum())

    tried = [error(40.0 * share) for share in np.linspace(0.05, 1, 200)]
    assert error(largest) <= min(tried) * 1.02
