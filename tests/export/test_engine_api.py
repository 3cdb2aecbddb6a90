from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
from engine_files import provider_of
from tensorrt_contract import VERSIONS, fake_tensorrt

from compress.errors import EnvironmentUnfitError
from export.engines.api import TensorRT, load_tensorrt


def load(monkeypatch: pytest.MonkeyPatch, version: str, **behaviour: bool) -> TensorRT:
    provider = provider_of(version)
    monkeypatch.setitem(sys.modules, provider, fake_tensorrt(version, **behaviour))
    return load_tensorrt(provider)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "explicit_batch", "strongly_typed", "precision_flags", "monitor", "flags"),
    [
        ("8.5.3.1", True, False, True, False, 0b01),
        ("8.6.1", True, False, True, False, 0b01),
        ("10.4.0", True, True, True, True, 0b11),
        ("10.16.1.11", True, True, True, True, 0b11),
        ("11.4.0.106", False, True, False, True, 0),
        ("rtx-1.7.1.116", False, True, False, True, 0),
    ],
)
def test_what_each_release_can(
    version: str,
    explicit_batch: bool,
    strongly_typed: bool,
    precision_flags: bool,
    monitor: bool,
    flags: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensorrt = load(monkeypatch, version)
    assert tensorrt.has_explicit_batch is explicit_batch
    assert tensorrt.has_strongly_typed is strongly_typed
    assert tensorrt.has_precision_flags is precision_flags
    assert tensorrt.has_progress_monitor is monitor
    assert tensorrt.network_flags == flags


def test_the_title_names_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, "10.4.0").title == "TensorRT 10.4.0"
    assert load(monkeypatch, "rtx-1.7.1.116").title == "TensorRT-RTX 1.7.1.116"


@pytest.mark.parametrize(
    ("provider", "extra"), [("tensorrt", r"\[tensorrt\]'.*\[v100\]'"), ("tensorrt_rtx", r"\[rtx\]")]
)
def test_a_missing_library_names_the_extra(
    provider: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, provider, None)  # what Python does for a module that is not
    with pytest.raises(EnvironmentUnfitError, match=rf"is not installed: pip install .*{extra}"):
        load_tensorrt(provider)  # type: ignore[arg-type]


def test_bindings_without_their_libraries_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "tensorrt":
                raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(EnvironmentUnfitError, match=r"cannot be loaded \(libnvinfer\.so\.10: "):
        load_tensorrt("tensorrt")


def test_one_module_has_one_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = load(monkeypatch, "10.4.0")
    assert load_tensorrt("tensorrt") is tensorrt
    assert load(monkeypatch, "10.4.0") is not tensorrt


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_driver_neither_builder_nor_runtime(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = load(monkeypatch, version, driver=False)
    for create in (tensorrt.create_builder, tensorrt.create_runtime):
        with pytest.raises(EnvironmentUnfitError, match="CUDA initialization failure") as caught:
            create()
        assert isinstance(caught.value.__cause__, TypeError)


def test_the_first_error_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = load(monkeypatch, "10.4.0")
    logger, severity = tensorrt.logger, tensorrt.module.ILogger
    assert tensorrt.messages.reason() == "it gives no reason"
    logger.log(severity.INFO, "fine so far")
    logger.log(severity.WARNING, "tight memory")
    assert tensorrt.messages.reason() == "tight memory"
    logger.log(severity.ERROR, "[optimizer.cpp::computeCosts::38] Error 10: No kernel for conv.\n ")
    logger.log(severity.INTERNAL_ERROR, "[builder.cpp::build::1] engine != nullptr")
    assert tensorrt.messages.reason() == "Error 10: No kernel for conv"
    assert len(tensorrt.messages.errors) == 2
    tensorrt.messages.clear()
    assert tensorrt.messages.reason() == "it gives no reason"


def test_messages_go_to_the_log_and_not_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt = load(monkeypatch, "10.4.0")
    caplog.set_level(logging.DEBUG, logger="compress.tensorrt")
    for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
        tensorrt.logger.log(getattr(tensorrt.module.ILogger, name), f"some {name}")
    assert [record.getMessage() for record in caplog.records] == [
        *("VERBOSE: some VERBOSE", "INFO: some INFO", "WARNING: some WARNING"),
        *("ERROR: some ERROR", "INTERNAL_ERROR: some INTERNAL_ERROR"),
    ]
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def test_a_flood_of_errors_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = load(monkeypatch, "10.4.0")
    for number in range(1000):
        tensorrt.logger.log(tensorrt.module.ILogger.ERROR, f"error {number}")
    assert len(tensorrt.messages.errors) == 20
    assert tensorrt.messages.reason() == "error 0"


def test_importing_the_package_imports_no_tensorrt() -> None:
    import subprocess

    code = (
        "import sys, export.engines.build, export.engines.sidecar; "
        "print(*sys.modules.keys() & {'tensorrt', 'tensorrt_rtx', 'torch', 'onnx'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_the_stand_in_is_a_module() -> None:
    assert isinstance(fake_tensorrt("10.4.0"), ModuleType)
