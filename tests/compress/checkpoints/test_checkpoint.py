"""Files of weights: written and read back in a fresh process, and every way to be no such file."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import RESNETS, built, input_size_of, lived_in, random_mask, some_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from safetensors import safe_open
from torch import nn

import compress
from compress.checkpoints.checkpoint import (
    identify,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
    structure_of,
)
from compress.checkpoints.description import METADATA_KEY, Description, read_description
from compress.checkpoints.recipe import recipe_from
from compress.checkpoints.summary import inspect_checkpoint
from compress.checkpoints.tensors import read_state_dict
from compress.errors import CheckpointError, ModelError, OutputError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.cuts import cuts_of
from compress.networks.models import build_model
from compress.networks.shrink import shrink

ROOT = Path(compress.__file__).parents[1]


def described(architecture: str, size: tuple[int, int, int], num_classes: int = 7) -> Description:
    return Description(
        architecture=architecture,
        classes=tuple(f"class {i}" for i in range(num_classes)),
        input_size=size,
        mean=(0.5,) * size[0],
        std=(0.25,) * size[0],
        metrics={"accuracy": {"top1": 12.5, "images": 8}},
        parent_sha256="0" * 64,
    )


def save_pruned(path: Path, name: str, share: float = 0.5) -> nn.Module:
    """Prune a network at random, write it, and return it."""
    model, graph = built(name)
    kept = random_mask(graph, 1, share)
    smaller = shrink(model, graph, kept)
    description = described(name, input_size_of(name))
    save_checkpoint(path, smaller, description=description, graph=graph, kept=kept)
    return smaller


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    path = tmp_path / "pruned.safetensors"
    save_pruned(path, "resnet20")
    return path


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the header document of a file in place."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    change(document)
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {METADATA_KEY: json.dumps(document)})
    return path


# Our own files


def fresh_process(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that knows nothing of this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


OWN_NETWORK = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, 0.1, 2)]  # needs numbers, not only shapes
        self.conv, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.head, self.drop = nn.Linear(12, num_classes), nn.Dropout(rates[1])
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, 10), persistent=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) * self.ramp
        return self.head(self.drop(x.mean((2, 3))))
"""


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    return "own_network:Own"


