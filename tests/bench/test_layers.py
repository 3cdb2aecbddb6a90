from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import lived_in, random_mask
from networks import NETWORKS
from onnx_models import exported
from rich.console import Console
from torch import nn

import export.profiling
from bench.measuring.layers import layer_times, profile_layers
from bench.measuring.records import LayerFigures, LayerRecord, LayerTimes
from bench.measuring.subject import Subject
from bench.pages import svg
from bench.pages.figures import plots
from bench.pages.page import render_page
from bench.pages.publish import render_markdown, render_table
from bench.reports.schema import Report
from bench.reports.summary import explain
from bench.statistics.latency_ratios import RatioInterval
from compress.checkpoints.checkpoint import Checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.config import BenchConfig
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from export.profiling import LayerTime, Profile
from export.profiling.onnx_layers import OnnxLayer

SIZE = (3, 16, 16)
Network = tuple[list[OnnxLayer], Profile]


def layer(name: str, macs: int = 100, inputs: int = 8, outputs: int = 8, **facts: Any) -> OnnxLayer:
    ends = {"reads_image": False, "writes_logits": False}
    kind = "Gemm" if name == "fc" else "Conv"
    return OnnxLayer(
        name=name, node=f"/{name}/{kind}", kind=kind, macs=macs, inputs=inputs, outputs=outputs,
        **{**ends, **facts},
    )  # fmt: skip


def profile(*found: tuple[str, str, float], total: float | None = None) -> Profile:
    """Each is the nodes, joined by plus signs, the kind and the milliseconds of what was run."""
    layers = tuple(
        LayerTime(
            name=nodes or kind, kind=kind, nodes=tuple(filter(None, nodes.split("+"))),
            milliseconds=ms,
        )
        for nodes, kind, ms in found
    )  # fmt: skip
    times = sum(ms for _, _, ms in found)
    return Profile(calls=3, total_ms=times if total is None else total, layers=layers)


def side_by_side(reference: Network, pruned: Network, multiple: int = 8) -> LayerTimes:
    times = layer_times(reference, pruned, batch_size=4, multiple=multiple)
    assert times is not None
    return times


def figures(macs: int, ms: float, channels: int | None = None) -> LayerFigures:
    return LayerFigures(macs=macs, milliseconds=ms, channels=channels)


def test_layers_of_one_name_are_one_row_and_other_work_one_for_each_operator() -> None:
    reference = (
        [layer("a", 100, 3, 16), layer("fc", 50, 16, 10)],
        profile(
            *(("/a/Conv+/a/Relu", "Conv", 4.0), ("", "ReorderOutput", 0.5), ("/add", "Add", 0.25)),
            *(("/add_1", "Add", 0.5), ("/fc/Gemm", "Gemm", 1.0)),
            total=6.5,
        ),
    )
    pruned = (
        [layer("a", 60, 3, 8), layer("fc", 25, 8, 10)],
        profile(
            *(("", "Cast", 0.125), ("/a/Conv", "FusedConv", 3.0), ("/fc/Gemm", "Gemm", 0.5)),
            *(("/add", "Add", 1.0),),
            total=4.75,
        ),
    )
    times = side_by_side(reference, pruned)
    assert (times.batch_size, times.calls, times.multiple) == (4, 3, 8)
    assert (times.reference_ms, times.pruned_ms) == (6.5, 4.75)
    assert [(row.name, row.kind, row.reference, row.pruned) for row in times.layers] == [
        ("a", "Conv", figures(100, 4.0, 16), figures(60, 3.0, 8)),
        ("fc", "Gemm", figures(50, 1.0, 10), figures(25, 0.5, 10)),
        ("ReorderOutput", "ReorderOutput", figures(0, 0.5), None),
        ("Add", "Add", figures(0, 0.75), figures(0, 1.0)),
        ("Cast", "Cast", None, figures(0, 0.125)),
    ]
    assert LayerTimes.model_validate_json(times.model_dump_json()) == times


