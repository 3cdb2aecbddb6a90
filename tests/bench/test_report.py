from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from pydantic import ValidationError
from rich.console import Console

from bench import units
from bench.judging.quality_gate import judge
from bench.judging.verdicts import Verdict
from bench.limits import load_limits
from bench.measuring.records import Outcomes
from bench.pages.publish import render_markdown, render_table
from bench.pages.sheets import verdict_sheet
from bench.reports.report import load_report, save_report, sealed
from bench.reports.schema import Report, report_schema
from bench.reports.summary import comparison_sheet
from compress.errors import CheckpointError, OutputError

ROOT = Path(__file__).parents[2]
ReportFactory = Callable[..., Report]


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def verdicts(report: Report) -> list[Verdict]:
    return judge(report, load_limits("default"))


def on_terminal(report: Report, verdicts: Sequence[Verdict], width: int = 200) -> str:
    out = StringIO()
    Console(file=out, width=width).print(render_table(report, verdicts))
    return out.getvalue()


def cells(line: str, separator: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip(separator).split(separator))


def test_round_trip(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.json"
    save_report(report, path)
    assert load_report(path) == report
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_the_document_says_what_it_is(report: Report, tmp_path: Path) -> None:
    save_report(report, tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert document["schema_version"] == 4
    assert document["created"] == "2026-01-02T03:04:05Z"
    assert document["pruning"] == {"criterion": "taylor-gate"}
    assert document["validation"] == {
        "kind": "labelled",
        "identity": report.validation.identity,
        "images": 2000,
        "skipped": 3,
        "max_skipped": 0.01,
    }
    assert document["networks"]["reference"]["top1"] == 0.9
    assert len(document["networks"]["pruned"]["latency"][0]["block_medians_ms"]) == 20
    assert document["comparison"]["macs_ratio"] == 20_325_376 / 40_813_184
    assert document["comparison"]["latency"][0]["speed_up"] == pytest.approx(1 / 0.65, rel=0.01)


def test_the_interval_can_be_recomputed_from_the_document(report: Report) -> None:
    from bench.statistics.latency_ratios import median_ratio_interval

    found = report.comparison.latency[0]
    again = median_ratio_interval(
        report.networks.reference.latency[0].block_medians_ms,
        report.networks.pruned.latency[0].block_medians_ms,
        confidence=report.config.confidence,
    )
    assert again == found.ratio


def test_a_written_report_fits_the_published_schema(report: Report) -> None:
    published = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    assert published == report_schema()
    check = Draft202012Validator(published, format_checker=FormatChecker())
    Draft202012Validator.check_schema(published)
    document = json.loads(json.dumps(sealed(report)))
    check.validate(document)
    for spoil in (
        lambda d: d.update(schema_version=1),
        lambda d: d.update(surprise=1),
        lambda d: d.pop("sha256"),
        lambda d: d["networks"]["pruned"].update(top1=1.5),
        lambda d: d["comparison"]["latency"][0]["ratio"].update(low="fast"),
    ):
        damaged_document = json.loads(json.dumps(document))
        spoil(damaged_document)
        assert not check.is_valid(damaged_document)


def test_the_digest_can_be_recomputed_from_the_document(report: Report) -> None:
    document = json.loads(json.dumps(sealed(report)))
    told = document.pop("sha256")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == told


def test_outcomes_of_every_image_are_in_the_report(report: Report) -> None:
    networks, accuracy = report.networks, report.comparison.accuracy
    reference, pruned = networks.reference.outcomes, networks.pruned.outcomes
    assert accuracy is not None
    assert reference is not None
    assert pruned is not None
    lost = reference.read_correct() & ~pruned.read_correct()
    assert (lost.sum(), lost.size) == (accuracy.drop.flips_to_wrong, 2000)
    assert pruned.read_correct().mean() == networks.pruned.top1
    assert pruned.read_top5_correct().mean() == networks.pruned.top5
    same = (reference.read_top1() == pruned.read_top1()).mean()
    assert same == accuracy.same_prediction


@pytest.mark.parametrize("text", ["", "?", "AAAA", "eJwDAAAAAAE="])
def test_outcomes_that_cannot_be_unpacked(report: Report, text: str) -> None:
    outcomes = report.networks.pruned.outcomes
    assert outcomes is not None
    with pytest.raises(ValidationError):
        Outcomes.model_validate({**outcomes.model_dump(), "correct": text})


def test_a_report_of_version_2_is_read_and_judged(tmp_path: Path) -> None:
    """It was written by the code of then, whose verdicts stand here; it said budgets for limits."""
    stored = ROOT / "tests" / "fixtures" / "v2" / "report.json"
    document = json.loads(stored.read_text(encoding="utf-8"))
    assert (document["schema_version"], "limits" in document) == (2, False)
    found = load_report(stored)
    assert found.limits is not None
    today = {**document["budgets"]}
    today["latency"] = {**today["latency"], "predicted_max_ratio": None}
    assert found.limits.model_dump(mode="json") == today
    assert [(v.name, v.batch_size, v.status, v.measured) for v in judge(found, found.limits)] == [
        ("accuracy.max_drop_pp", None, "INCONCLUSIVE", 1.0),
        ("latency.max_ratio", 1, "PASS", 0.6498035259104695),
        ("latency.max_regression", 1, "PASS", 0.9285714285714287),
        ("macs.max_ratio", None, "PASS", 0.4980100547901384),
        ("parity.max_relative_error", None, "PASS", 5e-07),
    ]
    save_report(found, tmp_path / "report.json")
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (again["schema_version"], "budgets" in again) == (4, False)
    assert again["limits"] == today
    assert load_report(tmp_path / "report.json") == found


def test_a_report_of_version_3_is_read_and_has_no_prediction() -> None:
    stored = ROOT / "tests" / "fixtures" / "v3" / "report.json"
    document = json.loads(stored.read_text(encoding="utf-8"))
    assert (document["schema_version"], "prediction" in document) == (3, False)
    found = load_report(stored)
    assert found.prediction is None
    assert found.networks.pruned.latency[0].summary.median_ms == pytest.approx(
        document["networks"]["pruned"]["latency"][0]["summary"]["median_ms"]
    )


def test_an_edited_report_of_version_2_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "fixtures" / "v2" / "report.json").read_text(encoding="utf-8")
    loose = damaged(lambda d: d["budgets"]["accuracy"].update(max_drop_pp=9.0))
    (tmp_path / "report.json").write_text(loose(text), encoding="utf-8")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        load_report(tmp_path / "report.json")


def test_a_failed_write_keeps_what_was_there(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "file" / "report.json"
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot write"):
        save_report(report, path)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON or is cut short"),
        (lambda text: "", "is not JSON or is cut short"),
        (lambda text: "[1, 2]", "not a report of `compress bench`"),
        (lambda text: '{"a": 1}', "not a report of `compress bench`"),
        (
            damaged(lambda d: d.update(schema_version=1)),
            "schema_version 1 and this tool reads 2 to 4",
        ),
        (damaged(lambda d: d["networks"].pop("reference")), "damaged report: networks.reference"),
        (damaged(lambda d: d.update(extra=1)), "damaged report: extra"),
        (
            damaged(lambda d: d["networks"]["reference"].update(top1=1.5)),
            "damaged report: networks.reference.top1",
        ),
        (
            damaged(lambda d: d["comparison"]["latency"][0]["ratio"].update(high=float("nan"))),
            "damaged report: comparison.latency.0.ratio.high",
        ),
        (damaged(lambda d: d.update(created="yesterday")), "damaged report: created"),
        (damaged(lambda d: d.pop("sha256")), "was changed after it was written"),
        (
            damaged(lambda d: d["comparison"].update(macs_ratio=0.1)),
            "damaged report: macs_ratio is not that of the counts",
        ),
        (
            damaged(lambda d: d["networks"]["pruned"]["outcomes"].update(images=7)),
            "damaged report: networks.pruned.outcomes",
        ),
    ],
)
def test_damage_is_one_sentence(
    report: Report, tmp_path: Path, spoil: Callable[[str], str], words: str
) -> None:
    path = tmp_path / "report.json"
    save_report(report, path)
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_report(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_report_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory; write one with"):
        load_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_report(tmp_path / "report.json")


def test_markdown_and_terminal_show_the_same(report: Report, verdicts: list[Verdict]) -> None:
    page, screen = render_markdown(report, verdicts), on_terminal(report, verdicts)
    in_page = {cells(line, "|") for line in page.splitlines() if line.startswith("|")}
    on_screen = {cells(line, "\u2502") for line in screen.splitlines() if "\u2502" in line}
    rows = [*comparison_sheet(report).rows, *verdict_sheet(verdicts).rows]
    assert len(rows) == 8 + len(verdicts)
    assert set(rows) <= in_page
    assert set(rows) <= on_screen


def test_the_main_table_in_human_units(report: Report) -> None:
    rows = {name: rest for name, *rest in comparison_sheet(report).rows}
    drop = report.comparison.accuracy
    assert drop is not None
    assert rows["top-1"][:2] == ["90.00 %", "89.50 %"]
    assert rows["top-1"][2].startswith("-0.50 pp [-1.")
    assert rows["MACs"] == ["40.8 M", "20.3 M", "x 0.498"]
    assert rows["parameters"] == ["271 k", "121 k", "x 0.447"]
    assert rows["file size"] == ["1.08 MB", "512.00 kB", "x 0.472"]
    assert rows["latency, batch 1"][2].startswith("x 0.650 [0.6")
    assert rows["speed-up, batch 1"][2].startswith("1.54x [1.5")


def test_what_did_not_pass_is_explained_in_both(sample_report: ReportFactory) -> None:
    report = sample_report(images=360, worse=5, better=2, ratio=1.2, parity=())
    verdicts = judge(report, load_limits("default"))
    page = render_markdown(report, verdicts)
    screen = " ".join(on_terminal(report, verdicts, width=120).split())
    open_ = [verdict for verdict in verdicts if verdict.status != "PASS"]
    assert {verdict.status for verdict in open_} == {"FAIL", "INCONCLUSIVE", "SKIPPED"}
    for verdict in open_:
        assert f"- {verdict.status}: {verdict.sentence}." in page
        assert f"{verdict.status}: {verdict.sentence}." in screen


def test_a_report_without_accuracy_or_verdicts_still_renders(sample_report: ReportFactory) -> None:
    report = sample_report(batch_sizes=(), parity=())
    bare = report.model_copy(
        update={"comparison": report.comparison.model_copy(update={"accuracy": None})}
    )
    assert "not measured" in on_terminal(bare, [])
    page = render_markdown(bare, [])
    assert "## Verdicts" not in page
    assert "## Environment" in page


def test_what_an_unfit_machine_measured_is_not_judged(sample_report: ReportFactory) -> None:
    unfit = sample_report(control=1.1, batch_sizes=(1,))
    found = verdict_sheet(judge(unfit, {"latency": {"max_ratio": 0.9}}))
    assert found.rows == (("latency.max_ratio, batch 1", "0.900", "not judged", "SKIPPED"),)
    assert "latency, batch 1" in {row[0] for row in comparison_sheet(unfit).rows}


def test_a_directory_is_not_a_report_but_may_hold_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_report(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is a directory: name the report in it, {tmp_path / 'report.json'}"
    )


def test_units() -> None:
    for written, expected in (
        (units.count(40_813_184), "40.8 M"),
        (units.count(4.1e9), "4.10 G"),
        (units.count(269_440), "269 k"),
        (units.count(999_600), "1.00 M"),
        (units.count(640), "640"),
        (units.size(1_084_121), "1.08 MB"),
        (units.size(999), "999 B"),
        (units.milliseconds(0.4119), "0.412 ms"),
        (units.milliseconds(12.345), "12.35 ms"),
        (units.milliseconds(123.45), "123.5 ms"),
        (units.share(0.98056), "98.06 %"),
        (units.level(0.975), "97.5 %"),
        (units.error(3.1e-7), "3.1e-07"),
        (units.about(19_631), "20000"),
    ):
        assert written == expected


def test_import_is_light() -> None:
    modules = "bench.judging.quality_gate, bench.reports.report, bench.compare, bench.pages.publish"
    heavy = "('torch', 'torchvision', 'onnx', 'onnxruntime', 'scipy', 'rich', 'jinja2')"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert found.stdout.strip() == "[]"
