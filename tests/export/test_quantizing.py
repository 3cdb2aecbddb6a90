"""The library: a network is trained in 8 bits in its user's loop, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import lived_in
from onnx_models import rounds_half_precision
from torch import nn
from torch.nn import functional as F

import compress
from compress.errors import ConfigError


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
