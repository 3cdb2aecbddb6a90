"""Engines built and run on a real GPU, beside torch; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from conftest import lived_in, random_mask
from engine_files import NETWORK
from onnx_models import export_classifier
from torch import nn

from compress.config import ExportConfig
from compress.config.targets import Target, load_target
from compress.errors import EnvironmentUnfitError
from compress.files.atomic import sha256_of
from compress.networks.analysis import analyse
from compress.networks.shrink import shrink
from export.engines import sidecar
from export.engines.api import load_tensorrt
from export.engines.build import build_engine
from export.nvml import find_gpu
from export.runners import EngineRunner

pytestmark = pytest.mark.tensorrt
SIZE = (3, 12, 12)
TOLERANCE = 2e-3
"""Of the largest logit; the convolutions of FP32 may use TF32, of eleven significant bits."""


@pytest.fixture(scope="module")
def target() -> Target:
    """Return a target for the GPU of this machine."""
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("there is no GPU")
    try:
        load_tensorrt("tensorrt").create_builder()
    except EnvironmentUnfitError as error:
        pytest.skip(str(error))
    fields = {**load_target("v100").model_dump(), "name": "here", "sm": gpu.sm}
    return Target.model_validate({**fields, "tensorrt": ">=8.5", "warnings": {}})


@pytest.fixture(scope="module", params=["dense", "pruned"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    whole = lived_in(networks.Dense()).eval()
    graph = analyse(whole, SIZE)
    return whole if request.param == "dense" else shrink(whole, graph, random_mask(graph, 1))


def built(model: nn.Module, target: Target, folder: Path, **options: Any) -> Path:
    onnx_path, path = folder / "model.onnx", folder / "model.engine"
    export_classifier(copy.deepcopy(model), onnx_path, target=target, input_size=SIZE, metadata={})
    build_engine(
        onnx_path,
        path,
        target=target,
        config=ExportConfig(target="v100", workspace_mib=256, **options),
        onnx_sha256=sha256_of(onnx_path),
        network={**NETWORK, "input_size": list(SIZE)},
    )
    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *SIZE)).astype(np.float32)


def check(model: nn.Module, path: Path, *counts: int) -> None:
    with EngineRunner(path, device="cuda") as runner:
        for count in counts:
            batch = images(count)
            with torch.inference_mode():
                expected = model(torch.from_numpy(batch)).numpy()
            error = np.abs(runner.infer(batch) - expected).max() / np.abs(expected).max()
            assert error < TOLERANCE, f"batch {count}"


def test_an_engine_computes_what_torch_computes(
    model: nn.Module, target: Target, tmp_path: Path
) -> None:
    check(model, built(model, target, tmp_path, dynamic_batch=(1, 4, 9)), 1, 4, 9, 2)


def test_one_profile_for_each_batch_size(model: nn.Module, target: Target, tmp_path: Path) -> None:
    check(model, built(model, target, tmp_path, batch=(1, 3, 8)), 8, 1, 3, 8)


def test_the_sidecar_tells_this_gpu_and_what_became_of_the_network(
    model: nn.Module, target: Target, tmp_path: Path
) -> None:
    path = built(model, target, tmp_path)
    document = sidecar.read_engine_sidecar(path)
    gpu = find_gpu()
    assert gpu is not None
    assert (document["sm"], document["gpu"], document["driver"]) == (gpu.sm, gpu.name, gpu.driver)
    assert document["inspection"]["layers"] > 0
    assert document["inspection"]["outputs"]
    assert set(document["inspection"]["io"]) == {"input", "logits"}


def test_the_second_build_uses_the_timings_of_the_first(
    model: nn.Module, target: Target, tmp_path: Path
) -> None:
    used = []
    for _ in range(2):
        path = built(model, target, tmp_path)
        used.append(sidecar.read_engine_sidecar(path)["timing_cache"]["used"])
    assert used == [False, True]
