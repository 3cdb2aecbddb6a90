from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from compress.config.targets import load_target
from compress.errors import ConfigError
from compress.files.documents import named_files
from export import doctor
from export.doctor import (
    MINIMUM,
    Finding,
    covers,
    diagnose,
    fit,
    mend_lines,
    render_findings,
    run_doctor,
)
from export.installed import Gpu, Installed

ROOT = Path(__file__).parents[2]
# What was measured in environments of these wheels, with a GPU and a driver added by hand.
V100 = Installed(
    python="3.12.4",
    torch="2.10.0+cu128",
    torchvision="0.25.0+cu128",
    cuda="12.8",
    architectures=("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    cudnn="9.10.2",
    torch_gpus=1,
    onnx="1.23.2",
    onnxruntime="1.26.0",
    onnxruntime_distributions=("onnxruntime-gpu",),
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    usable_providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    tensorrt="10.4.0",
    gpus=(Gpu("Tesla V100-SXM2-16GB", "7.0"),),
    driver="535.129.03",
)
CURRENT = replace(
    V100,
    torch="2.15.0+cu132",
    torchvision="0.29.2+cu132",
    cuda="13.2",
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    cudnn="9.26.0",
    onnxruntime="1.31.1",
    tensorrt="11.4.1.2",
    tensorrt_rtx="1.7.1.116",
    driver="580.65.06",
)
NO_GPU: dict[str, Any] = {
    "gpus": (),
    "torch_gpus": 0,
    "driver": None,
    "usable_providers": ("CPUExecutionProvider",),
    "problems": {"CUDAExecutionProvider": "CUDA failure 35: CUDA driver version is insufficient"},
}
FITTING = {
    "v100": V100,
    "t4": replace(CURRENT, gpus=(Gpu("Tesla T4", "7.5"),)),
    "a100": replace(CURRENT, gpus=(Gpu("NVIDIA A100-SXM4-80GB", "8.0"),)),
    "h100": replace(CURRENT, gpus=(Gpu("NVIDIA H100 80GB HBM3", "9.0"),)),
    "rtx": replace(CURRENT, gpus=(Gpu("NVIDIA GeForce RTX 4090", "8.9"),)),
    "cpu": replace(CURRENT, **NO_GPU),
}


def misfits(installed: Installed, target: str | None) -> dict[str, Finding]:
    found = diagnose(installed, load_target(target) if target else None)
    return {finding.component: finding for finding in found if finding.fits is False}


def judged(installed: Installed, target: str | None, component: str) -> Finding:
    found = diagnose(installed, load_target(target) if target else None)
    (finding,) = [finding for finding in found if finding.component == component]
    return finding


@pytest.mark.parametrize("name", sorted(named_files("targets")))
def test_every_shipped_target_has_a_machine_that_fits(name: str) -> None:
    assert misfits(FITTING[name], name) == {}


@pytest.mark.parametrize("name", sorted(named_files("targets")))
def test_every_misfit_on_an_empty_machine_can_be_mended(name: str) -> None:
    found = misfits(Installed(python="3.9.1"), name)
    assert found.keys() >= {"python", "torch", "torchvision", "onnx", "onnxruntime"}
    target = load_target(name)
    if target.builder:
        assert found.keys() >= {target.builder, "gpu"}
    for finding in found.values():
        assert finding.mend, finding
        assert finding.needed, finding


@pytest.mark.parametrize("name", sorted(named_files("targets")))
def test_no_mend_names_a_host(name: str) -> None:
    for requirement in load_target(name).requires.values():
        assert not re.search(r"https?:|\w\.(com|org|io)\b", requirement.mend)
        assert requirement.why


def test_the_current_stack_is_unfit_for_a_v100_in_every_part_that_lost_volta() -> None:
    found = misfits(replace(CURRENT, gpus=V100.gpus, torch_gpus=0), "v100")
    assert {name: finding.mend for name, finding in found.items()} == {
        "torch's CUDA code": "pip install torch==2.10.0 torchvision==0.25.0",
        "onnxruntime": "pip install 'onnxruntime-gpu<1.27' 'nvidia-cudnn-cu12<9.11'",
        "cudnn": "pip install nvidia-cudnn-cu12==9.10.2.21",
        "tensorrt": "pip install tensorrt-cu12==10.4.0  "
        "# with NVIDIA's package index as an extra index",
        "torch on the GPU": "pip install torch==2.10.0 torchvision==0.25.0",
    }
    assert found["torch's CUDA code"].needed == "sm_70"
    assert all(finding.why for finding in found.values())


@pytest.mark.parametrize(
    ("change", "component"),
    [
        ({"python": "3.13.0"}, "python"),
        ({"torch": "2.5.1"}, "torch"),
        ({"torch": None}, "torch"),
        ({"architectures": ()}, "torch's CUDA code"),
        ({"torchvision": None}, "torchvision"),
        ({"problems": {"torchvision": "RuntimeError: operator nms does not exist"}}, "torchvision"),
        ({"onnx": "1.15.0"}, "onnx"),
        ({"onnxruntime": "1.27.0"}, "onnxruntime"),
        ({"onnxruntime_distributions": ("onnxruntime", "onnxruntime-gpu")}, "onnxruntime"),
        ({"providers": ("CPUExecutionProvider",), "usable_providers": ("CPUExecutionProvider",)},
         "onnxruntime on CUDA"),
        ({"usable_providers": ("CPUExecutionProvider",)}, "onnxruntime on CUDA"),
        ({"usable_providers": ("CUDAExecutionProvider",)}, "onnxruntime on CPU"),
        ({"cudnn": "9.11.0"}, "cudnn"),
        ({"cudnn": None}, "cudnn"),
        ({"tensorrt": "10.5.0.18"}, "tensorrt"),
        ({"tensorrt": "8.4.3"}, "tensorrt"),
        ({"tensorrt": None}, "tensorrt"),
        ({"problems": {"tensorrt": "ImportError: libnvinfer.so.10"}}, "tensorrt"),
        ({"gpus": (Gpu("Tesla T4", "7.5"),)}, "gpu"),
        ({"gpus": (Gpu("Tesla V100", None),)}, "gpu"),
        ({"torch_gpus": 0}, "torch on the GPU"),
        ({"driver": "470.57.02"}, "driver"),
        ({"driver": "590.44.01"}, "driver"),
        ({"driver": None}, "driver"),
        ({"driver": "unreadable"}, "driver"),
    ],
)  # fmt: skip
def test_one_thing_amiss_is_the_one_misfit(change: dict[str, Any], component: str) -> None:
    assert misfits(replace(V100, **change), "v100").keys() == {component}


@pytest.mark.parametrize(
    "change",
    [
        {"python": "3.10.13"},
        {"torch": "2.14.0+cu126"},  # of another index, with code for SM 7.0
        {"torch": "2.12.0.dev20260301+cu126"},
        {"cudnn": "8.9.7"},
        {"tensorrt": "8.5.3.1"},
        {"tensorrt": "8.6.1.post1"},
        {"driver": "525.60.13"},
        {"driver": "580.95.05"},
        {"onnxruntime": "1.23.2"},
        {"gpus": (Gpu("Tesla T4", "7.5"), Gpu("Tesla V100-PCIE-32GB", "7.0"))},
    ],
)
def test_what_a_v100_still_takes(change: dict[str, Any]) -> None:
    assert misfits(replace(V100, **change), "v100") == {}


def test_without_a_gpu_the_wheels_are_still_judged() -> None:
    assert misfits(replace(V100, **NO_GPU), "v100").keys() == {"gpu"}
    provider = judged(replace(V100, **NO_GPU), "v100", "onnxruntime on CUDA")
    assert (provider.found, provider.fits) == ("built in, not tried: there is no GPU", None)
    driver = judged(replace(V100, **NO_GPU), "v100", "driver")
    assert (driver.fits, driver.needed) == (None, ">=525,<581")
    newer = judged(replace(CURRENT, **NO_GPU), "v100", "driver")  # torch's CUDA asks for more
    assert (newer.fits, newer.needed) == (None, ">=580,<581")
    assert misfits(replace(CURRENT, **NO_GPU), "v100").keys() == {
        *("gpu", "torch's CUDA code", "onnxruntime", "cudnn", "tensorrt")
    }


def test_what_a_broken_library_says_is_shown() -> None:
    problem = "loading it ends the process: signal SIGSEGV"
    finding = judged(replace(CURRENT, torch=None, problems={"torch": problem}), None, "torch")
    assert finding.found == f"installed, broken: {problem}"
    assert (finding.fits, finding.mend) == (False, "pip install --upgrade torch torchvision")
    on_gpu = {"CUDAExecutionProvider": "CUDA failure 35: CUDA driver version is insufficient"}
    broken = replace(V100, usable_providers=("CPUExecutionProvider",), problems=on_gpu)
    assert judged(broken, "v100", "onnxruntime on CUDA").found == on_gpu["CUDAExecutionProvider"]


def test_a_newer_cuda_needs_a_newer_driver() -> None:
    for driver, fits in (("570.86.10", False), ("580.65.06", True)):
        machine = replace(FITTING["a100"], driver=driver)
        assert judged(machine, "a100", "driver").fits is fits
    assert judged(replace(V100, gpus=(Gpu("A100", "8.0"),)), "a100", "driver").fits is True


def test_without_a_target_a_gpu_is_information() -> None:
    for machine in (V100, CURRENT, replace(CURRENT, **NO_GPU), replace(V100, torch_gpus=0)):
        assert misfits(machine, None) == {}
        for component in ("gpu", "driver", "tensorrt", "cudnn", "torch's CUDA code"):
            assert judged(machine, None, component).fits is None
    assert judged(V100, None, "gpu").found == "Tesla V100-SXM2-16GB (SM 7.0)"
    assert judged(V100, None, "onnxruntime on CUDA").found == "works"


def test_two_onnxruntimes_are_taken_apart() -> None:
    both = replace(CURRENT, onnxruntime_distributions=("onnxruntime", "onnxruntime-gpu"))
    assert judged(both, None, "onnxruntime").mend == (
        "pip uninstall --yes onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    )


def test_the_engine_library_of_a_target_of_ones_own_is_named_with_its_range() -> None:
    target = load_target("a100").model_copy(update={"tensorrt": ">=10.0,<10.9", "requires": {}})
    (finding,) = [f for f in diagnose(FITTING["a100"], target) if f.component == "tensorrt"]
    assert (finding.fits, finding.mend) == (False, "pip install 'tensorrt>=10.0,<10.9'")


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_what_the_constraints_install_fits_a_v100(python: str) -> None:
    lines = (ROOT / "constraints" / "v100.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {
        pin.name: str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    }
    machine = replace(
        V100,
        python=f"{python}.1",
        torch=found["torch"],
        torchvision=found["torchvision"],
        onnxruntime=found["onnxruntime-gpu"],
        cudnn=found["nvidia-cudnn-cu12"],
        tensorrt=found["tensorrt-cu12"],
    )
    assert misfits(machine, "v100") == {}
    mends = [requirement.mend for requirement in load_target("v100").requires.values()]
    for name in ("torch", "torchvision", "nvidia-cudnn-cu12", "tensorrt-cu12"):
        assert any(f"{name}=={found[name]}" in mend for mend in mends)


@pytest.mark.parametrize(
    ("architectures", "sm", "runs"),
    [
        (["sm_70"], "7.0", True),
        (["sm_70"], "7.5", True),  # the same major version, a later minor one
        (["sm_75"], "7.0", False),
        (["sm_80"], "8.6", True),
        (["sm_80"], "9.0", False),
        (["compute_80"], "9.0", True),  # PTX is compiled by the driver
        (["compute_90"], "8.0", False),
        (["sm_90a"], "9.0", True),
        (["compute_90a"], "10.0", False),
        (["sm_120"], "12.0", True),
        (["sm_100"], "10.3", True),
        (["gfx90a"], "9.0", False),
        ([], "7.0", False),
    ],
)
def test_which_code_runs_where(architectures: list[str], sm: str, runs: bool) -> None:
    assert covers(architectures, sm) is runs


def test_the_minimum_is_that_of_the_package() -> None:
    package = metadata.metadata("compress-convnets")
    assert MINIMUM["python"] == package["Requires-Python"]
    required = [Requirement(text) for text in package.get_all("Requires-Dist") or ()]
    for name, versions in MINIMUM.items():
        if name != "python":
            owners = {name, f"{name}-gpu"}
            plain = [r for r in required if "extra" not in str(r.marker)]
            found = {str(r.specifier) for r in plain if r.name in owners and r.specifier}
            assert found == {versions}


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> Callable[[Installed, str | None], dict[str, Any]]:
    """Run the doctor on a machine that is given."""

    def run(installed: Installed, target: str | None) -> dict[str, Any]:
        monkeypatch.setattr(doctor, "inspect_installed", lambda: installed)
        return run_doctor(target)

    return run


Document = Callable[[Installed, str | None], dict[str, Any]]


def test_the_document_is_json_and_holds_every_finding(document: Document) -> None:
    found = json.loads(json.dumps(document(CURRENT, "v100")))
    assert (found["schema_version"], found["target"], found["fits"]) == (1, "v100", False)
    assert found["installed"]["torch"] == "2.15.0+cu132"
    assert found["installed"]["gpus"] == [{"name": "Tesla V100-SXM2-16GB", "sm": "7.0"}]
    assert found["findings"] == [asdict(f) for f in diagnose(CURRENT, load_target("v100"))]
    assert document(V100, "v100")["fits"] is True
    assert document(V100, None)["target"] is None
    with pytest.raises(ConfigError, match="did you mean 'v100'"):
        document(V100, "v10")


def rows_of(document: dict[str, Any]) -> list[list[str]]:
    stream = StringIO()
    Console(file=stream, width=200).print(render_findings(document))
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("\u2502")]
    return [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in lines]


def test_the_table_shows_every_finding(document: Document) -> None:
    fits = {True: "yes", False: "NO", None: "-"}
    assert rows_of(document(CURRENT, "v100")) == [
        [finding.component, finding.found, finding.needed, fits[finding.fits]]
        for finding in diagnose(CURRENT, load_target("v100"))
    ]


def test_each_misfit_is_mended_by_one_line(document: Document) -> None:
    assert mend_lines(document(replace(V100, cudnn="9.26.0", driver="590.44.01"), "v100")) == [
        "cudnn: from 9.11 on, cuDNN has no code for SM 7.0",
        "    pip install nvidia-cudnn-cu12==9.10.2.21",
        "driver: CUDA 12 needs 525, and 580 is the last branch that drives Volta",
        "    install a driver of branch 580, on the host if this is a container",
    ]
    assert mend_lines(document(V100, "v100")) == []
    assert mend_lines(document(replace(V100, onnx=None), None)) == [
        "onnx: it does not fit",
        "    pip install --upgrade onnx",
    ]


def test_brackets_in_what_a_library_says_are_no_markup(document: Document) -> None:
    broken = replace(CURRENT, torch=None, problems={"torch": "OSError: [/tmp] [bold]"})
    assert rows_of(document(broken, None))[1][1] == "installed, broken: OSError: [/tmp] [bold]"


def test_one_misfit_makes_a_machine_unfit_and_an_open_question_does_not() -> None:
    fine, open_, wrong = (Finding("x", "", "", fits) for fits in (True, None, False))
    assert fit([fine, open_])
    assert not fit([fine, wrong, open_])
