from __future__ import annotations

import getpass
import os
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from bench.measuring import environment
from bench.measuring.environment import cpu_quota, default_threads, fingerprint
from export.nvml import Gpu


def test_fingerprint_describes_this_machine() -> None:
    found = fingerprint(threads=3)
    assert found.threads == 3
    assert found.logical_cores == os.cpu_count()
    assert found.python == platform.python_version()
    assert found.packages["torch"] == metadata.version("torch")
    assert found.packages["numpy"] == metadata.version("numpy")
    assert found.affinity


def test_fingerprint_names_nobody() -> None:
    found = fingerprint(threads=1)
    text = found.model_copy(update={"cpu": None}).model_dump_json()
    for secret in (platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())):
        assert len(secret) < 5 or secret not in text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_container(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert cpu_quota(tmp_path) == expected


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    for core, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n", encoding="utf-8")
    assert environment._physical((0, 1, 2, 3), tmp_path) == 2
    assert environment._physical((0, 2), tmp_path) == 1
    assert environment._physical((0, 9), tmp_path) is None


@pytest.mark.parametrize(
    ("physical", "quota", "expected"),
    [(4, None, 4), (4, 2.5, 2), (4, 0.5, 1), (None, None, 8), (4, 64.0, 4)],
)
def test_default_threads(
    monkeypatch: pytest.MonkeyPatch, physical: int | None, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(environment, "affinity", lambda: tuple(range(8)))
    monkeypatch.setattr(environment, "_physical", lambda cores: physical)
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert default_threads() == expected


V100 = Gpu("Tesla V100-SXM2-16GB", "7.0", "535.129.03", 0, ecc=True, mig=False, power_limit_w=300.0)
T4 = Gpu("Tesla T4", "7.5", "535.129.03", 1)
FACTS = {
    "name": "Tesla V100-SXM2-16GB",
    "sm": "7.0",
    "driver": "535.129.03",
    "power_limit_w": "300.0",
    "ecc": "on",
    "mig": "off",
}


def test_gpu_is_told_by_what_its_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "query_gpus", lambda: (V100,))
    assert fingerprint(threads=1).gpu == FACTS
    monkeypatch.setattr(environment, "query_gpus", tuple)
    assert fingerprint(threads=1).gpu is None


@pytest.mark.parametrize(
    ("gpus", "index", "expected"),
    [
        ((V100, replace(V100, index=1)), None, FACTS),
        ((T4, replace(V100, index=3)), 3, FACTS),
        ((T4, V100), None, None),
    ],
)
def test_of_several_gpus_it_is_the_one_that_cuda_takes(
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    index: int | None,
    expected: dict[str, str] | None,
) -> None:
    monkeypatch.setattr(environment, "query_gpus", lambda: gpus)
    monkeypatch.setattr(environment, "nvml_index", {0: index}.__getitem__)
    assert fingerprint(threads=1).gpu == expected
