"""Networks that only their users' code builds: saved with their cuts, and built and cut again."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from commands import document, invoke
from conftest import built, lived_in, random_mask
from networks import Plain
from safetensors import safe_open
from torch import nn

import compress
from compress.checkpoints.checkpoint import (
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)
from compress.checkpoints.description import METADATA_KEY, Description, read_description
from compress.checkpoints.library import load, save
from compress.checkpoints.recipe import Recipe, recipe_from
from compress.checkpoints.summary import inspect_checkpoint
from compress.errors import CheckpointError, CompressError, ConfigError, ModelError, OutputError
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.shrink import cuts_of, shrink

V1 = Path(__file__).parents[2] / "fixtures" / "v1"


class Own(nn.Module):
    """Two inputs, tied weights, a buffer that no file holds, and a width that forward reads."""

    ramp: torch.Tensor

    def __init__(self, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, width, 3), nn.Conv2d(3, width, 3)
        self.right.weight = self.left.weight
        self.norm = nn.BatchNorm2d(width)
        self.middle, self.last = nn.Conv2d(width, width, 3), nn.Linear(width, classes)
        self.width = width
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.left(left) + self.right(right)))
        x = torch.relu(self.middle(x)).mean((2, 3))
        return self.last((x * self.ramp).reshape(-1, self.width))


INPUTS = (torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9))


def pruned_own(seed: int = 0) -> tuple[nn.Module, Recipe]:
    """Return a pruned network of one's own, and the cuts that made it."""
    model = lived_in(Own()).eval()
    graph = analyse(model, Example(INPUTS))
    kept = random_mask(graph, seed)
    cuts = cuts_of(graph, kept)
    names = {cut.tensor for cut in cuts}
    assert {"norm.running_mean", "ramp", "width", "last.weight"} <= names
    return shrink(model, graph, kept), recipe_from(cuts, {})


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, nn.Module]:
    model, recipe = pruned_own()
    path = tmp_path / "own.safetensors"
    save(model, path, recipe=recipe)
    return path, model


def same(first: nn.Module, second: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(first(*INPUTS), second(*INPUTS))


# What is saved is what is loaded


@pytest.mark.parametrize("build", [Own, lambda: Own(), functools.partial(Own, 12, classes=5)])
def test_a_network_of_ones_own_comes_back(
    own: tuple[Path, nn.Module], build: Callable[[], nn.Module]
) -> None:
    path, model = own
    loaded = load(str(path), build=build)
    assert not any(module.training for module in loaded.modules())
    assert same(loaded, model)
    assert loaded.left.weight is loaded.right.weight  # type: ignore[union-attr]
    assert loaded.width == loaded.ramp.numel() < 12  # type: ignore[operator,union-attr]
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    state = model.state_dict()
    assert "ramp" not in state
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in state)


