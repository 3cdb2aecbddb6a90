"""Shared networks: small, with BatchNorm statistics as a trained network has them."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

# The networks are too small to share among threads; read when torch is imported, here and in
# every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from commands import COUNTED, invoke, small
from hypothesis import settings
from torch import nn
from typer.testing import Result

from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import CIFAR_DEPTHS, TORCHVISION_MODELS, build_model

# How long an example takes is a matter of what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

RESNETS = (*(name for name in TORCHVISION_MODELS if "res" in name), *CIFAR_DEPTHS)
"""Where every built-in network would take too long; test_architectures.py proves each one once."""
LARGE = {
    *("resnet34", "resnet101", "resnet152", "wide_resnet50_2", "resnet32", "resnet56", "resnet110"),
    *("preact_resnet50", "preact_resnet101", "preact_resnet152", "vgg16_bn", "vgg16_bn_cifar"),
    *("densenet121", "densenet201", "densenet_cifar"),
}
"""Those of which a smaller one of the same family says all that is not about size."""


def some_slow(values: Iterable[Any], slow: Collection[Any] = LARGE) -> list[Any]:
    """Return parameters of a test, some of them marked slow: large networks if none is named."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (value in slow)) for value in values]


def pytest_collection_finish() -> None:
    """Spare the collector what all imports made: tracing leaves it much to look through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what commands note of their files out of the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt: a shell that starts the tests in the background ignores it for them."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual or signal.SIG_DFL)


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm layers arbitrary statistics, scales and shifts, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model


def input_size_of(name: str) -> tuple[int, int, int]:
    """Return a small input that the architecture accepts."""
    return (3, 32, 32) if name in TORCHVISION_MODELS else (3, 16, 16)


@functools.cache
def small_graph(name: str, num_classes: int = 7) -> ChannelGraph:
    """Return the channel graph of a named network for small images; analysed once, read only."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes)
    return analyse(model, input_size_of(name))


@functools.cache
def as_published(name: str) -> tuple[nn.Module, ChannelGraph]:
    """Return a named network without weights, as its costs are published: ImageNet or CIFAR-10.

    Analysed once; read only, both.
    """
    classes, size = (1000, 224) if name in TORCHVISION_MODELS else (10, 32)
    with torch.device("meta"):
        model = build_model(name, num_classes=classes)
    return model, analyse(model, (3, size, size))


def built(name: str, num_classes: int = 7) -> tuple[nn.Module, ChannelGraph]:
    """Return a new named network, and its channel graph, which many share."""
    model = lived_in(build_model(name, num_classes=num_classes)).eval()
    return model, small_graph(name, num_classes)


def random_mask(graph: ChannelGraph, seed: int, share: float = 0.5) -> Mask:
    """Return a mask that removes units of every prunable group at random, never all of one."""
    rng = np.random.default_rng(seed)
    kept = graph.everything()
    for group in graph.prunable:
        drop = rng.random(group.size) < share
        drop[rng.integers(group.size)] = False
        kept[group.units[drop]] = False
    return kept


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let figures be drawn and not painted, which takes half of a short run; see test_plots.py."""
    monkeypatch.setattr("compress.runs.plots.write_figure", lambda path, figure: path.touch())


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One complete run, the same on every machine, and what the command said; read only."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "counted.toml").write_text(COUNTED)
    budgets = str(folder / "counted.toml")
    result = invoke("run", "--output", folder / "run", *small(bench_limits=budgets, device="cpu"))
    assert result.exit_code == 0, result.stderr
    return folder / "run", result


@pytest.fixture(scope="session")
def run(made: tuple[Path, Result]) -> Path:
    return made[0]


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copied"))