def test_layers_that_only_one_network_has_stand_where_they_run() -> None:
    def network(*names: str) -> Network:
        work = [(f"/{name}/Conv", "Conv", 1.0) for name in names]
        return [layer(name) for name in names], profile(*work)

    times = side_by_side(network("a", "b", "c", "d"), network("new", "a", "c", "added", "d"))
    assert [row.name for row in times.layers] == ["new", "a", "b", "c", "added", "d"]
    missing = [(row.reference is None, row.pruned is None) for row in times.layers]
    assert missing == [
        (True, False), (False, False), (False, True), (False, False), (True, False), (False, False)
    ]  # fmt: skip


def test_layers_that_were_run_together_are_one_row() -> None:
    names = list("abcdef")
    layers = [layer(name, 10 * place) for place, name in enumerate(names, 1)]
    apart = [(f"/{name}/Conv", "Conv", 1.0) for name in names]
    together = [
        *(("/a/Conv+/a/Relu+/b/Conv", "Myelin", 3.0), ("/b/Conv", "copy", 0.5)),
        *(("/c/Conv", "Conv", 1.0), ("/d/Conv+/e/Conv", "Myelin", 2.0)),
        *(("/f/Conv+/e/Conv", "Myelin", 4.0),),
    ]
    times = side_by_side((layers, profile(*apart)), (layers, profile(*together)))
    assert [(row.name, row.reference, row.pruned) for row in times.layers] == [
        ("a + b", figures(30, 2.0), figures(30, 3.5)),
        ("c", figures(30, 1.0, 8), figures(30, 1.0, 8)),
        ("d + e + f", figures(150, 3.0), figures(150, 6.0)),
    ]
    many = [("+".join(f"/{name}/Conv" for name in names), "Myelin", 5.0)]
    (row,) = side_by_side((layers, profile(*apart)), (layers, profile(*many))).layers
    assert (row.name, row.kind) == ("a + 5 more", "Conv")


def test_a_profile_that_lacks_a_layer_tells_nothing() -> None:
    layers = [layer("a"), layer("b")]
    whole = profile(("/a/Conv", "Conv", 1.0), ("/b/Conv", "Conv", 1.0))
    part = profile(("/a/Conv", "Conv", 1.0), ("", "Conv", 1.0))
    for networks in (((layers, whole), (layers, part)), ((layers, part), (layers, whole))):
        assert layer_times(*networks, batch_size=1, multiple=1) is None


def test_modules_are_known_by_their_path_also_when_called_twice() -> None:
    layers = [layer("a"), layer("twice", 10), layer("twice_1", 20), layer("b_2", 5)]
    ran = profile(
        *(("a", "Conv2d", 1.0), ("twice", "Conv2d", 2.0), ("norm", "BatchNorm2d", 0.5)),
        *(("twice", "Conv2d", 3.0), ("b_2", "Conv2d", 1.0)),
    )
    times = side_by_side((layers, ran), (layers, ran))
    assert [(row.name, row.pruned) for row in times.layers] == [
        ("a", figures(100, 1.0, 8)),
        ("twice + twice_1", figures(30, 5.0)),
        ("b_2", figures(5, 1.0, 8)),
        ("BatchNorm2d", figures(0, 0.5)),
    ]


def test_work_without_weights_is_not_mistaken_for_a_layer() -> None:
    ran = profile(("/a/Conv", "Conv", 1.0), ("/pool/Conv", "Conv", 2.0))
    times = side_by_side(([layer("a")], ran), ([layer("a")], ran))
    assert [row.name for row in times.layers] == ["a", "other Conv"]


