from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import export_classifier
from torch import nn
from torch.nn import functional

from compress.config.targets import load_target
from export.onnx.adaptive_pool import exportable_pools
from export.runners import OnnxRunner


@pytest.mark.parametrize(
    ("shape", "output"),
    [
        *(((8, 8), 7), ((1, 1), 7), ((2, 2), 7), ((9, 5), (4, 3)), ((5, 9), (None, 4))),
        *(((6, 6), 3), ((7, 7), 1)),
    ],
)
def test_the_product_is_torchs_pooling(shape: tuple[int, int], output: object) -> None:
    images = torch.randn(2, 3, *shape, dtype=torch.float64)
    wanted = functional.adaptive_avg_pool2d(images, output)  # type: ignore[arg-type]
    with exportable_pools():
        found = functional.adaptive_avg_pool2d(images, output)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # the matrices are float32


def test_torchs_own_function_is_put_back() -> None:
    originals = functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d
    with pytest.raises(KeyError), exportable_pools():
        raise KeyError
    assert (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d) == originals


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize("output", [1, 2, (7, None), 14])
def test_behind_a_padding_that_hides_the_size_of_the_map(
    tmp_path: Path, pool: type[nn.Module], output: object
) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), pool(output), nn.Flatten())
    model = nn.Sequential(*layers).eval()
    path, target = tmp_path / "model.onnx", load_target("v100")
    export_classifier(model, path, target=target, input_size=(3, 14, 14), metadata={})
    images = torch.randn(3, 3, 14, 14)
    with OnnxRunner(path) as runner, torch.no_grad():
        np.testing.assert_allclose(runner.infer(images.numpy()), model(images), atol=1e-6)


@pytest.mark.parametrize("size", [5, 8])
def test_a_pool_that_does_not_divide_its_map_is_exported(tmp_path: Path, size: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(196, 5)
    ).eval()
    path, target = tmp_path / "model.onnx", load_target("v100")
    facts = export_classifier(model, path, target=target, input_size=(3, size, size), metadata={})
    assert facts.nodes["MatMul"] == 2
    images = torch.randn(3, 3, size, size)
    with OnnxRunner(path) as runner, torch.no_grad():
        np.testing.assert_allclose(runner.infer(images.numpy()), model(images), atol=1e-6)
