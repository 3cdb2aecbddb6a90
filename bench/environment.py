"""What the figures were measured on: enough to tell two machines apart, nothing that names one.

No host name, no user name, no path. Nothing here imports a runtime: versions are read from package
metadata. What cannot be read is None.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from compress.documents import Section

PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
"""Distributions whose versions belong to a measurement."""

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_GPU_FACTS = ("name", "driver_version", "compute_cap", "clocks.max.sm", "power.limit")
_GPU_SECONDS = 10


class Environment(Section):
    """The machine and the software of one measurement."""

    cpu: str | None
    """Model name of the processor."""
    physical_cores: int | None
    """Of the whole machine."""
    logical_cores: int | None
    """Of the whole machine."""
    affinity: tuple[int, ...]
    """Logical cores that this process may run on."""
    cpu_quota: float | None
    """Cores' worth of time that the container grants; None without a limit."""
    threads: int
    """Threads that the runtime was given."""
    load_average: float | None
    """Runnable processes over the last minute, before the first measurement."""
    governor: str | None
    """Frequency governor of the first core of the affinity."""
    platform: str
    """Operating system, kernel release and instruction set."""
    python: str
    packages: dict[str, str]
    """Versions of what is installed of ``PACKAGES``."""
    gpu: dict[str, str] | None
    """What nvidia-smi says of the first GPU; None where it is absent."""


def fingerprint(*, threads: int) -> Environment:
    """Describe this machine; ``threads`` is what the runtime is given."""
    cores = affinity()
    return Environment(
        cpu=_cpu_model(),
        physical_cores=_physical(_all_cores()),
        logical_cores=os.cpu_count(),
        affinity=cores,
        cpu_quota=cpu_quota(),
        threads=threads,
        load_average=_load_average(),
        governor=_read(_CPUS / f"cpu{cores[0]}/cpufreq/scaling_governor"),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages=_versions(),
        gpu=_gpu(),
    )


def default_threads() -> int:
    """Return the physical cores that this process may use, within its container's quota."""
    cores = affinity()
    usable = _physical(cores) or len(cores)
    quota = cpu_quota()
    return usable if quota is None else max(1, min(usable, math.floor(quota)))


def affinity() -> tuple[int, ...]:
    """Return the logical cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return _all_cores()


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """Return the cores' worth of time that the control group grants, None without a limit."""
    if text := _read(cgroup / "cpu.max"):
        quota, _, period = text.partition(" ")
    else:
        quota = _read(cgroup / "cpu/cpu.cfs_quota_us") or ""
        period = _read(cgroup / "cpu/cpu.cfs_period_us") or ""
    with suppress(ValueError, ZeroDivisionError):
        share = int(quota) / int(period)
        return share if share > 0 else None
    return None


def _all_cores() -> tuple[int, ...]:
    return tuple(range(os.cpu_count() or 1))


def _physical(cores: tuple[int, ...], cpus: Path = _CPUS) -> int | None:
    """Count cores that share no execution units, by what the kernel lists as their siblings."""
    siblings = {_read(cpus / f"cpu{core}/topology/thread_siblings_list") for core in cores}
    return None if None in siblings else len(siblings)


def _cpu_model() -> str | None:
    text = _read(Path("/proc/cpuinfo")) or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or None


def _load_average() -> float | None:
    with suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _gpu() -> dict[str, str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={','.join(_GPU_FACTS)}", "--format=csv,noheader", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True
        ).stdout
        return dict(zip(_GPU_FACTS, (fact.strip() for fact in answer.split(",")), strict=True))
    return None


def _read(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return None
