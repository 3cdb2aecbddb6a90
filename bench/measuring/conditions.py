"""What processor and GPU did while they were measured: clocks, heat, limits, and time taken away.

The kernel counts heat, quota, stolen time and waiting for a core, so for those a start and an end
are enough. Clocks, temperature and power are read once a round; what comes and goes between two
looks is not seen. What cannot be read is None.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring.environment import affinity, read_fact
from bench.measuring.records import Conditions, CpuConditions, GpuConditions
from export.nvml import THROTTLING, GpuReading, read_gpu

QUOTA_SHARE = 0.01
"""Share of the time that a container's quota may stop the process, and latency is still judged.

A quota is part of where a network runs, so a rare stop belongs to the figures: 1 % of the time
moves the mean by 1 %, and as a stop (up to a period, 100 ms) lasts longer than most calls, it meets
fewer than one call in a hundred. Beyond that, p99 is the length of a stop and not of a call.
"""
TAKEN_SHARE = 0.1
"""Share of the time that others may have the cores, and latency is still judged.

Of two networks that share their cores the longer one is interrupted more often, and the faster one
loses less of its caches, so the ratio itself moves, and no repetition shows it: by 3 to 9 % where
half of a core was taken, by up to 17 % where one of two threads had none (docs/measuring.md).
"""

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_PROCESSOR_FIELD = 39  # of proc/PID/stat, counted from 1
_TICKS = 8  # user to steal of a line in proc/stat; the guests' ticks after it are part of user's


class Watch:
    """Watches the machine from now on, a look at a time."""

    def __init__(
        self,
        gpu_index: int | None,
        *,
        cores: Iterable[int] | None = None,
        read: Callable[[int], GpuReading | None] = read_gpu,
        clock: Callable[[], float] = time.perf_counter,
        proc: Path = _PROC,
        cpus: Path = _CPUS,
        cgroup: Path = _CGROUP,
    ) -> None:
        """Start to count.

        Args:
            gpu_index: NVML's number of the GPU that is measured (``export.nvml.nvml_index``), or
                None without one.
            cores: logical cores that count; default those that this process may run on.
            read: reads a GPU.
            clock: tells seconds.
            proc: where the kernel tells of processes.
            cpus: where it tells of cores.
            cgroup: where it tells of control groups.
        """
        self._gpu_index = gpu_index
        self._cores = tuple(affinity() if cores is None else cores)
        self._read_gpu, self._clock = read, clock
        self._proc, self._cpus = proc, cpus
        self._quotas = _quota_files(proc, cgroup)
        self._frequencies: list[float] = []
        self._readings: list[GpuReading] = []
        self._before = self._count()
        self._started = clock()

    def look(self) -> None:
        """Read what changes from moment to moment; best right after work, before clocks drop."""
        if self._gpu_index is not None:
            reading = self._read_gpu(self._gpu_index)
            if reading is not None:
                self._readings.append(reading)
        frequency = _frequency_mhz(self._proc, self._cpus)
        if frequency is not None:
            self._frequencies.append(frequency)

    def conditions(self) -> Conditions:
        """Return what was seen from the start until now."""
        seconds, before, after = self._clock() - self._started, self._before, self._count()
        return Conditions(
            seconds=max(0.0, seconds),
            cpu=CpuConditions(
                load_average_after=_load_average(self._proc),
                quota_throttled_ms=max(_rises(before.quota_ms, after.quota_ms), default=None),
                thermal_throttles=_thermal_throttles(before, after),
                stolen_share=_stolen_share(before, after),
                waited_share=_waited_share(before, after, seconds),
                frequency_mhz_min=min(self._frequencies, default=None),
                frequency_mhz_max=max(self._frequencies, default=None),
            ),
            gpu=_gpu_conditions(self._readings) if self._readings else None,
        )

    def _count(self) -> _Counters:
        folders = [self._cpus / f"cpu{core}/thermal_throttle" for core in self._cores]
        return _Counters(
            quota_ms=_numbers(self._quotas, _throttled_ms),
            core=_numbers([folder / "core_throttle_count" for folder in folders], int),
            package=_numbers([folder / "package_throttle_count" for folder in folders], int),
            ticks=_ticks(self._proc, self._cores),
            waited_ns=_numbers((self._proc / "self/task").glob("*/schedstat"), _waited_ns),
        )


def disturbed(conditions: Conditions | None) -> str | None:
    """Return why latency measured under these conditions cannot be judged, and what to do.

    Returns:
        The rest of a sentence; None where nothing speaks against judging, or nothing was watched.
    """
    if conditions is None:
        return None
    cpu, gpu = conditions.cpu, conditions.gpu
    found: list[tuple[str, str]] = []
    if gpu is not None and gpu.throttle_reasons:
        reasons = ", ".join(gpu.throttle_reasons)
        advice = "lock the GPU's clocks lower (nvidia-smi --lock-gpu-clocks)"
        found.append((f"the GPU throttled its clocks ({reasons})", advice))
    if cpu.thermal_throttles:
        found.append(("the processor throttled its clocks for heat", "let the machine cool down"))
    stopped = (cpu.quota_throttled_ms or 0) / 1000
    if stopped > QUOTA_SHARE * conditions.seconds:
        found.append(
            (
                f"the container's CPU quota stopped the process for {stopped:.2g} s of "
                f"{conditions.seconds:.2g} s",
                "raise the quota, or lower bench.threads",
            )
        )
    waited, stolen = 100 * (cpu.waited_share or 0), 100 * (cpu.stolen_share or 0)
    if waited > 100 * TAKEN_SHARE:
        found.append(
            (
                f"a thread waited for a core for {waited:.0f} % of the time",
                "stop other work, or lower bench.threads",
            )
        )
    if stolen > 100 * TAKEN_SHARE:
        found.append(
            (
                f"the hypervisor gave {stolen:.0f} % of the time to others",
                "choose a machine of your own",
            )
        )
    if not found:
        return None
    reasons, advice = (" and ".join(half) for half in zip(*found, strict=True))
    return f"{reasons}; {advice}, and measure again"


@dataclass(frozen=True)
class _Counters:
    """What the kernel has counted so far, by the file that told it."""

    quota_ms: Mapping[Path, float]
    core: Mapping[Path, float]
    package: Mapping[Path, float]
    ticks: tuple[int, int] | None
    """Stolen, and all."""
    waited_ns: Mapping[Path, float]
    """Of every thread of this process."""


def _quota_files(proc: Path, cgroup: Path) -> tuple[Path, ...]:
    """Return ``cpu.stat`` of this process's control group and of each above it, v2 and v1.

    In a container that still sees the host's names, only the topmost is there.
    """
    found = []
    for line in (read_fact(proc / "self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = cgroup / "cpu" if controllers else cgroup
        group = top if ".." in Path(path).parts else top / path.lstrip("/")
        found += [one / "cpu.stat" for one in (group, *group.parents) if one.is_relative_to(top)]
    return tuple(found)


def _throttled_ms(text: str) -> float:
    """Read ``throttled_usec`` of version 2, or ``throttled_time`` (nanoseconds) of version 1."""
    fields = dict(line.split() for line in text.splitlines())
    if "throttled_usec" in fields:
        return int(fields["throttled_usec"]) / 1e3
    return int(fields["throttled_time"]) / 1e6


def _ticks(proc: Path, cores: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the stolen ticks of cores, and all of their ticks."""
    text = read_fact(proc / "stat") or ""
    lines = re.findall(r"^cpu(\d+) ([\d ]+)$", text, flags=re.MULTILINE)
    ticks = [list(map(int, rest.split()))[:_TICKS] for core, rest in lines if int(core) in cores]
    if not ticks or any(len(row) < _TICKS for row in ticks):
        return None
    return sum(row[-1] for row in ticks), sum(map(sum, ticks))


