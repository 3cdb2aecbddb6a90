"""The command line as users meet it: files, streams, exit codes, and every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import typer.main
from commands import (
    CALIBRATION,
    COUNTED,
    RUN_FILES,
    contents,
    document,
    files_in,
    full_for,
    interrupted_in,
    invoke,
    no_file_beyond,
    onnx_files,
    refused,
    small,
    start,
)
from conftest import some_slow
from PIL import Image
from typer.testing import Result

import cli
import compress
from compress.config.targets import load_target
from compress.errors import CheckpointError, ParityError
from compress.files.atomic import sha256_of
from compress.files.documents import read_toml
from compress.networks.models import build_model
from export.installed import Installed, inspect_installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes, with one broken image in each half."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for half, count in (("train", 6), ("val", 4)):
        for label in ("cat", "dog", "owl"):
            place = root / half / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.jpg")
        (root / half / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xff, and then nothing")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as people have them, good and bad."""
    place = tmp_path_factory.mktemp("weights")
    model = build_model("resnet20", num_classes=3)
    state = model.state_dict()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": parallel, "epoch": 3}, place / "parallel.pth")
    torch.save(state, place / "plain.pth")
    safetensors.torch.save_file(state, place / "plain.safetensors")
    torch.save(build_model("resnet20", num_classes=5).state_dict(), place / "classes.pth")
    torch.save(build_model("resnet32", num_classes=3).state_dict(), place / "deeper.pth")
    torch.save(model, place / "code.pth")
    (place / "cut.pth").write_bytes((place / "plain.pth").read_bytes()[:9000])
    whole = (place / "plain.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(whole[:9000])
    (place / "text.pth").write_text("not weights")
    (place / "empty.pth").touch()
    return place


def prune_folder(folder: Path, checkpoint: Path, output: Path, *more: object) -> list[object]:
    """Return the arguments that prune a checkpoint on the image folder."""
    return [
        *("prune", "--config", "small-images-resnet20", "--data", folder, "--output", output),
        *(
            "--checkpoint",
            checkpoint,
            *small(data_image_size="32", data_batch_size="6", data_max_skipped="0.1"),
            *more,
        ),
    ]


@pytest.fixture(scope="module")
def pruned(weights: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the image folder, up to its export; read only."""
    output = tmp_path_factory.mktemp("pruned") / "run"
    result = invoke(*prune_folder(folder, weights / "plain.pth", output))
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def machine() -> Installed:
    """What doctor finds here; looking takes seconds."""
    return inspect_installed()


class TestRun:
    def test_writes_its_files_and_nothing_else(self, run: Path) -> None:
        assert files_in(run) == RUN_FILES

    def test_prints_the_table_on_stdout_and_the_rest_on_stderr(
        self, made: tuple[Path, Result]
    ) -> None:
        run, result = made
        for word in ("top-1", "MACs", "parameters", "file size", "latency", "speed-up", "PASS"):
            assert word in result.stdout
        for word in ("training resnet20", "pruning to macs=0.5", "exporting", "measuring"):
            assert word in result.stderr
            assert word not in result.stdout
        assert str(run) in result.stderr

    def test_history_tells_every_phase(self, run: Path) -> None:
        lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        events = [line["event"] for line in lines]
        assert events.count("epoch") == 2
        assert {"prune_step", "shrink", "pruned", "finetuned"} < set(events)

    def test_budget_holds(self, run: Path) -> None:
        report = json.loads((run / "report.json").read_text())
        assert report["schema_version"] == 4
        assert report["comparison"]["macs_ratio"] <= 0.5

    def test_result_loads_in_python(self, run: Path) -> None:
        logits = compress.load_model(run / "pruned.safetensors")(torch.zeros(2, 1, 8, 8))
        assert logits.shape == (2, 10)

    @pytest.mark.slow
    def test_from_a_checkpoint_nothing_is_trained_before(self, run: Path, tmp_path: Path) -> None:
        dense, output = run / "dense.safetensors", tmp_path / "run"
        options = ("--checkpoint", dense, "--budget", "macs=0.7", "--output", output)
        result = invoke("run", *options, *small())
        assert result.exit_code in (0, 3, 4, 5), result.stderr  # what the latencies say
        assert "training" not in result.stderr
        assert files_in(output) == RUN_FILES
        first, *lines = map(json.loads, (output / "history.jsonl").read_text().splitlines())
        assert (first["event"], first["checkpoint"]) == ("dense", "dense.safetensors")
        assert not [line for line in lines if line.get("phase") == "train"]
        ratio = json.loads((output / "report.json").read_text())["comparison"]["macs_ratio"]
        assert 0.5 < ratio <= 0.7

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--weights", "ema"), "give that as well"),
            (("--resume", "--checkpoint", "a.pth"), "give no --checkpoint"),
        ],
    )
    def test_weights_and_a_checkpoint_that_do_not_go_together(
        self, options: tuple[str, ...], says: str, tmp_path: Path
    ) -> None:
        refused("run", *options, "--output", tmp_path / "x", code=2, says=says)

    @pytest.mark.slow
    def test_resuming_a_complete_run_measures_again(self, copied: Path) -> None:
        before = contents(copied)
        result = invoke("run", "--resume", "--output", copied, "--json")
        assert result.exit_code == 0
        assert set(document(result)) == {"report", "verdicts"}
        assert result.stderr.count("done before") == 3
        after = contents(copied)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed <= {"report.json", "report.md", "report.html", "report.xml"}

    def test_without_output_a_new_directory_under_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = invoke("train", *small(train_epochs="0"), "--json")
        assert result.exit_code == 0
        assert document(result)["architecture"] == "resnet20"
        (made,) = (tmp_path / "runs").iterdir()
        assert made.name.startswith("digits-resnet20-")
        assert (made / "dense.safetensors").is_file()

    def test_without_output_a_failure_leaves_no_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        settings = small(train_lr="1e30", train_warmup_epochs="0")
        refused("train", *settings, code=1, says="the loss became")
        assert list(tmp_path.iterdir()) == []

    def test_overwrite_starts_anew_and_keeps_what_is_not_its_own(self, copied: Path) -> None:
        (copied / "notes.txt").write_text("mine")
        result = invoke("train", "--overwrite", "--output", copied, *small(train_epochs="0"))
        assert result.exit_code == 0
        assert files_in(copied) == {"config.toml", "dense.safetensors", "notes.txt"}

    def test_parity_failure_has_its_exit_code(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def disagree(*_: object, **__: object) -> None:
            raise ParityError("they disagree")

        monkeypatch.setattr("export.checkpoint_to_onnx.check_parity", disagree)
        before = contents(copied)
        refused("export", copied, code=6, says="they disagree")
        assert contents(copied) == before

    @pytest.mark.slow
    def test_in_another_precision_then_resumed_after_the_export(self, tmp_path: Path) -> None:
        output, budgets = tmp_path / "run", tmp_path / "b.toml"
        budgets.write_text("[macs]\nmax_ratio = 0.6\n")
        arguments = ("--precision", "int8", *small(bench_limits=str(budgets)), *CALIBRATION)
        assert invoke("run", "--output", output, *arguments).exit_code == 0
        exported = {f"export/{name}" for name in onnx_files("int8")}
        plain = {f"export/{name}" for name in onnx_files("fp32")}
        assert files_in(output) == RUN_FILES - plain | exported
        before = contents(output)
        for name in ("report.json", "report.md"):
            (output / name).unlink()
        result = invoke("run", "--resume", "--output", output, "--json")
        assert result.exit_code == 0, result.stderr
        assert document(result)["report"]["precision"] == "int8"
        assert result.stderr.count("done before") == 3
        after = contents(output)
        assert {name for name in after if after[name] != before[name]} <= {
            *("report.json", "report.md", "report.html", "report.xml")
        }


class TestPrune:
    @pytest.mark.parametrize(
        "name",
        some_slow(
            ["parallel.pth", "plain.pth", "plain.safetensors"], ["plain.pth", "parallel.pth"]
        ),
    )
    def test_from_weights_on_an_image_folder(
        self, name: str, weights: Path, folder: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "run"
        result = invoke(*prune_folder(folder, weights / name, output, "--budget", "params=0.6"))
        assert result.exit_code == 0, result.stderr
        assert files_in(output) == {
            *("config.toml", "dense.safetensors", "pruned.safetensors", "history.jsonl"),
            *("history.png", "pruning.png"),
        }
        assert "MACs" in result.stdout
        history = (output / "history.jsonl").read_text().splitlines()
        first = json.loads(history[0])
        assert (first["event"], first["checkpoint"]) == ("dense", name)
        assert (first["images"], first["skipped"]) == (11, 1)
        described = document(invoke("inspect", output / "pruned.safetensors", "--json"))
        assert described["now"]["params"] <= 0.6 * described["dense"]["params"]

    @pytest.mark.slow
    def test_stages_alone_from_files(self, weights: Path, folder: Path, tmp_path: Path) -> None:
        output = tmp_path / "run"
        pruned = invoke(*prune_folder(folder, weights / "plain.pth", output, "--json"))
        assert document(pruned)["num_classes"] == 3
        exported = invoke("export", output, "--target", "v100", "--json")
        assert exported.exit_code == 0, exported.stderr
        sidecars = document(exported)["onnx"].values()
        assert {sidecar["target"] for sidecar in sidecars} == {"v100"}
        measured = invoke("bench", output, "--json")
        assert measured.exit_code == 0, measured.stderr
        report = document(measured)["report"]
        assert report["validation"]["skipped"] == 1
        assert report["target"] == "v100"
        loose = ("--set", "accuracy.max_drop_pp=50")  # eleven images decide nothing smaller
        judged = invoke("gate", output / "report.json", "--limits", "default", *loose, "--json")
        assert judged.exit_code in (0, 3, 4, 5)
        assert document(judged)["verdicts"]

    @pytest.mark.slow
    def test_names_the_first_broken_image(
        self, weights: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert invoke(*prune_folder(folder, weights / "plain.pth", tmp_path / "x")).exit_code == 0
        assert "unreadable images are skipped" in caplog.text
        assert "cat/0.jpg" in caplog.text

    def test_needs_a_checkpoint(self, tmp_path: Path) -> None:
        refused("prune", "--output", tmp_path / "x", code=2, says="--checkpoint FILE")

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("none.pth", "there is no checkpoint"),
            ("cut.pth", "truncated"),
            ("cut.safetensors", "truncated"),
            ("text.pth", "not a PyTorch checkpoint"),
            ("empty.pth", "is empty"),
            ("deeper.pth", "of another architecture"),
            ("classes.pth", "5 classes and 3 are needed"),
            ("code.pth", "needs code execution"),
        ],
    )
    def test_unfit_checkpoint(
        self, name: str, says: str, weights: Path, folder: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "run"
        refused(*prune_folder(folder, weights / name, output), code=1, says=says)
        assert not output.exists()

    @pytest.mark.parametrize("name", ["none.pth", "deeper.pth", "code.pth"])
    def test_unfit_checkpoint_leaves_the_run_that_it_was_to_replace(
        self, name: str, weights: Path, folder: Path, copied: Path
    ) -> None:
        before = contents(copied)
        arguments = prune_folder(folder, weights / name, copied, "--overwrite")
        refused(*arguments, code=1, says=name)
        assert contents(copied) == before

    def test_checkpoint_that_overwrite_would_remove(self, copied: Path) -> None:
        before = contents(copied)
        arguments = ("--checkpoint", copied / "dense.safetensors", "--output", copied)
        refused("prune", *arguments, "--overwrite", code=2, says="would be overwritten")
        assert contents(copied) == before

    def test_pruned_network_is_not_pruned_again(self, run: Path, tmp_path: Path) -> None:
        arguments = ("--checkpoint", run / "pruned.safetensors", "--output", tmp_path / "x")
        refused("prune", *arguments, *small(), code=1, says="pruned already")
        assert not (tmp_path / "x").exists()

    def test_network_of_other_classes(self, run: Path, folder: Path, tmp_path: Path) -> None:
        arguments = prune_folder(folder, run / "dense.safetensors", tmp_path / "x")
        refused(*arguments, code=1, says="10 classes")
        assert not (tmp_path / "x").exists()


class TestExport:
    @pytest.mark.parametrize(
        ("target", "precision", "fits"),
        [
            ("cpu", "int8", "opset 17, IR 8"),
            ("v100", "fp16", "opset 17, IR 8"),
            pytest.param("cpu", "fp32", "opset 17, IR 8", marks=pytest.mark.slow),
            pytest.param("v100", "fp32", "opset 17, IR 8", marks=pytest.mark.slow),
            pytest.param("a100", "int8", "opset 20, IR 9", marks=pytest.mark.slow),
            pytest.param("rtx", "fp16", "opset 20, IR 9", marks=pytest.mark.slow),
        ],
    )
    def test_for_a_target(
        self,
        target: str,
        precision: str,
        fits: str,
        run: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        output = tmp_path / "onnx"
        arguments = ("--target", target, "--precision", precision, "--output", output)
        result = invoke("export", run, *arguments, *CALIBRATION)
        warned = load_target(target).warnings.get(precision)
        said = f"warning: {warned}\n" if warned else ""
        assert (result.exit_code, result.stderr) == (0, said)
        assert capfd.readouterr() == ("", "")  # what the libraries write past Python
        assert files_in(output) == onnx_files(precision)
        assert result.stdout.count(fits) == 2
        assert f"resnet20 for {target}, {precision}" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80

    @pytest.mark.slow
    def test_precision_that_rarely_pays_is_exported_with_a_warning(
        self, run: Path, tmp_path: Path
    ) -> None:
        arguments = ("--target", "v100", "--precision", "int8", "--output", tmp_path / "x")
        result = invoke("export", run, *arguments, *CALIBRATION, "--json")
        assert result.exit_code == 0
        (warning,) = document(result)["warnings"]
        assert result.stderr == f"warning: {warning}\n"
        assert "INT8 tensor cores" in warning

    def test_document_tells_all_that_was_written(self, run: Path, tmp_path: Path) -> None:
        arguments = ("--output", tmp_path / "x", "--triton", tmp_path / "models")
        told = document(invoke("export", run, *arguments, "--json"))
        assert set(told) == {"onnx", "engines", "triton", "warnings"}
        for name, sidecar in told["onnx"].items():
            assert sidecar == json.loads((tmp_path / "x" / f"{name}.json").read_text())
        assert (told["engines"], told["warnings"]) == ({}, [])
        assert {Path(folder).parent.name for folder in told["triton"].values()} == set(
            told["triton"]
        )
        assert all((Path(folder) / "model.onnx").is_file() for folder in told["triton"].values())

    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            (["--target", "v10"], 2, "did you mean 'v100'?"),
            (["--target", "./absent.toml"], 2, "No such file"),
            (["--precision", "int4"], 2, "'fp32', 'fp16' or 'int8'"),
            (["--precision", "fp16"], 2, "target cpu does not compute fp16"),
            (["--batch", "0"], 2, "--batch 0"),
            (["--batch", "1,x"], 2, "--batch '1,x'"),
            (["--batch", ""], 2, "--batch ''"),
            (["--batch", "8,-1"], 2, "--batch '8,-1'"),
            (["--engine"], 2, "target cpu has no engines"),
            (["--set", "export.calibration_images=4"], 2, "greater than or equal to 8"),
            (["--set", "export.limits.fp16.relativ_error=1"], 2, "mean 'relative_error'?"),
        ],
    )
    def test_refused_before_anything_is_written(
        self, arguments: list[str], code: int, says: str, run: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "x"
        refused("export", run, *arguments, "--output", output, code=code, says=says)
        assert not output.exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize(("target", "sm"), [("v100", "7.0"), ("a100", "8.0")])
    def test_engine_for_a_gpu_that_is_not_here(
        self, target: str, sm: str, run: Path, tmp_path: Path
    ) -> None:
        arguments = ("--target", target, "--precision", "fp16", "--output", tmp_path / "x")
        refused("export", run, *arguments, "--engine", code=5, says=f"a GPU of SM {sm}")
        assert not (tmp_path / "x").exists()

    @pytest.mark.slow
    def test_disagreement_names_the_file_and_keeps_the_earlier_ones(self, copied: Path) -> None:
        arguments = ("export", copied, "--target", "v100", "--precision", "fp16")
        assert invoke(*arguments).exit_code == 0
        before = contents(copied)
        limit = ("--set", "export.limits.fp16.relative_error=1e-9")
        refused(*arguments, *limit, code=6, says="dense.fp16.onnx is not written")
        refused(*arguments, *limit, code=6, says="export.limits.fp16 holds the limits")
        assert contents(copied) == before

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("good", "says"),
        [
            ({"cat": 4, "dog": 1, "owl": 1}, "at least 8 images and has 6"),
            ({"cat": 9, "dog": 0, "owl": 0}, "all 9 calibration images are of class 0"),
        ],
    )
    def test_images_that_cannot_calibrate(
        self, good: dict[str, int], says: str, pruned: Path, folder: Path, tmp_path: Path
    ) -> None:
        root = Path(shutil.copytree(folder, tmp_path / "images"))
        for label, count in good.items():
            whole = (folder / "train" / label / "1.jpg").read_bytes()
            for number in range(9):
                data = whole if number < count else b"broken"
                (root / "train" / label / f"{number}.jpg").write_bytes(data)
        arguments = ("--data", root, "--precision", "int8", "--output", tmp_path / "x")
        refused("export", pruned, *arguments, code=1, says=says)
        assert files_in(tmp_path) == {f"images/{name}" for name in files_in(root)}

    def test_full_disk_keeps_what_was_there(self, copied: Path) -> None:
        before = contents(copied)
        with no_file_beyond(100_000):
            refused("export", copied, code=1, says="cannot write")
        assert contents(copied) == before

    def test_disk_that_is_full_once_the_onnx_file_is_written(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(copied)
        full_for(monkeypatch, "compress.files.atomic", ".json")
        arguments = ("export", copied, "--target", "v100")
        refused(*arguments, code=1, says="dense.json: the disk is full")
        assert contents(copied) == before

    @pytest.mark.slow
    @pytest.mark.parametrize("suffix", [".onnx", ".pbtxt"])
    def test_full_disk_in_the_model_repository(
        self, suffix: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = tmp_path / "models"
        arguments = ("export", copied, "--triton", models)
        assert invoke(*arguments).exit_code == 0
        before = contents(models)
        full_for(monkeypatch, "export.triton", suffix)
        refused(*arguments, code=1, says="the disk is full")
        assert contents(models) == before
        shutil.rmtree(models)
        refused(*arguments, code=1, says="the disk is full")
        assert not any(models.iterdir())
        assert files_in(copied) == RUN_FILES

    @pytest.mark.parametrize("option", ["--output", "--triton"])
    def test_folder_that_cannot_be_made(self, option: str, copied: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        arguments = (option, tmp_path / "file" / "below")
        refused("export", copied, *arguments, code=1, says="cannot write")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize(
        ("arguments", "moment"),
        [
            (["--precision", "int8"], "export.precision.calibration.histogram"),
            pytest.param(
                ["--precision", "int8"], "export.verify.is_logits", marks=pytest.mark.slow
            ),
        ],
    )
    def test_interrupted(
        self, arguments: list[str], moment: str, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert invoke("export", copied, *arguments, *CALIBRATION).exit_code == 0
        before = contents(copied)
        interrupted_in(monkeypatch, moment)
        result = invoke("export", copied, *arguments, *CALIBRATION)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped\n")
        assert contents(copied) == before


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
class TestEngines:
    """TensorRT-RTX builds engines on any machine."""

    ENGINES = ("--target", "rtx", "--precision", "fp16", "--engine", "--batch", "1,8")

    def test_of_both_networks(
        self, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        arguments = (*self.ENGINES, "--output", tmp_path / "x", "--triton", tmp_path / "models")
        result = invoke("export", run, *arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert capfd.readouterr() == ("", "")
        engines = {f"{name}.fp16.engine" for name in ("dense", "pruned")}
        assert files_in(tmp_path / "x") == {
            *(onnx_files("fp16") | engines),
            *(f"{name}.json" for name in engines),
        }
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "any GPU" in result.stdout
        served = {Path(name).name for name in files_in(tmp_path / "models")}
        assert "model.onnx" in served
        assert "model.plan" not in served

    @pytest.mark.slow
    def test_full_disk_keeps_the_earlier_engines(self, copied: Path) -> None:
        arguments = ("export", copied, *self.ENGINES)
        assert invoke(*arguments).exit_code == 0
        before = contents(copied)
        with no_file_beyond(1_000_000):  # an ONNX file is smaller
            refused(
                *arguments,
                code=1,
                says="dense.fp16.engine: the file would be larger",
            )
        assert contents(copied) == before

    def test_interrupted(self, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        interrupted_in(monkeypatch, "export.engines.build.profile_shapes")
        result = invoke("export", copied, *self.ENGINES)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped\n")
        made = {f"export/{name}" for name in onnx_files("fp16")}
        assert files_in(copied) == RUN_FILES | made
        assert not list(copied.rglob(".building*"))

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_bench_has_no_gpu_to_run_them_on(self, copied: Path) -> None:
        assert invoke("export", copied, *self.ENGINES).exit_code == 0
        arguments = ("--runtime", "tensorrt", "--precision", "fp16")
        refused("bench", copied, *arguments, code=5, says="finds no usable GPU")


class TestWidths:
    """Of a pruned network, for a target."""

    def resolved(self, output: Path, *arguments: object) -> dict[str, Any]:
        result = invoke("train", "--output", output, *small(train_epochs="0"), *arguments)
        assert result.exit_code == 0, result.stderr
        found: dict[str, Any] = read_toml(str(output / "config.toml"))["prune"]
        return found

    @pytest.mark.parametrize(
        ("settings", "multiple"),
        [
            (["export.target=v100"], 8),
            (["export.target=v100", "export.precision=int8"], 8),
            (["export.target=t4", "export.precision=int8"], 32),
            (["export.target=cpu"], 8),
            (["export.target=t4", "export.precision=int8", "prune.channel_multiple=2"], 2),
            (["export.target=v100", "prune.recipe=seed2019"], 1),
        ],
    )
    def test_resolved_configuration(
        self, settings: list[str], multiple: int, tmp_path: Path
    ) -> None:
        given = [part for setting in settings for part in ("--set", setting)]
        assert self.resolved(tmp_path / "x", *given)["channel_multiple"] == multiple

    @pytest.mark.slow
    def test_widths_are_multiples_of_the_targets(self, run: Path, tmp_path: Path) -> None:
        output, checkpoint = tmp_path / "x", run / "dense.safetensors"
        arguments = ("--checkpoint", checkpoint, "--target", "v100", "--precision", "fp16")
        pruned = invoke("prune", *arguments, "--output", output, *small(), "--json")
        assert pruned.exit_code == 0, pruned.stderr
        config = read_toml(str(output / "config.toml"))
        assert config["prune"]["channel_multiple"] == 8
        assert config["export"]["target"] == "v100"
        assert config["export"]["precision"] == "fp16"
        groups = document(pruned)["groups"]
        widths = [group["kept"] for group in groups if not group["frozen"]]
        assert all(width % 8 == 0 for width in widths), widths
        assert invoke("export", output).exit_code == 0
        assert files_in(output / "export") == onnx_files("fp16")

    def test_target_or_precision_that_does_not_exist(self, run: Path, tmp_path: Path) -> None:
        arguments = ("--checkpoint", run / "dense.safetensors", "--output", tmp_path / "x")
        refused("prune", *arguments, "--target", "v10", code=2, says="did you mean 'v100'?")
        refused("prune", *arguments, "--precision", "half", code=2, says="--precision 'half': ")
        assert not (tmp_path / "x").exists()


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _looked_once(self, machine: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("export.doctor.inspect_installed", lambda: machine)

    @pytest.mark.parametrize("arguments", [[], ["--target", "cpu"]])
    def test_this_machine_fits_itself_and_the_cpu(self, arguments: list[str]) -> None:
        result = invoke("doctor", *arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "onnxruntime" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert document(invoke("doctor", *arguments, "--json"))["fits"]

    def test_unfit_machine_is_told_what_mends_it(self, tmp_path: Path) -> None:
        target = tmp_path / "future.toml"
        text = (resources.files("configs") / "targets" / "v100.toml").read_text()
        changed = text.replace('versions = "<3.13"', 'versions = ">=99"')
        target.write_text(changed.replace("python3.12 -m venv .venv", "wait for it"))
        result = invoke("doctor", "--target", target)
        assert (result.exit_code, result.stderr) == (5, "")
        assert "\n    wait for it\n" in result.stdout
        table, _, _ = result.stdout.partition("\n    ")
        assert max(map(len, table.splitlines()[:-1])) <= 80
        machine = invoke("doctor", "--target", target, "--json")
        assert (machine.exit_code, machine.stderr) == (5, "")
        found = document(machine)
        assert not found["fits"]
        (python,) = [one for one in found["findings"] if one["component"] == "python"]
        assert (python["fits"], python["mend"]) == (False, "wait for it")

    def test_unknown_target(self) -> None:
        refused("doctor", "--target", "v10", code=2, says="did you mean 'v100'?")


class TestInspect:
    def test_own_file(self, run: Path) -> None:
        result = invoke("inspect", run / "pruned.safetensors")
        assert result.exit_code == 0
        assert result.stderr == ""
        shown = document(invoke("inspect", run / "pruned.safetensors", "--json"))
        assert shown["parent_sha256"] == sha256_of(run / "dense.safetensors")
        printed = "".join(result.stdout.split())
        assert shown["sha256"] in printed
        assert shown["parent_sha256"] in printed
        assert shown["now"]["macs"] < shown["dense"]["macs"]
        assert {"dense", "masked", "pruned", "finetuned"} < set(shown["metrics"])

    @pytest.mark.parametrize("name", ["parallel.pth", "plain.pth", "plain.safetensors"])
    def test_weights_of_a_known_architecture(self, name: str, weights: Path) -> None:
        result = invoke("inspect", weights / name, "--json")
        assert result.exit_code == 0
        shown = document(result)
        assert (shown["architecture"], shown["num_classes"]) == ("resnet20", 3)
        assert shown["dense"] == shown["now"]
        assert "resnet20, 3 classes" in invoke("inspect", weights / name).stdout

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("none.pth", "there is no checkpoint"),
            ("cut.pth", "truncated"),
            ("cut.safetensors", "truncated"),
            ("code.pth", "needs code execution"),
        ],
    )
    def test_unreadable(self, name: str, says: str, weights: Path) -> None:
        refused("inspect", weights / name, code=1, says=says)

    def test_unknown_architecture_asks_for_its_name(self, tmp_path: Path) -> None:
        torch.save({"layer.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "own.pth")
        refused("inspect", tmp_path / "own.pth", code=1, says="--model")

    def test_model_that_does_not_fit(self, weights: Path) -> None:
        arguments = ("inspect", weights / "plain.pth", "--model")
        refused(*arguments, "resnet18", code=1, says="of another architecture")
        refused(*arguments, "resnet21", code=2, says="did you mean")


OWN_MODELS = """
import torch
from torch import nn

def small(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

class Branching(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)

class Flat(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.fc = nn.Linear(in_channels * 64, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(x, 1))

def broken():
    raise RuntimeError("first line\\nsecond line")

def number():
    return 3
"""


class TestOwnModel:
    @pytest.fixture(autouse=True)
    def _own_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_models.py").write_text(OWN_MODELS)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, "own_models", raising=False)

    @pytest.mark.slow
    def test_the_whole_path(self, tmp_path: Path) -> None:
        name, settings = "own_models:small", small(prune_channel_multiple="1")
        trained = invoke("train", "--model", name, "--output", "dense", *settings)
        assert trained.exit_code == 0, trained.stderr
        arguments = ("--checkpoint", "dense/dense.safetensors", "--output", "run")
        pruned = invoke("prune", "--model", name, *arguments, *settings)
        assert pruned.exit_code == 0, pruned.stderr
        assert invoke("inspect", "run/pruned.safetensors").exit_code == 0
        assert invoke("export", "run").exit_code == 0
        assert invoke("bench", "run", "--runtime", "torch-cpu").exit_code == 0
        assert compress.load_model("run/pruned.safetensors")

    @pytest.mark.slow
    def test_somebody_else_s_has_to_be_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, settings = "own_models:small", small(prune_channel_multiple="1")
        result = invoke("run", "--model", name, "--output", "run", *settings)
        assert result.exit_code in (0, 3, 4, 5)  # 5: a busy machine
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        says = f"pass --model {name} to allow it"
        for command in (
            ("inspect", "run/pruned.safetensors"),
            ("export", "run"),
            ("bench", "run", "--runtime", "torch-cpu"),
            ("oracle", "--checkpoint", "run", "--output", "oracle", "--images", "8"),
        ):
            refused(*command, code=1, says=says)
            assert invoke(*command, "--model", name).exit_code == 0
        with pytest.raises(CheckpointError, match=says):
            compress.load_model("run/pruned.safetensors")
        assert compress.load_model("run/pruned.safetensors", model=name)
        assert invoke("bench", "run").exit_code == 0  # the runtime of the ONNX file imports nothing

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("own_models:Branching", "cannot be captured"),
            ("own_models:Flat", "nothing to prune"),
            ("own_models:broken", "first line second line"),
            ("own_models:number", "not a torch.nn.Module"),
            ("resnet18", "takes images of 3 channels"),
        ],
    )
    def test_unfit(self, name: str, says: str) -> None:
        refused("run", "--model", name, "--output", "x", *small(), code=1, says=says)
        assert not Path("x").exists()

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("own_models:absent", "no callable 'absent'"),
            ("absent_module:small", "cannot import 'absent_module'"),
            ("absent.module:small", "cannot import 'absent.module'"),
            (":small", "cannot import"),
            ("resnet21", "did you mean"),
            ("torchvision:resnet21", "did you mean torchvision:resnet"),
        ],
    )
    def test_a_name_that_no_network_has_is_a_mistake_of_usage(self, name: str, says: str) -> None:
        refused("run", "--model", name, "--output", "x", *small(), code=2, says=says)
        assert not Path("x").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--set", "prune.bugdet=macs=0.5"], "did you mean 'budget'?"),
            (["--set", "trian.epochs=3"], "did you mean 'train'?"),
            (["--set", "train.epochs=many"], "train.epochs = 'many'"),
            (["--set", "train.lr=-1"], "train.lr"),
            (["--set", "train.epochs"], "section.key=value"),
            (["--set", "seed.deeper=3"], "seed"),
            (["--set", "prune.budget=mac=0.5"], "'macs', 'params'"),
            (["--set", "prune.budget=half"], "KIND=VALUE"),
            (["--set", "prune.criterion=tailor-gate"], "taylor-gate"),
            (["--set", "prune.keep_dense=['conv9']"], "did you mean 'conv1'?"),
            (["--set", "export.target=v10"], "did you mean 'v100'?"),
            (["--set", "bench.limits=defalt"], "did you mean 'default'?"),
            (["--set", "limits.macs.max_ration=0.5"], "did you mean 'max_ratio'?"),
            (["--set", "bench.batch_sizes=[]"], "bench.batch_sizes"),
            (["--set", "export.parity_batches=[0]"], "export.parity_batches"),
            (["--config", "digits-resnet2"], "did you mean 'digits-resnet20'?"),
            (["--config", "absent.toml"], "No such file"),
            (["--config", "./"], "Is a directory"),
            (["--config", "digits-resnet20", "--data", "images"], "would be ignored"),
            (["--resume", "--set", "seed=1"], "give no other"),
            (["--resume", "--overwrite"], "exclude each other"),
            (["--resume"], "is not a run directory"),
        ],
    )
    def test_configuration(self, arguments: list[str], says: str, tmp_path: Path) -> None:
        refused("run", "--output", tmp_path / "x", *arguments, code=2, says=says)
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("command", [(), ("run",), ("gate",), ("inspect",), ("oracle",)])
    def test_help_gives_switches_no_value(self, command: tuple[str, ...]) -> None:
        shown = invoke(*command, "--help").stdout
        assert "--help" in shown
        assert "bool" not in shown
        assert "list[" not in shown

    def test_what_help_says_is_not_broken_anew_at_80_columns(self) -> None:
        group = typer.main.get_command(cli.app)
        assert isinstance(group, typer.core.TyperGroup)
        for name, command in group.commands.items():
            _, *more = (command.help or "").split("\n\n")  # the first is joined, these are kept
            assert all(len(line) <= 78 for text in more for line in text.splitlines()), name

    def test_resume_needs_a_directory(self) -> None:
        refused("run", "--resume", code=2, says="--resume needs --output")

    @pytest.mark.parametrize("arguments", [[], ["prone"], ["run", "--outptu", "x"], ["inspect"]])
    def test_usage(self, arguments: list[str]) -> None:
        assert invoke(*arguments).exit_code == 2

    @pytest.mark.parametrize(
        ("budget", "closest"), [("macs=0.001", "macs=0."), ("removed=9999", "removed=")]
    )
    def test_unreachable_budget(self, budget: str, closest: str, tmp_path: Path) -> None:
        arguments = ("--output", tmp_path / "x", *small(prune_budget=budget))
        refused("run", *arguments, code=1, says=f"the closest is {closest}")
        assert not (tmp_path / "x").exists()

    def test_device_that_is_not_there(self, tmp_path: Path) -> None:
        arguments = ("--output", tmp_path / "x", "--set", "device=cuda:99")
        refused("train", *arguments, code=5, says="cuda:99")
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("missing", ["root", "halves", "classes", "images", "class"])
    def test_data_folder(self, missing: str, folder: Path, weights: Path, tmp_path: Path) -> None:
        root = tmp_path / "images"
        if missing != "root":
            root.mkdir()
        if missing == "classes":
            (root / "train").mkdir()
            (root / "val").mkdir()
        if missing in ("images", "class"):
            shutil.copytree(folder, root, dirs_exist_ok=True)
            if missing == "images":
                for file in (root / "val" / "dog").iterdir():
                    file.unlink()
            else:
                shutil.rmtree(root / "val" / "dog")
        says = {
            "root": "does not exist",
            "halves": "needs train/ and val/",
            "classes": "no class folders",
            "images": "no image for class 'dog'",
            "class": "only train/ has 'dog'",
        }[missing]
        arguments = prune_folder(root, weights / "plain.pth", tmp_path / "x")
        refused(*arguments, code=1, says=says)
        assert not (tmp_path / "x").exists()

    def test_not_one_readable_image(self, folder: Path, weights: Path, tmp_path: Path) -> None:
        root = shutil.copytree(folder, tmp_path / "images")
        for path in (root / "val").rglob("*.jpg"):
            path.write_bytes(b"broken")
        arguments = prune_folder(root, weights / "plain.pth", tmp_path / "x")
        refused(*arguments, code=1, says="none of 12 could be read")
        assert not (tmp_path / "x").exists()

    def test_directory_that_is_not_empty(self, copied: Path) -> None:
        before = contents(copied)
        refused("run", "--output", copied, code=2, says="--resume")
        assert contents(copied) == before

    @pytest.mark.parametrize("output", ["file", "file/below"])
    def test_directory_that_cannot_be_made(self, output: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        result = invoke("train", "--output", tmp_path / output, *small())
        assert result.exit_code == (2 if output == "file" else 1)
        assert result.stderr.startswith("error: ")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_directory_without_permission(self, tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        refused("train", "--output", locked / "x", *small(), code=1, says="permission denied")

    @pytest.mark.parametrize("phase", ["train", "finetune"])
    def test_loss_that_is_not_a_number(self, phase: str, run: Path, tmp_path: Path) -> None:
        settings = small(**{f"{phase}_lr": "1e30", f"{phase}_warmup_epochs": "0"})
        command: list[object] = ["train"]
        if phase == "finetune":
            command = ["prune", "--checkpoint", run / "dense.safetensors"]
        arguments = (*command, "--output", tmp_path / "x", *settings)
        refused(*arguments, code=1, says="the loss became")
        kept = {"train": set(), "finetune": {"config.toml", "dense.safetensors", "history.jsonl"}}
        assert (files_in(tmp_path / "x") if (tmp_path / "x").exists() else set()) == kept[phase]


class TestStreams:
    def test_terminal_without_unicode(self, run: Path) -> None:
        process = start("gate", run / "report.json", PYTHONIOENCODING="ascii")
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode in (0, 3, 4, 5), stderr  # of a busy machine, 5
        assert "top-1" in stdout
        assert stdout.isascii()

    def test_full_disk_while_training(self, tmp_path: Path) -> None:
        output = tmp_path / "x"
        with no_file_beyond(50_000):
            refused("train", "--output", output, *small(), code=1, says="cannot write")
        assert files_in(output) == {"config.toml", "history.jsonl"}

    @pytest.mark.slow
    def test_reader_that_goes_away_does_not_change_the_verdict(
        self, run: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "b.toml").write_text("[macs]\nmax_ratio = 0.1\n")
        process = start("gate", run / "report.json", "--limits", tmp_path / "b.toml")
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 3
        assert process.stderr.read() == ""
        process.stderr.close()

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_full_disk_behind_stdout(self, run: Path) -> None:
        program = [sys.executable, "-c", "import cli; cli.main()", "inspect"]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*program, str(run / "dense.safetensors")],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                cwd=Path(cli.__file__).parent,
            )
        assert done.returncode == 1
        assert done.stderr.startswith("error: cannot write to the standard output")

    def test_a_bug_keeps_its_traceback(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("compress.checkpoints.summary.inspect_checkpoint", fail)
        with pytest.raises(ZeroDivisionError):
            invoke("inspect", run / "dense.safetensors")


class TestInterrupt:
    @pytest.mark.slow
    def test_in_training_and_in_pruning_then_resumed(self, tmp_path: Path) -> None:
        output, history = tmp_path / "run", tmp_path / "run" / "history.jsonl"
        (tmp_path / "b.toml").write_text(COUNTED)
        settings = small(
            data_batch_size="128",
            train_epochs="8",
            prune_steps="15",
            prune_interval="3",
            bench_limits=str(tmp_path / "b.toml"),
        )
        first = start("run", "--output", output, *settings)
        self.interrupt(first, history, '"phase": "train"')
        assert (output / "state" / "state.safetensors").is_file()
        assert not (output / "dense.safetensors").exists()

        second = start("run", "--resume", "--output", output)
        self.interrupt(second, history, '"prune_step"')
        assert (output / "dense.safetensors").is_file()
        assert not (output / "pruned.safetensors").exists()

        third = start("run", "--resume", "--output", output, "--json")
        stdout, stderr = third.communicate(timeout=240)
        assert third.returncode == 0, stderr
        assert json.loads(stdout)["report"]["comparison"]["macs_ratio"] <= 0.5
        assert files_in(output) == RUN_FILES
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        epochs = [line["epoch"] for line in lines if line.get("phase") == "train"]
        assert epochs == list(range(1, 9))
        steps = [line["pruning_step"] for line in lines if line["event"] == "prune_step"]
        assert steps == list(range(1, len(steps) + 1))

    def interrupt(self, process: subprocess.Popen[str], history: Path, when: str) -> None:
        """Press Ctrl-C once the history holds a word, and see how the process ends."""
        deadline = time.monotonic() + 120
        while not (history.is_file() and when in history.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        last = stderr.splitlines()[-1]
        assert last.startswith("error: stopped; the state is saved")
        assert f"--resume --output {history.parent}" in last

    def test_where_no_state_is_kept(self, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("bench.commands.compare_run", interrupt)
        arguments = ("run", "--resume", "--output", copied)
        refused(*arguments, code=130, says=f"go on with --resume --output {copied}")
        result = invoke("bench", copied)
        assert (result.exit_code, result.stderr) == (130, "stopped\n")

    def test_before_anything_was_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("compress.runs.stages.train_dense", interrupt)
        result = invoke("train", "--output", tmp_path / "x", *small())
        assert (result.exit_code, result.stderr) == (
            130,
            "training resnet20\nerror: stopped\n",
        )
        assert not (tmp_path / "x").exists()
