"""Where no terminal shows a bar, a line now and then says how far a task is."""

from __future__ import annotations

import pytest

from compress.terminal import progress
from compress.terminal.progress import bar, percent_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, in a list that a test may change."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_where_nobody_watches(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("pruning", 400) as shown:
        for step in range(1, 301):
            clock[0] += 0.5
            shown.at(step, f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "pruning: 120 of 400, loss 120",
        "pruning: 240 of 400, loss 240",
    ]


def test_short_tasks_say_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with percent_bar("measuring") as show:
        for part in range(60):
            clock[0] += 0.9
            show("batch 1", part / 60)
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_main_one_speaks(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with bar("pruning", 4) as shown:
        clock[0] += 100
        shown.at(1)
    assert capsys.readouterr().err == ""
