"""Any two networks: files of every kind and from anybody, networks in memory, and what they eat."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import document, invoke, refused
from host_gpu import fresh_host_gpu
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from steady_reports import steady
from torch import nn

from bench.compare import compare, read_settings
from bench.judging.quality_gate import judge
from bench.pages.page import render_page
from bench.pages.publish import render_markdown
from bench.reports.report import load_report, save_report, sealed
from bench.reports.schema import Report
from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description
from compress.errors import CheckpointError, ConfigError, DataError, ModelError
from compress.networks.models import build_model

ROOT = Path(__file__).parents[2]
FAST: dict[str, Any] = {
    "threads": 1,
    "block_ms": 0.2,
    "min_blocks": 4,
    "max_seconds": 0.3,
    "ratio_precision": 1.0,
}
FLOAT, HALF, WHOLE, BYTE = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16),
    *(TensorProto.INT64, TensorProto.UINT8),
)
Ends = dict[str, tuple[int, list[int | str]]]


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Ends,
    outputs: Ends,
    weights: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write an ONNX file as somebody else's tool would: without a sidecar."""
    ends = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in of.items()]
        for of in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, "network", *ends, constants)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def linear(
    path: Path,
    weight: np.ndarray,
    *,
    batch: int | str = "n",
    names: tuple[str, str] = ("x", "y"),
    kind: int = FLOAT,
    size: tuple[int | str, ...] = (1, 2, 3),
) -> Path:
    """Write Flatten and MatMul."""
    reads, writes = names
    nodes = [
        helper.make_node("Flatten", [reads], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], [writes]),
    ]
    half = np.float16 if kind == HALF else np.float32
    return save(
        *(path, nodes, {reads: (kind, [batch, *size])}),
        {writes: (kind, [batch, weight.shape[1]])},
        {"weight": weight.astype(half)},
    )


def compared(reference: Any, candidate: Any, data: Any = None, **options: Any) -> Report:
    if not options.keys() & {"batch_sizes"}:
        options["batch_sizes"] = None
    return compare(reference, candidate, data, **{**FAST, "layer_calls": 0, **options})


def arrays(count: int = 40, size: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, *size)).astype(np.float32)


@pytest.fixture
def eye(tmp_path: Path) -> Path:
    return linear(tmp_path / "dense.onnx", np.eye(6))


# What is measured of two files that nobody describes


def test_two_files_on_random_inputs(eye: Path, tmp_path: Path) -> None:
    steps: set[str] = set()
    slightly = linear(tmp_path / "pruned.onnx", 1.001 * np.eye(6))
    found = compared(eye, slightly, layer_calls=2, progress=lambda step, share: steps.add(step))
    agreement = found.comparison.agreement
    assert agreement is not None
    (output,) = agreement.outputs
    assert (output.name, agreement.inputs) == ("y", 256)
    assert output.relative_error == pytest.approx(1e-3, rel=1e-3)
    assert output.cosine == pytest.approx(1.0)
    assert output.same_top1 is not None
    assert (output.same_top1.share, output.same_top1.count) == (1.0, 256)
    # Clopper and Pearson where all agree: the bound has a closed form.
    assert output.same_top1.at_least == pytest.approx(0.05 ** (1 / 256))
    assert found.comparison.accuracy is None
    assert found.validation.kind == "random"
    assert (found.architecture, found.target, found.precision) == (None, None, None)
    assert found.networks.pruned.macs is found.networks.pruned.params is None
    assert found.networks.reference.file == "dense.onnx"
    assert found.comparison.bytes_ratio == pytest.approx(1.0, abs=0.01)
    assert [one.batch_size for one in found.comparison.latency] == [1, 8]
    assert any("no sidecar of dense.onnx and pruned.onnx" in note for note in found.notes)
    assert any("256 random" in note for note in found.notes)
    assert steps == {
        "agreement",
        *(f"{w}, batch {n}" for w in ("latency", "layers") for n in (1, 8)),
    }
    assert [(times.batch_size, times.multiple) for times in found.layers] == [(1, 1), (8, 1)]


def test_random_inputs_follow_from_the_seed_alone(eye: Path, tmp_path: Path) -> None:
    other = linear(tmp_path / "b.onnx", np.random.default_rng(0).standard_normal((6, 6)))
    first, again, another = (compared(eye, other, seed=seed) for seed in (1, 1, 2))
    assert first.comparison.agreement == again.comparison.agreement
    assert first.validation.identity == again.validation.identity != another.validation.identity
    assert first.comparison.agreement != another.comparison.agreement


def test_the_report_is_read_back_and_shown(eye: Path, tmp_path: Path) -> None:
    found = compared(eye, linear(tmp_path / "b.onnx", np.eye(6)[:, ::-1]))
    save_report(found, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == found
    pages = (render_markdown(found, []), render_page(found, []))
    for page in pages:
        assert "b.onnx against dense.onnx" in page
        assert "None" not in page
        assert str(tmp_path) not in page
    assert "| same top-1 |" in pages[0]
    assert "random inputs" in pages[0]


def test_reports_from_before_keep_loading(eye: Path, tmp_path: Path) -> None:
    """As an earlier version wrote them: without the keys that are new, under their own digest."""
    document = sealed(compared(eye, eye, arrays(), labels=np.zeros(40, dtype=np.int64)))
    for key in ("notes", "sha256"):
        del document[key]
    del document["validation"]["kind"]
    del document["comparison"]["agreement"]
    for network in document["networks"].values():
        del network["file"], network["runtime"]
        network["onnx_sha256"] = "0" * 64
    document |= {"against": "dense", "architecture": "a", "target": "cpu", "precision": "fp32"}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "report.json").write_text(json.dumps(document))
    found = load_report(tmp_path / "report.json")
    assert (found.validation.kind, found.comparison.agreement) == ("labelled", None)
    assert "a for cpu: pruned against dense" in render_markdown(found, [])


