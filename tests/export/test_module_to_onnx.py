"""Any network as an ONNX file: its names, its shapes, and proof for every output."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lived_in
from torch import nn
from torch.nn import functional

from compress.errors import ConfigError, ModelError, OutputError, ParityError, UsageError
from compress.networks.capture import Example
from export.module_to_onnx import export_onnx
from export.verify import largest_error


class Two(nn.Module):
    """An image and a mask to a dictionary of a tensor, a list, a decision and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(
        self, image: torch.Tensor, extra: dict[str, torch.Tensor], unused: torch.Tensor
    ) -> dict[str, Any]:
        x = self.drop(torch.relu(self.norm(self.conv(image)))) * extra["mask"]
        pooled = [functional.avg_pool2d(x, 2), functional.interpolate(x, scale_factor=2.0)]
        return {"map": x, "levels": pooled, "classes": x.argmax(1), "rows": x.shape[0], "no": None}


def inputs(rows: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.randint(0, 2, (rows, 1, 8, 8), generator=generator)
    return torch.randn(rows, 3, 8, 8, generator=generator), {"mask": mask}, torch.zeros(rows, 1)


def run(path: Path, **feeds: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    named = {name.replace("__", "."): tensor.numpy() for name, tensor in feeds.items()}
    return dict(zip(names, session.run(None, named), strict=True))


def test_two_inputs_and_a_dictionary(tmp_path: Path) -> None:
    model = lived_in(Two()).train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "new" / "two.onnx"
    facts = export_onnx(model, str(path), example=inputs())
    assert facts.path == path
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.bytes == path.stat().st_size
    assert facts.opset == 17
    assert facts.inputs == {"image": ("batch", 3, 8, 8), "extra.mask": ("batch", 1, 8, 8)}
    assert facts.outputs == {
        "map": ("batch", 4, 8, 8),
        "levels.0": ("batch", 4, 4, 4),
        "levels.1": ("batch", 4, 16, 16),
        "classes": ("batch", 8, 8),
    }
    assert facts.relative_error is not None
    assert facts.relative_error < 1e-5
    # The network is as it was.
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(path.parent.iterdir()) == [path]
    # Batches and values that the export has not seen.
    model.eval()
    for rows in (1, 3, 5):
        image, extra, unused = inputs(rows)
        with torch.no_grad():
            expected = model(image, extra, unused)
        found = run(path, image=image, extra__mask=extra["mask"])
        flat = {"map": expected["map"], "classes": expected["classes"]}
        flat |= {f"levels.{i}": level for i, level in enumerate(expected["levels"])}
        assert found.keys() == flat.keys()
        for name, tensor in flat.items():
            torch.testing.assert_close(torch.from_numpy(found[name]), tensor, rtol=1e-5, atol=1e-6)


def test_the_graph_is_folded_and_keeps_the_names_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    export_onnx(Two(), path, example=inputs())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        assert not all(name in constants for name in node.input), node.name
    assert any(node.name == "/conv/Conv" for node in model.graph.node)
    export_onnx(nn.Sequential(nn.Linear(3, 2)), path, example=torch.randn(2, 3))
    assert {t.name for t in onnx.load(path).graph.initializer} == {"0.weight", "0.bias"}
    assert not onnx.load(path).metadata_props


def test_names_that_are_given(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    ins, outs = ["pixels", "mask", "nothing"], ["a", "b", "c", "d"]
    facts = export_onnx(Two(), path, example=inputs(), input_names=ins, output_names=outs)
    assert list(facts.inputs) == ["pixels", "mask"]
    assert list(facts.outputs) == outs
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["pixels", "mask"]
    assert [value.name for value in graph.output] == outs


Pair = namedtuple("Pair", "left right")


@dataclass
class Found:
    boxes: torch.Tensor
    parts: Pair


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x * 2), ["output.0", "output.1"]),
        (lambda x: [x + 1], ["output.0"]),
        (lambda x: Pair(x + 1, x * 2), ["left", "right"]),
        (lambda x: Found(x + 1, Pair(x * 2, x * 3)), ["boxes", "parts.left", "parts.right"]),
        (lambda x: OrderedDict([("0", x + 1), ("pool", x * 2)]), ["output.0", "pool"]),
        (lambda x: {"x": x + 1}, ["output.x"]),
        (lambda x: {"same": x, "one": torch.ones(2), "int": 3}, ["same", "one"]),
    ],
)
def test_names_of_outputs(tmp_path: Path, returned: Any, names: list[str]) -> None:
    class Returning(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return returned(x)

    images = torch.randn(2, 3)
    facts = export_onnx(Returning(), tmp_path / "a.onnx", example=images)
    assert list(facts.outputs) == names
    found = run(tmp_path / "a.onnx", x=images)
    assert np.array_equal(next(iter(found.values())), images + ("same" not in names))


class Many(nn.Module):
    def forward(self, *images: torch.Tensor, **more: Any) -> torch.Tensor:
        return images[0] - images[1] * more["factor"] + more["shift"]


def test_arguments_of_every_kind(tmp_path: Path) -> None:
    a, b, c = (torch.randn(2, 3) for _ in range(3))
    example = Example((a, b), {"factor": 2.0, "shift": c})
    facts = export_onnx(Many(), tmp_path / "many.onnx", example=example)
    assert list(facts.inputs) == ["images.0", "images.1", "shift"]
    found = run(tmp_path / "many.onnx", images__0=a, images__1=b, shift=c)
    assert np.allclose(found["output"], a - 2 * b + c)
    image, extra, unused = inputs()
    named = {"unused": unused, "extra": extra, "image": image}
    facts = export_onnx(Two(), tmp_path / "two.onnx", example=named)
    assert list(facts.inputs) == ["image", "extra.mask"]


class Flattening(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)


def test_a_dimension_that_follows_the_batch(tmp_path: Path) -> None:
    facts = export_onnx(Flattening(), tmp_path / "a.onnx", example=torch.randn(1, 3, 4))
    assert facts.outputs == {"output": ("output_0", 4)}
    assert run(tmp_path / "a.onnx", x=torch.randn(5, 3, 4))["output"].shape == (15, 4)


def test_a_fixed_batch(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.view(2, 3, 4) @ torch.ones(4, 4)).squeeze()

    path, example = tmp_path / "a.onnx", torch.randn(2, 12)
    with pytest.raises(ModelError, match=r"does not compute a batch of 1 \(RuntimeError.*_batch=F"):
        export_onnx(Fixed(), path, example=example)
    assert not path.exists()
    facts = export_onnx(Fixed(), path, example=example, dynamic_batch=False)
    assert (facts.inputs, facts.outputs) == ({"x": (2, 12)}, {"output": (2, 3, 4)})
    facts = export_onnx(nn.ReLU(), path, example=torch.tensor(1.0), dynamic_batch=False)
    assert (facts.inputs, facts.outputs) == ({"input": ()}, {"output": ()})
    with pytest.raises(ModelError, match="Linear does not accept inputs of no dimensions: "):
        export_onnx(nn.Linear(2, 2), path, example=torch.tensor(1.0), dynamic_batch=False)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model, images = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3))), torch.randn(2, 3, 6, 6)
    first = export_onnx(model, tmp_path / "a.onnx", example=images)
    outer: Any = torch.compile(nn.DataParallel(model).cpu())
    assert export_onnx(outer, tmp_path / "b.onnx", example=images).sha256 == first.sha256