def save_own(path: Path, name: str) -> nn.Module:
    model = lived_in(build_model(name, num_classes=7)).eval()
    graph = analyse(model, (3, 12, 12))
    kept = random_mask(graph, 2)
    smaller = shrink(model, graph, kept)
    save_checkpoint(path, smaller, description=described(name, (3, 12, 12)), graph=graph, kept=kept)
    return smaller


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path, own_network: str) -> None:
    torch.set_num_threads(1)  # sums in the order of the other process
    expected = {}
    networks = {
        "resnet20": save_pruned(tmp_path / "resnet20.safetensors", "resnet20"),
        "resnext50": save_pruned(tmp_path / "resnext50.safetensors", "resnext50_32x4d", 0.8),
        "own": save_own(tmp_path / "own.safetensors", own_network),
    }
    sizes = {"resnet20": 16, "resnext50": 32, "own": 12}
    for name, model in networks.items():
        images = torch.randn(2, 3, sizes[name], sizes[name])
        with torch.no_grad():
            expected[f"{name}.logits"] = model(images)
        expected[f"{name}.images"] = images
    safetensors.torch.save_file(expected, tmp_path / "expected.safetensors")
    done = fresh_process(
        tmp_path,
        "import torch, compress, safetensors.torch\n"
        "torch.set_num_threads(1)\n"
        "expected = safetensors.torch.load_file('expected.safetensors')\n"
        "for name in ('resnet20', 'resnext50', 'own'):\n"
        "    asked = 'own_network:Own' if name == 'own' else None\n"
        "    model = compress.load_model(f'{name}.safetensors', model=asked)\n"
        "    assert not model.training\n"
        "    with torch.no_grad():\n"
        "        logits = model(expected[f'{name}.images'])\n"
        "    print(name, torch.equal(logits, expected[f'{name}.logits']))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "resnet20 True\nresnext50 True\nown True\n"


def test_a_checkpoint_knows_what_it_holds(pruned: Path) -> None:
    model = save_pruned(pruned, "resnet20")
    checkpoint = load_checkpoint(pruned)
    assert same_state(checkpoint.model, model)
    assert checkpoint.costs["params"] == sum(p.numel() for p in model.parameters())
    _, graph = built("resnet20")
    kept = random_mask(graph, 1)
    assert checkpoint.costs["macs"] == cost.macs(graph, kept) < cost.macs(graph, graph.everything())
    expected = described("resnet20", (3, 16, 16))
    written = checkpoint.description
    update = {"recipe": {}, "structure": None, "tools": {}}
    assert written.model_copy(update=update) == expected
    assert written.recipe == recipe_from(cuts_of(graph, kept), {})
    assert written.structure == checkpoint.structure == structure_of(graph, kept)
    assert written.tools.keys() == {"compress", "torch", "python"}
    assert checkpoint.classes == expected.classes
    assert checkpoint.num_classes == 7
    assert checkpoint.input_size == (3, 16, 16)
    assert (checkpoint.mean, checkpoint.std) == (expected.mean, expected.std)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    save_pruned(tmp_path / "a.safetensors", "resnet20")
    torch.manual_seed(0)
    save_pruned(tmp_path / "b.safetensors", "resnet20")
    first = load_checkpoint(tmp_path / "a.safetensors")
    save_checkpoint(tmp_path / "c.safetensors", first.model, description=first.description)
    written = (tmp_path / "a.safetensors").read_bytes()
    assert written == (tmp_path / "b.safetensors").read_bytes()
    assert written == (tmp_path / "c.safetensors").read_bytes()


def test_saving_changes_nothing_and_takes_any_memory_format(tmp_path: Path) -> None:
    model, _ = built("resnet20")
    before = copy.deepcopy(model)
    description = described("resnet20", (3, 16, 16))
    save_checkpoint(tmp_path / "a.safetensors", model, description=description)
    save_checkpoint(
        tmp_path / "b.safetensors",
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        description=description,
    )
    assert same_state(model, before)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_is_written_is_safetensors_and_no_pickle(pruned: Path) -> None:
    data = pruned.read_bytes()
    tensors = safetensors.torch.load(data)
    assert tensors.keys() == load_model(pruned).state_dict().keys()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"][METADATA_KEY])["format_version"] == 2
    last = max(entry["data_offsets"][1] for key, entry in header.items() if key[0] != "_")
    assert 8 + length + last == len(data)  # header, tensors, and nothing else
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError)):
        pickle.loads(data)


