"""A wrong option is refused by the name that was typed, and in words, not those of a library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import invoke, small

from compress.config import load_config
from compress.runs.request import PruneRequest
from compress.runs.rundirectory import RunDirectory
from compress.terminal.options import as_typed

FOREIGN = re.compile(r"settings:|config\.toml|[Ii]nput should be a valid|unable to parse|Traceback")
PRUNE = ("prune", "--checkpoint", "weights.pth", "--output", "new")
SWEEP = ("sweep", "--output", "new")
PAIR = ("bench", "a.onnx", "b.onnx")

WRONG: list[tuple[tuple[str, ...], str]] = [
    ((*PRUNE, "--budget", "removed=100,channels=0.5"), "--budget 'removed=100,channels=0.5': a"),
    ((*PRUNE, "--budget", "macs=-1"), "--budget '-1': input should be greater than 0"),
    ((*PRUNE, "--budget", "macs=x"), "--budget 'macs=x': the value of a budget is a number"),
    ((*PRUNE, "--batch", "a"), "Invalid value for '--batch': 'a': a whole number belongs here."),
    ((*PRUNE, "--batch", "-3"), "--batch -3: input should be greater than or equal to 1"),
    ((*PRUNE, "--criterion", "99"), "--criterion 99: no criterion has this number"),
    ((*PRUNE, "--precision", "FP16"), "--precision 'FP16': input should be 'fp32', 'fp16' or"),
    ((*PRUNE, "--data", "/nowhere"), "--data /nowhere does not exist: name the folder"),
    ((*PRUNE, "--set", "prune=3"), "--set: prune is a section: give one of its keys, as prune."),
    ((*PRUNE, "--set", "prune..steps=3"), "--set 'prune..steps=3' is not of the form"),
    ((*PRUNE, "--set", "prune.steps=a"), "--set: prune.steps = 'a': a whole number belongs here"),
    ((*PRUNE, "--set", "prune.stepz=1"), "--set: unknown key 'prune.stepz': did you mean 'steps'"),
    ((*SWEEP, "--budget", "macs"), "--budget 'macs': a budget is written KIND=VALUE"),
    ((*SWEEP, "--max-drop", "x"), "Invalid value for '--max-drop': 'x': a number belongs here."),
    ((*SWEEP, "--max-drop", "-1"), "--max-drop -1.0: input should be greater than or equal to 0"),
    ((*SWEEP, "--max-drop", "1", "--kind", "removed"), "--kind 'removed': input should be 'macs'"),
    ((*SWEEP, "--max-drop", "1", "--lowest", "1"), "--lowest 1.0: input should be less than 1"),
    ((*SWEEP, "--max-drop", "1", "--tolerance", "0"), "--tolerance 0.0: input should be greater"),
    ((*SWEEP, "--max-drop", "1", "--points", "0"), "--points 0: input should be greater than or"),
    (("oracle", "--checkpoint", "x", "--output", "new", "--images", "a"), "'--images': 'a': a wh"),
    (("profile", "--config", "digits-resnet20", "--threads", "a"), "'--threads': 'a': a whole"),
    (("bench", "run", "--batch", "1,a"), "--batch 'a': a whole number belongs here"),
    (("bench", "run", "--batch", ""), "--batch '': a list belongs here, as 1,2"),
    (("bench", "run", "--runtime", "foo"), "--runtime 'foo': input should be 'torch-cpu'"),
    ((*PAIR, "--batch", "a"), "--batch 'a': a whole number belongs here"),
    ((*PAIR, "--batch", "0"), "--batch 0: input should be greater than or equal to 1"),
    ((*PAIR, "--runtime", "foo"), "--runtime 'foo': input should be 'torch-cpu'"),
    ((*PAIR, "--set", "bench.block_ms=x"), "bench.block_ms = 'x': a number belongs here"),
    (("export", "run", "--batch", "1.5"), "--batch 1.5: batch sizes are whole numbers"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that is begun, to which commands are given."""
    monkeypatch.chdir(tmp_path)
    RunDirectory(Path("run")).begin(load_config(settings=small()[1::2]))
    return tmp_path


@pytest.mark.parametrize(("words", "says"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_option_is_named_as_it_was_typed(
    words: tuple[str, ...], says: str, place: Path
) -> None:
    result = invoke(*words)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code in (1, 2), said
    assert says in said
    assert not FOREIGN.search(said), said
    assert not (place / "new").exists()


def test_what_was_not_typed_keeps_its_name() -> None:
    said = "mine.toml: prune.budget = 'macs': a budget is written KIND=VALUE"
    assert as_typed(said, PruneRequest(settings=("seed=1",))) == said
    said = "settings: prune.budgets = 3, data.root.x and export.precision"
    assert as_typed(said, PruneRequest(budget="macs=0.5")).endswith(said.removeprefix("settings"))
