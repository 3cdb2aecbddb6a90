"""Checkpoints whose filters or scales were zeroed: what goes goes exactly, what stays is said."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lived_in, some_slow
from torch import nn

import compress
from compress.checkpoints.checkpoint import load_checkpoint
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.seed2019.gates import left_without
from compress.seed2019.importing import import_checkpoint
from compress.seed2019.zeros import Zeroed, find_zeroed

CLASSES = 5
NETWORKS = ("resnet18", "resnet34", "resnet50")


@lru_cache(maxsize=3)
def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(build_model(name, num_classes=CLASSES)).double().eval()


@lru_cache(maxsize=3)
def graph_of(name: str) -> ChannelGraph:
    with torch.device("meta"):
        return analyse(build_model(name, num_classes=CLASSES), (3, 32, 32))


def inner(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, convolution and BatchNorm of what writes inside of blocks."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        block, _, last = name.rpartition(".")
        deepest = "conv3" if f"{block}.conv3" in modules else "conv2"
        if name.startswith("layer") and last.startswith("conv") and last != deepest:
            yield name, module, modules[name.replace("conv", "bn")]


def looked_through(name: str, model: nn.Module) -> tuple[Zeroed, dict[str, int], float]:
    """Return what was found, the widths without it, and how far the outputs differ, relative."""
    graph = graph_of(name)
    zeroed = find_zeroed(model, graph, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    smaller = shrink(model, graph, left_without(graph, zeroed.gone))
    widths = {n: m.out_channels for n, m in smaller.named_modules() if isinstance(m, nn.Conv2d)}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        difference = (smaller(images) - expected).abs().max() / expected.abs().max()
    return zeroed, widths, float(difference)


@torch.no_grad()
def zero_some(model: nn.Module, kind: str) -> tuple[dict[str, int], int]:
    """Zero filters or scales; return the widths that must be left, and how many are constants."""
    rng = np.random.default_rng(0)
    left, constants = {}, 0
    for layer, conv, norm in inner(model):
        chosen = torch.from_numpy(rng.random(conv.out_channels) < 0.4)
        (conv if kind == "filter" else norm).weight[chosen] = 0
        # a filter of zeros leaves beta - gamma mean / std, a scale of zero leaves beta
        value = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        left[layer] = int((~chosen | (value > 0)).sum())
        constants += int((chosen & (value > 0)).sum())
    return left, constants


@pytest.mark.parametrize("kind", ["filter", "scale"])
@pytest.mark.parametrize("name", some_slow(NETWORKS, NETWORKS[1:]))
def test_channels_that_are_zero_behind_relu_go_and_constants_stay(name: str, kind: str) -> None:
    """Methods 0, 2, 3 zero filters, 30 and 31 scales; the shift, or what is left of it, decides."""
    model = copy.deepcopy(dense(name))
    expected, constants = zero_some(model, kind)
    zeroed, widths, difference = looked_through(name, model)
    assert {layer: widths[layer] for layer in expected} == expected
    assert len(zeroed.gone) > 100
    assert len(zeroed.constant) == constants > 100
    assert not len(zeroed.written)
    assert difference <= 1e-12


@pytest.mark.parametrize("name", some_slow(NETWORKS, NETWORKS[1:]))
def test_filters_with_scale_and_shift_all_go(name: str) -> None:
    model = copy.deepcopy(dense(name))
    with torch.no_grad():
        for _, conv, norm in inner(model):
            for tensor in (conv.weight, norm.weight, norm.bias):
                tensor[: conv.out_channels // 4] = 0
    zeroed, widths, difference = looked_through(name, model)
    for layer, conv, _ in inner(model):
        assert widths[layer] == conv.out_channels - conv.out_channels // 4
    assert zeroed.words() == ""
    assert difference <= 1e-12


def test_a_layer_of_zeros_keeps_one_channel() -> None:
    model: Any = copy.deepcopy(dense("resnet18"))
    block = model.layer2[1]
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            tensor.zero_()
    _, widths, difference = looked_through("resnet18", model)
    assert widths["layer2.1.conv1"] == 1
    assert difference <= 1e-12


@pytest.mark.slow
def test_a_stream_goes_where_every_writer_is_zero_and_is_named_where_one_is_not() -> None:
    model: Any = copy.deepcopy(dense("resnet50"))
    stage = model.layer3
    writers = [(b.conv3, b.bn3) for b in stage] + [tuple(stage[0].downsample)]
    with torch.no_grad():
        for conv, norm in writers:
            conv.weight[:10] = 0
            norm.bias[:10] = -norm.bias[:10].abs()
            norm.running_mean[:10] = 0
        for conv, _ in writers[:-1]:  # and seven that the shortcut still writes
            conv.weight[10:17] = 0
    zeroed, widths, difference = looked_through("resnet50", model)
    assert widths["layer3.0.conv3"] == 1024 - 10
    assert difference <= 1e-12
    assert zeroed.words() == "7 belong to residual streams that other layers write too"


def test_a_channel_that_is_zero_on_an_image_but_not_zeroed_stays() -> None:
    """A shift far below zero closes ReLU on any usual image, and on none for certain."""
    model: Any = copy.deepcopy(dense("resnet18"))
    with torch.no_grad():
        model.layer1[0].bn1.bias[:5] = -1e6
    zeroed, _, _ = looked_through("resnet18", model)
    assert not len(zeroed.gone)
    assert zeroed.words() == ""


def test_the_network_is_left_as_it_was() -> None:
    model: Any = copy.deepcopy(dense("resnet18")).train()
    with torch.no_grad():
        model.layer1[0].conv1.weight[:5] = 0
    before = model.layer1[0].bn1.running_mean.clone()
    find_zeroed(model, graph_of("resnet18"), torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert model.training
    assert torch.equal(model.layer1[0].bn1.running_mean, before)


@pytest.mark.slow
def test_an_import_removes_zeroed_channels_and_says_what_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With gates of ones, as the research code saves a network whose filters it zeroed."""
    model = copy.deepcopy(dense("resnet50")).float()
    expected, constants = zero_some(model, "filter")
    gates = {
        layer.replace("conv", "gate") + ".weight": torch.ones(conv.out_channels)
        for layer, conv, _ in inner(model)
    }
    torch.save({"state_dict": {**model.state_dict(), **gates}}, tmp_path / "checkpoint.pth")
    with caplog.at_level(logging.WARNING, logger="compress"):
        path = import_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "r50.safetensors")
    checkpoint = load_checkpoint(path)
    modules: dict[str, Any] = dict(checkpoint.model.named_modules())
    assert {layer: modules[layer].out_channels for layer in expected} == expected
    gone = sum(conv.out_channels - expected[layer] for layer, conv, _ in inner(model))
    assert checkpoint.description.metrics["imported"]["zeroed"] == gone
    assert checkpoint.description.metrics["proof"] <= 1e-12
    stays = f"scales that stay: {constants} hand on a constant that is not zero"
    assert stays in caplog.text
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = compress.load_model(path).double()(images), model.double()(images)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-9


@pytest.mark.slow
def test_a_network_without_a_word_about_gates_is_looked_through_too(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(dense("resnet18")).float()
    with torch.no_grad():
        for tensor in (model.layer1[0].conv1.weight, model.layer1[0].bn1.bias):
            tensor[:5] = 0
        model.layer1[0].bn1.running_mean[:5] = 0
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    path = import_checkpoint(tmp_path / "plain.pth", tmp_path / "plain.safetensors")
    smaller: Any = load_checkpoint(path).model
    assert smaller.layer1[0].conv1.out_channels == 59
