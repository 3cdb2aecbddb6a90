"""Documents of sweeps, oracles and latency tables: whatever they say, a sentence or sound facts."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import BOUNDS, CASES, at, damaged, fuzzed, mutated, places, refused_in_a_sentence
from rich.console import RenderableType
from valid_documents import (
    DESCRIPTION,
    ENGINE,
    IDENTITY,
    LOG,
    SIDECAR,
    SWEEP,
    TABLE,
    with_description,
)
from whole_report import DOCUMENT as REPORT
from whole_report import written

from bench.measuring.discovery import subjects
from bench.reports.report import load_report
from bench.statistics.shares import tango_interval
from compress.checkpoints.summary import inspect_checkpoint, render_summary
from compress.config import BenchConfig
from compress.latency.table import document_of, read_table
from compress.oracle.changes import ChangeLog
from compress.sweep.points import SweepFiles
from compress.sweep.report import render_sweep, sweep_csv
from compress.sweep.request import read_goal
from compress.sweep.sweep import Sweep
from compress.terminal.console import print_table
from export.engines.sidecar import read_engine_sidecar


class Kind(NamedTuple):
    """A document, and what the commands do with a file of it."""

    document: Any
    use: Callable[[Path, Any], str]
    """Writes it, reads it, shows it: returns all that is shown."""


def on_terminal(renderable: RenderableType) -> str:
    """Return what a command would print."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        print_table(renderable)
    return shown.getvalue()


def use_table(folder: Path, document: Any) -> str:
    (folder / "table.json").write_text(json.dumps(document))
    table = read_table(folder / "table.json")
    figures = [table.fixed, table.error.mean, table.error.largest, table.spread, table.dense_ms]
    for shape, grid in table.grids.items():
        if grid.read.size and grid.written.size:
            known = np.argwhere(~np.isnan(grid.milliseconds))[0]
            widths = grid.read[known[0]], grid.written[known[1]]
            figures.append(float(table.milliseconds(shape, *widths)))
    assert all(map(math.isfinite, figures)), figures
    return json.dumps(document_of(table), allow_nan=False)


def use_sweep(folder: Path, document: Any) -> str:
    """Go on with a sweep as far as its document says anything, and begin anew over it."""
    files = SweepFiles(folder)
    files.document.write_text(json.dumps(document))
    goal, found = read_goal(files.document)
    sweep = Sweep(goal, files, (), (), lambda line: None, tango_interval)
    sweep.remember(found)
    document = sweep.write()
    assert found["complete"] in (True, False)
    assert all(0 <= seconds < math.inf for seconds in sweep.seconds.values())
    said = on_terminal(render_sweep(document, folder))
    assert sweep_csv(document)
    above = folder.parent / "config.toml"
    above.touch()  # as if a run lay there
    files.clear()
    assert above.exists()
    assert not files.document.exists()
    return said


def use_log(folder: Path, document: Any) -> str:
    lines = document if isinstance(document, list) else [document]
    (folder / "oracle.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = ChangeLog(folder / "oracle.jsonl", IDENTITY)
    for key, sums in log.entries.items():  # a loss without a unit may be infinite
        assert min(key.batch, key.first) >= 0
        assert all(type(number) is float for number in sums)
    return ""


def use_description(folder: Path, document: Any) -> str:
    (folder / "a.safetensors").write_bytes(with_description(document))
    return on_terminal(render_summary(inspect_checkpoint(folder / "a.safetensors")))


def use_report(folder: Path, document: Any) -> str:
    return str(load_report(written(folder / "report.json", document)))


def use_sidecar(folder: Path, document: Any) -> str:
    export = folder / "export"
    export.mkdir(exist_ok=True)
    for name in ("dense", "pruned"):
        (export / f"{name}.onnx").write_bytes(b"network")
    (export / "dense.json").write_text(json.dumps(SIDECAR))
    (export / "pruned.json").write_text(json.dumps(document))
    found = subjects(folder, config=BenchConfig(), precision="fp32")
    assert all(subject.artefact.bytes == 7 for subject in found)
    return ""  # what is shown of it is in the report


def use_engine(folder: Path, document: Any) -> str:
    path = folder / "a.engine"
    path.write_bytes(b"network")
    path.with_name("a.engine.json").write_text(json.dumps(document))
    read_engine_sidecar(path)
    return ""


KINDS = {
    "latency table": Kind(TABLE, use_table),
    "sweep": Kind(SWEEP, use_sweep),
    "oracle": Kind(LOG, use_log),
    "header of weights": Kind(DESCRIPTION, use_description),
    "report": Kind(REPORT, use_report),
    "sidecar": Kind(SIDECAR, use_sidecar),
    "engine sidecar": Kind(ENGINE, use_engine),
}
OTHERS = ("latency table", "sweep", "oracle", "header of weights")
"""Those whose structure no other file breaks."""


@pytest.mark.parametrize("name", KINDS)
def test_what_is_broken_is_good(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.use(tmp_path, copy.deepcopy(kind.document))


@pytest.mark.parametrize("name", OTHERS)
@fuzzed
@given(data=st.data())
def test_a_document_of_any_structure(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = KINDS[name]
    folder = tmp_path_factory.getbasetemp() / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    document = data.draw(mutated(kind.document))
    refused_in_a_sentence(lambda: kind.use(folder, document))


@pytest.mark.parametrize("name", KINDS)
@settings(fuzzed, max_examples=max(CASES // 2, 1))
@given(data=st.data())
def test_no_value_of_a_document_breaks_what_shows_it(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One text or number at a time becomes one that steers a terminal, or that nobody measured."""
    kind = KINDS[name]
    folder = tmp_path_factory.getbasetemp() / f"one-{name.replace(' ', '-')}"
    folder.mkdir(exist_ok=True)
    leaves = [
        place
        for place in places(kind.document)
        if isinstance(at(kind.document, place), str | int | float)
    ]
    *parents, last = data.draw(st.sampled_from(leaves))
    document = copy.deepcopy(kind.document)
    at(document, tuple(parents))[last] = data.draw(BOUNDS)

    def show() -> None:
        said = kind.use(folder, document)
        strange = [c for c in said if not (c.isprintable() or c in "\n\N{NO-BREAK SPACE}")]
        assert not strange, strange

    refused_in_a_sentence(show)


@fuzzed
@given(data=damaged(json.dumps(TABLE).encode()))
def test_a_latency_table_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(data)
    refused_in_a_sentence(lambda: read_table(path))


@fuzzed
@given(data=damaged("".join(json.dumps(line) + "\n" for line in LOG).encode()))
def test_a_log_of_an_oracle_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(data)
    refused_in_a_sentence(lambda: ChangeLog(path, IDENTITY))