def _frequency_mhz(proc: Path, cpus: Path) -> float | None:
    """Return the clock of the core that this thread is on."""
    core = _core_of_thread(proc)
    with suppress(ValueError):
        return int(read_fact(cpus / f"cpu{core}/cpufreq/scaling_cur_freq") or "") / 1000
    match = re.search(
        rf"^processor\s*: {core}$.*?^cpu MHz\s*: ([\d.]+)$",
        read_fact(proc / "cpuinfo") or "",
        flags=re.MULTILINE | re.DOTALL,
    )
    return float(match.group(1)) if match else None


def _core_of_thread(proc: Path) -> int | None:
    # The second field is the program's name in brackets, and may hold spaces and brackets itself.
    fields = (read_fact(proc / "thread-self/stat") or "").rpartition(")")[2].split()
    with suppress(IndexError):
        return int(fields[_PROCESSOR_FIELD - 3])
    return None


def _load_average(proc: Path) -> float | None:
    with suppress(ValueError, IndexError):
        return float((read_fact(proc / "loadavg") or "").split()[0])
    return None


def _thermal_throttles(before: _Counters, after: _Counters) -> int | None:
    cores, packages = _rises(before.core, after.core), _rises(before.package, after.package)
    if not cores and not packages:
        return None
    # Every core of a package repeats the count of its package.
    return round(sum(cores) + max(packages, default=0))