# Inputs and outputs of every form


@pytest.mark.parametrize("order", [("images", "ids"), ("ids", "images")])
def test_two_inputs_one_of_them_whole_numbers(tmp_path: Path, order: tuple[str, str]) -> None:
    def network(path: Path, scale: float) -> Path:
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["shift"]),
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Mul", ["flat", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["y"]),
        ]
        ends: Ends = {"images": (FLOAT, ["n", 1, 2, 3]), "ids": (WHOLE, ["n"])}
        table = np.arange(12, dtype=np.float32).reshape(2, 6)
        weights = {"table": table, "scale": np.array(scale, np.float32)}
        reads = {name: ends[name] for name in order}
        return save(path, nodes, reads, {"y": (FLOAT, ["n", 6])}, weights)

    dense, pruned = network(tmp_path / "a.onnx", 1.0), network(tmp_path / "b.onnx", 0.5)
    assert compared(dense, pruned).validation.kind == "random"  # 0 and 1 are rows of any table
    images, ids = arrays(10), np.array([0, 1] * 5, dtype=np.int32)
    found = compared(dense, pruned, {"images": images, "ids": ids})
    assert found.comparison.agreement is not None
    (output,) = found.comparison.agreement.outputs
    flat = images.reshape(10, 6)
    shift = np.arange(12, dtype=np.float32).reshape(2, 6)[ids]
    expected, actual = flat + shift, flat / 2 + shift
    error = np.abs(expected - actual).max() / np.abs(expected).max()
    assert output.relative_error == pytest.approx(error, rel=1e-5)
    same = (expected.argmax(axis=1) == actual.argmax(axis=1)).mean()
    assert output.same_top1 is not None
    assert output.same_top1.share == same
    np.savez(tmp_path / "in.npz", images=images, ids=ids, labels=expected.argmax(axis=1))
    labelled = compared(dense, pruned, tmp_path / "in.npz")
    assert labelled.networks.reference.top1 == 1.0
    assert labelled.networks.pruned.top1 == same
    np.savez(tmp_path / "less.npz", images=images)
    with pytest.raises(DataError, match=r"less\.npz: there is no array 'ids' .* but images"):
        compared(dense, pruned, tmp_path / "less.npz")
    with pytest.raises(DataError, match="one array was given, and the networks read"):
        compared(dense, pruned, images)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_fixed_batch_is_measured_at_its_size(batch: int, tmp_path: Path) -> None:
    blind = np.eye(6)
    blind[0, 0] = -1
    dense = linear(tmp_path / "dense.onnx", np.eye(6), batch=batch)
    pruned = linear(tmp_path / "pruned.onnx", blind)  # takes any number
    images = arrays(13)
    labels = images.reshape(13, 6).argmax(axis=1)
    found = compared(dense, pruned, images, labels=labels)
    assert [one.batch_size for one in found.comparison.latency] == [batch]
    assert found.config.batch_sizes == (batch,)
    # 13 is no multiple of 8: what fills the last batch up is in no figure.
    assert found.validation.images == 13
    assert found.networks.reference.top1 == 1.0
    answers = (images.reshape(13, 6) @ blind).argmax(axis=1)
    assert found.networks.pruned.top1 == pytest.approx((answers == labels).mean())
    assert compared(dense, pruned, images, batch_sizes=(batch,)).config.batch_sizes == (batch,)
    with pytest.raises(ConfigError, match=f"takes batches of {batch} alone: ask for {batch}"):
        compared(dense, pruned, images, batch_sizes=(4,))


def test_two_fixed_batches_that_differ(tmp_path: Path) -> None:
    files = [linear(tmp_path / f"{n}.onnx", np.eye(6), batch=n) for n in (1, 8)]
    with pytest.raises(DataError, match=r"1\.onnx takes batches of 1 and 8\.onnx of 8"):
        compared(*files)


def test_other_names_are_matched_by_order(eye: Path, tmp_path: Path) -> None:
    other = linear(tmp_path / "b.onnx", 2 * np.eye(6), names=("pixels", "scores"))
    for data in (arrays(), {"x": arrays()}, {"pixels": arrays()}):
        found = compared(eye, other, data)
        assert found.comparison.agreement is not None
        (output,) = found.comparison.agreement.outputs
        assert (output.name, output.relative_error) == ("y", 1.0)


