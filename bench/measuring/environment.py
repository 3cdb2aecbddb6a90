"""What the figures were measured on: enough to tell two machines apart, nothing that names one.

No host name, no user name, no path. Nothing here imports a runtime: versions are read from package
metadata. What cannot be read is None.
"""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from bench.measuring.records import Environment
from export.latency.serving import cpu_name
from export.nvml import Gpu, nvml_index, query_gpus

PACKAGES = (
    *("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
"""Distributions whose versions belong to a measurement."""

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def fingerprint(*, threads: int) -> Environment:
    """Describe this machine; ``threads`` is what the runtime is given."""
    cores = affinity()
    return Environment(
        cpu=cpu_name(),
        physical_cores=_physical(_all_cores()),
        logical_cores=os.cpu_count(),
        affinity=cores,
        cpu_quota=cpu_quota(),
        threads=threads,
        load_average=_load_average(),
        governor=read_fact(_CPUS / f"cpu{cores[0]}/cpufreq/scaling_governor"),
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
    if text := read_fact(cgroup / "cpu.max"):
        quota, _, period = text.partition(" ")
    else:
        quota = read_fact(cgroup / "cpu/cpu.cfs_quota_us") or ""
        period = read_fact(cgroup / "cpu/cpu.cfs_period_us") or ""
    with suppress(ValueError, ZeroDivisionError):
        share = int(quota) / int(period)
        return share if share > 0 else None
    return None


def _all_cores() -> tuple[int, ...]:
    return tuple(range(os.cpu_count() or 1))


def _physical(cores: tuple[int, ...], cpus: Path = _CPUS) -> int | None:
    """Count cores that share no execution units, by what the kernel lists as their siblings."""
    siblings = {read_fact(cpus / f"cpu{core}/topology/thread_siblings_list") for core in cores}
    return None if None in siblings else len(siblings)


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
    found = {gpu.index: _facts(gpu) for gpu in query_gpus()}
    first = next(iter(found.values()), None)
    if all(facts == first for facts in found.values()):
        return first
    return found.get(nvml_index(0))  # only here does it matter which one, and only torch can tell


def _facts(gpu: Gpu) -> dict[str, str]:
    facts = {name: fact for name, fact in gpu.to_dict().items() if fact is not None}
    del facts["index"]  # where a GPU sits says nothing of what it can do
    return {name: _word(fact) for name, fact in facts.items()}


def _word(fact: object) -> str:
    return ("on" if fact else "off") if isinstance(fact, bool) else str(fact)


def read_fact(path: Path) -> str | None:
    """Return what a file of the kernel says, without space around it; None if it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return None
