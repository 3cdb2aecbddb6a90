from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.measuring import conditions as module
from bench.measuring.conditions import Watch, disturbed
from bench.measuring.environment import affinity
from bench.measuring.records import Conditions, CpuConditions, GpuConditions
from export.nvml import THROTTLING, GpuReading

READING = GpuReading(
    sm_clock_mhz=1380,
    memory_clock_mhz=877,
    temperature_c=61,
    power_w=287.4,
    throttle_reasons=("idle",),
)
NOTHING = GpuReading(
    sm_clock_mhz=None,
    memory_clock_mhz=None,
    temperature_c=None,
    power_w=None,
    throttle_reasons=None,
)


class Kernel:
    """Files of a kernel, made up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds = 100.0

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def watch(self, gpu_index: int | None = None, **options: Any) -> Watch:
        return Watch(
            gpu_index,
            **{"cores": (0, 1), **options},
            clock=lambda: self.seconds,
            proc=self.root / "proc",
            cpus=self.root / "cpus",
            cgroup=self.root / "cgroup",
        )


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_what_cannot_be_read_is_none(kernel: Kernel) -> None:
    watch = kernel.watch()
    watch.look()
    kernel.seconds += 2.5
    assert watch.conditions() == Conditions(
        seconds=2.5,
        cpu=CpuConditions(
            load_average_after=None,
            quota_throttled_ms=None,
            thermal_throttles=None,
            stolen_share=None,
            waited_share=None,
            frequency_mhz_min=None,
            frequency_mhz_max=None,
        ),
        gpu=None,
    )


def test_files_that_say_something_else_are_none(kernel: Kernel) -> None:
    kernel.put("proc/self/cgroup", "0::/\nnonsense\n4:cpu:/\n")
    for name in (
        *("proc/loadavg", "proc/stat", "proc/cpuinfo", "proc/thread-self/stat"),
        "proc/self/task/7/schedstat",
        *("cgroup/cpu.stat", "cgroup/cpu/cpu.stat"),
        *(f"cpus/cpu0/thermal_throttle/{which}_throttle_count" for which in ("core", "package")),
    ):
        kernel.put(name, "what is\nthis ?\n")
    watch = kernel.watch()
    watch.look()
    found = watch.conditions().cpu
    assert set(found.model_dump().values()) == {None}


V2, V1 = "throttled_usec {}", "throttled_time {}"


@pytest.mark.parametrize(
    ("groups", "before", "after", "milliseconds"),
    [
        ("0::/", {"cpu.stat": (V2, 5_000)}, {"cpu.stat": (V2, 17_500)}, 12.5),
        ("0::/", {"cpu.stat": (V2, 5_000)}, {"cpu.stat": (V2, 5_000)}, 0.0),
        ("0::/", {"cpu.stat": ("usage_usec {}", 1)}, {"cpu.stat": ("usage_usec {}", 9)}, None),
        ("0::/", {"cpu.stat": (V2, 900)}, {"cpu.stat": (V2, 100)}, 0.0),
        (
            "0::/user.slice/job.service",
            {"user.slice/job.service/cpu.stat": (V2, 0), "user.slice/cpu.stat": (V2, 7_000)},
            {"user.slice/job.service/cpu.stat": (V2, 2_000), "user.slice/cpu.stat": (V2, 10_000)},
            3.0,
        ),
        (
            "0::/user.slice",
            {"user.slice/cpu.stat": (V2, 0), "other.slice/cpu.stat": (V2, 0)},
            {"user.slice/cpu.stat": (V2, 1_000), "other.slice/cpu.stat": (V2, 8_000)},
            1.0,
        ),
        (
            "9:memory:/\n4:cpu,cpuacct:/job\n0::/",
            {"cpu/job/cpu.stat": (V1, 1_000_000)},
            {"cpu/job/cpu.stat": (V1, 43_000_000)},
            42.0,
        ),
        # a container that sees the name its group has on the host, and mounts only its own
        (
            "4:cpuacct,cpu:/docker/4f2a",
            {"cpu/cpu.stat": (V1, 0)},
            {"cpu/cpu.stat": (V1, 250_000)},
            0.25,
        ),
        # a process that entered the container from outside, whose group is out of sight
        (
            "0::/..",
            {"cpu.stat": (V2, 0), "../cpu.stat": (V2, 0)},
            {"cpu.stat": (V2, 6_000), "../cpu.stat": (V2, 9_000)},
            6.0,
        ),
        (
            "4:cpu:/",
            {"cpu/cpu.stat": (V1, 0), "cpu.stat": (V2, 0)},
            {"cpu/cpu.stat": (V1, 2_000_000), "cpu.stat": (V2, 9_000)},
            2.0,
        ),
        ("5:cpuset:/\n6:cpuacct:/", {"cpu/cpu.stat": (V1, 0)}, {"cpu/cpu.stat": (V1, 9)}, None),
    ],
)
def test_time_that_a_quota_takes(
    kernel: Kernel,
    groups: str,
    before: dict[str, tuple[str, int]],
    after: dict[str, tuple[str, int]],
    milliseconds: float | None,
) -> None:
    kernel.put("proc/self/cgroup", groups + "\n")
    for name, (line, value) in before.items():
        kernel.put(f"cgroup/{name}", f"nr_periods 10\n{line.format(value)}\nnr_bursts 0\n")
    watch = kernel.watch()
    for name, (line, value) in after.items():
        kernel.put(f"cgroup/{name}", f"nr_periods 90\n{line.format(value)}\nnr_bursts 0\n")
    assert watch.conditions().cpu.quota_throttled_ms == milliseconds


def heat(kernel: Kernel, *cores: tuple[int, int]) -> None:
    for number, counts in enumerate(cores):
        for which, count in zip(("core", "package"), counts, strict=True):
            kernel.put(f"cpus/cpu{number}/thermal_throttle/{which}_throttle_count", f"{count}\n")


def test_heat_is_counted_over_the_affinity_and_a_package_once(kernel: Kernel) -> None:
    heat(kernel, (10, 100), (20, 100), (30, 500))
    watch = kernel.watch()
    heat(kernel, (11, 104), (23, 104), (99, 999))
    assert watch.conditions().cpu.thermal_throttles == (1 + 3) + 4
    assert kernel.watch(cores=(2,)).conditions().cpu.thermal_throttles == 0


def test_cores_without_counters_of_heat(kernel: Kernel) -> None:
    kernel.put("cpus/cpu1/thermal_throttle/core_throttle_count", "4\n")
    watch = kernel.watch()
    kernel.put("cpus/cpu1/thermal_throttle/core_throttle_count", "6\n")
    assert watch.conditions().cpu.thermal_throttles == 2
    assert kernel.watch(cores=(0,)).conditions().cpu.thermal_throttles is None


def ticks(kernel: Kernel, *cores: str) -> None:
    lines = [f"cpu{number} {text}" for number, text in enumerate(cores)]
    kernel.put("proc/stat", "\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 1 2 3 4 5", ""]))


def test_of_all_threads_the_one_that_waited_longest_counts(kernel: Kernel) -> None:
    kernel.put("proc/self/task/7/schedstat", "5000000000 1000000000 40\n")
    kernel.put("proc/self/task/8/schedstat", "1 2000000000 3\n")
    kernel.put("proc/self/task/9/schedstat", "1 9000000000 3\n")
    watch = kernel.watch()
    kernel.put("proc/self/task/7/schedstat", "9000000000 1500000000 80\n")
    kernel.put("proc/self/task/8/schedstat", "2 2000000000 4\n")
    (kernel.root / "proc/self/task/9/schedstat").unlink()  # a thread that has ended
    kernel.put("proc/self/task/10/schedstat", "100 1000000000 4\n")  # and one that is new
    kernel.seconds += 4.0
    assert watch.conditions().cpu.waited_share == pytest.approx(1.0 / 4.0)


def test_a_kernel_that_does_not_count_waiting_tells_nothing(kernel: Kernel) -> None:
    kernel.put("proc/self/task/7/schedstat", "0 0 0\n")
    watch = kernel.watch()
    kernel.seconds += 4.0
    assert watch.conditions().cpu.waited_share is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count")
def test_who_shares_a_core_waits_for_it() -> None:
    """Two threads of two processes on one core: each runs half of the time."""
    usual = os.sched_getaffinity(0)
    core = min(usual)
    busy = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            os.sched_setaffinity(other.pid, {core})
            os.sched_setaffinity(0, {core})
            watch = Watch(None)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pass
            waited = watch.conditions().cpu.waited_share
        finally:
            os.sched_setaffinity(0, usual)
            other.kill()
    assert waited is not None
    assert waited > 0.25


def test_stolen_time_is_a_share_of_the_affinity(kernel: Kernel) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice
    ticks(kernel, "100 0 0 50 0 0 0 7 0 0", "0 0 0 200 0 0 0 0 0 0", "0 0 0 0 0 0 0 0 0 0")
    watch = kernel.watch()
    ticks(kernel, "110 1 2 53 4 5 6 16 90 1", "20 0 0 230 0 0 0 10 0 0", "0 0 0 0 0 0 0 9 0 0")
    core0 = 10 + 1 + 2 + 3 + 4 + 5 + 6 + 9  # guests run in user's time
    core1 = 20 + 30 + 10
    assert watch.conditions().cpu.stolen_share == pytest.approx((9 + 10) / (core0 + core1))


def test_no_tick_has_no_share(kernel: Kernel) -> None:
    ticks(kernel, "100 0 0 50 0 0 0 7 0 0")
    assert kernel.watch().conditions().cpu.stolen_share is None
    ticks(kernel, "100 0 0 50 0")  # kernels before steal was told
    watch = kernel.watch()
    ticks(kernel, "120 0 0 50 0")
    assert watch.conditions().cpu.stolen_share is None


def put_thread_on(kernel: Kernel, core: int, name: str = "python") -> None:
    # pid (comm) state, then fields 4 to 52 of proc(5); the 39th is the processor
    fields = [str(number) for number in range(4, 53)]
    fields[39 - 4] = str(core)
    kernel.put("proc/thread-self/stat", f"4711 ({name}) R {' '.join(fields)}\n")


@pytest.mark.parametrize("name", ["python", "a (b) c) 7"])
def test_frequency_is_that_of_the_core_in_use(kernel: Kernel, name: str) -> None:
    watch = kernel.watch()
    for core, khz in ((0, 2_600_000), (1, 800_123), (0, 3_400_000), (9, 1_000)):
        kernel.put(f"cpus/cpu{core}/cpufreq/scaling_cur_freq", f"{khz}\n")
    for core in (1, 0):
        put_thread_on(kernel, core, name)
        watch.look()
    found = watch.conditions().cpu
    assert (found.frequency_mhz_min, found.frequency_mhz_max) == (800.123, 3400.0)


def test_frequency_of_a_kernel_that_tells_it_elsewhere(kernel: Kernel) -> None:
    cores = [f"processor\t: {core}\nmodel\t\t: 85\ncpu MHz\t\t: 2{core}00.5" for core in range(11)]
    kernel.put("proc/cpuinfo", "\n\n".join(cores) + "\n")
    put_thread_on(kernel, 1)
    watch = kernel.watch()
    watch.look()
    put_thread_on(kernel, 10)
    watch.look()
    found = watch.conditions().cpu
    assert (found.frequency_mhz_min, found.frequency_mhz_max) == (2100.5, 21000.5)


def test_load_is_that_of_the_end(kernel: Kernel) -> None:
    kernel.put("proc/loadavg", "0.10 0.20 0.30 1/83 9773\n")
    watch = kernel.watch()
    kernel.put("proc/loadavg", "1.75 0.20 0.30 1/83 9773\n")
    assert watch.conditions().cpu.load_average_after == 1.75


@pytest.fixture
def _affinity() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.usefixtures("_affinity")
def test_the_kernel_tells_the_core_of_a_thread() -> None:
    for core in affinity():
        os.sched_setaffinity(0, {core})
        assert module._core_of_thread(Path("/proc")) == core


def test_this_machine_is_watched() -> None:
    watch = Watch(None)
    watch.look()
    found = watch.conditions()
    assert found.gpu is None
    assert Conditions.model_validate_json(found.model_dump_json()) == found


def test_readings_of_a_gpu_are_summed_up(kernel: Kernel) -> None:
    readings = [
        replace(READING, sm_clock_mhz=1200, power_w=None),
        replace(READING, memory_clock_mhz=405, throttle_reasons=("idle", "hardware slowdown")),
        None,
        NOTHING,
        replace(
            READING,
            sm_clock_mhz=1530,
            temperature_c=83,
            power_w=301.5,
            throttle_reasons=("software power cap", "board limit"),
        ),
    ]
    asked = []

    def read(index: int) -> GpuReading | None:
        asked.append(index)
        return readings[len(asked) - 1]

    watch = kernel.watch(3, read=read)
    for _ in readings:
        watch.look()
    assert asked == [3] * 5
    assert watch.conditions().gpu == GpuConditions(
        readings=4,
        sm_clock_mhz_min=1200,
        sm_clock_mhz_max=1530,
        memory_clock_mhz_min=405,
        memory_clock_mhz_max=877,
        temperature_c_max=83,
        power_w_max=301.5,
        throttle_reasons=("software power cap", "hardware slowdown"),
    )


def test_a_gpu_that_tells_nothing_of_itself(kernel: Kernel) -> None:
    watch = kernel.watch(0, read=lambda index: NOTHING)
    watch.look()
    found = watch.conditions().gpu
    assert found is not None
    rest = found.model_dump()
    assert (rest.pop("readings"), rest.pop("throttle_reasons")) == (1, ())
    assert set(rest.values()) == {None}


def test_a_gpu_that_cannot_be_read_is_none(kernel: Kernel) -> None:
    watch = kernel.watch(0, read=lambda index: None)
    watch.look()
    assert watch.conditions().gpu is None


def test_no_gpu_is_not_read(kernel: Kernel) -> None:
    def read(index: int) -> GpuReading | None:
        raise AssertionError(index)

    watch = kernel.watch(None, read=read)
    watch.look()
    assert watch.conditions().gpu is None


def seen(
    *reasons: str,
    thermal: int | None = 0,
    quota_ms: float | None = 0.0,
    waited: float | None = 0.0,
    stolen: float | None = 0.0,
    seconds: float = 10.0,
) -> Conditions:
    gpu = dict.fromkeys(GpuConditions.model_fields)
    cpu = dict.fromkeys(CpuConditions.model_fields)
    return Conditions.model_validate(
        {
            "seconds": seconds,
            "cpu": {
                **cpu,
                "thermal_throttles": thermal,
                "quota_throttled_ms": quota_ms,
                "waited_share": waited,
                "stolen_share": stolen,
            },
            "gpu": {**gpu, "readings": 5, "throttle_reasons": reasons} if reasons else None,
        }
    )


@pytest.mark.parametrize(
    "conditions",
    [
        seen(),
        seen(thermal=None, quota_ms=None),
        seen(quota_ms=100.0),
        seen(seconds=0.0),
        seen(waited=0.1, stolen=0.1),
        seen(waited=None, stolen=None),
    ],
)
def test_a_steady_machine_is_no_reason(conditions: Conditions) -> None:
    assert disturbed(conditions) is None


@pytest.mark.parametrize(
    ("conditions", "sentence"),
    [
        (
            seen("software power cap", "hardware slowdown"),
            "the GPU throttled its clocks (software power cap, hardware slowdown); lock the "
            "GPU's clocks lower (nvidia-smi --lock-gpu-clocks), and measure again",
        ),
        (
            seen(thermal=1),
            "the processor throttled its clocks for heat; let the machine cool down, and measure "
            "again",
        ),
        (
            seen(quota_ms=101.0),
            "the container's CPU quota stopped the process for 0.1 s of 10 s; raise the quota, or "
            "lower bench.threads, and measure again",
        ),
        (
            seen(waited=0.26),
            "a thread waited for a core for 26 % of the time; stop other work, or lower "
            "bench.threads, and measure again",
        ),
        (
            seen(stolen=0.85),
            "the hypervisor gave 85 % of the time to others; choose a machine of your own, and "
            "measure again",
        ),
        (
            seen("sync boost", thermal=2),
            "the GPU throttled its clocks (sync boost) and the processor throttled its clocks for "
            "heat; lock the GPU's clocks lower (nvidia-smi --lock-gpu-clocks) and let the machine "
            "cool down, and measure again",
        ),
    ],
)
def test_what_speaks_against_judging_is_said(conditions: Conditions, sentence: str) -> None:
    assert disturbed(conditions) == sentence


@pytest.mark.parametrize("reason", THROTTLING)
def test_every_throttling_that_was_read_is_said(kernel: Kernel, reason: str) -> None:
    watch = kernel.watch(0, read=lambda index: replace(READING, throttle_reasons=(reason,)))
    watch.look()
    assert reason in (disturbed(watch.conditions()) or "")


@pytest.mark.parametrize("reason", ["idle", "application clocks setting", "reason 0x800"])
def test_what_is_no_throttling_is_not_said(kernel: Kernel, reason: str) -> None:
    watch = kernel.watch(0, read=lambda index: replace(READING, throttle_reasons=(reason,)))
    watch.look()
    assert disturbed(watch.conditions()) is None