def test_several_outputs_each_have_their_agreement(tmp_path: Path) -> None:
    def network(path: Path, names: tuple[str, str], power: float) -> Path:
        nodes = [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Pow", ["x", "power"], [names[0]]),
            helper.make_node("Identity", ["flat"], [names[1]]),
        ]
        outputs: Ends = {names[0]: (FLOAT, ["n", 1, 2, 3]), names[1]: (FLOAT, ["n", 6])}
        weights = {"power": np.array(power, np.float32)}
        return save(path, nodes, {"x": (FLOAT, ["n", 1, 2, 3])}, outputs, weights)

    dense = network(tmp_path / "a.onnx", ("map", "logits"), 2.0)
    pruned = network(tmp_path / "b.onnx", ("other", "scores"), 4.0)
    images = arrays()
    labels = images.reshape(40, 6).argmax(axis=1)
    found = compared(dense, pruned, images, labels=labels)
    assert found.comparison.agreement is not None
    by_name = {output.name: output for output in found.comparison.agreement.outputs}
    assert by_name.keys() == {"map", "logits"}
    squares = images.astype(np.float64) ** 2
    error = np.abs(squares - squares**2).max() / squares.max()
    assert by_name["map"].relative_error == pytest.approx(error, rel=1e-4)
    assert by_name["map"].same_top1 is None
    assert by_name["logits"].relative_error == 0
    assert found.networks.pruned.top1 == 1.0  # read from the output that is (N, classes)
    for given in (labels, None):
        with pytest.raises(DataError, match="no output is named 'score'"):
            compared(dense, pruned, images, labels=given, output="score")
    chosen = compared(dense, pruned, images, output="logits").comparison.agreement
    assert chosen is not None
    assert [output.name for output in chosen.outputs] == ["logits", "map"]
    with pytest.raises(DataError, match=r"labels need an output of shape \(N, classes\)"):
        compared(dense, pruned, images, labels=labels, output="map")


def test_floats_of_two_widths_are_fed_the_same(eye: Path, tmp_path: Path) -> None:
    half = linear(tmp_path / "half.onnx", np.eye(6), kind=HALF)
    images = arrays()
    found = compared(eye, half, images)
    assert found.comparison.agreement is not None
    (output,) = found.comparison.agreement.outputs
    rounded = images.astype(np.float16).astype(np.float64)
    error = np.abs(images - rounded).max() / np.abs(images).max()
    assert output.relative_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 2**-10


def test_open_sizes_are_told_or_asked_for(tmp_path: Path) -> None:
    def network(path: Path, size: list[int | str]) -> Path:
        nodes = [
            helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["y"]),
        ]
        return save(path, nodes, {"x": (FLOAT, ["n", 3, *size])}, {"y": (FLOAT, ["n", 3])})

    free, also = (network(tmp_path / f"{n}.onnx", ["h", "w"]) for n in "ab")
    told = network(tmp_path / "told.onnx", [8, 8])
    with pytest.raises(DataError, match=r"x float32 \(n, 3, h, w\).*set data.image_size"):
        compared(free, also)
    sized = compared(free, also, images={"image_size": 8})
    assert sized.validation.identity == compared(free, told).validation.identity


# Images from a folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two class folders: dark images and bright ones, whole in one colour."""
    for label, levels in (("dark", range(0, 120, 10)), ("light", range(140, 250, 10))):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for level in levels:
            name = tmp_path / "photos" / label / f"{level}.png"
            Image.new("RGB", (20, 20), (level,) * 3).save(name)
    return tmp_path / "photos"