@pytest.mark.parametrize(
    ("facts", "misses"),
    [
        ({"inputs": 16, "outputs": 24}, False),
        ({"inputs": 16, "outputs": 20}, True),
        ({"inputs": 12, "outputs": 24}, True),
        ({"inputs": 3, "outputs": 24, "reads_image": True}, False),
        ({"inputs": 3, "outputs": 20, "reads_image": True}, True),
        ({"inputs": 16, "outputs": 10, "writes_logits": True}, False),
        ({"inputs": 12, "outputs": 10, "writes_logits": True}, True),
    ],
)
def test_channels_that_pruning_chose_shall_be_multiples(
    facts: dict[str, Any], misses: bool
) -> None:
    def network(**facts: Any) -> Network:
        return [layer("a", **facts)], profile(("/a/Conv", "Conv", 1.0))

    whole = network(inputs=16, outputs=32)
    (row,) = side_by_side(whole, network(**facts)).layers
    assert row.misses_multiple is misses
    (row,) = side_by_side(network(**facts), whole).layers
    assert not row.misses_multiple
    (row,) = side_by_side(whole, network(**facts), multiple=1).layers
    assert not row.misses_multiple


def times_of(*rows: tuple[str, Any, Any] | tuple[str, Any, Any, bool]) -> LayerTimes:
    """Each row is a name, (macs, ms) of both networks, and whether it misses the multiple."""

    def side(found: tuple[int, float] | None) -> LayerFigures | None:
        return None if found is None else figures(*found)

    records = tuple(
        LayerRecord(
            name=name, kind="Conv", reference=side(reference), pruned=side(pruned),
            misses_multiple=bool(rest),
        )
        for name, reference, pruned, *rest in rows
    )  # fmt: skip
    sums = [
        sum(found.milliseconds for row in records if (found := getattr(row, of)) is not None)
        for of in ("reference", "pruned")
    ]
    return LayerTimes(
        batch_size=1, calls=3, multiple=8, reference_ms=sums[0], pruned_ms=sums[1], layers=records
    )


def test_why_the_time_did_not_follow_the_macs() -> None:
    # MACs fall 2x, so that 5.2 of 10.4 ms would be left; there are 7.95.
    times = times_of(
        ("a", (400, 4.0), (100, 3.0), True),  # 1 ms is all its own MACs would leave it
        ("b", (200, 2.0), (200, 2.0)),
        ("fc", (10, 0.4), (5, 0.2)),
        ("Add", (0, 3.0), (0, 2.0)),
        ("Cast", (0, 1.0), (0, 0.75)),
    )
    # outside: 2.75 - 4 / 2 = 0.75; not following: 3 - 1 = 2; elsewhere, a saved 1 more than half of
    # its 4 ms and b 1 less than half of its 2, which leaves nothing.
    assert explain(times) == (
        "MACs fell 2.00x and the time in layers fell 1.31x (10.40 ms to 7.950 ms). Had the time "
        "fallen as the MACs did, it would be 5.200 ms. The 2.750 ms beyond that are 2.000 ms in "
        "layers whose time did not follow their MACs (a with MACs 4.00x and time 1.33x) and 0.750 "
        "ms outside of layers with weights (Add and Cast). Of 3 layers with weights, 1 "
        "has channels that are no multiple of 8."
    )


def test_macs_saved_where_they_are_cheap_and_layers_that_were_added() -> None:
    times = times_of(
        *(("a", (900, 1.0), (300, 1 / 3)), ("b", (100, 9.0), (100, 9.0))),
        *(("added", None, (100, 1.0)),),
    )
    # 1000 to 500 MACs would leave 5 of 10 ms: 1 of 5.33 ms beyond is the new layer's, 4.33 are b's
    # half, less the sixth that a saved more.
    assert explain(times) == (
        "MACs fell 2.00x and the time in layers rose 1.03x (10.00 ms to 10.33 ms). Had the time "
        "fallen as the MACs did, it would be 5.000 ms. The 5.333 ms beyond that are 4.333 ms from "
        "saving MACs where they take less time than elsewhere and 1.000 ms in layers that the "
        "reference lacks."
    )


