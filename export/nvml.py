"""What the NVIDIA driver says of the GPUs here, through NVML: the one place that asks it.

NVML counts the GPUs of a machine by PCI bus, whatever ``CUDA_VISIBLE_DEVICES`` hides and in
whatever order CUDA counts the rest; ``nvml_index`` leads from CUDA's number to NVML's. What the
library, the driver or the GPU does not tell is None. Nothing that names a machine leaves here.

NVML is opened once per process and stays open: without a persistence daemon opening it wakes the
GPU, which takes seconds, while one reading is a few calls of the driver.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

REASONS = {
    0x001: "idle",
    0x002: "application clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks setting",
    0x200: "board limit",
    0x400: "reliability limit",
}
"""Bits of NVML's ``nvmlClocksEventReasons``, formerly ``nvmlClocksThrottleReasons``."""
THROTTLING = (
    "software power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
)
"""Those that hold the clocks below what was asked for.

An idle GPU has nothing to do, and the two settings are somebody's wish. The board and reliability
limits, which drivers tell since R615 (NVML's change log), are shown and not judged: NVML does not
say whether they are part of normal work.
"""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    """As its maker calls it."""
    sm: str
    """CUDA compute capability, such as 7.0."""
    driver: str | None = None
    """Version of the driver."""
    index: int | None = None
    """NVML's number; None if another than NVML found the GPU."""
    memory_bytes: int | None = None
    """The whole memory."""
    max_sm_clock_mhz: int | None = None
    """The highest clock of its multiprocessors."""
    power_limit_w: float | None = None
    """The limit in force, in watts."""
    ecc: bool | None = None
    """Whether its memory corrects errors, which takes bandwidth."""
    mig: bool | None = None
    """Whether it is divided into instances."""
    vbios: str | None = None
    """Version of its firmware, which sets its clocks and limits."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """What a GPU does at one moment."""

    sm_clock_mhz: int | None
    """Clock of its multiprocessors."""
    memory_clock_mhz: int | None
    temperature_c: int | None
    """Of the chip, in degrees Celsius."""
    power_w: float | None
    """Of the whole board, in watts; from Ampere on, but for A100, the mean of the last second."""
    throttle_reasons: tuple[str, ...] | None
    """Every one of ``REASONS`` that holds, throttling or not."""


def query_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that NVML lists, none where there is no driver or no library."""
    found = (_describe(index) for index in range(_ask("nvmlDeviceGetCount") or 0))
    return tuple(gpu for gpu in found if gpu is not None)


def find_gpu() -> Gpu | None:
    """Return the current GPU of this process, or None where torch can use none.

    Torch names it, as CUDA sees it: an instance of a divided GPU has a name of its own.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", driver_version())


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver."""
    return _text(_ask("nvmlSystemGetDriverVersion"))


def nvml_index(cuda_index: int | None = None) -> int | None:
    """Return NVML's number of a GPU that CUDA knows by another.

    Torch opens CUDA, which obeys ``CUDA_VISIBLE_DEVICES``, and tells the device's UUID, or from old
    releases its place on the PCI bus; NVML finds the device by either. An instance of a divided GPU
    (MIG) leads to the whole GPU, which is what has clocks and a temperature.

    Args:
        cuda_index: N of ``cuda:N``; default the current device of torch.

    Returns:
        None where NVML or CUDA does not work.
    """
    import torch

    if _nvml() is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if cuda_index is None else cuda_index
    handle = _handle_of(torch.cuda.get_device_properties(index))
    return None if handle is None else _ask("nvmlDeviceGetIndex", handle)


def read_gpu(index: int) -> GpuReading | None:
    """Read clocks, temperature, power and throttling of a GPU.

    Args:
        index: NVML's number.

    Returns:
        None where there is no such GPU.
    """
    nvml, handle = _nvml(), _ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return None
    mask = _ask_either(
        "nvmlDeviceGetCurrentClocksEventReasons",  # older drivers have only the other
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        handle,
    )
    return GpuReading(
        sm_clock_mhz=_ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=_ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        temperature_c=_ask_either(
            "nvmlDeviceGetTemperatureV",  # CUDA 14 drops the other
            "nvmlDeviceGetTemperature",
            handle,
            nvml.NVML_TEMPERATURE_GPU,
        ),
        power_w=_watts(_ask("nvmlDeviceGetPowerUsage", handle)),
        throttle_reasons=None if mask is None else decode_reasons(mask),
    )


def decode_reasons(mask: int) -> tuple[str, ...]:
    """Return the words of a bit mask of reasons; a bit that is not in ``REASONS`` is a number."""
    unknown = mask & ~sum(REASONS)
    words = tuple(word for bit, word in REASONS.items() if mask & bit)
    return (*words, f"reason {unknown:#x}") if unknown else words


def _describe(index: int) -> Gpu | None:
    """Return the facts of a GPU; None of one that the driver lists and has lost."""
    nvml, handle = _nvml(), _ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return None
    name = _text(_ask("nvmlDeviceGetName", handle))
    capability = _ask("nvmlDeviceGetCudaComputeCapability", handle)
    if name is None or capability is None:  # every GPU that works has both
        return None
    memory = _ask("nvmlDeviceGetMemoryInfo", handle)
    ecc, mig = _ask("nvmlDeviceGetEccMode", handle), _ask("nvmlDeviceGetMigMode", handle)
    return Gpu(
        name=name,
        sm="{}.{}".format(*capability),
        driver=driver_version(),
        index=index,
        memory_bytes=None if memory is None else int(memory.total),
        max_sm_clock_mhz=_ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
        power_limit_w=_watts(_ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
        ecc=None if ecc is None else bool(ecc[0]),  # now, and after the next reboot
        mig=None if mig is None else bool(mig[0]),
        vbios=_text(_ask("nvmlDeviceGetVbiosVersion", handle)),
    )


def _handle_of(properties: Any) -> Any:
    """Return NVML's handle of a device by what torch tells of it, or None."""
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        handle = _ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
        if handle is not None:
            return handle
        instance = _ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
        if instance is not None:
            return _ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", instance)
    if getattr(properties, "pci_bus_id", None) is None:
        return None
    place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    return _ask("nvmlDeviceGetHandleByPciBusId", "{:08x}:{:02x}:{:02x}.0".format(*place))


@cache
def _nvml() -> Any:
    """Return the opened library, or None where it or the driver is missing."""
    try:
        nvml = import_module("pynvml")  # of nvidia-ml-py
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or one whose library and kernel module differ
        return None
    return nvml


def _ask(function: str, *arguments: Any) -> Any:
    """Return NVML's answer; None where library, driver or GPU has none."""
    nvml = _nvml()
    if nvml is None or not hasattr(nvml, function):
        return None
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError):  # some drivers under WSL spoil the name
        return None


def _ask_either(newer: str, older: str, *arguments: Any) -> Any:
    answer = _ask(newer, *arguments)
    return _ask(older, *arguments) if answer is None else answer


def _text(answer: str | bytes | None) -> str | None:
    """Return text; early releases of the library answer in bytes."""
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
