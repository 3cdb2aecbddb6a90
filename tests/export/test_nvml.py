from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from export import nvml
from export.nvml import (
    REASONS,
    THROTTLING,
    Gpu,
    GpuReading,
    decode_reasons,
    driver_version,
    nvml_index,
    query_gpus,
    read_gpu,
)

NO_GPU = not torch.cuda.is_available()
V100 = Gpu(
    "Tesla V100-SXM2-16GB",
    "7.0",
    driver="535.129.03",
    index=0,
    memory_bytes=17_179_869_184,
    max_sm_clock_mhz=1530,
    power_limit_w=300.0,
    ecc=True,
    mig=None,
    vbios="88.00.4F.00.09",
)
A100 = replace(
    V100, name="NVIDIA A100-SXM4-40GB", sm="8.0", index=1, ecc=False, mig=True, power_limit_w=399.5
)
READING = GpuReading(
    sm_clock_mhz=1380,
    memory_clock_mhz=877,
    temperature_c=61,
    power_w=287.412,
    throttle_reasons=("software power cap",),
)


class Machine:
    """Answers as NVML does for a V100 and an A100 that is divided."""

    uuids = ("aaaaaaaa-0000-0000-0000-000000000000", "bbbbbbbb-0000-0000-0000-000000000001")
    instance = "cccccccc-0000-0000-0000-000000000002"
    places = ("00000000:06:00.0", "00000001:8a:00.0")
    opened = 0
    reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap
    gpus = (V100, A100)

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "535.129.03"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index >= len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return SimpleNamespace(index=index, gpu=self.gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        if uuid == f"MIG-{self.instance}":
            return SimpleNamespace(index=None, parent=self.nvmlDeviceGetHandleByIndex(1))
        names = [f"GPU-{name}" for name in self.uuids]
        return self.nvmlDeviceGetHandleByIndex(names.index(uuid) if uuid in names else 99)

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> Any:
        return self.nvmlDeviceGetHandleByIndex(self.places.index(place))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Any:
        return handle.parent

    def nvmlDeviceGetIndex(self, handle: Any) -> int:
        return handle.index

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return handle.gpu.name

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        major, minor = handle.gpu.sm.split(".")
        return int(major), int(minor)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return pynvml.c_nvmlMemory_t(total=17_179_869_184, free=12, used=13)

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1530, pynvml.NVML_CLOCK_MEM: 878}[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return 300_000 if handle.index == 0 else 399_500

    def nvmlDeviceGetEccMode(self, handle: Any) -> list[int]:
        return [1, 0] if handle.index == 0 else [0, 1]

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        if handle.index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [1, 0]

    def nvmlDeviceGetVbiosVersion(self, handle: Any) -> str:
        return "88.00.4F.00.09"

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1380, pynvml.NVML_CLOCK_MEM: 877}[kind]

    def nvmlDeviceGetTemperatureV(self, handle: Any, sensor: int) -> int:
        return {pynvml.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return {pynvml.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return 287_412

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:
        return self.reasons


class StandIn:
    """The library on a machine: names and signatures are those of the installed one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.refused: dict[str, int] = {}
        """Code of the error that a function answers with."""
        self.missing: set[str] = set()
        """What this release of the library does not have."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)
        if name in self.missing:
            raise AttributeError(name)
        return real if not inspect.isfunction(real) else self._function(name, real)

    def _function(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            inspect.signature(real).bind(*arguments)
            if not self.machine.opened and name != "nvmlInit":
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            if name in self.refused:
                raise pynvml.NVMLError(self.refused[name])
            return getattr(self.machine, name)(*arguments)

        return call


@pytest.fixture(autouse=True)
def _opened_anew() -> Iterator[None]:
    nvml._nvml.cache_clear()
    yield
    nvml._nvml.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn(Machine())
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def test_the_gpus_are_those_of_the_driver(library: StandIn) -> None:
    assert query_gpus() == (V100, A100)
    assert driver_version() == "535.129.03"


FACTS = {
    "driver": "nvmlSystemGetDriverVersion",
    "memory_bytes": "nvmlDeviceGetMemoryInfo",
    "max_sm_clock_mhz": "nvmlDeviceGetMaxClockInfo",
    "power_limit_w": "nvmlDeviceGetEnforcedPowerLimit",
    "ecc": "nvmlDeviceGetEccMode",
    "mig": "nvmlDeviceGetMigMode",
    "vbios": "nvmlDeviceGetVbiosVersion",
}
ERRORS = ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "GPU_IS_LOST", "UNKNOWN")


def test_every_fact_that_may_be_missing_is_tried() -> None:
    assert FACTS.keys() | {"name", "sm", "index"} == {field.name for field in fields(Gpu)}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_that_the_driver_does_not_tell_is_none(
    library: StandIn, fact: str, error: str
) -> None:
    library.refused[FACTS[fact]] = getattr(pynvml, f"NVML_ERROR_{error}")
    assert query_gpus() == (replace(V100, **{fact: None}), replace(A100, **{fact: None}))


@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName", "nvmlDeviceGetCudaComputeCapability"],
)
def test_a_gpu_that_is_lost_is_left_out(library: StandIn, function: str) -> None:
    library.refused[function] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert query_gpus() == ()


def test_the_others_keep_their_number(library: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(index: int) -> Any:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(index=index, gpu=A100)

    monkeypatch.setattr(library.machine, "nvmlDeviceGetHandleByIndex", handle)
    assert query_gpus() == (A100,)


def test_text_may_come_as_bytes(library: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("nvmlDeviceGetName", "NVIDIA A100-SXM4-40GB"),
        ("nvmlSystemGetDriverVersion", "535.129.03"),
        ("nvmlDeviceGetVbiosVersion", "88.00.4F.00.09"),
    ):
        monkeypatch.setattr(library.machine, name, lambda *_, text=text: text.encode())
    assert query_gpus()[1] == A100


def test_text_that_is_none_is_as_good_as_lost(
    library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        library.machine, "nvmlDeviceGetVbiosVersion", lambda _: b"\xf8\x01".decode()
    )
    assert query_gpus()[0] == replace(V100, vbios=None)


def test_no_driver_is_no_gpu(library: StandIn) -> None:
    library.refused["nvmlInit"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert query_gpus() == ()
    assert driver_version() is None
    assert read_gpu(0) is None
    assert nvml_index(0) is None


def test_no_library_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert query_gpus() == ()
    assert driver_version() is None
    assert read_gpu(0) is None


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_the_real_library_finds_nothing_without_a_gpu() -> None:
    assert query_gpus() == ()
    assert read_gpu(0) is None


def test_a_reading(library: StandIn) -> None:
    assert read_gpu(0) == READING
    assert read_gpu(2) is None


READ = {
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo",),
    "memory_clock_mhz": ("nvmlDeviceGetClockInfo",),
    "temperature_c": ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"),
    "power_w": ("nvmlDeviceGetPowerUsage",),
    "throttle_reasons": (
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ),
}


@pytest.mark.parametrize("refused", dict.fromkeys(READ.values()), ids=lambda names: names[0])
def test_what_a_gpu_does_not_tell_is_none(library: StandIn, refused: tuple[str, ...]) -> None:
    library.refused = dict.fromkeys(refused, pynvml.NVML_ERROR_NOT_SUPPORTED)
    nothing = {name: None for name, functions in READ.items() if functions == refused}
    assert read_gpu(0) == replace(READING, **nothing)


@pytest.mark.parametrize("name", ["temperature_c", "throttle_reasons"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["driver", "library"])
def test_the_newer_and_the_older_function_tell_the_same(
    library: StandIn, name: str, which: int, how: str
) -> None:
    function = READ[name][which]
    if how == "driver":
        library.refused[function] = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    else:
        library.missing.add(function)
    assert read_gpu(0) == READING


def test_a_gpu_that_nothing_holds_back(library: StandIn) -> None:
    library.machine.reasons = pynvml.nvmlClocksThrottleReasonNone
    assert read_gpu(0) == replace(READING, throttle_reasons=())


def test_nvml_is_opened_once(library: StandIn) -> None:
    for _ in range(3):
        query_gpus()
        read_gpu(1)
    assert library.machine.opened == 1


WORDS = {
    "GpuIdle": "idle",
    "ApplicationsClocksSetting": "application clocks setting",
    "SwPowerCap": "software power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "hardware power brake",
    "DisplayClockSetting": "display clocks setting",
    "BoardLimit": "board limit",
    "Reliability": "reliability limit",
}


@pytest.mark.parametrize("prefix", ["nvmlClocksThrottleReason", "nvmlClocksEventReason"])
def test_every_bit_of_the_library_has_its_word(prefix: str) -> None:
    bits = {
        name.removeprefix(prefix): getattr(pynvml, name)
        for name in dir(pynvml)
        if name.startswith(prefix) and not name.endswith(("All", "None", "UserDefinedClocks"))
    }
    assert len(bits) >= 9
    for name, bit in bits.items():
        assert decode_reasons(bit) == (WORDS[name],)
    every = getattr(pynvml, f"{prefix}All")
    assert set(decode_reasons(every)) == {WORDS[name] for name, bit in bits.items() if bit & every}


def test_bits_that_nobody_knows_yet_are_shown_as_numbers() -> None:
    assert decode_reasons(0) == ()
    assert decode_reasons(0x24) == ("software power cap", "software thermal slowdown")
    assert decode_reasons(0x30004) == ("software power cap", "reason 0x30000")


def test_waiting_and_wishes_are_no_throttling() -> None:
    harmless = {"GpuIdle", "ApplicationsClocksSetting", "DisplayClockSetting"}
    unclear = {"BoardLimit", "Reliability"}
    assert set(THROTTLING) == {WORDS[name] for name in WORDS.keys() - harmless - unclear}
    assert set(THROTTLING) < set(REASONS.values())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Devices of CUDA, which counts those of ``CUDA_VISIBLE_DEVICES`` in its own order."""
    devices: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
    return devices


@pytest.mark.parametrize(
    ("device", "index"),
    [
        ({"uuid": Machine.uuids[1]}, 1),
        ({"uuid": Machine.uuids[0], "pci_domain_id": 1, "pci_bus_id": 138, "pci_device_id": 0}, 0),
        ({"uuid": Machine.instance}, 1),
        ({"pci_domain_id": 0, "pci_bus_id": 6, "pci_device_id": 0}, 0),
        ({"pci_domain_id": 1, "pci_bus_id": 138, "pci_device_id": 0}, 1),
        ({"uuid": "elsewhere", "pci_domain_id": 1, "pci_bus_id": 138, "pci_device_id": 0}, 1),
        ({"uuid": "elsewhere"}, None),
        ({}, None),
    ],
)
def test_cudas_number_leads_to_nvmls(
    library: StandIn, cuda: list[Any], device: dict[str, Any], index: int | None
) -> None:
    cuda += [SimpleNamespace(uuid=Machine.uuids[0]), SimpleNamespace(**device)]
    assert nvml_index(1) == nvml_index() == index
    assert nvml_index(0) == 0


def test_no_cuda_is_no_number(library: StandIn, cuda: list[Any]) -> None:
    assert nvml_index(0) is None
    assert nvml_index() is None


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
def test_a_real_gpu_is_found_and_read() -> None:
    index = nvml_index()
    assert index is not None
    found = {gpu.index: gpu for gpu in query_gpus()}[index]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert found.sm == f"{properties.major}.{properties.minor}"
    assert found.name in properties.name  # an instance of a divided GPU has a longer one
    assert found.driver is not None
    assert found.memory_bytes is not None
    assert found.memory_bytes >= properties.total_memory
    reading = read_gpu(index)
    assert reading is not None
    assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    if reading.sm_clock_mhz is not None and found.max_sm_clock_mhz is not None:
        assert 0 < reading.sm_clock_mhz <= found.max_sm_clock_mhz