def test_what_was_gained_is_taken_off_what_was_lost() -> None:
    times = times_of(
        *(("a", (900, 9.0), (300, 9.0)), ("b", (100, 1.0), (200, 2.0))),
        *(("Add", (0, 4.0), (0, 1.0)),),
    )
    # 2x less MACs would leave 7 of 14 ms; a is 6 behind its own MACs, Add fell by 1 more than by
    # half, a and b are as far from half as their MACs are.
    assert explain(times) == (
        "MACs fell 2.00x and the time in layers fell 1.17x (14.00 ms to 12.00 ms). Had the time "
        "fallen as the MACs did, it would be 7.000 ms. The 5.000 ms beyond that are 6.000 ms in "
        "layers whose time did not follow their MACs (a with MACs 3.00x and time 1.00x), less "
        "1.000 ms outside of layers with weights."
    )
    times = times_of(("a", (100, 2.0), (10, 4.0)), ("b", (100, 8.0), (90, 3.0)))
    # Half of 10 ms would be 5: a is 3.8 behind its MACs, b 4.2 ahead, and b kept most of its MACs.
    assert "beyond that are 2.400 ms from saving MACs where they take less" in explain(times)
    assert explain(times).endswith("less 0.400 ms in layers whose time fell more than their MACs.")
    times = times_of(("a", (100, 9.0), (10, 8.0)), ("b", (100, 1.0), (90, 1.0)))
    assert explain(times).endswith(
        "(a with MACs 10.00x and time 1.12x, b with MACs 1.11x and time 1.00x), less 3.200 ms from "
        "saving MACs where they take more time than elsewhere."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [("a", (100, 4.0), (50, 2.0))],
            "MACs fell 2.00x and the time in layers fell 2.00x (4.000 ms to 2.000 ms).",
        ),
        (
            [("a", (100, 4.0), (100, 4.0))],
            "MACs stayed the same and the time in layers stayed the same (4.000 ms to 4.000 ms).",
        ),
        (
            [("a", (100, 4.0), (120, 5.0)), ("Add", (0, 1.0), (0, 1.0))],
            "MACs rose 1.20x and the time in layers rose 1.20x (5.000 ms to 6.000 ms).",
        ),
        (
            [("a", (100, 4.0), (100, 2.0), True), ("b", (0, 1.0), (0, 1.0))],
            "MACs stayed the same and the time in layers fell 1.67x (5.000 ms to 3.000 ms). Of 1 "
            "layer with weights, 1 has channels that are no multiple of 8.",
        ),
    ],
)
def test_where_there_is_nothing_to_explain(rows: list[Any], said: str) -> None:
    assert explain(times_of(*rows)) == said


def test_layers_that_do_not_add_up_explain_nothing() -> None:
    times = times_of(("a", (100, 5.0), (50, 2.5)))
    times = times.model_copy(update={"reference_ms": 10.0, "pruned_ms": 9.0})
    assert explain(times).endswith("Had the time fallen as the MACs did, it would be 5.000 ms.")


def ratio(low: float, found: float, high: float) -> RatioInterval:
    return RatioInterval(
        ratio=found, low=low, high=high, at_least=low, at_most=high, confidence=0.95, rounds=20
    )


def test_layers_that_contradict_what_was_measured_explain_nothing() -> None:
    # torch on the CPU with hooks around every module, and a machine under heavy load
    times = times_of(("a", (100, 0.1), (50, 0.115)))
    assert explain(times, ratio(0.87, 0.875, 0.88)) == (
        "Where the time goes is left out: the layers add up to x 1.150 (0.100 ms to 0.115 ms), and "
        "whole calls were measured at x 0.875 [0.870, 0.880], so what was profiled is not what was "
        "measured; profiling slows short layers, and other programs disturb it."
    )
    loaded = times_of(("a", (100, 2.0), (50, 22.0)))
    assert "rose" in explain(loaded)
    assert "rose" not in explain(loaded, ratio(0.4, 0.6, 0.9))


