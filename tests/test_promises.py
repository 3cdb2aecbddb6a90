"""What README and docs promise of exit codes and of words that are printed, held against behaviour.

A promise is quoted as it stands on its page, so a page that says something else fails here too.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import invoke
from steady_reports import of_too_few_calls

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
FAST = (
    "--set",
    "bench.max_seconds=0.3",
    "--set",
    "bench.min_blocks=4",
    "--set",
    "bench.block_ms=1",
)

README, CI, MEASURING, ENGINES = "README.md", "docs/ci.md", "docs/measuring.md", "docs/engines.md"
USAGE = "| 2 | usage or configuration |"
COULD_NOT = "| 1 | the command could not do its job; one sentence on stderr says why |"
UNFIT = (
    "A runtime that cannot work here is refused with exit code 5, and none falls back to another."
)
CONTRADICT = "Limits that contradict are refused with exit code 2, before anything is measured"

HOLDS = "| 0 | done; for `run`, `gate` and `bench --limits`: every limit holds |"
VIOLATED = "| 3 | a limit is violated |"
UNDECIDED = "| 4 | inconclusive: the measurement cannot decide |"
SKIPPED = "or a limit could not be judged here (SKIPPED and not allowed) |"
PARITY = "| 6 | parity failed: ONNX Runtime and torch disagree on the same network |"
NO_BUILDER = "| the target has no builder, or does not compute the precision | 2 |"
NO_GPU_HERE = "| there is no GPU; TensorRT-RTX alone builds without one | 5 |"
V100 = "--target v100 --precision fp16"

PROMISES: list[tuple[str, str, int, str]] = [
    # page, what it says, exit code, command
    (README, USAGE, 2, "run --model resnet21 --output new"),
    (README, USAGE, 2, "run --model own_models:absent --output new"),
    (README, USAGE, 2, "run --config digits-resnet21 --output new"),
    (README, USAGE, 2, "run --set prune.bugdet=macs=0.5 --output new"),
    (README, USAGE, 2, "run --no-such-option"),
    (README, USAGE, 2, "bench RUN --runtime tensorr"),
    (README, USAGE, 2, "export RUN --target v10"),
    (README, COULD_NOT, 1, "gate none.json"),
    (README, COULD_NOT, 1, "inspect none.pth"),
    (README, COULD_NOT, 1, "bench none.onnx RUN/export/pruned.onnx"),
    (README, HOLDS, 0, "gate RUN/report.json --limits holds.toml"),
    (README, VIOLATED, 3, "gate RUN/report.json --limits violated.toml"),
    (README, VIOLATED, 3, f"bench RUN --limits violated.toml --output new {' '.join(FAST)}"),
    (README, UNDECIDED, 4, "gate RUN/report.json --limits undecided.toml"),
    (README, SKIPPED, 5, "gate RUN/report.json --limits skipped.toml"),
    (README, PARITY, 6, "export RUN --set export.limits={fp32={relative_error=1e-30}}"),
    (CI, "| 0 | every limit holds |", 0, "gate RUN/report.json --limits holds.toml"),
    (CI, "a runtime or a GPU is missing", 5, "bench RUN --runtime torch-cuda"),
    (MEASURING, UNFIT, 5, "bench RUN --runtime tensorrt"),
    (MEASURING, UNFIT, 5, "bench RUN --runtime onnxruntime-cuda"),
    (MEASURING, UNFIT, 5, "bench RUN --runtime onnxruntime-tensorrt"),
    (MEASURING, CONTRADICT, 2, "gate RUN/report.json --limits contradict.toml"),
    (MEASURING, CONTRADICT, 2, "bench RUN --limits contradict.toml --output new"),
    (ENGINES, NO_BUILDER, 2, "export RUN --engine --target cpu"),
    (ENGINES, NO_GPU_HERE, 5, f"export RUN --engine {V100}"),
]
LIMITS = {
    "holds": "[macs]\nmax_ratio = 0.9\n",
    "violated": "[macs]\nmax_ratio = 0.01\n",
    "undecided": "[latency]\np99_ms = 1000.0\n",  # of fewer than 662 calls there is none
    "skipped": "[latency]\nmax_ratio = 2.0\nbatch_sizes = [77]\n",
    "contradict": "[latency]\np99_ms = 1.0\nmedian_ms = 2.0\n",
}


def page(name: str) -> str:
    """Return a page on one line: sentences go on after the end of a line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@NO_GPU
@pytest.mark.parametrize(
    ("name", "promise", "code", "command"), PROMISES, ids=lambda value: str(value)[:40]
)
def test_a_promised_exit_code_is_the_one_that_is_returned(
    name: str,
    promise: str,
    code: int,
    command: str,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert promise in page(name)
    for limits, text in LIMITS.items():
        (tmp_path / f"{limits}.toml").write_text(text)
    (tmp_path / "own_models.py").write_text("")
    if promise == UNDECIDED:  # not as this machine is loaded just now
        of_too_few_calls(copied / "report.json", copied / "report.json", calls=600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = invoke(*(re.sub("^RUN", str(copied), word) for word in command.split()))
    assert result.exit_code == code, result.stderr
    if code in (1, 2, 5, 6) and "gate" not in command and "--no-such" not in command:
        assert result.stderr.splitlines()[-1].startswith("error: ")
    if code == 2:
        assert not (tmp_path / "new").exists()


@NO_GPU
@pytest.mark.parametrize("exported", [True, False])
def test_a_missing_library_is_the_environment_and_not_a_missing_file(
    copied: Path, monkeypatch: pytest.MonkeyPatch, exported: bool
) -> None:
    assert UNFIT in page(MEASURING)
    for library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, library, None)
    if not exported:
        shutil.rmtree(copied / "export")
    result = invoke("bench", copied, "--runtime", "tensorrt")
    assert result.exit_code == 5
    assert "TensorRT is not installed: pip install" in result.stderr


def test_a_baseline_that_is_replaced_and_a_stored_report_show_the_change(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "prints the change against the one it replaces" in page(CI)
    stored = "compress bench RUN --against earlier/report.json # and against a stored report"
    assert stored in page(MEASURING)
    monkeypatch.setattr("bench.judging.baseline.unfit", lambda comparison, config: None)
    report, baseline = copied / "report.json", tmp_path / "baseline.json"
    shutil.copyfile(report, baseline)
    replaced = invoke("baseline", report, "--output", baseline, "--overwrite")
    measured = invoke("bench", copied, "--against", baseline, "--output", tmp_path / "new", *FAST)
    for result in (replaced, measured):
        assert result.exit_code == 0, result.stderr
        shown = " ".join(result.stdout.split())
        assert re.search(
            r"against the stored report.*latency ratio, batch 1.*x \d\.\d{3} \[", shown
        )


def test_whoever_writes_files_says_where_they_are(copied: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    measured = invoke("bench", copied, "--output", new, *FAST)
    assert f"the report is in {new}" in measured.stderr
    again = invoke("report", new / "report.json", "--output", tmp_path / "pages")
    assert again.stderr == f"report.md and report.html are in {tmp_path / 'pages'}\n"
    assert {"report.md", "report.html"} <= {path.name for path in (tmp_path / "pages").iterdir()}
    judged = invoke("gate", new / "report.json", "--output", tmp_path / "judged")
    assert judged.stderr == f"the report is in {tmp_path / 'judged'}\n"