def test_a_full_disk_keeps_the_file_that_was_there(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pruned.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full; what was there before is kept"):
        save_pruned(pruned, "resnet20", 0.9)
    assert pruned.read_bytes() == before
    assert list(pruned.parent.iterdir()) == [pruned]


# The user's own networks


def test_a_file_never_names_code_to_import(
    tmp_path: Path, own_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.safetensors"
    save_own(path, own_network)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # of somebody who did not write it
    sys.modules.pop("own_network")
    for asked in (None, "own_network:Other", "resnet20"):
        with pytest.raises(CheckpointError, match="pass --model own_network:Own to allow"):
            load_model(path, asked)
    assert "own_network" not in sys.modules
    model = load_model(path, own_network)
    assert torch.equal(dict(model.named_buffers())["ramp"], torch.linspace(0.5, 1.5, 10))


TIED_NETWORK = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.module = nn.Module()  # a name that looks like DistributedDataParallel's prefix
        self.module.first, self.module.again = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.module.again.weight = self.module.first.weight
        self.module.widen, self.module.head = nn.Conv2d(3, 9, 1), nn.Linear(9, num_classes)

    def forward(self, x):
        m = self.module
        x = torch.relu(m.widen(torch.relu(m.again(torch.relu(m.first(x))))))
        return m.head(x.mean((2, 3)))
"""


def test_tied_weights_and_a_child_named_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_network.py").write_text(TIED_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tied_network", raising=False)
    path, name = tmp_path / "tied.safetensors", "tied_network:Tied"
    saved = save_own(path, name)
    loaded = load_checkpoint(path)  # which was written here
    assert same_state(loaded.model, saved)
    inner = loaded.model.module
    assert inner.first.weight is inner.again.weight  # type: ignore[union-attr]
    assert loaded.costs["params"] == sum(p.numel() for p in saved.parameters())
    torch.save({f"module.{k}": v for k, v in saved.state_dict().items()}, tmp_path / "tied.pth")
    another = copy.deepcopy(saved)
    for parameter in another.parameters():
        nn.init.zeros_(parameter)
    load_weights(tmp_path / "tied.pth", another)
    assert same_state(another, saved)


# Rebuilding from cuts


@pytest.mark.parametrize("name", ["Plain", "Separable", "Grouped", "FewGroups", "Shared"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_loaded_network_is_the_saved_one_bit_for_bit(
    tmp_path: Path, name: str, share: float
) -> None:
    """Flattened, depthwise, with groups that go whole and with groups that shrink alike."""
    model = lived_in(NETWORKS[name]()).eval()
    graph = analyse(model, (3, 12, 12))
    kept = random_mask(graph, 4, share)
    smaller = shrink(model, graph, kept)
    path, architecture = tmp_path / "pruned.safetensors", f"networks:{name}"
    about = described(architecture, (3, 12, 12), num_classes=4)
    save_checkpoint(path, smaller, description=about, graph=graph, kept=kept)
    loaded = load_model(path, architecture)
    assert same_state(loaded, smaller)
    images = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded(images), smaller(images))
    for module, other in zip(loaded.modules(), smaller.modules(), strict=True):
        integers, those = (
            {k: v for k, v in vars(m).items() if type(v) is int} for m in (module, other)
        )
        assert integers == those


@pytest.mark.parametrize(
    "name", some_slow(["resnet20", "lenet", "resnext50_32x4d"], ["resnext50_32x4d"])
)
def test_a_built_in_network_is_rebuilt_bit_for_bit(tmp_path: Path, name: str) -> None:
    smaller = save_pruned(tmp_path / "pruned.safetensors", name, 0.8)
    loaded = load_model(tmp_path / "pruned.safetensors")
    assert same_state(loaded, smaller)
    images = torch.randn(2, *input_size_of(name))
    with torch.no_grad():
        assert torch.equal(loaded(images), smaller(images))


def captured(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("something was captured")


def test_loading_captures_nothing(
    tmp_path: Path, pruned: Path, own_network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_model(pruned)
    own = save_own(tmp_path / "own.safetensors", own_network)
    monkeypatch.setattr(torch.export, "export", captured)
    monkeypatch.setattr(torch.fx.Tracer, "trace", captured)
    monkeypatch.setattr("compress.checkpoints.checkpoint.analyse", captured)
    with pytest.raises(ModelError, match="something was captured"):
        analyse(build_model("lenet", num_classes=7), (3, 16, 16))
    assert same_state(load_model(pruned), expected)
    assert same_state(load_model(tmp_path / "own.safetensors", own_network), own)
    checkpoint = load_checkpoint(pruned)
    assert checkpoint.costs["params"] == sum(p.numel() for p in expected.parameters())
    assert inspect_checkpoint(pruned)["now"]["params"] == checkpoint.costs["params"]


@pytest.mark.parametrize("loads", [15, pytest.param(125, marks=pytest.mark.slow)])
def test_threads_load_while_another_serves(tmp_path: Path, loads: int) -> None:
    """Many loads by each of eight threads: what one thread builds no other thread notices."""
    name = "networks:FewGroups"
    model = lived_in(NETWORKS["FewGroups"]()).eval()
    graph = analyse(model, (3, 12, 12))
    kept = random_mask(graph, 1)
    smaller = shrink(model, graph, kept)
    path = tmp_path / "pruned.safetensors"
    about = described(name, (3, 12, 12), num_classes=4)
    save_checkpoint(path, smaller, description=about, graph=graph, kept=kept)
    lenet = tmp_path / "lenet.safetensors"
    save_pruned(lenet, "lenet", 0.9)
    images, digits = torch.randn(1, 3, 12, 12), torch.randn(1, *input_size_of("lenet"))
    served = load_model(path, name)
    with torch.no_grad():
        expected, of_digits = served(images), load_model(lenet)(digits)
    done, requests = threading.Event(), 0

    def load(count: int) -> None:
        for number in range(count):
            with torch.no_grad():
                if number % 5:
                    assert torch.equal(load_model(path, name)(images), expected)
                else:
                    assert torch.equal(load_model(lenet)(digits), of_digits)

    def serve() -> int:
        count = 0
        while not done.is_set():
            with torch.no_grad():
                assert torch.equal(served(images), expected)
            count += 1
        return count

    torch.set_num_threads(1)
    with ThreadPoolExecutor(9) as pool:
        serving = pool.submit(serve)
        loading = [pool.submit(load, loads) for _ in range(8)]
        try:
            for future in loading:
                future.result()
        finally:
            done.set()
        requests = serving.result()
    assert requests > 0.8 * loads


# Files that are not what they should be


def one_cut(tensor: str, size: int, indices: list[int]) -> dict[str, Any]:
    kept = {"0": {"size": size, "indices": indices}}
    return {"recipe": {"kept": kept, "cuts": {tensor: {"0": "0"}}}}


def by_group(group: str, size: int, kept: list[int]) -> dict[str, Any]:
    """A recipe of version 1."""
    return {"format_version": 1, "recipe": {group: {"size": size, "kept": kept}}}


def cut_at(data: bytes) -> list[int]:
    """Return lengths that end in the length field, the header, and all over the tensors."""
    ends = [0, 1, 4, 7, 8, 9, 64, 1000, len(data) - 1]
    return [*ends, *range(0, len(data), len(data) // 12)]


def test_a_truncated_file_of_ours(pruned: Path) -> None:
    data = pruned.read_bytes()
    for length in cut_at(data):
        pruned.write_bytes(data[:length])
        for read in (load_model, read_description, read_state_dict):
            says = "is truncated or not a safetensors file" if length else "is empty: copy"
            with pytest.raises(CheckpointError, match=says):
                read(pruned)


@pytest.mark.parametrize("archive", [True, False])
def test_a_truncated_pth(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "dense.pth"
    state = build_model("resnet20", num_classes=3).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    data = path.read_bytes()
    for length in cut_at(data):
        path.write_bytes(data[:length])
        says = "is truncated or not a PyTorch checkpoint" if length else "is empty: copy"
        with pytest.raises(CheckpointError, match=says):
            read_state_dict(path)
    path.write_bytes(data)
    assert read_state_dict(path).keys() == state.keys()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=64), protocol=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_noise_is_no_checkpoint(tmp_path: Path, data: bytes, protocol: bytes) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(protocol + data)
        with pytest.raises(CheckpointError, match="noise"):
            read_state_dict(path)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pth", "folder.pth", ""])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    says = "there is no checkpoint" if "gone" in name else "is a folder and not a file of weights"
    with pytest.raises(CheckpointError, match=says):
        read_state_dict(tmp_path / name)
    with pytest.raises(CheckpointError, match=says):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5}, "is of format version 5 and this tool reads 1 to 4"),
        ({"format_version": 0}, "is of format version 0 and this tool reads 1 to 4"),
        ({"format_version": "2"}, "is of format version 2 and this tool reads 1 to 4"),
        ({"format_version": None}, "is of format version None"),
        ({"surprise": 1}, "header that cannot be understood"),
        ({"classes": "ten"}, "header that cannot be understood"),
        ({"classes": []}, "header that cannot be understood"),
        ({"input_size": [3, 16]}, "header that cannot be understood"),
        ({"input_size": [3, 0, 16]}, "header that cannot be understood"),
        ({"input_size": [10**12, 16, 16]}, "header that cannot be understood"),
        ({"architecture": "resnet32"}, "than CifarResNet: 60 tensors are missing"),
        ({"architecture": "resnet21"}, "no architecture is named 'resnet21'"),
        ({"classes": ["a", "b"]}, "has 7 classes and 2 are needed"),
        ({"input_size": [1, 16, 16]}, "header that cannot be understood"),
        (
            {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.25]},
            "'conv1.weight' is .* in the network",
        ),
        ({"recipe": {}}, r"'bn1.bias' is \[9\] there and \[16\] in"),
        (one_cut("fc.weight", 10, [1]), "'fc.weight' a width of 10 and this network has 7"),
        (one_cut("fc.weight", 7, [1]), r"'bn1.bias' is \[9\] there and \[16\] in"),
        (one_cut("conv1.weight", 16, [99]), "are not ascending indices"),
        (one_cut("conv1.weight", 10**12, [0]), "'conv1.weight' a width of 1000000000000 and"),
        (one_cut("conv9.weight", 16, [0]), "cuts 'conv9.weight', which this network does not have"),
        ({"recipe": {"conv1": {"size": 16, "kept": [0]}}}, "the recipe has no cuts"),
        ({"recipe": [1]}, "header that cannot be understood"),
        ({"structure": {}}, "header that cannot be understood"),
        (by_group("fc", 7, [1]), "the recipe prunes 'fc', which"),
        (by_group("conv1", 16, [99]), "are not ascending indices"),
        (by_group("conv1", 10**12, [0]), "gives 'conv1' another width"),
    ],
)
def test_a_header_that_does_not_fit(pruned: Path, change: dict[str, Any], message: str) -> None:
    rewritten(pruned, lambda document: document.update(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(pruned)
    assert str(pruned) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format_version": 1}', "[" * 10**5])
def test_a_header_that_is_no_document(pruned: Path, text: str) -> None:
    tensors = safetensors.torch.load_file(pruned)
    safetensors.torch.save_file(tensors, pruned, {METADATA_KEY: text})
    with pytest.raises(CheckpointError, match="has a header that cannot be understood"):
        load_model(pruned)


def test_safetensors_of_others_hold_weights_only(tmp_path: Path) -> None:
    model, _ = built("resnet20")
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(model.state_dict(), path, {"format": "pt"})
    assert read_description(path) is None
    with pytest.raises(CheckpointError, match=r"holds weights only.*--checkpoint.*--model"):
        load_model(path)
    empty = build_model("resnet20", num_classes=7)
    load_weights(path, empty)
    assert same_state(empty, model)


def test_pruned_weights_are_no_dense_parent(pruned: Path) -> None:
    with pytest.raises(CheckpointError, match="is pruned already: prune its dense parent"):
        load_weights(pruned, build_model("resnet20", num_classes=7))


# State dicts as people keep them


WRAPPERS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "plain": lambda state: dict(state),
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "both": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "reference": lambda state: {"model": dict(state), "epoch": 89, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "lightning": lambda state: {"model_state_dict": dict(state), "loss": 0.5},
    "net": lambda state: {"net": dict(state), "acc": 93.0},
    "parameters": lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v
                                 for k, v in state.items()},
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("archive", [True, False])
def test_a_state_dict_in_any_wrapping(tmp_path: Path, wrapper: str, archive: bool) -> None:
    model, _ = built("resnet20")
    path = tmp_path / "dense.pth"
    content = WRAPPERS[wrapper](model.state_dict())
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    fresh = build_model("resnet20", num_classes=7)
    load_weights(path, fresh)
    assert same_state(fresh, model)
    assert all(p.requires_grad for p in fresh.parameters())
    assert identify(read_state_dict(path)) == "resnet20"


def test_half_precision_weights_are_computed_with_in_full(tmp_path: Path) -> None:
    model, _ = built("resnet20")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(halves, tmp_path / "half.pth")
    fresh = build_model("resnet20", num_classes=7)
    load_weights(tmp_path / "half.pth", fresh)
    for key, value in fresh.state_dict().items():
        assert value.dtype == (torch.float32 if halves[key].is_floating_point() else torch.int64)
        assert torch.equal(value, halves[key].to(value.dtype))
    save_checkpoint(
        tmp_path / "half.safetensors", model.half(), description=described("resnet20", (3, 16, 16))
    )
    assert same_state(load_model(tmp_path / "half.safetensors"), fresh)


def test_the_network_keeps_its_parameters(tmp_path: Path) -> None:
    """An optimizer made before the weights were read goes on with the same tensors."""
    model, _ = built("resnet20")
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    fresh = build_model("resnet20", num_classes=7)
    before = list(fresh.parameters())
    load_weights(tmp_path / "dense.pth", fresh)
    assert all(a is b for a, b in zip(before, fresh.parameters(), strict=True))


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_needs_code_execution_is_refused(tmp_path: Path, archive: bool) -> None:
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    state = build_model("resnet20", num_classes=3).state_dict()
    torch.save(
        {"state_dict": state, "extra": Canary(canary)},
        path,
        _use_new_zipfile_serialization=archive,
    )
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have worked
    canary.unlink()
    with pytest.raises(CheckpointError, match="needs code execution, which is refused: re-save"):
        read_state_dict(path)
    assert not canary.exists()


def test_a_whole_pickled_network_and_a_bare_pickle_are_refused(tmp_path: Path) -> None:
    torch.save(build_model("resnet20", num_classes=3), tmp_path / "network.pth")
    with pytest.raises(CheckpointError, match="needs code execution"):
        read_state_dict(tmp_path / "network.pth")
    canary = tmp_path / "canary"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        read_state_dict(tmp_path / "bare.pth")
    assert not canary.exists()


@pytest.mark.parametrize(
    "content", [{}, [], 5, {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {1: 2}]
)
def test_a_pth_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no state dict.*: save model.state_dict\(\)"):
        read_state_dict(tmp_path / "other.pth")


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "dense.pth"
    torch.save(build_model("resnet20", num_classes=10).state_dict(), path)
    with pytest.raises(CheckpointError, match="has 10 classes and 7 are needed"):
        load_weights(path, build_model("resnet20", num_classes=7))
    with pytest.raises(CheckpointError, match=r"another architecture than CifarResNet: \d+ tensor"):
        load_weights(path, build_model("resnet32", num_classes=10))
    with pytest.raises(CheckpointError, match=r"'conv1.weight' is \[16, 3, 3, 3\] there and \[16,"):
        load_weights(path, build_model("resnet20", num_classes=10, in_channels=1))
    torch.save(build_model("resnet18", num_classes=10).state_dict(), path)
    with pytest.raises(CheckpointError, match="do not belong"):
        load_weights(path, build_model("resnet20", num_classes=10))


def test_a_network_is_not_touched_by_weights_that_do_not_fit(tmp_path: Path) -> None:
    model, _ = built("resnet20")
    before = copy.deepcopy(model)
    torch.save(build_model("resnet20", num_classes=9).state_dict(), tmp_path / "dense.pth")
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "dense.pth", model)
    assert same_state(model, before)


# Recognising a network


@pytest.mark.parametrize("name", some_slow(RESNETS))
def test_every_resnet_is_recognised(name: str) -> None:
    with torch.device("meta"):
        state = build_model(name, num_classes=11).state_dict()
    assert identify(state) == name
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert identify(old) == name  # as torchvision's first files are
    del state["layer1.0.conv1.weight"]
    assert identify(state) is None


def test_what_is_not_recognised() -> None:
    with torch.device("meta"):
        state = build_model("resnet20", num_classes=11, in_channels=1).state_dict()
    assert identify(state) == "resnet20"
    assert identify({}) is None
    assert identify({**state, "more": torch.zeros(1)}) is None
    assert identify({**state, "fc.weight": torch.zeros(())}) is None
    assert identify({**state, "conv1.weight": torch.zeros(4)}) is None
    assert identify({**state, "layer2.0.conv1.weight": torch.zeros(31, 16, 3, 3)}) is None


def test_weights_with_gates_are_sent_to_the_import(tmp_path: Path) -> None:
    model = build_model("resnet18", num_classes=3)
    torch.save({**model.state_dict(), "layer1.0.gate1.weight": torch.ones(64)}, tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match=r"g\.pth has the gates .* with compress import"):
        load_weights(tmp_path / "g.pth", model)