@pytest.mark.parametrize(
    ("after", "measured", "told"),
    [
        (6.0, (0.54, 0.55, 0.56), True),
        (6.0, (0.50, 0.51, 0.52), False),
        (6.0, (0.67, 0.68, 0.69), True),
        (6.0, (0.70, 0.71, 0.72), False),
        # as near as that, and still the other way round
        (10.3, (0.96, 0.97, 0.98), False),
        (10.3, (0.96, 0.97, 1.01), True),
        (9.7, (1.02, 1.03, 1.04), False),
        (9.7, (0.99, 1.03, 1.04), True),
        (10.0, (0.96, 0.97, 0.98), True),
    ],
)
def test_the_story_is_told_where_layers_and_calls_agree(
    after: float, measured: tuple[float, float, float], told: bool
) -> None:
    times = times_of(("a", (100, 10.0), (50, after)))
    said = explain(times, ratio(*measured))
    assert (said == explain(times)) is told
    assert said.startswith("Where the time goes is left out: ") is not told


def test_a_story_that_is_withheld_is_withheld_everywhere(
    sample_report: Callable[..., Report],
) -> None:
    report = sample_report(ratio=0.65)
    times = times_of(("a", (100, 2.0), (50, 22.0)))
    loaded = report.model_copy(update={"layers": (times,)})
    with svg.default_style():
        notes = [note for plot in plots(loaded) for note in plot.notes]
    table = Console(width=200, file=io.StringIO(), record=True)
    table.print(render_table(loaded, []))
    ways = (render_markdown(loaded, []), render_page(loaded, []), *notes, table.export_text())
    assert len(ways) == 4
    for said in ways:
        assert "Where the time goes is left out: the layers add up to x 11.000" in plain(said)
        assert "time in layers" not in said


def plain(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", "", text).replace("\N{NO-BREAK SPACE}", " ").split())


def test_causes_add_up_to_what_is_missing() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows: list[Any] = [
            (f"l{i}", (int(m), float(t)), (int(m * s), float(t * u)))
            for i, (m, t, s, u) in enumerate(
                rng.uniform((500, 1, 0.2, 0.5), (999, 9, 0.6, 2), (6, 4))
            )
        ]
        rows += [("Add", (0, 2.0), (0, 2.0 * rng.uniform(0.5, 2))), ("new", None, (30, 4.0))]
        said = explain(times_of(*rows))
        beyond, causes = said.split(". The ")[1].split(" beyond that are ")
        missing = float(beyond.removesuffix(" ms"))
        more, less = (
            [float(found) for found in re.findall(r"([\d.]+) ms", part)]
            for part in f"{causes}, less ".split(", less ")[:2]
        )
        # What is not said is less than a twentieth each.
        assert sum(more) - sum(less) == pytest.approx(missing, abs=0.1 * missing + 0.01)
        assert min(more + less) >= 0.05 * missing - 0.01
        assert more == sorted(more, reverse=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network and a pruned one, as ONNX files and as checkpoints, and the MACs of both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    dense = lived_in(build_model("resnet20", num_classes=4)).eval()
    graph = analyse(dense, SIZE)
    kept = random_mask(graph, seed=0, share=0.4)
    found: dict[str, Any] = {"folder": folder}
    description = Description(
        architecture="resnet20", classes=tuple("abcd"), input_size=SIZE, mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )  # fmt: skip
    for name, model, mask in (
        ("dense", dense, graph.everything()),
        ("pruned", shrink(dense, graph, kept), kept),
    ):
        onnx.save(exported(model, SIZE), folder / f"{name}.onnx")
        path = folder / f"{name}.safetensors"
        save_checkpoint(path, model, description=description, graph=graph, kept=mask)
        found[name] = cost.macs(graph, mask)
    return found


def subjects(folder: Path, runtime: str, **config: Any) -> tuple[Subject, Subject]:
    suffix = ".onnx" if runtime.startswith("onnx") else ".safetensors"
    settings = BenchConfig(runtime=runtime, **config)
    return tuple(  # type: ignore[return-value]
        Subject(
            path=folder / f"{name}{suffix}", onnx=folder / f"{name}.onnx",
            facts={"precision": "fp32"}, config=settings,
        )
        for name in ("dense", "pruned")
    )  # fmt: skip


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SIZE)).astype(np.float32)


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "torch-cpu"])
def test_a_pruned_network_is_set_against_its_parent(pair: dict[str, Any], runtime: str) -> None:
    reference, pruned = subjects(pair["folder"], runtime)
    times = profile_layers(
        reference,
        pruned,
        images=images(2),
        calls=4,
        multiple=8,
        threads=1,
    )
    assert times is not None
    assert (times.batch_size, times.calls, times.multiple) == (2, 4, 8)
    weighted = [row for row in times.layers if row.reference is not None and row.reference.macs]
    modules = build_model("resnet20", num_classes=4).named_modules()
    names = [name for name, of in modules if isinstance(of, nn.Conv2d | nn.Linear)]
    assert [row.name for row in weighted] == names
    for side in ("reference", "pruned"):
        sums = sum(getattr(row, side).macs for row in weighted)
        assert sums == pair["dense" if side == "reference" else "pruned"]
    assert any(row.misses_multiple for row in weighted)
    assert not any(row.misses_multiple for row in times.layers if row not in weighted)
    assert LayerTimes.model_validate_json(times.model_dump_json()) == times
    assert explain(times).startswith(f"MACs fell {pair['dense'] / pair['pruned']:.2f}x and ")