def threshold(path: Path, at: float, *, kind: int = FLOAT) -> Path:
    """Write a network that answers class 1 where the mean of an image is above a level."""
    nodes = [
        helper.make_node("Cast", ["x"], ["pixels"], to=FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Sub", ["mean", "at"], ["above"]),
        helper.make_node("Unsqueeze", ["above", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "signs"], ["y"]),
    ]
    weights = {
        "at": np.array(at, np.float32),
        "axis": np.array([1]),
        "signs": np.array([[-1, 1]], np.float32),
    }
    reads: Ends = {"x": (kind, ["n", 3, 16, 16])}
    return save(path, nodes, reads, {"y": (FLOAT, ["n", 2])}, weights)


@pytest.mark.parametrize("layout", ["classes", "halves"])
def test_accuracy_on_a_folder_of_classes(layout: str, photos: Path, tmp_path: Path) -> None:
    how = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    dense = threshold(tmp_path / "dense.onnx", 130 / 255)
    pruned = threshold(tmp_path / "pruned.onnx", 175 / 255)
    if layout == "halves":
        halves = tmp_path / "halves"
        for half in ("train", "val"):
            (halves / half).parent.mkdir(exist_ok=True)
            (halves / half).symlink_to(photos)
        photos = halves
    found = compared(dense, pruned, photos, images=how)
    assert found.validation.kind == "labelled"
    assert found.validation.images == 23
    assert found.networks.reference.top1 == 1.0
    assert found.networks.pruned.top1 == pytest.approx(19 / 23)  # 140, 150, 160 and 170 are lost
    assert not any("ImageNet" in note for note in found.notes)
    assumed = compared(dense, pruned, photos)
    assert any("ImageNet" in note for note in assumed.notes)


@pytest.mark.parametrize("layout", ["classes", "flat"])
def test_images_that_cannot_be_read_are_refused_before_anything_is_timed(
    layout: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that cannot be read once passed the gate: the rest of the images did."""

    def untimed(*_: Any, **__: Any) -> None:
        raise AssertionError("timed")

    files = [threshold(tmp_path / f"{at}.onnx", at / 255) for at in (130, 131)]
    images: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    folder = photos if layout == "classes" else photos / "light"
    whole = compared(*files, folder, images=images).validation
    count = whole.images
    assert (whole.skipped, whole.max_skipped) == (0, 0.01)
    (photos / "light" / "150.png").write_bytes(b"broken")
    monkeypatch.setattr("bench.measuring.session.measure_latency", untimed)
    with pytest.raises(DataError, match=rf"1 of {count} images .* data\.max_skipped = 0\.01"):
        compared(*files, folder, images=images)
    monkeypatch.undo()
    images["max_skipped"] = 0.1
    found = compared(*files, folder, images=images)
    assert (found.validation.images, found.validation.skipped) == (count - 1, 1)
    assert found.validation.unread is None
    for path in (photos / "light").iterdir():
        path.write_bytes(b"broken")
    images["max_skipped"] = 1.0
    monkeypatch.setattr("bench.measuring.session.measure_latency", untimed)
    says = "of class 'light' could be read" if layout == "classes" else "none of 11"
    with pytest.raises(DataError, match=says):
        compared(*files, folder, images=images)


def test_bytes_are_fed_as_they_are(photos: Path, tmp_path: Path) -> None:
    dense, pruned = (threshold(tmp_path / f"{at}.onnx", at, kind=BYTE) for at in (130, 175))
    found = compared(dense, pruned, photos)
    assert found.networks.reference.top1 == 1.0
    assert found.networks.pruned.top1 == pytest.approx(19 / 23)


def test_images_that_the_networks_do_not_read(eye: Path, photos: Path, tmp_path: Path) -> None:
    byte = threshold(tmp_path / "byte.onnx", 130, kind=BYTE)
    digits = {"dataset": "digits", "image_size": 16}
    with pytest.raises(DataError, match=r"the images are 1x16x16 and the networks read x uint8"):
        compared(byte, byte, images=digits)
    gray = linear(tmp_path / "gray.onnx", np.eye(256), kind=FLOAT, size=(1, 16, 16))
    assert compared(gray, gray, images=digits).validation.images == 599
    with pytest.raises(DataError, match=r"the images are 3x2x2 and the networks read x float32"):
        compared(eye, eye, photos)
    flat = linear(tmp_path / "flat.onnx", np.eye(6), size=(6,))
    with pytest.raises(DataError, match=r"images are fed to one input of shape \(N, C, H, W\)"):
        compared(flat, flat, photos)
    with pytest.raises(ConfigError, match=r"images.*'image_sise'.*image_size"):
        compared(gray, gray, photos, images={"image_sise": 8})


def test_images_without_labels_tell_how_far_both_agree(photos: Path, tmp_path: Path) -> None:
    how = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    files = [threshold(tmp_path / f"{at}.onnx", at / 255) for at in (130, 175)]
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in photos.rglob("*.png"):
        image.rename(flat / image.name)
    (flat / "notes.txt").write_text("no image")
    found = compared(*files, flat, images=how)
    assert found.validation.kind == "images"
    assert found.comparison.accuracy is None
    assert found.comparison.agreement is not None
    same = found.comparison.agreement.same_top1
    assert same is not None
    assert (same.count, same.share) == (23, pytest.approx(19 / 23))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        compared(*files, tmp_path / "none")


# Two kinds of network


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=4, in_channels=1).eval()
    path = tmp_path_factory.mktemp("checkpoint") / "dense.safetensors"
    description = Description(
        architecture="resnet20",
        classes=tuple("abcd"),
        input_size=(1, 16, 16),
        mean=(0.5,),
        std=(0.5,),
    )
    save_checkpoint(path, model, description=description)
    return path, model


def exported(model: nn.Module, path: Path, size: tuple[int, int, int]) -> Path:
    """Export as people do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, *size),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )
    return path


def exported_plainly(model: nn.Module, path: Path, size: tuple[int, int, int]) -> Path:
    """Export as torch does by default: a fixed batch, and weights in a file beside it."""
    pytest.importorskip("onnxscript", reason="torch's exporter needs it")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.zeros(8, *size),), path, dynamo=True)
    return path


