from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper

from export import installed as module
from export.installed import driver_from, inspect_installed
from export.nvml import Gpu
from export.probes import ADD_MODEL, ask, cudnn_version

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a module of one's own before the real one, for probes."""

    def write(name: str, code: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    return write


@pytest.fixture(scope="module")
def here() -> module.Installed:
    """Load every library that is here, each in a process of its own."""
    return inspect_installed()


@pytest.mark.slow
def test_the_facts_are_those_of_this_environment(here: module.Installed) -> None:
    assert here.python.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert here.torch == torch.__version__
    assert here.torchvision == torchvision.__version__
    assert here.cuda == torch.version.cuda
    assert here.onnx == onnx.__version__
    assert here.onnxruntime == onnxruntime.__version__
    assert here.providers == tuple(onnxruntime.get_available_providers())
    assert "CPUExecutionProvider" in here.usable_providers
    assert len(here.onnxruntime_distributions) == 1
    assert json.loads(json.dumps(here.to_dict()))["python"] == here.python


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_torch_tells_its_code_and_its_cudnn_without_a_gpu(here: module.Installed) -> None:
    assert "sm_90" in here.architectures
    package = next(
        dist for dist in metadata.distributions() if dist.name.startswith("nvidia-cudnn-cu")
    )
    assert here.cudnn is not None
    assert package.version.startswith(f"{here.cudnn}.")  # 9.10.2 of 9.10.2.21


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_provider_that_falls_back_in_silence_is_not_usable(here: module.Installed) -> None:
    assert here.usable_providers == ("CPUExecutionProvider",)
    for provider in set(here.providers) - {"CPUExecutionProvider"}:
        assert len(here.problems[provider]) < 150  # a sentence, not pages of C++
        assert "hostname" not in here.problems[provider]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_are_those_that_torch_sees(here: module.Installed) -> None:
    assert here.torch_gpus == torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability()
    assert f"{major}.{minor}" in {gpu.sm for gpu in here.gpus}
    assert here.driver is not None


def test_the_probe_model_is_what_onnx_would_write() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "add", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 13)]
    expected = helper.make_model(graph, opset_imports=opset, ir_version=8)
    assert onnx.load_model_from_string(ADD_MODEL) == expected
    onnx.checker.check_model(expected, full_check=True)


def test_a_module_that_is_not_there_has_no_facts(fake: Fake) -> None:
    fake("tensorrt_rtx", "raise ModuleNotFoundError('no', name='tensorrt_rtx')")
    assert ask("tensorrt_rtx") == {}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; os.abort()", "loading it ends the process: signal SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "loading it ends the process: signal SIGSEGV"),
        ("import os; os._exit(7)", "loading it ends the process: exit code 7"),
        ("raise SystemExit(3)", "loading it ends the process: exit code 3"),
        ("raise ImportError('libcublas.so.11: cannot open\\nmore')",
         "ImportError: libcublas.so.11: cannot open"),
        ("import surely_absent", "ModuleNotFoundError: No module named 'surely_absent'"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)  # fmt: skip
def test_a_broken_library_becomes_a_sentence(fake: Fake, code: str, problem: str) -> None:
    fake("tensorrt", code)
    assert ask("tensorrt") == {"problem": problem}


def test_a_library_that_prints_or_cannot_end_still_answers(fake: Fake) -> None:
    noise = "import atexit, os, time; print('{}'); os.system('echo noise'); __version__ = '10.4.0'"
    fake("tensorrt", f"{noise}\natexit.register(time.sleep, 600)")
    assert ask("tensorrt", seconds=30) == {"version": "10.4.0"}
    fake("tensorrt_rtx", f"{noise}\natexit.register(os.abort)")
    assert ask("tensorrt_rtx") == {"version": "10.4.0"}


def test_a_library_that_hangs_is_left_behind(fake: Fake) -> None:
    fake("tensorrt", "import time; time.sleep(60)")
    assert ask("tensorrt", seconds=1.0) == {"problem": "it did not answer within 1 s"}


def test_a_folder_of_the_users_is_not_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text("__version__ = 'mine'")
    monkeypatch.chdir(tmp_path)
    assert ask("onnx") == {"version": onnx.__version__}


def test_everything_broken_is_a_list_of_problems(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("torch", "torchvision", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")
    for name in names:
        fake(name, "import os; os.abort()")
    monkeypatch.setattr(module, "query_gpus", tuple)
    found = inspect_installed()
    assert found.problems.keys() == set(names)
    assert (found.torch, found.onnx, found.providers, found.torch_gpus) == (None, None, (), 0)


@pytest.mark.parametrize(
    ("number", "version"),
    [(91002, "9.10.2"), (92600, "9.26.0"), (8902, "8.9.2"), (8600, "8.6.0"), (None, None)],
)
def test_cudnn_numbers_are_read_as_its_header_writes_them(
    number: int | None, version: str | None
) -> None:
    """Since 9.0 major * 10000 + minor * 100 + patch, before that major * 1000 (cudnn_version.h)."""
    assert cudnn_version(number) == version


def test_the_driver_tells_of_gpus_and_else_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs = {"torch": {"gpus": [{"name": "Tesla T4", "sm": "7.5"}]}}
    monkeypatch.setattr(module, "ask", lambda name, *_, **__: torchs.get(name, {}))
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\n")
    monkeypatch.setattr(module, "_DRIVER_FILE", file)
    monkeypatch.setattr(module, "query_gpus", tuple)
    monkeypatch.setattr(module, "driver_version", lambda: None)
    found = inspect_installed()
    assert (found.gpus, found.driver) == ((Gpu("Tesla T4", "7.5"),), "470.57.02")
    gpus = (Gpu("Tesla V100-SXM2-16GB", "7.0", "535.129.03", ecc=True),)
    monkeypatch.setattr(module, "query_gpus", lambda: gpus)
    monkeypatch.setattr(module, "driver_version", lambda: "535.129.03")
    found = inspect_installed()
    assert (found.gpus, found.driver) == (gpus, "535.129.03")
    assert found.to_dict()["gpus"] == [{"name": "Tesla V100-SXM2-16GB", "sm": "7.0"}]


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32\n"
         "GCC version:  gcc version 12.3.0\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95  Release Build\n",
         "580.95"),
        ("something else\n", None),
    ],
)  # fmt: skip
def test_the_driver_is_read_from_its_kernel_module(
    tmp_path: Path, text: str, driver: str | None
) -> None:
    path = tmp_path / "version"
    path.write_text(text)
    assert driver_from(path) == driver
    assert driver_from(tmp_path / "absent") is None


def test_importing_the_facts_loads_no_library() -> None:
    code = (
        "import sys, export.doctor; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