def test_both_networks_take_turns(pair: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, dict[str, Any]]] = []
    profiled = export.profiling.profile_network

    def noted(source: Checkpoint, runtime: Any, batch: Any, *, calls: int, **options: Any) -> Any:
        stem = "pruned" if source.description.recipe else "dense"
        asked.append((stem, calls, options))
        return profiled(source, runtime, batch, calls=calls, **options)

    monkeypatch.setattr(export.profiling, "profile_network", noted)
    reference, pruned = subjects(pair["folder"], "torch-cpu", channels_last=True)
    times = profile_layers(
        reference,
        pruned,
        images=images(1),
        calls=5,
        multiple=1,
        threads=1,
    )
    assert times is not None
    assert times.calls == 5
    found = [(stem, calls) for stem, calls, _ in asked]
    assert found == [(stem, calls) for calls in (2, 2, 1) for stem in ("dense", "pruned")]
    options = {"threads": 1, "precision": "fp32", "channels_last": True, "compiled": False}
    assert all(given == options for _, _, given in asked)


@pytest.mark.parametrize(
    ("runtime", "config"),
    [("onnxruntime-cuda", {}), ("onnxruntime-tensorrt", {}), ("torch-cpu", {"compiled": True})],
)
def test_runtimes_that_cannot_tell(
    pair: dict[str, Any], runtime: str, config: dict[str, Any]
) -> None:
    reference, pruned = subjects(pair["folder"], runtime, **config)
    found = profile_layers(reference, pruned, images=images(1), calls=1, multiple=1)
    assert found is None


@pytest.mark.parametrize("name", ["Shared", "PreActivation", "Dense"])
def test_networks_of_many_shapes_are_told_apart_in_torch(name: str) -> None:
    from export.profiling.onnx_layers import layers_of
    from export.profiling.torch_profile import profile_module

    model = lived_in(NETWORKS[name]()).eval()
    network = (
        layers_of(exported(model, (3, 12, 12))),
        profile_module(model, "cpu", images(1)[..., :12, :12].copy(), calls=1, threads=1),
    )
    times = layer_times(network, network, batch_size=1, multiple=1)
    assert times is not None
    graph = analyse(model, (3, 12, 12))
    found = sum(row.pruned.macs for row in times.layers if row.pruned is not None)
    assert found == cost.macs(graph, graph.everything())
