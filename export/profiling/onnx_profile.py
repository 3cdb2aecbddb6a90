"""The profile of ONNX Runtime on the CPU, its nodes traced back to those of the file.

ONNX Runtime rewrites a network before it runs it. A node that takes others in keeps its own name
or bears that of a tensor, with decorations: ``/relu/Relu_output_0_nchwc`` is the convolution before
that ReLU, in a blocked layout. What it adds itself, reorderings and casts, traces back to nothing.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, compress
from pathlib import Path
from statistics import median, median_grouped
from typing import TYPE_CHECKING, Any

from export.profiling import WARMUPS, LayerTime, Profile
from export.profiling.onnx_layers import node_title

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from export.runners.onnx_runner import OnnxRunner

_KERNEL = "_kernel_time"
_CALL = "model_run"  # ends the events of a call
_DECORATION = re.compile(
    r"^(?:fused |InsertedPrecisionFreeCast_|InsertedCast_)+"
    r"|(?:_bn|_nchwc|_nhwc|_token_\d+|_transformed|/MatMulAddFusion|/duplicated)+$"
)
_NORM = "BatchNormalization"
_NORM_AS_CONV = "_bn_nchwc"  # ends the name of one that runs as a depthwise convolution
_TURN = 10  # calls before the other session has its turn
_HALF = 0.5  # what is lost on average where a duration is cut to whole microseconds


def profile_onnx(
    path: Path, images: np.ndarray, *, calls: int, threads: int | None = None
) -> Profile | None:
    """Return the profile of an ONNX file on the CPU; see ``profile_network``.

    The profiler spends a few microseconds on each node, within the time that it reports for it:
    more than most small nodes take. So the same session is run in turns without it, and the
    difference is taken off all nodes alike, though never more than a node took. What is left adds
    up to about a call without a profiler.

    Raises:
        CheckpointError: the file is missing, damaged or not ONNX.
        EnvironmentUnfitError: ONNX Runtime is not there.
        DataError: the images are not of the shape or type that the network reads.
        ModelError: ONNX Runtime cannot compute the network on them.
    """
    import onnx

    from export.runners.onnx_runner import OnnxRunner

    with tempfile.TemporaryDirectory() as folder:
        with (
            OnnxRunner(path, threads=threads, profile_to=Path(folder)) as profiled,
            OnnxRunner(path, threads=threads) as plain,
        ):
            counted, plain_us = _take_turns(profiled, plain, images, calls)
            written = profiled.end_profile()
        try:
            events = json.loads(written.read_bytes())
        except ValueError:  # it escapes no quotes in names
            return None
    model = onnx.load(path, load_external_data=False)
    return profile_from_events(events, model, counted=counted, plain_us=plain_us)


def profile_from_events(
    events: Sequence[dict[str, Any]],
    model: onnx.ModelProto,
    *,
    counted: Sequence[bool],
    plain_us: Sequence[float],
) -> Profile:
    """Return the profile that ONNX Runtime's events hold.

    Args:
        events: what ONNX Runtime wrote; one ``model_run`` ends each call.
        model: the network, as it was before ONNX Runtime rewrote it.
        counted: which of the calls count.
        plain_us: microseconds of calls without a profiler.
    """
    calls = list(compress(_calls(events), counted))
    times: dict[tuple[str, str], list[int]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for event in chain.from_iterable(calls):
        # Nodes without a name are told apart by their number.
        key = event["name"].removesuffix(_KERNEL), str(event["args"].get("node_index"))
        kinds[key] = _NORM if key[0].endswith(_NORM_AS_CONV) else event["args"]["op_name"]
        times.setdefault(key, []).append(event["dur"])
    # Within its microsecond, a median lies where half of the calls are below it.
    medians = [median_grouped(found) + _HALF for found in times.values()]
    total = median(sum(event["dur"] + _HALF for event in call) for call in calls)
    cost = max(0.0, (total - median(plain_us)) / len(medians))
    covered = covered_nodes(model, [(name, kind) for (name, _), kind in kinds.items()])
    return Profile(
        calls=len(calls),
        total_ms=(total - sum(min(cost, us) for us in medians)) / 1000,
        layers=tuple(
            LayerTime(name=name, kind=kind, nodes=nodes, milliseconds=max(0.0, us - cost) / 1000)
            for ((name, _), kind), nodes, us in zip(kinds.items(), covered, medians, strict=True)
        ),
    )


def _take_turns(
    profiled: OnnxRunner, plain: OnnxRunner, images: np.ndarray, calls: int
) -> tuple[list[bool], list[float]]:
    """Run both in turns of a few calls; return which profiled ones count, and the others' times."""
    counted, plain_us = [False] * WARMUPS, []
    for runner in (profiled, plain):
        for _ in range(WARMUPS):
            runner.infer(images)
    for first in range(0, calls, _TURN):
        turn = min(_TURN, calls - first)
        for _ in range(1 + turn):  # one that pays for the caches that the other left cold
            profiled.infer(images)
        counted += [False] + [True] * turn
        plain.infer(images)
        for _ in range(turn):
            start = time.perf_counter()
            plain.infer(images)
            plain_us.append(1e6 * (time.perf_counter() - start))
    return counted, plain_us


def covered_nodes(
    model: onnx.ModelProto, executed: Sequence[tuple[str, str]]
) -> list[tuple[str, ...]]:
    """Return, for everything that was executed, the nodes of the network that it computes.

    A node that was not executed itself was taken in by what ran last of all that it reads from.

    Args:
        model: the network as it was.
        executed: ONNX Runtime's names and operators, in order of execution.
    """
    nodes = {node_title(node): node for node in model.graph.node}
    # ONNX Runtime's own names of nodes without one.
    numbered = {f"{node.op_type}_{i}": title for i, (title, node) in enumerate(nodes.items())}
    executed = [(numbered.get(name, name), kind) for name, kind in executed]
    makers = {name: node_title(node) for node in nodes.values() for name in node.output}
    own = {name for name, _ in executed if name in nodes}
    owners: dict[str, int] = {}
    for index, (name, kind) in enumerate(executed):
        title = name if name in nodes else _taken_in(name, kind, own, nodes, makers)
        if title is not None:
            owners[title] = index
    for title, node in nodes.items():
        before = [owners[makers[name]] for name in node.input if makers.get(name) in owners]
        if title not in owners and before:
            owners[title] = max(before)
    return [
        tuple(title for title in nodes if owners.get(title) == index)
        for index in range(len(executed))
    ]


def _taken_in(
    name: str, kind: str, own: set[str], nodes: dict[str, onnx.NodeProto], makers: dict[str, str]
) -> str | None:
    """Return the node that something with a decorated name computes, back from what it names."""
    plain = _DECORATION.sub("", name)
    level = {plain if plain in nodes else makers.get(plain)}
    while level := {title for title in level if title is not None and title not in own}:
        found = [title for title in level if _computes(kind, nodes[title].op_type)]
        if found:
            return found[0] if len(found) == 1 else None
        level = {makers.get(read) for title in level for read in nodes[title].input}
    return None


def _computes(kind: str, operator: str) -> bool:
    """Whether one of ONNX Runtime's operators, such as QLinearConv, stands for one of ONNX."""
    if operator in ("Gemm", "MatMul"):
        return "Gemm" in kind or "MatMul" in kind
    return operator in kind


def _calls(events: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Return the executed nodes of each call."""
    call: list[dict[str, Any]] = []
    for event in events:
        if event["name"] == _CALL:
            yield call
            call = []
        elif event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            call.append(event)
