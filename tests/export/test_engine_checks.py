from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_files import T4, V100

from compress.config.targets import Target, load_target
from compress.errors import ConfigError, EnvironmentUnfitError, ModelError
from export import nvml
from export.engines.checks import refuse_engine, refuse_version, runs_on
from export.nvml import Gpu, find_gpu

ANY = Target.model_validate(
    {**load_target("v100").model_dump(), "name": "any", "sm": None, "warnings": {}}
)


def test_an_engine_that_fits_is_let_through() -> None:
    assert refuse_engine(load_target("v100"), "fp16", gpu=V100, opset=17) is None
    assert refuse_engine(load_target("t4"), "int8", gpu=T4, opset=20) is None
    assert refuse_engine(ANY, "fp32", gpu=V100, opset=13) is None


def test_tensorrt_rtx_runs_where_it_says_itself() -> None:
    sms = ("7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0", "12.1", "13.0")
    rtx, h100 = load_target("rtx"), load_target("h100")
    found = [sm for sm in sms if runs_on(rtx, Gpu("some", sm))]
    assert found == ["8.0", "8.6", "8.9", "12.0", "12.1", "13.0"]
    assert all(runs_on(h100, Gpu("some", sm)) for sm in sms)  # another SM is refused before


def test_what_rarely_pays_is_said() -> None:
    warning = refuse_engine(load_target("v100"), "int8", gpu=V100, opset=17)
    assert warning == load_target("v100").warnings["int8"]
    assert warning


@pytest.mark.parametrize(
    ("target", "precision", "gpu", "opset", "error", "reason"),
    [
        ("cpu", "fp32", V100, 17, ConfigError, "target cpu has no engines"),
        ("v100", "fp16", V100, 18, ModelError, "opset 18 and target v100 reads up to 17"),
        ("v100", "fp16", None, 17, EnvironmentUnfitError, "torch finds none .*a GPU of SM 7.0"),
        ("v100", "fp16", T4, 17, EnvironmentUnfitError, "SM 7.0, and this Tesla T4 is SM 7.5"),
        ("t4", "fp16", V100, 17, EnvironmentUnfitError, "is SM 7.0; .*a GPU of SM 7.5"),
    ],
)
def test_what_cannot_be_is_refused(
    target: str, precision: Any, gpu: Gpu | None, opset: int, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        refuse_engine(load_target(target), precision, gpu=gpu, opset=opset)


def test_a_precision_that_the_target_does_not_compute_is_refused() -> None:
    whole = ANY.model_dump()
    target = Target.model_validate(
        {**whole, "channel_multiple": {"fp32": 1, "fp16": 8}, "precisions": ["fp16"]}
    )
    with pytest.raises(ConfigError, match=r"does not compute int8; it computes fp32, fp16$"):
        refuse_engine(target, "int8", gpu=V100, opset=17)


@pytest.mark.parametrize(
    ("sm", "precision", "fits"),
    [
        ("5.2", "fp32", True),
        ("5.2", "fp16", False),
        ("5.3", "fp16", True),
        ("6.0", "int8", False),
        ("6.1", "int8", True),
        ("10.0", "int8", True),
    ],
)
def test_a_chip_computes_what_nvidia_lists(sm: str, precision: Any, fits: bool) -> None:
    gpu = Gpu("some GPU", sm)
    if fits:
        assert refuse_engine(ANY, precision, gpu=gpu, opset=17) is None
    else:
        with pytest.raises(EnvironmentUnfitError, match=f"SM {sm} does not compute {precision}"):
            refuse_engine(ANY, precision, gpu=gpu, opset=17)


def test_rtx_builds_without_a_gpu_and_tensorrt_does_not() -> None:
    assert refuse_engine(load_target("rtx"), "fp16", gpu=None, opset=17) is None
    with pytest.raises(EnvironmentUnfitError, match="on a machine with an NVIDIA GPU"):
        refuse_engine(ANY, "fp16", gpu=None, opset=17)


@pytest.mark.parametrize(
    ("target", "version"),
    [
        *(("v100", version) for version in ("8.5.3.1", "8.6.1.post1", "10.0.1", "10.4.0")),
        *(("t4", version) for version in ("10.0.1", "10.16.1.11", "11.4.0.106")),
        *(("rtx", version) for version in ("1.0.0.21", "1.7.1.116")),
        ("cpu", "10.4.0"),
    ],
)
def test_a_release_of_the_range_is_let_through(target: str, version: str) -> None:
    refuse_version(load_target(target), version)


@pytest.mark.parametrize(
    ("target", "version", "reason"),
    [
        ("v100", "10.5.0", r"no longer builds for SM 7\.0.*install tensorrt-cu12==10\.4\.0$"),
        ("v100", "11.4.0.106", r"no longer builds for SM 7\.0.*install tensorrt-cu12==10\.4\.0$"),
        ("v100", "8.4.3.1", r"needs TensorRT >=8\.5,<10\.5 and 8\.4\.3\.1 is installed; install a"),
        ("t4", "8.6.1", r"target t4 needs TensorRT >=10\.0,<12 and 8\.6\.1"),
        ("t4", "12.0.0", r"target t4 needs TensorRT >=10\.0,<12 and 12\.0\.0"),
        ("rtx", "2.0", r"target rtx needs TensorRT-RTX >=1\.0,<2 and 2\.0"),
        ("t4", "unknown", "and unknown is installed"),
    ],
)
def test_a_release_outside_of_the_range_is_refused(target: str, version: str, reason: str) -> None:
    with pytest.raises(EnvironmentUnfitError, match=reason):
        refuse_version(load_target(target), version)


def test_the_gpu_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        SimpleNamespace(name="NVIDIA A100", major=8, minor=0),
        SimpleNamespace(name="Tesla V100", major=7, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)
    monkeypatch.setattr(nvml, "driver_version", lambda: "550.90.07")
    assert find_gpu() == Gpu("Tesla V100", "7.0", "550.90.07")


def test_a_driver_that_nobody_tells_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvml, "driver_version", lambda: None)
    assert find_gpu() == Gpu("Tesla T4", "7.5", None)


def test_no_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_gpu() is None