def test_a_decision_by_a_shape_is_none(tmp_path: Path) -> None:
    class ByShape(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.interpolate(x, size=int(x.shape[2]) * 2)  # the tracer warns

    facts = export_onnx(ByShape(), tmp_path / "a.onnx", example=torch.randn(1, 3, 4, 4))
    assert facts.outputs == {"output": ("batch", 3, 8, 8)}


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3)


class Broadcasting(nn.Module):
    """It takes a batch of 1 and of 3, and no other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(3, 3)


class Squeezing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze()


class Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, int]:
        return {"rows": x.shape[0]}


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(7, 7)


IMAGES = torch.rand(2, 3)


class WithAConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": x * self.scale, "anchors": self.scale * 2}


def test_a_constant_is_returned_under_its_name(tmp_path: Path) -> None:
    written = export_onnx(WithAConstant(), tmp_path / "a.onnx", example=IMAGES)
    assert list(written.outputs) == ["scaled", "anchors"]
    found = run(tmp_path / "a.onnx", x=IMAGES)
    np.testing.assert_array_equal(found["anchors"], np.float32([2, 4, 6]))


@pytest.mark.parametrize(
    ("model", "given", "kind", "says"),
    [
        (ByValue(), {}, ModelError, r"a decision by the value of a tensor at test_module_to_onnx"),
        (Random(), {}, ParityError, r"disagree about 'output' at batch size 1: .* exceeds the lim"),
        (Squeezing(), {}, ModelError, "tensors of other dimensions for a batch of 1 than for .* 3"),
        (
            Broadcasting(),
            {"example": IMAGES[:1]},
            ModelError,
            r"a batch of 2 \(RuntimeError: The si",
        ),
        (Silent(), {}, ModelError, "Silent returns dict, in which there is no tensor"),
        (Failing(), {}, ModelError, r"not accept inputs of 2x3: RuntimeError: .* at test_module"),
        (Two(), {}, ConfigError, r"does not fit Two\.forward\(.*: missing a required argument"),
        (nn.ReLU(), {"example": 3}, UsageError, r"the example \(int\) holds no tensor"),
        (nn.ReLU(), {"example": (3,)}, UsageError, r"the example \(tuple\) holds no tensor"),
        (
            Many(),
            {"example": (IMAGES, torch.ones(1))},
            ConfigError,
            r"no batch .*\(images\.0 of 2x3, ",
        ),
        (nn.ReLU(), {"example": torch.tensor(1.0)}, ConfigError, "input of no dimensions"),
        (nn.ReLU(), {"input_names": ["a", "b"]}, ConfigError, "has 2 names and .* 1 inputs: input"),
        (nn.ReLU(), {"output_names": "out"}, ConfigError, "is a list of names, not 'out'"),
        (nn.ReLU(), {"output_names": ["input"]}, ConfigError, "'input' names more than one"),
        (nn.ReLU(), {"target": "toaster"}, ConfigError, "no target is named 'toaster'"),
        (nn.Linear(3, 3).double(), {}, ModelError, r"numbers of float64 .*\.float\(\)"),
        (nn.LazyLinear(3), {}, ModelError, "LazyLinear"),
        (
            nn.BatchNorm2d(3, track_running_stats=False),
            {"example": torch.rand(2, 3, 4, 4)},
            ModelError,
            "cannot be expressed for target cpu: (batch_size|AssertionError)",
        ),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    tmp_path: Path, model: nn.Module, given: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as told:
        export_onnx(model, tmp_path / "a.onnx", **{"example": IMAGES, **given})
    assert "--" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_path_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"an ONNX file is named \*\.onnx, not 'a\.pt'"):
        export_onnx(nn.ReLU(), tmp_path / "a.pt", example=IMAGES)


def test_parity_can_be_left_out(tmp_path: Path) -> None:
    facts = export_onnx(Random(), tmp_path / "a.onnx", example=IMAGES, parity=False)
    assert facts.relative_error is None
    assert facts.path.exists()


def test_a_full_disk_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"earlier")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        export_onnx(nn.ReLU(), path, example=IMAGES)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


# The proof


def judged(expected: Any, found: Any) -> float:
    return largest_error(["out"], [[np.asarray(expected)]], [[np.asarray(found)]], [3])


def test_the_error_is_that_of_the_definition() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.5]], np.float32)
    found = expected + np.array([[0, 2e-4], [0, 0]], np.float32)
    assert judged(expected, found) == pytest.approx(2e-4 / 4, rel=1e-2)
    assert judged(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
    assert judged(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)) == 0


@pytest.mark.parametrize(
    ("expected", "found", "says"),
    [
        ([1.0, 2.0], [1.0, 2.1], "'out' at batch size 3: the relative error 5.0e-02 exceeds"),
        ([1.0, 2.0], [[1.0, 2.0]], r"float32 of shape \(1, 2\) instead of float32 of shape \(2,\)"),
        ([1.0, 2.0], [1.0, float("nan")], "there are NaN or infinities"),
        ([0.0], [1e-9], "torch gives zeros alone and ONNX Runtime up to 1.0e-09"),
    ],
)
def test_what_is_no_parity(expected: Any, found: Any, says: str) -> None:
    with pytest.raises(ParityError, match=says):
        judged(np.array(expected, np.float32), np.array(found, np.float32))


def test_one_decision_in_a_thousand_may_differ() -> None:
    expected = np.arange(2000)
    found = expected.copy()
    found[[3, 1700]] += 1
    assert judged(expected, found) == 0
    found[5] += 1
    with pytest.raises(ParityError, match="3 of 2000 values differ and 2 may"):
        judged(expected, found)
    with pytest.raises(ParityError, match="1 of 2 values differ and 0 may"):
        judged(np.array([True, False]), np.array([True, True]))
