"""Measuring and judging by the command line: files, verdicts, exit codes, bad input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import (
    CALIBRATION,
    contents,
    document,
    files_in,
    full_for,
    interrupted_in,
    invoke,
    refused,
    small,
)
from steady_reports import of_too_few_calls, steady
from tensorrt_contract import fake_tensorrt

from bench.reports.report import load_report, save_report
from compress.errors import DataError


class TestBenchAndGate:
    @pytest.mark.parametrize("command", ["export", "bench"])
    @pytest.mark.parametrize("name", ["missing", "images"])
    def test_not_a_run_directory(self, command: str, name: str, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        refused(command, tmp_path / name, code=2, says="is not a run directory")
        assert files_in(tmp_path) == set()

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "--precision fp32"),
            (["--precision", "int8"], "--precision int8"),
            (["--runtime", "torch-cpu"], "--precision fp32"),
            (["--runtime", "tensorrt"], "--precision fp32 --engine --target TARGET"),
        ],
    )
    def test_bench_before_export_says_how_to_export(
        self, arguments: list[str], says: str, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bench.measuring.discovery.require_usable", lambda runtime: None)
        shutil.rmtree(copied / "export")
        expected = f"write it with: compress export {copied} {says}"
        refused("bench", copied, *arguments, code=1, says=expected)

    @pytest.mark.parametrize(
        ("target", "precision", "runtime"),
        [
            pytest.param("cpu", "int8", "onnxruntime-cpu", marks=pytest.mark.slow),
            pytest.param("v100", "fp16", "onnxruntime-cpu", marks=pytest.mark.slow),
            pytest.param("cpu", "fp32", "torch-cpu", marks=pytest.mark.slow),
        ],
    )
    def test_bench_of_each_precision(
        self,
        target: str,
        precision: str,
        runtime: str,
        copied: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        arguments = ("--target", target, "--precision", precision)
        assert invoke("export", copied, *arguments, *CALIBRATION).exit_code == 0
        measured = invoke("bench", copied, *arguments[2:], "--runtime", runtime, "--json")
        assert (measured.exit_code, measured.stderr) == (0, f"the report is in {copied}\n")
        assert capfd.readouterr() == ("", "")
        report = document(measured)["report"]
        assert (report["target"], report["precision"]) == (target, precision)
        assert report["runtime"] == {"torch-cpu": "torch (cpu)"}.get(runtime, "ONNX Runtime (CPU)")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--runtime", "torch-cpu", "--precision", "int8"], "another bench.runtime"),
            (["--runtime", "tensorr"], "--runtime 'tensorr'"),
            (["--precision", "int4"], "--precision 'int4'"),
        ],
    )
    def test_bench_of_what_cannot_be(self, arguments: list[str], says: str, copied: Path) -> None:
        before = contents(copied)
        refused("bench", copied, *arguments, code=2, says=says)
        assert contents(copied) == before

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize("runtime", ["onnxruntime-cuda", "onnxruntime-tensorrt", "torch-cuda"])
    def test_bench_on_a_gpu_that_is_not_here(self, runtime: str, copied: Path) -> None:
        for gone in (False, True):
            if gone:  # what cannot run here need not be exported first
                shutil.rmtree(copied / "export")
            before = contents(copied)
            refused("bench", copied, "--runtime", runtime, code=5, says="")
            assert contents(copied) == before

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_bench_in_tensorrt_that_is_not_here(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)
        says = "TensorRT is not installed: pip install"
        refused("bench", copied, "--runtime", "tensorrt", code=5, says=says)
        # either library runs engines, and then the GPU is missing
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt("rtx-1.7.1.116"))
        says = "tensorrt was asked for and finds no usable GPU"
        refused("bench", copied, "--runtime", "tensorrt", code=5, says=says)

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("dense.json", None, "dense.json; write it with: compress export"),
            ("pruned.onnx", None, "pruned.onnx; write it with: compress export"),
            ("pruned.onnx", lambda whole: whole[:5000], "is not the file that"),
            ("pruned.onnx", lambda whole: whole + b" ", "is not the file that"),
            ("pruned.json", lambda whole: whole[:300], "is not valid JSON; export again"),
            ("dense.json", lambda whole: b"[]", "export again"),
            ("dense.json", lambda whole: whole.replace(b'"cpu"', b'"t4"'), "differ in target"),
        ],
    )
    def test_bench_of_an_export_that_is_not_whole(
        self, name: str, content: Callable[[bytes], bytes] | None, says: str, copied: Path
    ) -> None:
        path = copied / "export" / name
        whole = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content(whole))
        before = contents(copied)
        refused("bench", copied, code=1, says=says)
        assert contents(copied) == before

    def test_bench_of_an_engine_without_its_sidecar(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bench.measuring.discovery.require_usable", lambda runtime: None)
        for name in ("dense", "pruned"):
            (copied / "export" / f"{name}.engine").write_bytes(b"an engine of somebody")
        refused("bench", copied, "--runtime", "tensorrt", code=1, says="dense.engine.json;")

    def test_bench_judges_where_budgets_are_named(self, copied: Path, tmp_path: Path) -> None:
        (tmp_path / "b.toml").write_text("[macs]\nmax_ratio = 0.01\n")
        arguments = ("--limits", tmp_path / "b.toml", "--output", tmp_path / "new", "--json")
        result = invoke("bench", copied, *arguments)
        assert result.exit_code == 3
        assert [v["status"] for v in document(result)["verdicts"]] == ["FAIL"]
        assert files_in(tmp_path / "new") == {
            *("report.json", "report.md", "report.html", "report.xml")
        }

    @pytest.mark.parametrize(
        ("budgets", "code", "word"),
        [
            ("[macs]\nmax_ratio = 0.6\n", 0, "PASS"),
            ("[macs]\nmax_ratio = 0.1\n", 3, "FAIL"),
            ("[latency]\nmax_ratio = 2.0\nbatch_sizes = [77]\n", 5, "SKIPPED"),
            (
                "[macs]\nmax_ratio = 0.1\n[latency]\nmax_ratio = 2.0\nbatch_sizes = [77]\n",
                3,
                "FAIL",
            ),
        ],
    )
    def test_gate(self, budgets: str, code: int, word: str, run: Path, tmp_path: Path) -> None:
        (tmp_path / "b.toml").write_text(budgets)
        result = invoke("gate", run / "report.json", "--limits", tmp_path / "b.toml")
        assert result.exit_code == code
        assert word in result.stdout
        assert result.stderr == ""
        machine = invoke("gate", run / "report.json", "--limits", tmp_path / "b.toml", "--json")
        assert machine.exit_code == code
        assert word in [verdict["status"] for verdict in document(machine)["verdicts"]]

    def test_gate_of_too_few_calls(self, run: Path, tmp_path: Path) -> None:
        of_too_few_calls(run / "report.json", tmp_path / "report.json", calls=600)
        limit = "[latency]\np99_ms = 1000.0\nbatch_sizes = [1]\n"
        (tmp_path / "b.toml").write_text(limit)
        result = invoke("gate", tmp_path / "report.json", "--limits", tmp_path / "b.toml")
        assert result.exit_code == 4
        assert "INCONCLUSIVE: p99 of the pruned network" in " ".join(result.stdout.split())
        assert "600 calls were timed" in " ".join(result.stdout.split())

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"[macs\n", "not valid TOML"),
            (b"[macs]\nmax_ration = 1\n", "did you mean 'max_ratio'?"),
            (b"[macs]\nmax_ratio = -1\n", "macs.max_ratio"),
            (b"[macs]\nmax_ratio = 'low'\n", "macs.max_ratio"),
            (b"", "no limit to judge by"),
            (b"\xff\xfe", "not a text file"),
            (None, "No such file"),
        ],
    )
    def test_bad_budget_file(
        self, content: bytes | None, says: str, run: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "b.toml"
        if content is not None:
            path.write_bytes(content)
        refused("gate", run / "report.json", "--limits", path, code=2, says=says)

    def test_limits_may_still_be_named_as_in_the_version_before(self, run: Path) -> None:
        usual = invoke("gate", run / "report.json", "--limits", "default", "--json")
        before = invoke("gate", run / "report.json", "--budgets", "default", "--json")
        assert before.stdout == usual.stdout
        assert before.exit_code == usual.exit_code
        assert before.stderr == "warning: --budgets is now --limits\n" + usual.stderr

    def test_unknown_name_of_budgets(self, run: Path) -> None:
        arguments = ("--limits", "defalt")
        refused("gate", run / "report.json", *arguments, code=2, says="did you mean 'default'?")

    def test_settings_lie_over_the_budgets(self, run: Path) -> None:
        result = invoke("gate", run / "report.json", "--set", "macs.max_ratio=0.01")
        assert result.exit_code == 3

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (lambda whole: whole[:3000], "is cut short"),
            (lambda whole: b"", "is cut short"),
            (lambda whole: b"[]", "not a report"),
            (lambda whole: whole.replace(b'"schema_version": 4', b'"schema_version": 9'), "9"),
            (lambda whole: whole.replace(b'"created"', b'"creatd"'), "damaged"),
        ],
    )
    def test_damaged_report(
        self, content: Callable[[bytes], bytes], says: str, run: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "report.json"
        path.write_bytes(content((run / "report.json").read_bytes()))
        refused("gate", path, code=1, says=says)

    def test_missing_report(self, tmp_path: Path) -> None:
        refused("gate", tmp_path / "report.json", code=1, says="compress bench")
        refused("gate", tmp_path, code=1, says="is a directory: name the report in it")


class TestReport:
    def test_every_page_is_made_again_from_the_json_alone(self, run: Path, tmp_path: Path) -> None:
        shutil.copyfile(run / "report.json", tmp_path / "report.json")
        result = invoke("report", tmp_path / "report.json")
        said = f"report.md and report.html are in {tmp_path}\n"
        assert (result.exit_code, result.stderr) == (0, said)
        assert "PASS" in result.stdout
        pages = {"report.json", "report.md", "report.html", "report.xml"}
        assert contents(tmp_path) == {
            name: content for name, content in contents(run).items() if name in pages
        }

    @pytest.mark.slow
    def test_other_reports_stand_beside_it(self, run: Path, tmp_path: Path) -> None:
        other = steady(run / "report.json", tmp_path / "other.json", slower=0.5)
        alone = invoke("report", run / "report.json", "--output", tmp_path / "alone")
        both = invoke("report", run / "report.json", other, "--output", tmp_path / "both")
        assert (alone.exit_code, both.exit_code) == (0, 0)
        pages = {"report.md", "report.html", "report.xml"}
        assert files_in(tmp_path / "both") == pages
        differ = {
            name
            for name in pages
            if (tmp_path / "alone" / name).read_bytes() != (tmp_path / "both" / name).read_bytes()
        }
        assert differ == {"report.html", "report.md"}
        page = (tmp_path / "both" / "report.md").read_text()
        for name in (run.name, "other.json"):
            assert f"| {name} |" in page
            assert re.search(rf"│ {re.escape(name)} +│", both.stdout)
        assert "Reports" not in alone.stdout

    @pytest.mark.slow
    def test_a_report_that_is_named_twice_is_shown_once(self, run: Path, tmp_path: Path) -> None:
        twice = (run / "report.json", run / ".." / run.name / "report.json")
        result = invoke("report", *twice, "--output", tmp_path / "both")
        assert result.exit_code == 0
        assert "## Reports" not in (tmp_path / "both" / "report.md").read_text()

    def test_an_edited_report_is_refused(self, run: Path, tmp_path: Path) -> None:
        text = (run / "report.json").read_text()
        name = f'"architecture": "{load_report(run / "report.json").architecture}"'
        assert name in text
        (tmp_path / "report.json").write_text(text.replace(name, '"architecture": "resnet56"'))
        says = "was changed after it was written"
        for command in ("report", "gate"):
            refused(command, tmp_path / "report.json", code=1, says=says)
        assert files_in(tmp_path) == {"report.json"}


class TestBaseline:
    @pytest.fixture
    def report(self, run: Path, tmp_path: Path) -> Path:
        return steady(run / "report.json", tmp_path / "steady.json", slower=0.5)

    def test_it_is_kept_and_replaced_only_on_purpose(self, report: Path, tmp_path: Path) -> None:
        baseline = tmp_path / "baseline.json"
        assert invoke("baseline", report, "--output", baseline).exit_code == 0
        kept = load_report(baseline)
        assert (kept.limits, kept.change) == (None, None)
        assert kept.networks == load_report(report).networks
        before = baseline.read_bytes()
        refused("baseline", report, "--output", baseline, code=1, says="--overwrite")
        assert baseline.read_bytes() == before
        slower = steady(report, tmp_path / "slower.json", slower=0.6)
        replaced = invoke("baseline", slower, "--output", baseline, "--overwrite", "--json")
        assert replaced.exit_code == 0
        (change,) = document(replaced)["report"]["change"]["latency"]
        assert change["ratio"]["ratio"] == pytest.approx(0.6 / 0.5)
        assert load_report(baseline).comparison.latency[0].ratio.ratio == 0.6

    def test_one_that_decides_nothing_is_kept_with_a_warning(
        self, report: Path, tmp_path: Path
    ) -> None:
        assert "warning" not in invoke("baseline", report, "--output", tmp_path / "a.json").stderr
        config = load_report(report).config.model_copy(update={"min_blocks": 40})
        few = steady(report, tmp_path / "few.json")
        save_report(load_report(few).model_copy(update={"config": config}), few)
        kept = invoke("baseline", few, "--output", tmp_path / "b.json")
        assert (kept.exit_code, (tmp_path / "b.json").exists()) == (0, True)
        assert "warning: against this baseline even an unchanged network is INC" in kept.stderr
        assert "20 rounds of the 40 needed" in kept.stderr

    def test_what_replaces_another_prints_the_change(self, report: Path, tmp_path: Path) -> None:
        baseline = tmp_path / "baseline.json"
        first = invoke("baseline", report, "--output", baseline)
        assert "stored report" not in first.stdout
        slower = steady(report, tmp_path / "slower.json", slower=0.6)
        replaced = invoke("baseline", slower, "--output", baseline, "--overwrite")
        shown = " ".join(replaced.stdout.split())
        assert "against the stored report" in shown
        assert re.search(r"latency ratio, batch 1 .*?x 1\.200 \[", shown)
        assert "Now over then: above x 1 is slower." in shown
        assert re.search(r"top-1 drop .*?0\.00 pp \[", shown)

    @pytest.mark.parametrize(
        ("slower", "code", "word"), [(0.5, 0, "PASS"), (0.51, 0, "PASS"), (0.53, 3, "FAIL")]
    )
    def test_the_gate_judges_the_regression(
        self, slower: float, code: int, word: str, report: Path, tmp_path: Path
    ) -> None:
        now = steady(report, tmp_path / "now.json", slower=slower)
        (tmp_path / "b.toml").write_text("[latency]\nmax_regression = 1.03\n")
        arguments = ("--limits", tmp_path / "b.toml", "--baseline", report, "--json")
        judged = invoke("gate", now, *arguments)
        assert judged.exit_code == code
        (verdict,) = document(judged)["verdicts"]
        assert verdict["status"] == word
        assert verdict["measured"] == pytest.approx(slower / 0.5)

    def test_a_regression_needs_a_baseline(self, report: Path, tmp_path: Path) -> None:
        (tmp_path / "b.toml").write_text("[latency]\nmax_regression = 1.03\n")
        refused("gate", report, "--limits", tmp_path / "b.toml", code=2, says="without a baseline")

    def test_a_baseline_of_another_model(self, report: Path, tmp_path: Path) -> None:
        other = steady(report, tmp_path / "other.json", architecture="resnet56")
        refused("gate", report, "--baseline", other, code=1, says="resnet56")
        refused(*("baseline", report, "--output", other, "--overwrite"), code=1, says="resnet56")

    def test_a_machine_that_was_not_steady_gives_no_baseline(
        self, report: Path, tmp_path: Path
    ) -> None:
        found = load_report(report)
        latency = found.comparison.latency[0]
        bounds = dict.fromkeys(("ratio", "low", "high", "at_least", "at_most"), 1.2)
        control = {"control": replace(latency.control, **bounds)}
        shaken = latency.model_copy(update=control | {"control_block_medians_ms": (1.2,) * 20})
        changed = found.comparison.model_copy(update={"latency": (shaken,)})
        save_report(found.model_copy(update={"comparison": changed}), tmp_path / "shaken.json")
        arguments = ("--output", tmp_path / "baseline.json")
        refused("baseline", tmp_path / "shaken.json", *arguments, code=5, says="against itself")
        assert not (tmp_path / "baseline.json").exists()
        (tmp_path / "b.toml").write_text("[latency]\nmax_ratio = 2.0\n")
        judged = invoke("gate", tmp_path / "shaken.json", "--limits", tmp_path / "b.toml")
        assert judged.exit_code == 5
        assert "SKIPPED" in judged.stdout


class TestAgainst:
    @pytest.mark.slow
    def test_another_run(self, run: Path, copied: Path) -> None:
        measured = invoke("bench", copied, "--against", run, "--json")
        assert measured.exit_code == 0, measured.stderr
        report = document(measured)["report"]
        assert report["against"] == "run"
        assert (
            report["networks"]["reference"]["weights_sha256"]
            == (report["networks"]["pruned"]["weights_sha256"])
        )
        drop = report["comparison"]["accuracy"]["drop"]
        assert (drop["flips_to_wrong"], drop["flips_to_right"]) == (0, 0)
        assert "pruned against other run" in (copied / "report.md").read_text()
        assert not (copied / "report.xml").exists()  # verdicts on what was measured before

    def test_a_stored_report(self, run: Path, copied: Path) -> None:
        measured = invoke("bench", copied, "--against", run / "report.json", "--json")
        assert measured.exit_code == 0, measured.stderr
        change = document(measured)["report"]["change"]
        assert change["differences"] == []
        assert change["accuracy"]["drop_pp"] == 0
        assert change["sha256"] == json.loads((run / "report.json").read_text())["sha256"]

    @pytest.fixture
    def never_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measured(*_: object, **__: object) -> None:
            raise AssertionError("this should have been refused before")

        monkeypatch.setattr("bench.measuring.subject.Subject.open", measured)

    @pytest.mark.usefixtures("never_measured")
    def test_a_stored_report_of_another_model_is_refused_before_it_measures(
        self, run: Path, copied: Path, tmp_path: Path
    ) -> None:
        other = steady(run / "report.json", tmp_path / "other.json", architecture="resnet56")
        for option in ("--against", "--baseline"):
            refused("bench", copied, option, other, code=1, says="architecture resnet56")
        refused(
            "bench",
            copied,
            "--against",
            run,
            "--baseline",
            run / "report.json",
            code=1,
            says="kind of reference dense",
        )

    @pytest.mark.usefixtures("never_measured")
    def test_budgets_on_a_baseline_that_is_missing_are_refused_before_it_measures(
        self, copied: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "b.toml").write_text("[latency]\nmax_regression = 1.03\n")
        refused("bench", copied, "--limits", tmp_path / "b.toml", code=2, says="without a baseline")
        settings = small(bench_limits=str(tmp_path / "b.toml"))
        refused("run", "--output", tmp_path / "new", *settings, code=2, says="without a baseline")
        assert not (tmp_path / "new").exists()

    def test_neither(self, copied: Path, tmp_path: Path) -> None:
        before = contents(copied)
        refused("bench", copied, "--against", tmp_path / "nothing", code=2, says="is neither dense")
        (tmp_path / "text.json").write_text("{}")
        refused("bench", copied, "--against", tmp_path / "text.json", code=1, says="not a report")
        assert contents(copied) == before


class TestWhatIsMeasured:
    @pytest.mark.slow
    def test_layers_groups_and_batch_sizes(self, copied: Path) -> None:
        measured = invoke("bench", copied, "--batch", "1,3", "--json")
        assert measured.exit_code == 0, measured.stderr
        report = document(measured)["report"]
        assert [found["batch_size"] for found in report["comparison"]["latency"]] == [1, 3]
        assert [found["batch_size"] for found in report["layers"]] == [1, 3]
        for times in report["layers"]:
            for side in ("reference", "pruned"):
                layers = [layer[side] for layer in times["layers"] if layer[side]]
                macs = report["networks"][side]["macs"]
                assert sum(layer["macs"] for layer in layers) == macs
        shown = document(invoke("inspect", copied / "pruned.safetensors", "--json"))
        kept = {group["name"]: group["kept"] for group in shown["groups"] if not group["frozen"]}
        assert {group["name"]: group["kept"] for group in report["groups"]} == kept

    def test_no_layers_when_none_are_asked_for(self, copied: Path) -> None:
        measured = invoke("bench", copied, "--set", "bench.layer_calls=0", "--json")
        assert document(measured)["report"]["layers"] == []

    @pytest.mark.slow
    def test_torch_as_it_is_asked_for(self, copied: Path) -> None:
        arguments = ("--runtime", "torch-cpu", "--set", "bench.channels_last=true", "--json")
        report = document(invoke("bench", copied, *arguments))["report"]
        assert report["runtime"] == "torch (cpu, channels_last)"
        assert report["layers"][0]["layers"][0]["name"] == "conv1"
        says = "channels_last is for torch"
        refused("bench", copied, "--set", "bench.channels_last=true", code=2, says=says)

    @pytest.mark.parametrize("sizes", ["0", "1,x", "", "1;2"])
    def test_batch_sizes_that_are_none(self, sizes: str, copied: Path) -> None:
        refused("bench", copied, "--batch", sizes, code=2, says="error: --batch")

    def test_budgets_that_so_few_images_cannot_decide(self, copied: Path, tmp_path: Path) -> None:
        before = contents(copied)
        (tmp_path / "b.toml").write_text("[accuracy]\nmax_drop_pp = 0.01\n")
        for command in (("bench", copied), ("gate", copied / "report.json")):
            refused(*command, "--limits", tmp_path / "b.toml", code=2, says="27053 images")
        assert contents(copied) == before


class TestProgress:
    @pytest.mark.parametrize("command", ["run", "bench"])
    def test_measuring_tells_how_far_it_is(
        self, command: str, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object, progress: Callable[[str, float], None], **__: object) -> None:
            progress("latency", 0.5)
            raise DataError("told")

        monkeypatch.setattr("bench.commands.compare_run", stop)
        goes_on = ("run", "--resume", "--output", copied)
        refused(*(goes_on if command == "run" else ("bench", copied)), code=1, says="told")


class TestTrouble:
    @pytest.mark.slow
    def test_disk_full_while_the_page_is_written(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(copied)
        full_for(monkeypatch, "compress.files.atomic", ".html")
        result = invoke("bench", copied)
        assert result.exit_code == 1
        assert "report.html: the disk is full" in result.stderr.splitlines()[-1]
        assert "pruned against dense" in result.stdout  # what was measured is shown first
        after = contents(copied)
        assert after["report.json"] != before["report.json"]  # what was measured is not lost
        assert after["report.html"] == before["report.html"]
        assert after.keys() == before.keys()

    @pytest.mark.parametrize("moment", ["measure_latency", "profile_layers"])
    def test_ctrl_c_while_it_measures(
        self, moment: str, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(copied)
        interrupted_in(monkeypatch, f"bench.measuring.session.{moment}")
        result = invoke("bench", copied)
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr.splitlines()[-1] == "stopped"
        assert contents(copied) == before
