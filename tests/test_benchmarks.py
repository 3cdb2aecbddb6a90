"""The measuring programs work to their end, with the code as it is now.

``--smoke`` makes seconds of them and prints the columns that docs/ show. All run in one process,
which imports torch once.
"""

from __future__ import annotations

import json
import re
import warnings
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "choice_quality": ("networks", "exact", "largest gap", "greedy", "seconds a step", "bound"),
    "compare_criteria": ("budget", "criterion", "MACs", "masked", "after BatchNorm", "finetuned"),
    "equal_time": ("way", "multiple", "blocks gone", "share of the dense time", "torch-pruning"),
    "export_matrix": ("network", "precision", "ONNX MB", "error", "engine MB", "build s"),
    "gate_error_rates": ("noise", "FAIL", "PASS", "interval holds", "FAIL at 1.03", "2 pp: FAIL"),
    "gate_on_this_machine": ("ratio", "at least", "at most", "verdict", "one more layer"),
    "imagenet_throughput": ("the loader alone", "step", "images/s (range)", "peak memory"),
    "int8_accuracy": ("network", "precision", "top-1", "drop", "calibration"),
    "kill_and_resume": ("kill", "at", "left behind", "those of the run left alone"),
    "latency_error": ("network", "dense, ms", "mean", "largest", "by MACs", "halves", "load"),
    "many_files": ("what", "seconds", "batches read", "epoch", "main process, MiB (private)"),
    "network_coverage": (
        "network",
        "ours",
        "TP",
        "seconds",
        "difference",
        "counted",
        "ONNX",
        "nodes",
    ),
    "on_a_gpu": ("part", "seconds", "dense training", "onnxruntime-cpu", "has no engines"),
    "pruning_cost": ("what", "figure", "bound", "shrink", "peak memory of pruning / plain"),
    "quantizers": (
        "in ONNX Runtime",
        "top-1",
        "of FP32's time",
        "ours, for tensorrt",
        "U8 Entropy",
    ),
    "record_tensorrt_api": ('"module"', '"version"', '"names"', '"classes"', '"enums"'),
    "seed2019": ("pruning steps, one every 30", "100 channels", "masked = shrunk", "peak memory"),
    "shards_ahead": ("shards", "epoch, s", "longest wait, s", "fetched ahead"),
    "v100_resnet50": (
        "change (predicted)",
        "time, batch 32",
        "channels only",
        "saved time / saved",
    ),
    "v100_table": ("layers", "rows", "median", "90 %", "bias", "published", "left out"),
}
"""What each prints: its columns, or the words of its lines."""
SLOW = (
    "on_a_gpu",
    *("compare_criteria", "gate_on_this_machine", "imagenet_throughput", "int8_accuracy"),
    *("kill_and_resume", "pruning_cost", "quantizers", "seed2019", "export_matrix", "shards_ahead"),
    *("v100_resnet50", "v100_table", "equal_time"),
)
"""They start processes, take whole runs, or build engines."""


def test_every_program_is_tried() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {*PROGRAMS, "smoke", "small_networks"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PROGRAMS]
)
def test_the_smoke_form_prints_what_the_docs_show(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("export_matrix", "record_tensorrt_api"):
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a program, they end no test
        import_module(name).main(["--smoke"])
    said = capsys.readouterr().out
    assert [words for words in PROGRAMS[name] if words not in said] == []
    for table in re.findall(r"(?:^\|.*\n)+", said, re.MULTILINE):
        header, rule, *rows = (line.count("|") for line in table.splitlines())
        assert rows
        assert {header, rule} == set(rows) == {header}


def test_which_networks_can_be_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    program = import_module("network_coverage")
    with warnings.catch_warnings():
        program.main(["--smoke", "--json"])
        program.main(["--smoke", "--speed"])
    row, speed = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["ours"] == pytest.approx(row["torch_pruning"], rel=0.05)
    assert row["difference"] < 1e-9
    assert row["onnx"] < 1e-5
    assert row["counted"]
    assert row["nodes"] <= row["slim"] + 2
    assert set(speed) > {"together_s", "peak_mib"}


def test_what_pruning_costs_is_told_by_its_parts() -> None:
    program = import_module("pruning_cost")
    bench = program.Bench(program.parse(["--smoke", "--device", "cpu"]))
    assert set(bench.importance_step()) == {"plain", "importance", "scoring"}
    seconds = bench.prune_and_shrink()
    assert set(seconds) == {"decide", "shrink", "proof"}
    assert min(seconds.values()) > 0


def test_every_worker_of_the_loader_has_batches_to_read(tmp_path: Path) -> None:
    throughput = import_module("imagenet_throughput")
    options = Namespace(folder=tmp_path, device="cpu", size=16, batch=2, images=6)
    throughput.write_folder(tmp_path, options.images)
    lengths = [len(throughput.batches_of(options, count, "pil")) for count in (0, 1, 3, 3)]
    assert lengths == [3, 4, 12, 12]
    assert len(list(tmp_path.glob("train/*/*.jpg"))) == 6


def test_what_is_given_goes_before_the_smallest_value() -> None:
    parse = import_module("pruning_cost").parse
    assert (parse([]).model, parse(["--smoke"]).model) == ("resnet50", "resnet20")
    assert parse(["--smoke", "--model", "resnet18"]).model == "resnet18"
    assert parse(["--smoke"]).arguments == ["--smoke"]  # for the processes that it starts
