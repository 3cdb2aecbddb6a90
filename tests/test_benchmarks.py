"""The measuring programs work to their end, with the code as it is now."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module


def test_what_pruning_costs(benchmark: Any) -> None:
    options = Namespace(device="cpu", model="resnet20", size=16, batch=4, steps=1, memory=None)
    bench = benchmark("pruning_cost").Bench(options)
    assert set(bench.importance_step()) == {"plain", "importance", "scoring"}
    seconds = bench.prune_and_shrink()
    assert set(seconds) == {"decide", "shrink", "proof"}
    assert min(seconds.values()) > 0


def test_which_networks_can_be_pruned(benchmark: Any) -> None:
    coverage = benchmark("coverage")
    row = coverage.measure("torchvision:squeezenet1_1", 64)
    assert row.ours == pytest.approx(row.torch_pruning, rel=0.05)
    assert row.difference < 1e-9
    assert row.onnx < 1e-5
    assert row.counted
    assert set(coverage.speed("torchvision:squeezenet1_1", 64)) > {"together_s", "peak_mib"}


def test_every_worker_of_the_loader_has_batches_to_read(benchmark: Any, tmp_path: Path) -> None:
    throughput = benchmark("imagenet_throughput")
    options = Namespace(folder=tmp_path, device="cpu", size=16, batch=2, images=6)
    throughput.write_folder(tmp_path, options.images)
    lengths = [len(throughput.batches_of(options, count, "pil")) for count in (0, 1, 3, 3)]
    assert lengths == [3, 4, 12, 12]
    assert len(list(tmp_path.glob("train/*/*.jpg"))) == 6
