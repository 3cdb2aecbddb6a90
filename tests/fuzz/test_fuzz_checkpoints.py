"""Files of weights, ours and other people's: whatever they say, a sentence or a network."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, fuzzed, mutated, refused_in_a_sentence
from valid_documents import (
    DESCRIPTION,
    GRAPH,
    HEADER,
    LENGTH,
    PRUNED,
    with_description,
    with_header,
)

from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.recipe import cuts_from_recipe, mask_from_groups
from compress.checkpoints.summary import inspect_checkpoint
from compress.networks.cuts import Cut, apply_cuts_
from compress.networks.models import build_model


def _dense(archive: bool) -> bytes:
    """Return a dense LeNet as PyTorch writes it."""
    model = build_model("lenet", num_classes=3, in_channels=1)
    stream = io.BytesIO()
    torch.save(
        {"state_dict": model.state_dict(), "epoch": 3},
        stream,
        _use_new_zipfile_serialization=archive,
    )
    return stream.getvalue()


BY_GROUPS = {"conv2": {"size": 16, "kept": [0, 3, 7]}, "fc1": {"size": 120, "kept": [5]}}
with torch.device("meta"):
    NETWORK = build_model("lenet", num_classes=3, in_channels=1)
ATTRIBUTES = {name for module in NETWORK.modules() for name in dir(module)}
ARCHIVE, STREAM = _dense(archive=True), _dense(archive=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def loads(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return not refused_in_a_sentence(lambda: load_checkpoint(path))


@fuzzed
@given(description=mutated(DESCRIPTION))
def test_a_description_of_any_structure(folder: Path, description: Any) -> None:
    loads(folder / "a.safetensors", with_description(description))


@fuzzed
@given(recipe=mutated(DESCRIPTION["recipe"]))
def test_a_recipe_of_any_structure(recipe: Any) -> None:
    """What is accepted cuts what is there, to what is left of it, and nothing else."""
    cuts: list[Cut] = []
    if refused_in_a_sentence(lambda: cuts.extend(cuts_from_recipe(NETWORK, recipe))):
        return
    smaller = copy.deepcopy(NETWORK)
    for cut in cuts:
        owner, _, attribute = cut.tensor.rpartition(".")
        value = getattr(NETWORK.get_submodule(owner), attribute)
        length = value.shape[cut.dim] if isinstance(value, torch.Tensor) else value
        assert cut.size == length
        assert set(cut.kept.tolist()) <= set(range(length))
    apply_cuts_(smaller, cuts)
    wanted = {(cut.tensor, cut.dim): len(cut.kept) for cut in cuts}
    for name, tensor in NETWORK.state_dict().items():
        shape = tuple(wanted.get((name, dim), size) for dim, size in enumerate(tensor.shape))
        assert tuple(smaller.state_dict()[name].shape) == shape


@fuzzed
@given(recipe=mutated(BY_GROUPS))
def test_a_recipe_of_version_1_of_any_structure(recipe: Any) -> None:
    refused_in_a_sentence(lambda: mask_from_groups(GRAPH, recipe))


@pytest.mark.slow
@fuzzed
@given(tensor=st.text(max_size=12), attribute=st.sampled_from(sorted(ATTRIBUTES)))
def test_names_of_any_kind(folder: Path, tensor: str, attribute: str) -> None:
    """A name that leads elsewhere than to a tensor or a width is refused."""
    for name in (tensor, f"conv1.{tensor}", f"conv1.{attribute}", attribute):
        recipe = {"kept": {"a": {"size": 1, "indices": [0]}}, "cuts": {name: {"0": "a"}}}
        loads(folder / "n.safetensors", with_description({**DESCRIPTION, "recipe": recipe}))


@fuzzed
@given(header=mutated(HEADER))
def test_a_header_of_any_structure(folder: Path, header: Any) -> None:
    loads(folder / "b.safetensors", with_header(header))


@fuzzed
@given(data=damaged(PRUNED, head=LENGTH + 8))
def test_a_file_of_ours_of_any_bytes(folder: Path, data: bytes) -> None:
    loads(folder / "c.safetensors", data)


@pytest.mark.slow
@fuzzed
@given(data=st.one_of(damaged(ARCHIVE, head=2000), damaged(STREAM, head=2000)))
def test_a_pth_of_any_bytes(folder: Path, data: bytes) -> None:
    path = folder / "d.pth"
    path.write_bytes(data)
    refused_in_a_sentence(lambda: inspect_checkpoint(path))


def test_the_files_that_are_damaged_are_good(folder: Path) -> None:
    assert loads(folder / "e.safetensors", PRUNED)
    assert loads(folder / "e.safetensors", with_description(DESCRIPTION))
    assert DESCRIPTION["format_version"] == 2
    assert cuts_from_recipe(NETWORK, DESCRIPTION["recipe"])
    assert not mask_from_groups(GRAPH, BY_GROUPS).all()
    for data in (ARCHIVE, STREAM):
        (folder / "e.pth").write_bytes(data)
        assert inspect_checkpoint(folder / "e.pth")["num_classes"] == 3