def _stolen_share(before: _Counters, after: _Counters) -> float | None:
    if before.ticks is None or after.ticks is None:
        return None
    stolen, passed = (end - start for start, end in zip(before.ticks, after.ticks, strict=True))
    return min(1.0, max(0.0, stolen / passed)) if passed > 0 else None


def _waited_ns(text: str) -> float:
    """Read how long a thread was ready and did not run; of a kernel that counts it."""
    _, waited, runs = map(int, text.split())
    if not runs:
        raise ValueError("nothing was counted")
    return waited


def _waited_share(before: _Counters, after: _Counters, seconds: float) -> float | None:
    """Return the share of the thread that waited longest; one that is new began at nothing."""
    if not after.waited_ns or seconds <= 0:
        return None
    waited = max(now - before.waited_ns.get(file, 0) for file, now in after.waited_ns.items())
    return min(1.0, max(0.0, waited / 1e9 / seconds))


def _gpu_conditions(readings: list[GpuReading]) -> GpuConditions:
    def known(name: str) -> list[Any]:
        found = (getattr(reading, name) for reading in readings)
        return [value for value in found if value is not None]

    reasons = {reason for reading in readings for reason in reading.throttle_reasons or ()}
    return GpuConditions(
        readings=len(readings),
        sm_clock_mhz_min=min(known("sm_clock_mhz"), default=None),
        sm_clock_mhz_max=max(known("sm_clock_mhz"), default=None),
        memory_clock_mhz_min=min(known("memory_clock_mhz"), default=None),
        memory_clock_mhz_max=max(known("memory_clock_mhz"), default=None),
        temperature_c_max=max(known("temperature_c"), default=None),
        power_w_max=max(known("power_w"), default=None),
        throttle_reasons=tuple(reason for reason in THROTTLING if reason in reasons),
    )


def _numbers(files: Iterable[Path], read: Callable[[str], float]) -> dict[Path, float]:
    """Return the number that each file tells, of those that tell one."""
    found = {}
    for file in files:
        with suppress(ValueError, KeyError):
            found[file] = read(read_fact(file) or "")
    return found


def _rises(before: Mapping[Path, float], after: Mapping[Path, float]) -> list[float]:
    """Return how far each count rose; one that was reset while it was watched did not rise."""
    return [max(0, after[file] - before[file]) for file in before.keys() & after.keys()]