def test_a_checkpoint_in_torch_against_onnx(lenet: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = lenet
    found = compared(path, exported(model, tmp_path / "same.onnx", (1, 16, 16)))
    assert found.runtime == "ONNX Runtime (CPU) against torch (cpu)"
    assert found.networks.reference.runtime == "torch-cpu"
    assert found.networks.reference.params == sum(p.numel() for p in model.parameters())
    assert found.networks.pruned.params is None
    assert found.comparison.agreement is not None
    (output,) = found.comparison.agreement.outputs
    assert output.relative_error is not None
    assert output.relative_error < 1e-5
    assert found.comparison.bytes_ratio is None  # two kinds of file
    assert any("no sidecar of same.onnx" in note for note in found.notes)
    memory = compared(model, tmp_path / "same.onnx", torch.from_numpy(arrays(10, (1, 16, 16))))
    assert memory.networks.reference.bytes is None
    assert memory.networks.reference.params == found.networks.reference.params
    assert memory.validation.images == 10


def test_two_networks_in_memory() -> None:
    class Two(nn.Module):
        def forward(self, images: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": images * 2, "logits": images.flatten(1) * scale}

    images, scale = torch.from_numpy(arrays(6)), torch.full((6, 1), 3.0)
    found = compared(Two(), Two(), {"images": images, "scale": scale})
    assert found.comparison.agreement is not None
    assert [one.name for one in found.comparison.agreement.outputs] == ["map", "logits"]
    assert all(one.relative_error == 0 for one in found.comparison.agreement.outputs)
    with pytest.raises(DataError, match="do not say what they read"):
        compared(nn.Flatten(), nn.Flatten())
    batches = [(images[:4], torch.tensor([0, 1, 2, 3])), (images[4:], torch.tensor([4, 5]))]
    labelled = compared(nn.Flatten(), nn.Flatten(), batches)
    answers = images.flatten(1).argmax(dim=1).numpy()
    assert labelled.networks.reference.top1 == pytest.approx((answers == np.arange(6)).mean())
    with pytest.raises(DataError, match="an iterator is used up"):
        compared(nn.Flatten(), nn.Flatten(), iter(batches))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.runners.torch_runner.Cuda", fresh_host_gpu())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_several_tensors_on_a_gpu(cuda_graph: bool) -> None:
    class Two(nn.Module):
        def forward(self, images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"rows": images.flatten(1) + ids[:, None], "ids": ids * 2}

    feeds = {"images": arrays(7), "ids": np.arange(7)}
    found = compared(Two(), Two(), feeds, runtime="torch-cuda", cuda_graph=cuda_graph)
    assert found.comparison.agreement is not None
    by_name = {output.name: output for output in found.comparison.agreement.outputs}
    assert {name: output.relative_error for name, output in by_name.items()} == {
        "rows": 0.0,
        "ids": 0.0,
    }
    steps = {"h2d", "compute", "d2h", "enqueue", "host"}
    for network in (found.networks.reference, found.networks.pruned):
        assert [set(record.stages) for record in network.latency] == [steps, steps]
    assert found.runtime == "torch (cuda)"
    assert found.notes == ()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_against_a_cpu_is_said(eye: Path) -> None:
    module = nn.Flatten()
    found = compared(eye, module, arrays(), runtime="torch-cuda")
    assert found.runtime == "torch (cuda) against ONNX Runtime (CPU)"
    assert found.config.runtime == "torch-cuda"
    assert found.networks.reference.runtime == "onnxruntime-cpu"
    assert any("on a GPU and the other on the CPU" in note for note in found.notes)
    assert found.networks.pruned.latency[0].stages
    assert not found.networks.reference.latency[0].stages
    pages = (render_markdown(found, []), render_page(found, []))
    assert all("torch (cuda) against ONNX Runtime (CPU)" in page for page in pages)


def test_batches_without_labels_and_by_name() -> None:
    images = torch.from_numpy(arrays(6))
    for batches in ([images[:4], images[4:]], [{"input": images}], [(images, None)]):
        found = compared(nn.Flatten(), nn.Flatten(), batches)
        assert (found.validation.kind, found.validation.images) == ("arrays", 6)
        assert found.comparison.accuracy is None
    with pytest.raises(DataError, match="do not say what they read: give inputs"):
        compared(nn.Flatten(), nn.Flatten(), [])


def test_an_output_that_has_no_row_for_each_input_names_no_class() -> None:
    class Grid(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(5, 2), images.flatten(1)

    images = arrays(6)
    found = compared(Grid(), Grid(), images, labels=images.reshape(6, 6).argmax(axis=1))
    assert found.comparison.agreement is not None
    first, second = found.comparison.agreement.outputs
    assert first.same_top1 is None
    assert second.same_top1 is not None
    assert second.same_top1.count == 6
    assert found.networks.reference.top1 == 1.0


@pytest.mark.slow
def test_a_precision_that_nothing_would_heed(eye: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="precision fp16 would be ignored"):
        compared(eye, eye, precision="fp16")
    with pytest.raises(ConfigError, match="torch does not run the INT8 network"):
        compared(run / "dense.safetensors", eye, precision="int8")


def test_large_inputs_are_answered_a_few_at_once() -> None:
    sizes: list[int] = []

    class Noting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return images.mean(dim=(2, 3))

    noting = Noting()
    noting.__deepcopy__ = lambda memo: noting  # type: ignore[operator]
    large = np.zeros((3, 3, 1400, 2000), np.float32)  # 33.6 MB each
    compared(noting, noting, large, batch_sizes=(1,))
    assert set(sizes) == {1}
    sizes.clear()
    compared(noting, noting, large[:, :, :10, :10], batch_sizes=(1,))
    assert set(sizes) == {1, 3}


@pytest.mark.slow
@pytest.mark.parametrize("export", [exported, exported_plainly])
def test_a_network_that_another_tool_pruned(
    tmp_path: Path, export: Callable[[nn.Module, Path, tuple[int, int, int]], Path]
) -> None:
    """Pruned by Torch-Pruning, exported by torch.onnx: nothing in the files is ours."""
    pruning = pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ).eval()
    size = (3, 32, 32)
    dense = export(model, tmp_path / "dense.onnx", size)
    images = arrays(40, size)
    with torch.no_grad():
        before = model(torch.from_numpy(images)).numpy()
    importance = pruning.importance.MagnitudeImportance(p=2)
    pruning.pruner.MagnitudePruner(
        model, torch.zeros(1, *size), importance, pruning_ratio=0.75, ignored_layers=[model[-1]]
    ).step()
    assert model[3].weight.shape == (16, 16, 3, 3)  # type: ignore[union-attr]
    pruned = export(model, tmp_path / "pruned.onnx", size)
    limits = {
        "latency": {"max_ratio": 0.95, "batch_sizes": [8]},
        "size": {"max_ratio": 0.2},
        "agreement": {"max_relative_error": 10.0},
    }
    found = compared(
        *(dense, pruned, images), limits=limits, max_seconds=2.0, layer_calls=3, min_blocks=8
    )
    verdicts = {verdict.name: verdict for verdict in judge(found, limits)}
    assert verdicts["size.max_ratio"].status == "PASS"
    assert verdicts["agreement.max_relative_error"].status == "PASS"
    # Sixteen times fewer multiplications; a machine may still be too busy to tell.
    assert verdicts["latency.max_ratio"].status in ("PASS", "INCONCLUSIVE", "SKIPPED")
    assert found.comparison.agreement is not None
    (output,) = found.comparison.agreement.outputs
    with torch.no_grad():
        after = model(torch.from_numpy(images)).numpy()
    error = np.abs(before - after).max() / np.abs(before).max()
    assert output.relative_error == pytest.approx(error, rel=1e-3)
    assert output.same_top1 is not None
    assert output.same_top1.share == (before.argmax(axis=1) == after.argmax(axis=1)).mean()
    files = sorted(tmp_path.glob("pruned.onnx*"))
    assert len(files) == (1 if export is exported else 2)
    assert found.networks.pruned.bytes == sum(file.stat().st_size for file in files)
    if export is exported_plainly:
        return
    counted = [layer for layer in found.layers[0].layers if layer.reference and layer.pruned]
    macs = [(one.reference.macs, one.pruned.macs) for one in counted if one.reference.macs]  # type: ignore[union-attr]
    assert macs == [
        (1024 * 27 * 64, 1024 * 27 * 16),
        (1024 * 9 * 64 * 64, 1024 * 9 * 16 * 16),
        (640, 160),
    ]


# Runs


@pytest.mark.slow
def test_run_directories_and_their_files_are_networks_too(run: Path, tmp_path: Path) -> None:
    """``dense`` of a run is its reference, whatever it is called by."""
    fast = {**FAST, "layer_calls": 0, "batch_sizes": (1,)}
    digits = {"dataset": "digits", "image_size": 8}
    exports = run / "export"
    by_file = compare(exports / "dense.onnx", run, images=digits, **fast)
    whole = load_report(run / "report.json")
    assert by_file.networks.pruned.outcomes == whole.networks.pruned.outcomes
    assert by_file.networks.reference.top1 == whole.networks.reference.top1
    assert by_file.validation.identity == whole.validation.identity
    assert (by_file.groups, by_file.pruning) == (whole.groups, whole.pruning)
    assert whole.groups
    assert by_file.notes == ()
    in_torch = compare(run / "dense.safetensors", run, images=digits, **fast)
    assert in_torch.runtime == "torch (cpu)"
    assert in_torch.networks.pruned.file == "pruned.safetensors"
    assert in_torch.networks.pruned.macs == whole.networks.pruned.macs
    assert in_torch.comparison.bytes_ratio is not None
    two = compare(run, run, images=digits, runtime="torch-cpu", **fast)
    assert two.networks.reference.file == "pruned.safetensors"
    with pytest.raises(ConfigError, match=r"is neither dense\.onnx nor pruned\.onnx"):
        compare(exports / "dense.onnx", exports / "pruned.onnx", runtime="torch-cpu", **fast)
    copy = tmp_path / "pruned.onnx"
    copy.write_bytes((exports / "pruned.onnx").read_bytes())
    copy.with_suffix(".json").write_bytes((exports / "dense.json").read_bytes())
    with pytest.raises(CheckpointError, match="is not the file that"):
        compare(exports / "dense.onnx", copy, images=digits, **fast)


@pytest.mark.slow
def test_a_sidecar_from_before_groups_were_written(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    for name in ("dense", "pruned"):
        path = old / "export" / f"{name}.json"
        sidecar = json.loads(path.read_text())
        del sidecar["groups"], sidecar["pruning"]
        path.write_text(json.dumps(sidecar))
    whole = load_report(run / "report.json")
    for network in (old, old / "export" / "pruned.onnx"):
        digits = {"dataset": "digits", "image_size": 8}
        found = compare(
            *(old / "export" / "dense.onnx", network),
            **{**FAST, "layer_calls": 0, "batch_sizes": (1,), "images": digits},
        )
        told = network is old  # by the header of the checkpoint in the run
        assert found.groups == (whole.groups if told else ())
        assert found.pruning == (whole.pruning if told else None)


# Verdicts


def test_agreement_is_judged_by_its_interval(eye: Path, tmp_path: Path) -> None:
    swapped = linear(tmp_path / "b.onnx", np.eye(6)[:, [1, 0, 2, 3, 4, 5]])
    images = arrays(200)
    found = compared(eye, swapped, images)
    share = (images.reshape(200, 6).argmax(axis=1) >= 2).mean()

    def status(limit: float) -> str:
        (verdict,) = judge(found, {"agreement": {"min_same_top1": limit}})
        assert verdict.measured == pytest.approx(share)
        return verdict.status

    assert [status(limit) for limit in (share - 0.1, share, share + 0.1)] == [
        *("PASS", "INCONCLUSIVE", "FAIL")
    ]
    (verdict,) = judge(found, {"agreement": {"max_relative_error": 1e-3}})
    assert (verdict.status, "the largest difference of the two" in verdict.sentence) == (
        "FAIL",
        True,
    )
    (tmp_path / "b.toml").write_text("[agreement]\nmax_relative_error = 9\n")
    for limits in (tmp_path / "b.toml", str(tmp_path / "b.toml")):
        assert [verdict.status for verdict in judge(found, limits)] == ["PASS"]


def test_what_nothing_tells_is_skipped(eye: Path) -> None:
    limits = {
        "accuracy": {"max_drop_pp": 1.0},
        "macs": {"max_ratio": 0.5},
        "params": {"max_ratio": 0.5},
        "parity": {"max_relative_error": 1e-4},
    }
    found = compared(eye, eye, limits=limits)
    assert found.limits is not None
    assert [verdict.status for verdict in judge(found, found.limits)] == ["SKIPPED"] * 4


def test_a_share_that_so_few_inputs_cannot_show_is_refused(eye: Path) -> None:
    limits = {"agreement": {"min_same_top1": 0.98}}
    with pytest.raises(ConfigError, match=r"min_same_top1 = 0.98 cannot be shown on 20 .* 149 inp"):
        compared(eye, eye, arrays(20), limits=limits)
    assert judge(compared(eye, eye, arrays(149), limits=limits), limits)[0].status == "PASS"
    for limit in ({"agreement": {"min_same_top1": 1.0}}, {"latency": {"max_regression": 1.1}}):
        with pytest.raises(ConfigError, match=r"no number of inputs can|without a baseline"):
            compared(eye, eye, arrays(149), limits=limit)


def test_a_baseline_is_of_the_same_reference(eye: Path, tmp_path: Path) -> None:
    first = compared(eye, linear(tmp_path / "b.onnx", 2 * np.eye(6)), arrays())
    save_report(first, tmp_path / "baseline.json")
    steady(tmp_path / "baseline.json", tmp_path / "baseline.json")
    again = compared(
        eye, linear(tmp_path / "c.onnx", 3 * np.eye(6)), baseline=tmp_path / "baseline.json"
    )
    assert again.change is not None
    assert [one.batch_size for one in again.change.latency] == [1, 8]
    other = linear(tmp_path / "other.onnx", 4 * np.eye(6))
    with pytest.raises(CheckpointError, match="weights of the reference"):
        compared(other, eye, baseline=first)


# Bad input


def test_inputs_or_classes_that_differ(eye: Path, tmp_path: Path) -> None:
    larger = linear(tmp_path / "larger.onnx", np.eye(8)[:, :6], size=(1, 2, 4))
    whole = linear(tmp_path / "classes.onnx", np.eye(6)[:, :5])
    with pytest.raises(DataError, match=r"dense\.onnx reads x float32 \(n, 1, 2, 3\) and larger"):
        compared(eye, larger)
    with pytest.raises(DataError, match=r"names 6 classes at its output y and classes\.onnx 5"):
        compared(eye, whole)


def test_files_that_cannot_be_compared(eye: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("these are words and no network\n")
    (tmp_path / "x.engine").write_bytes(b"an engine of somebody")
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "folder").mkdir()
    for file, kind, words in (
        ("missing.onnx", CheckpointError, "there is no file"),
        ("text.onnx", CheckpointError, "is not ONNX|cannot load"),
        ("x.engine", CheckpointError, "only used with the sidecar"),
        ("x.txt", ConfigError, r"none of the files that can be compared: \.onnx"),
        ("folder", ConfigError, "is not a run directory"),
    ):
        with pytest.raises(kind, match=words):
            compared(eye, tmp_path / file)
    for data, words in (
        ("x.npz", "cannot read"),
        ("x.txt", "neither a folder"),
        ("no.npz", "No such"),
    ):
        with pytest.raises(DataError, match=words):
            compared(eye, eye, tmp_path / data)
    with pytest.raises(ConfigError, match=r"torch-cpu reads a file \*\.safetensors, and that is"):
        compared(eye, eye, runtime="torch-cpu")
    with pytest.raises(ConfigError, match="unknown key 'max_second'"):
        compared(eye, eye, max_second=1)


def test_json_of_another_tool_is_no_sidecar(eye: Path, tmp_path: Path) -> None:
    eye.with_suffix(".json").write_text('{"labels": ["cat", "dog"]}')
    found = compared(eye, linear(tmp_path / "pruned.onnx", np.eye(6)))
    assert any("no sidecar of dense.onnx and pruned.onnx" in note for note in found.notes)
    for damaged in ('{"schema_version": 2, ', '{"schema_version": 2}'):
        eye.with_suffix(".json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"dense\.json"):
            compared(eye, tmp_path / "pruned.onnx")


def test_a_sidecar_of_another_file_is_an_error(eye: Path, tmp_path: Path) -> None:
    eye.with_suffix(".json").write_text('{"schema_version": 1}')
    with pytest.raises(CheckpointError, match="schema_version 1"):
        compared(eye, eye)


def test_pickled_arrays_are_not_loaded(eye: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds what is no array"):
        compared(eye, eye, tmp_path / "x.npy")


@pytest.mark.parametrize("side", [0, 1])
def test_answers_that_are_no_numbers(side: int, eye: Path, tmp_path: Path) -> None:
    """Their largest would be a class: that of NaN the first, which some images are of."""
    weight = np.eye(6)
    weight[0, 0] = np.nan
    files = [eye, eye]
    files[side] = linear(tmp_path / "nan.onnx", weight)
    with pytest.raises(
        ModelError, match=r"nan\.onnx gives NaN on 256 of 256 images at its output y"
    ):
        compared(*files)
    weight[0, 0] = 1e38
    files[side] = linear(tmp_path / "infinity.onnx", weight)
    fed = arrays(90)
    fed[::9, 0, 0, 0] = 100
    fed[1::9, 0, 0, 0] = 0.5
    fed[2:, 0, 0, 0] = np.where(fed[2:, 0, 0, 0] == 100, 100, 0.5)
    with pytest.raises(ModelError, match=r"gives infinity on 10 of 90 images at its output y"):
        compared(*files, fed, labels=np.zeros(90, np.int64))
    fed[3, 0, 0, 1] = np.nan
    with pytest.raises(ModelError, match=r"gives NaN( or infinity)? on (1|11) of 90 images"):
        compared(*files, fed, labels=np.zeros(90, np.int64))


# The command line


def test_the_command_writes_where_it_says(
    eye: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pruned = linear(tmp_path / "pruned.onnx", np.eye(6))
    np.savez(tmp_path / "in.npz", x=arrays(200))
    (tmp_path / "b.toml").write_text("[agreement]\nmin_same_top1 = 0.98\n[macs]\nmax_ratio = 0.5\n")
    fast = [f"bench.{key}={value}" for key, value in FAST.items()]
    settings = [word for setting in fast for word in ("--set", setting)]
    arguments = ("bench", eye, pruned, "--data", tmp_path / "in.npz", "--batch", "2", *settings)
    result = invoke(*arguments, "--limits", tmp_path / "b.toml")
    assert result.exit_code == 5, result.stderr  # nothing tells the MACs
    assert "the report is in bench-dense-pruned" in result.stderr
    assert "SKIPPED" in result.stdout
    assert {path.name for path in (tmp_path / "bench-dense-pruned").iterdir()} == {
        *("report.json", "report.md", "report.html", "report.xml")
    }
    judged = invoke(
        "gate", "bench-dense-pruned/report.json", "--set", "accuracy.allow_skipped=true"
    )
    assert judged.exit_code in (3, 4, 5)
    machine = invoke(*arguments, "--json", "--output", tmp_path / "new")
    assert machine.exit_code == 0
    assert document(machine)["report"]["validation"]["images"] == 200
    assert [one["batch_size"] for one in document(machine)["report"]["comparison"]["latency"]] == [
        2
    ]
    refused("bench", eye, code=2, says="is one file: name what is measured against it")
    refused(*arguments, "--against", "dense", code=2, says="--against is for one run directory")
    refused(*arguments, "--set", "prune.steps=3", code=2, says="unknown key 'prune'")


DOCUMENTED = re.findall(
    r"^    (compress bench dense\.onnx.*)$",
    (ROOT / "docs/measuring.md").read_text().split("## Any two files")[1].split("## Latency")[0],
    re.MULTILINE,
)


@pytest.fixture
def as_documented(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files that the page speaks of."""
    threshold(tmp_path / "dense.onnx", 0.5)
    threshold(tmp_path / "pruned.onnx", 0.5001)
    np.savez(tmp_path / "inputs.npz", x=arrays(160, (3, 16, 16)))
    (tmp_path / "limits.toml").write_text("[agreement]\nmin_same_top1 = 0.9\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("as_documented")
@pytest.mark.parametrize("command", DOCUMENTED)
def test_the_commands_of_the_page_run(command: str) -> None:
    fast = (word for key, value in FAST.items() for word in ("--set", f"bench.{key}={value}"))
    _, *words = shlex.split(command)
    result = invoke(*words, *fast)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("the report is in ")
    assert Path(result.stderr.split()[-1], "report.html").is_file()


@pytest.mark.usefixtures("as_documented")
def test_the_lines_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/measuring.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("max_seconds=5", "max_seconds=0.3, min_blocks=4"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "pruned.onnx against dense.onnx"
    assert any(line.startswith("top-1 ") for line in printed)
    assert printed[-1].split()[0] in ("PASS", "FAIL", "INCONCLUSIVE", "SKIPPED")


def test_settings_of_two_networks_are_keywords_of_a_comparison() -> None:
    said = ["bench.limits=mine.toml", "bench.batch_sizes=[2]", "bench.threads=1", "seed=3"]
    found = read_settings(said)
    assert (found["batch_sizes"], found["threads"], found["seed"]) == ((2,), 1, 3)
    assert "limits" not in found  # nor under the name of the version before
    assert read_settings(["bench.budgets=mine.toml"]).keys() == read_settings([]).keys()
    with pytest.raises(ConfigError, match=r"unknown key 'bench\.baseline'"):
        read_settings(["bench.baseline=x"])
