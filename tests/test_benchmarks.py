"""The measuring programs work to their end, with the code as it is now.

``--smoke`` makes seconds of them and prints the columns that docs/ show. All run in one process,
which imports torch once.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import warnings
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.data.idx import read_idx
from compress.data.loading import Batch
from compress.networks import cost
from compress.networks.capture import Example

ROOT = Path(__file__).parents[1]
PARTS = {"killed", "pruners", "race", "small_networks", "smoke", "standings"}
"""What programs share, or are made of."""
PROGRAMS = {
    "choice_quality": ("networks", "exact", "largest gap", "greedy", "seconds a step", "bound"),
    "compare_criteria": ("budget", "criterion", "MACs", "masked", "after BatchNorm", "finetuned"),
    "equal_time": ("way", "multiple", "blocks gone", "share of the dense time", "torch-pruning"),
    "export_matrix": ("network", "precision", "ONNX MB", "error", "engine MB", "build s"),
    "gate_error_rates": ("noise", "FAIL", "PASS", "interval holds", "FAIL at 1.03", "2 pp: FAIL"),
    "gate_against_baselines": ("baseline", "now", "pairs", "one convolution more takes"),
    "gate_on_this_machine": ("ratio", "at least", "at most", "verdict", "one more layer"),
    "imagenet_throughput": ("the loader alone", "step", "images/s (range)", "peak memory"),
    "int8_accuracy": ("network", "precision", "top-1", "drop", "calibration"),
    "kill_and_resume": ("kill", "at", "left behind", "goes on by", "of 2 ended with the files"),
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
    "peers": ("way", "share of the dense time", "| network |", "exact, of", "median time of those"),
    "pretrained": ("photographs", "same top-1", "| dense | pruned |", "latency, ms", "PASS"),
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
    "uneven_channels": ("block", "least factor", "layer3.2", "outputs differ by"),
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
    *("compare_criteria", "gate_against_baselines", "gate_on_this_machine"),
    *("imagenet_throughput", "int8_accuracy"),
    *("kill_and_resume", "pruning_cost", "quantizers", "seed2019", "export_matrix", "shards_ahead"),
    *("v100_resnet50", "v100_table", "equal_time", "peers", "pretrained"),
)
"""They start processes, take whole runs, or build engines."""


def test_every_program_is_tried() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert found == {*PROGRAMS, *PARTS}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PROGRAMS]
)
def test_the_smoke_form_prints_what_the_docs_show(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A table that is made beside other tests is noisy, and what it says counts for nothing here.
    monkeypatch.setattr("export.latency.building.require_quiet", lambda spread: None)
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


def removed(network: nn.Module, written: list[int], read: list[int]) -> nn.Module:
    """Keep some outputs of the first convolution, and what the second reads of as many."""
    first, norm, second = network[0], network[1], network[3]
    with torch.no_grad():
        for module, name in ((first, "weight"), (norm, "weight"), (norm, "bias")):
            setattr(module, name, nn.Parameter(getattr(module, name)[written]))
        norm.running_mean, norm.running_var = norm.running_mean[written], norm.running_var[written]
        second.weight = nn.Parameter(second.weight[:, read])
    norm.num_features = len(written)
    return network


@pytest.mark.parametrize(
    ("prune", "verdict"),
    [
        (lambda network, _: removed(network, [0, 2, 5], [0, 2, 5]), "exact"),
        (lambda network, _: removed(network, [5, 0, 2], [5, 0, 2]), "exact"),  # sorted
        (lambda network, _: removed(network, [0, 2, 5], [0, 2, 4]), "off by"),
        (lambda network, _: removed(network, [0, 2, 5], [0, 2]), "fails: RuntimeError"),
        (lambda network, _: network, "nothing pruned"),
    ],
)
def test_what_a_peer_leaves_is_judged_by_its_weights(
    monkeypatch: pytest.MonkeyPatch, prune: Any, verdict: str
) -> None:
    peers = import_module("peers")
    layers = (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    dense = peers.unequal(nn.Sequential(*layers))
    monkeypatch.setitem(peers.ONE_SHOT, "peer", prune)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outcome = peers.attempt("peer", dense, images, 60)
    assert outcome.verdict.startswith(verdict)
    assert outcome.macs is None or outcome.macs in (0.5, 1.0)


@pytest.mark.parametrize(("name", "verdict"), [("anew", "exact"), ("peer", "off by")])
def test_a_peer_that_forgets_statistics_is_judged_without_them(
    monkeypatch: pytest.MonkeyPatch, name: str, verdict: str
) -> None:
    peers = import_module("peers")

    def prune(network: nn.Module, _: torch.Tensor) -> nn.Module:
        smaller = removed(network, [0, 2, 5], [0, 2, 5])
        smaller[1].reset_running_stats()
        return smaller

    layers = (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    nn.init.uniform_(layers[1].running_mean, 0.5, 1)
    monkeypatch.setattr(peers, "ANEW", ("anew",))
    monkeypatch.setitem(peers.ONE_SHOT, name, prune)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outcome = peers.attempt(name, peers.unequal(nn.Sequential(*layers)), images, 60)
    assert outcome.verdict.startswith(verdict)


class Minibatches:
    """Six, of noise, the same in every epoch."""

    def __len__(self) -> int:
        return 6

    def epoch(self, number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(len(self)):
            images = torch.randn(8, 3, 8, 8, generator=generator)
            yield Batch(images, torch.randint(4, (8,), generator=generator), skipped=0)


@pytest.mark.parametrize(
    ("name", "multiple", "unit"),
    [
        ("torch-pruning", 8, "macs"),
        ("torch-pruning default", 1, "macs"),
        ("torch-pruning raw", 1, "macs"),
        ("torch-kirigami", 8, "params"),
        ("modelopt-fastnas", 8, "macs"),
    ],
)
def test_a_peer_leaves_what_is_asked_and_the_loop_goes_on(
    name: str, multiple: int, unit: str
) -> None:
    pruners, race = import_module("pruners"), import_module("race")
    if lacking := pruners.missing(name):
        pytest.skip(f"{lacking} is not installed")
    torch.manual_seed(0)
    convs = [
        layer
        for inputs in (3, 16)
        for layer in (nn.Conv2d(inputs, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    ]
    network = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    one = Example((torch.zeros(1, 3, 8, 8),))
    dense = cost.measured(network.eval(), one)
    options = Namespace(steps=3, interval=1, lr=0.01, epochs=1)
    loop = race.Loop(network, options, Minibatches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about torch
        pruners.PRUNERS[name](loop, race.Way(name, 0.6, multiple), None, None)
    assert loop.steps == 3
    loop.finetune()
    assert loop.steps == 9
    assert 0.1 < cost.measured(network.eval(), one)[unit] / dense[unit] < 0.62
    widths = {m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert {width % multiple for width in widths} == {0}


def test_a_peer_that_is_not_installed_is_named() -> None:
    pruners = import_module("pruners")
    assert pruners.missing("latency") == []
    assert set(pruners.PACKAGES) < set(pruners.PRUNERS)


def test_accuracy_at_a_share_lies_on_the_line_between_two_points() -> None:
    standings = import_module("standings")
    points = [
        standings.Point("way", seed, 0.5, 8, 0.5, 0, time, time, time, None, top1)
        for seed, time, top1 in ((0, 0.5, 90.0), (0, 0.3, 80.0), (1, 0.5, 88.0))
    ]
    assert standings.at_share(points[:2], 0.35) == pytest.approx(82.5)
    assert standings.at_share(points[:2], 0.2) is None
    assert standings.at_share([], 0.35) is None
    assert standings.mean_and_interval([90.0, 88.0]) == "89.00 ± 12.71"  # t of 1 degree: 12.706


def test_imagenet_weights_are_named_by_their_place() -> None:
    pretrained = import_module("pretrained")
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    theirs = {f"_{name}": tensor + 1 for name, tensor in network.state_dict().items()}
    found = pretrained.renamed(theirs, network)
    assert {name: f"_{name}" for name in found} == dict(zip(found, theirs, strict=True))
    assert all(torch.equal(found[name], theirs[f"_{name}"]) for name in found)
    swapped = dict(zip(theirs, reversed(theirs.values()), strict=True))
    with pytest.raises(ValueError, match=r"is not 0\.weight"):
        pretrained.renamed(swapped, network)


def test_the_first_images_of_idx_files_are_a_data_set(tmp_path: Path) -> None:
    pixels = np.arange(2 * 5 * 9, dtype=np.uint8).reshape(2, 5, 3, 3)
    for half, images in zip(("train", "t10k"), pixels, strict=True):
        for kind, values in (
            ("images-idx3", images),
            ("labels-idx1", np.arange(5, dtype=np.uint8)),
        ):
            header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
            path = tmp_path / f"{half}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes()))
    import_module("pretrained").write_first(tmp_path, tmp_path / "few", {"train": 2, "t10k": 99})
    train, test = read_idx(tmp_path / "few", num_classes=5)
    assert torch.equal(train.images, torch.from_numpy(pixels[0, :2]))
    assert train.labels.tolist() == [0, 1]
    assert torch.equal(test.images, torch.from_numpy(pixels[1]))


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