def test_a_dense_network_needs_no_recipe(tmp_path: Path) -> None:
    dense = lived_in(Own()).eval()
    for number, recipe in enumerate((None, {})):
        path = tmp_path / f"{number}.safetensors"
        save(dense, path, recipe=recipe)
        assert same(load(path, build=Own), dense)


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(own: tuple[Path, nn.Module]) -> None:
    path, model = own
    with torch.no_grad():
        expected = {"left": INPUTS[0], "right": INPUTS[1], "logits": model(*INPUTS)}
    safetensors.torch.save_file(expected, path.with_name("expected.safetensors"))
    program = (
        "import torch, safetensors.torch\n"
        "from compress.checkpoints.library import load\n"
        "from test_library import Own\n"
        "expected = safetensors.torch.load_file('expected.safetensors')\n"
        "with torch.no_grad():\n"
        "    logits = load('own.safetensors', build=Own)(expected['left'], expected['right'])\n"
        "print(torch.equal(logits, expected['logits']))\n"
    )
    root = Path(compress.__file__).parents[1]
    places = (root, root / "tests", Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_threads_load_side_by_side(own: tuple[Path, nn.Module]) -> None:
    path, model = own
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load(path, build=Own), range(12)))
    assert all(same(network, model) for network in loaded)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model, recipe = pruned_own()
    under = {"kept": recipe["kept"], "cuts": {f"module.{k}": v for k, v in recipe["cuts"].items()}}
    wrapped: list[tuple[nn.Module, Any]] = [
        (nn.DataParallel(model), under),
        (torch.optim.swa_utils.AveragedModel(model), recipe),
        (torch.compile(model), recipe),  # type: ignore[list-item]
    ]
    for number, (outer, own_recipe) in enumerate(wrapped):
        path = tmp_path / f"{number}.safetensors"
        save(outer, path, recipe=own_recipe)
        assert same(load(path, build=Own), model)
        assert same(load(path, build=lambda: nn.DataParallel(Own()).cpu()), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_under_prefixes_load(own: tuple[Path, nn.Module], prefix: str) -> None:
    path, model = own
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {f"{prefix}{k}": v for k, v in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata)
    assert same(load(path, build=Own), model)


def test_a_child_named_module_is_no_prefix(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Own()

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.module(left, right)

    model = Outer().eval()
    graph = analyse(model, Example(INPUTS))
    kept = random_mask(graph, 1)
    smaller = shrink(model, graph, kept)
    save(smaller, tmp_path / "a.safetensors", recipe=recipe_from(cuts_of(graph, kept), {}))
    assert same(load(tmp_path / "a.safetensors", build=Outer), smaller)
    shown = inspect_checkpoint(tmp_path / "a.safetensors")
    (norm,) = (entry for entry in shown["tensors"] if entry["name"] == "norm.weight")
    assert norm["dense"] == [12]
    assert norm["now"] == [smaller.module.norm.num_features]  # type: ignore[union-attr]


def test_the_file_keeps_facts(tmp_path: Path) -> None:
    model, recipe = pruned_own()
    path = tmp_path / "own.safetensors"
    metadata = {"top1": 71.5, "epochs": 3, "tags": ("a", ["b", None]), "more": {"x": True}}
    save(
        *(model, path),
        recipe=recipe,
        metadata=metadata,
        input_size=(3, 9, 9),
        mean=[0.5] * 3,
        std=[0.25] * 3,
        classes=list("abcde"),
    )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    assert header.pop("tools").keys() == {"compress", "torch", "python"}
    assert header == {
        "format_version": 2,
        "recipe": recipe,
        "tied": {"right.weight": "left.weight"},
        "metadata": {"top1": 71.5, "epochs": 3, "tags": ["a", ["b", None]], "more": {"x": True}},
        "classes": list("abcde"),
        "input_size": [3, 9, 9],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    assert same(load(path, build=Own), model)


# Files of commands


def test_a_file_of_a_named_network_needs_no_build(tmp_path: Path) -> None:
    model, graph = built("resnet20")
    kept = random_mask(graph, 1)
    smaller = shrink(model, graph, kept)
    about = Description(
        architecture="resnet20",
        classes=tuple("abcdefg"),
        input_size=(3, 16, 16),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    path = tmp_path / "pruned.safetensors"
    save_checkpoint(path, smaller, description=about, graph=graph, kept=kept)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = smaller.eval()(images)
        assert torch.equal(load(path)(images), expected)
        assert torch.equal(load(path, build=lambda: built("resnet20")[0])(images), expected)


def test_a_file_of_ones_own_network_by_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in(Plain()).eval()
    graph = analyse(model, (3, 12, 12))
    kept = random_mask(graph, 2)
    smaller, path = shrink(model, graph, kept), tmp_path / "pruned.safetensors"
    about = Description(
        architecture="networks:Plain",
        classes=tuple("abcd"),
        input_size=(3, 12, 12),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    save_checkpoint(path, smaller, description=about, graph=graph, kept=kept)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # of somebody who did not write it
    with pytest.raises(
        CheckpointError, match=r"networks:Plain, .*: give build, a callable"
    ) as told:
        load(path)
    assert "--" not in str(told.value)
    loaded, images = load(path, build=Plain), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded(images), smaller(images))


@pytest.mark.parametrize("name", ["resnet20", "lenet"])
def test_files_of_version_1(name: str) -> None:
    path = V1 / f"{name}.safetensors"
    about = read_description(path)
    assert about is not None

    def build() -> nn.Module:
        from compress.networks.models import build_model

        size = about.input_size[0]
        return build_model(name, num_classes=about.num_classes, in_channels=size)

    images = torch.randn(2, *about.input_size)
    with torch.no_grad():
        expected = load_model(path)(images)
        assert torch.equal(load(path)(images), expected)
        assert torch.equal(load(path, build=build)(images), expected)


def test_weights_alone_load_with_build(tmp_path: Path) -> None:
    model = Plain().eval()
    safetensors.torch.save_model(model, str(tmp_path / "plain.safetensors"))
    loaded = load(tmp_path / "plain.safetensors", build=Plain)
    images = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


# What commands make of such a file


def test_inspect_shows_what_was_cut(own: tuple[Path, nn.Module]) -> None:
    path, model = own
    shown = document(invoke("inspect", path, "--json"))
    tensors = {entry["name"]: entry for entry in shown["tensors"]}
    assert shown["tied"] == {"right.weight": "left.weight"}
    assert tensors.keys() == model.state_dict().keys() - shown["tied"].keys()
    dense = Own().state_dict()
    for name, tensor in safetensors.torch.load_file(path).items():
        assert tensors[name]["now"] == list(tensor.shape)
        assert tensors[name]["dense"] == list(dense[name].shape)
    text = invoke("inspect", path).stdout
    assert re.search(r"left\.weight\s.*12x3x3x3", text)
    save(Own(), path, metadata={"note": "a\x1b[31m"}, input_size=(3, 9, 9))
    text = invoke("inspect", path).stdout
    assert "no tensor is pruned" in text
    assert "3x9x9" in text
    assert "\x1b" not in text


def test_what_needs_the_network_says_so(own: tuple[Path, nn.Module]) -> None:
    path, _ = own
    assert read_description(path) is None
    with pytest.raises(CheckpointError, match=r"compress\.load reads it with the function"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="is pruned already"):
        load_weights(path, Own())


def test_a_dense_one_serves_as_weights(tmp_path: Path) -> None:
    dense, other = Own().eval(), Own().eval()
    save(dense, tmp_path / "dense.safetensors")
    load_weights(tmp_path / "dense.safetensors", other)
    assert same(dense, other)


# Every way to be refused


@pytest.mark.parametrize(
    ("build", "kind", "says"),
    [
        (None, CheckpointError, "does not say which network it holds: give build, a callable"),
        (Own(), ConfigError, r"build is a network \(Own\) and not what makes one"),
        ("timm:resnet50", ConfigError, "build is str: give build"),
        (lambda: 1 / 0, ModelError, "build failed: ZeroDivisionError"),
        (lambda: 3, ModelError, "build returned int, not a torch.nn.Module"),
        (lambda: nn.LazyLinear(3), ModelError, "weight has no shape yet"),
        (functools.partial(Own, 16), CheckpointError, "gives '.*' a width of 12 .* has 16"),
        (functools.partial(Own, 12, 4), CheckpointError, r"'last.bias' is \[5\] there and \[4\]"),
        (Plain, CheckpointError, "the recipe cuts '.*', which this network does not have"),
        (lambda: pruned_own()[0], CheckpointError, "gives '.*' a width of 12"),
    ],
)
def test_a_build_that_does_not_fit(
    own: tuple[Path, nn.Module], build: Any, kind: type[CompressError], says: str
) -> None:
    with pytest.raises(kind, match=says) as told:
        load(own[0], build=build)
    assert "--" not in str(told.value)


def test_a_build_of_other_classes(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(4, classes)

    save(Head(3), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="3 classes and 2 are needed: build the network for"):
        load(tmp_path / "a.safetensors", build=lambda: Head(2))


def test_tensors_that_are_missing_or_too_many(own: tuple[Path, nn.Module]) -> None:
    path, _ = own

    class More(Own):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match=r"than More: 2 tensors are missing \(first 'more"):
        load(path, build=More)
    save(More(), path)
    with pytest.raises(CheckpointError, match=r"2 tensors do not belong \(first 'more"):
        load(path, build=Own)


def test_a_truncated_file(own: tuple[Path, nn.Module]) -> None:
    path, _ = own
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        for build in (None, Own):
            with pytest.raises(CheckpointError, match=r"not a safetensors|give build|is empty"):
                load(path, build=build)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path.with_name("absent.safetensors"), build=Own)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"metadata": {"a": torch.ones(1)}}, r"metadata\['a'\] is Tensor"),
        ({"metadata": {"a": float("nan")}}, r"metadata\['a'\] is float"),
        ({"metadata": {"a": {1: 2}}}, r"metadata\['a'\] is dict"),
        ({"metadata": {3: 4}}, r"metadata\[3\]"),
        ({"metadata": {"a": "\ud800"}}, r"metadata\['a'\] is str"),
        ({"metadata": {"a": "x" * 2**24}}, "would be longer than 16777216 bytes"),
        ({"metadata": [1]}, "metadata is a dictionary, not list"),
        ({"recipe": [1]}, "recipe is a dictionary, not list"),
        ({"mean": ["black"]}, "mean cannot be kept"),
        ({"std": [float("inf")]}, "std cannot be kept"),
        ({"classes": [1, 2]}, "classes cannot be kept"),
    ],
)
def test_facts_that_no_file_keeps(tmp_path: Path, facts: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        save(nn.Linear(2, 2), tmp_path / "a.safetensors", **facts)
    with pytest.raises(ConfigError, match=r"named \*\.safetensors, not 'a\.pt'"):
        save(nn.Linear(2, 2), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_another_network_is_not_saved(tmp_path: Path) -> None:
    model, recipe = pruned_own()
    _, other = pruned_own(seed=3)
    for wrong, says in (
        (other, "the recipe gives '.*' a width of"),
        ({"kept": {}, "cuts": {"x": {"0": "a"}}}, "in no way"),
        ({"a": 1}, "the recipe has no cuts"),
    ):
        with pytest.raises(CheckpointError, match=says):
            save(model, tmp_path / "a.safetensors", recipe=wrong)
    with pytest.raises(CheckpointError, match=r"the recipe gives '.*' a width of"):
        save(Own(), tmp_path / "a.safetensors", recipe=recipe)
    assert not list(tmp_path.iterdir())


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


class Held(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("held", tensor)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Extra(), "Extra holds '_extra_state', which is no plain tensor"),
        (nn.LazyLinear(3), "LazyLinear holds 'weight'"),
        (nn.Linear(2, 2, device="meta"), "Linear holds 'weight'"),
        (Held(torch.eye(3).to_sparse()), "Held holds 'held'"),
        (Held(torch.ones(2, dtype=torch.complex64)), "'held' holds complex numbers"),
    ],
)
def test_networks_that_no_file_keeps(tmp_path: Path, model: nn.Module, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_file_that_was_there(
    own: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = own

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="the disk is full; what was there before is kept"):
            save(Own(), path)
    assert same(load(path, build=Own), model)
    assert list(path.parent.iterdir()) == [path]
