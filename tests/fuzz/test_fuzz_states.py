"""The state of a run and its history: whatever they hold, a sentence or something to go on from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from mutations import damaged, fuzzed, mutated, refused_in_a_sentence

from compress.config import RunConfig
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import DIGEST_KEY, DOCUMENT_KEY, State, StateFiles, _digest

TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "skipped": torch.tensor(1)}
DOCUMENT = {"phase": "train", "lines": 1, "facts": {"step": 3, "accuracy": {"top1": 1.0}}}
EVENTS = [
    {"event": "epoch", "phase": "train", "epoch": 1, "step": 18, "loss": 0.5, "top1": 90.0},
    {"event": "prune_step", "step": 20, "widths": {"conv1": 8}, "importance": {"min": 0.1}},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.begin(RunConfig(tensorboard=False))
    return run


def write_state(run: RunDirectory, data: bytes) -> None:
    run.state.parent.mkdir(exist_ok=True)
    run.state.write_bytes(data)


def go_on(run: RunDirectory) -> None:
    """Do with a state what a run does before it reaches the network."""
    state = Session(run).load("train")
    if state:
        assert state.facts.get("step", 0) >= 0
        with Session(run).taking_up():
            state.facts["accuracy"]["top1"]


def signed(document: Any) -> bytes:
    text = json.dumps(document)
    return safetensors.torch.save(TENSORS, {DOCUMENT_KEY: text, DIGEST_KEY: _digest(text, TENSORS)})


@fuzzed
@given(document=mutated(DOCUMENT))
def test_a_state_of_any_structure(run: RunDirectory, document: Any) -> None:
    run.history.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    write_state(run, signed(document))
    refused_in_a_sentence(lambda: go_on(run))


@fuzzed
@given(data=damaged(signed(DOCUMENT), head=200))
def test_a_state_of_any_bytes(run: RunDirectory, data: bytes) -> None:
    """Its digest tells: nothing but what was written is gone on from."""
    run.history.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    write_state(run, data)
    files = StateFiles(run.state, run.previous_state)
    if not refused_in_a_sentence(lambda: go_on(run)) and run.state.exists():
        saved = files.read()
        assert saved is not None
        assert saved.state.facts == DOCUMENT["facts"]
        assert all(torch.equal(saved.state.tensors[name], t) for name, t in TENSORS.items())


@fuzzed
@given(events=mutated(EVENTS))
def test_a_history_of_any_structure(run: RunDirectory, events: Any) -> None:
    lines = events if isinstance(events, list) else [events]
    run.history.write_text("".join(json.dumps(event) + "\n" for event in lines))
    run.state.unlink(missing_ok=True)
    refused_in_a_sentence(lambda: (go_on(run), run.events()))


@fuzzed
@given(data=damaged("".join(json.dumps(event) + "\n" for event in EVENTS).encode()))
def test_a_history_of_any_bytes(run: RunDirectory, data: bytes) -> None:
    run.history.write_bytes(data)
    run.state.unlink(missing_ok=True)
    refused_in_a_sentence(lambda: (go_on(run), run.events()))


def test_what_is_whole_is_gone_on_from(run: RunDirectory) -> None:
    run.history.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    StateFiles(run.state, run.previous_state).write(State("train", {"step": 3}, TENSORS), lines=1)
    state = Session(run).load("train")
    assert state is not None
    assert state.facts == {"step": 3}
    assert len(run.events()) == 1
