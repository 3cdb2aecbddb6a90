"""Branches of residual additions: found from the graph, gated, removed exactly."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from conftest import some_slow
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import compress
from compress.checkpoints.recipe import rebuild_
from compress.criteria.taylor import BranchGate
from compress.errors import CheckpointError, ConfigError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import build_model
from compress.networks.shortened import Shortened, programs_of
from compress.networks.shrink import proof, shrink, shrink_
from compress.networks.trial import tried_graph
from compress.pruning.importance import Importance
from compress.pruning.progress import Progress
from export.module_to_onnx import export_onnx

SIZE = (3, 16, 16)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Head(nn.Module):
    """A stem, blocks and a classifier; forward may be any."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.fc = conv(3, 8), nn.Sequential(*blocks), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation behind the last BatchNorm, a LayerScale, functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(8, 6), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = conv(6, 8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = conv(8, 4, 1), conv(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        s = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return F.hardtanh(y * s + x, 0, 6)


class Scaled(nn.Module):
    """Two additions in one forward; the factors of both are parameters of the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mlp = conv(8, 8, groups=8), nn.Sequential(conv(8, 12, 1), nn.GELU())
        self.out = conv(12, 8, 1)
        self.gamma1 = nn.Parameter(torch.full((8, 1, 1), 0.3))
        self.gamma2 = nn.Parameter(torch.full((1, 8, 1, 1), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gamma1 * self.conv(x)
        return x + self.out(self.mlp(x)).mul(self.gamma2)


class Ghost(nn.Module):
    """A branch that ends in a cat, one part of which is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 4), nn.BatchNorm2d(4)
        self.cheap, self.last = conv(4, 4, groups=4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = F.leaky_relu(self.norm(self.conv(x)), 0.1)
        return torch.cat([first, self.last(self.cheap(first))], 1) + x


class InRoot(nn.Module):
    """Additions in the forward of the network itself (ResNet-9)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Linear(8, 4)
        self.first = nn.Sequential(conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8))
        self.second = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.first(x) + x
        y = self.second(x)
        y += x  # in place, which a zero without a shape cannot be
        return self.fc(y.mean((2, 3)))


class Parts(nn.Module):
    """What goes into the addition is computed in the forward of the network: nothing can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = conv(3, 8), conv(8, 6), conv(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((x + self.b(self.a(x))).mean((2, 3)))


class TwoNetworks(nn.Module):
    """The sum of two networks: nothing forks but the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), nn.Sequential(conv(3, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.a(x) + self.b(x)).mean((2, 3)))


class Shared(nn.Module):
    """A block whose last weights another block uses as well."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.conv = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def shared() -> nn.Module:
    inner = conv(8, 8)
    return Head(Shared(inner), Shared(inner))


def small(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=5, **options)


def resnext() -> nn.Module:
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], 5, groups=4, width_per_group=8
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "excited": (lambda: Head(Excited(), Excited()), ["blocks.0", "blocks.1"]),
    "scaled": (lambda: Head(Scaled()), ["blocks.0", "blocks.0#2"]),
    "ghost": (lambda: Head(Ghost(), Ghost()), ["blocks.0", "blocks.1"]),
    "root": (InRoot, ["first"]),
    "parts": (Parts, []),
    "two networks": (TwoNetworks, []),
    "shared": (shared, []),
    "resnet": (
        lambda: build_model("resnet20", num_classes=5, in_channels=3),
        [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)],
    ),
    "resnext": (resnext, ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]),
    "preact": (
        lambda: build_model("preact_resnet18", num_classes=5, in_channels=3),
        [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)],
    ),
    "mobilenet": (
        small("mobilenet_v2", width_mult=0.25),
        [f"features.{n}" for n in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
    ),
}


LATER = (("preact", 0), ("mobilenet", 1))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval()
    for parameter in model.parameters():  # also last scales and shifts that begin at zero or one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def without(graph: ChannelGraph, *names: str) -> Mask:
    kept = graph.everything()
    kept[[branch.unit for branch in graph.branches if branch.name in names]] = False
    return graph.closed(kept)


@pytest.mark.parametrize("name", some_slow(NETWORKS, ["resnext", "preact", "mobilenet"]))
def test_branches_are_found_and_their_removal_is_exact(name: str) -> None:
    model = network(name)
    graph = tried_graph(model, SIZE)
    assert [branch.name for branch in graph.removable] == NETWORKS[name][1]
    rng, example = np.random.default_rng(0), Example.images(SIZE, count=2)
    for share in (1.0, 0.6):
        kept = graph.everything()
        for group in graph.prunable:
            left = max(group.fewest, round(share * group.size))
            kept[rng.permutation(group.units)[left:]] = False
        gone = [b for b in graph.removable if rng.random() < 0.6 or share == 1]
        kept[[branch.unit for branch in gone]] = False
        kept = graph.closed(kept)
        assert proof(model, graph, kept, example) <= 1e-9
        smaller = shrink(model, graph, kept)
        assert cost.measured(smaller, example) == {
            "macs": cost.macs(graph, kept),
            "params": cost.params(graph, kept),
        }
        for branch in gone:
            left_of = smaller.get_submodule(branch.module)
            assert isinstance(left_of, Shortened)
            assert not any(
                name.startswith(branch.gate.weights) for name, _ in smaller.named_parameters()
            )


def test_a_branch_that_cannot_go_says_why() -> None:
    graph = tried_graph(network("root"), SIZE)
    reasons = {branch.name: str(branch.frozen) for branch in graph.branches}
    assert "forward fails" in reasons["second"]
    reasons = {b.name: str(b.frozen) for b in tried_graph(network("shared"), SIZE).branches}
    assert set(reasons.values()) == {"no weights alone tell the gradient of its gate"}


def test_projections_stay_and_what_is_rectified_is_not_rectified_again() -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    graph = analyse(model, (3, 64, 64))
    shrink_(model, graph, without(graph, "layer1.0", "layer2.0"))
    said = {name: program.to_json() for name, program in programs_of(model).items()}
    assert said["layer1.0"] == {"steps": [], "result": "$0"}
    assert said["layer2.0"] == {
        "steps": [{"call": "downsample", "of": ["$0"]}, {"call": "relu", "of": ["$1"]}],
        "result": "$2",
    }
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert "layer2.0.downsample.0" in convolutions
    assert not {n for n in convolutions if n.startswith(("layer1.0", "layer2.0.conv"))}


def test_an_input_that_others_read_is_not_changed_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = conv(8, 8), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(x + self.conv(x))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.fc = conv(3, 8), Block(), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.fc(torch.cat([self.block(x), x], 1).mean((2, 3)))

    model = Both().eval()
    graph = tried_graph(model, SIZE)
    smaller, images = shrink(model, graph, without(graph, "block")), torch.randn(2, *SIZE)
    stem = model.stem(images)
    expected = model.fc(torch.cat([stem.relu(), stem], 1).mean((2, 3)))
    torch.testing.assert_close(smaller(images), expected)
    smaller(images).sum().backward()  # what is needed for that is not overwritten either


class Gates(TorchFunctionMode):
    """Multiply one side of each addition of activations by factors: the definition of its gate."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.gates: list[torch.Tensor] = []
        """One factor for each channel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        two = len(args) == 2 and all(isinstance(a, torch.Tensor) and a.dim() == 4 for a in args)
        if (
            name in ("add", "__add__", "add_", "__iadd__")
            and two
            and args[0].shape == args[1].shape
        ):
            sides = list(args)
            shape = (sides[self.side].shape[1], 1, 1)
            self.gates.append(torch.ones(shape, dtype=torch.float64, requires_grad=True))
            sides[self.side] = sides[self.side] * self.gates[-1]
            return sides[0] + sides[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(("excited", 0), ("scaled", 1), ("ghost", 0), ("resnet", 0)),
        *(pytest.param(name, side, marks=pytest.mark.slow) for name, side in LATER),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_folded_gate_of_a_branch_is_the_gradient_of_its_factor(
    name: str, side: int, training: bool
) -> None:
    model = network(name).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # two passes are compared
    graph = analyse(model, SIZE)
    images, labels = torch.randn(4, *SIZE).double(), torch.tensor([0, 1, 2, 3])
    with Gates(side) as mode:
        loss = F.cross_entropy(copy.deepcopy(model)(images), labels)
    expected = torch.autograd.grad(loss, mode.gates)
    assert len(expected) == len(graph.branches)
    F.cross_entropy(model(images), labels).backward()
    for branch, of_channels in zip(graph.branches, expected, strict=True):
        gate = BranchGate(model, branch)
        torch.testing.assert_close(gate(), of_channels.sum(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(gate.parts(), of_channels.flatten(), rtol=1e-8, atol=1e-12)


def test_optimizers_forget_what_is_gone_and_training_goes_on() -> None:
    model = network("resnet").train()
    graph = analyse(model, SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, *SIZE)).square().mean().backward()
        optimizer.step()

    step()
    before = {name: id(p) for name, p in model.named_parameters()}
    graph = shrink_(model, graph, without(graph, "layer1.1", "layer2.0"), [optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    assert len(held) == len(before) - 6 - 6  # two convolutions and BatchNorms each
    step()
    # And once more, beside what has gone already.
    kept = without(graph, "layer1.1", "layer2.0", "layer3.2")
    shrink_(model, graph, kept, [optimizer])
    step()
    assert set(programs_of(model)) == {"layer1.1", "layer2.0", "layer3.2"}


def test_both_branches_of_a_module_go_one_after_the_other() -> None:
    model = network("scaled")
    graph = analyse(model, SIZE)
    images = torch.randn(2, *SIZE)
    first = without(graph, "blocks.0#2")
    block, stem = model.blocks[0], torch.relu(model.stem(images))
    expected = model.fc((stem + block.gamma1 * block.conv(stem)).mean((2, 3)))
    smaller = shrink_(model, graph, first)
    torch.testing.assert_close(model(images), expected)
    assert [n for n, _ in model.blocks.named_parameters()] == [
        "0.gamma1",
        "0.conv.weight",
        "0.conv.bias",
    ]
    shrink_(model, smaller, without(graph, "blocks.0", "blocks.0#2"))
    torch.testing.assert_close(model(images), model.fc(stem.mean((2, 3))))
    assert not list(model.blocks.parameters())


def test_of_a_module_that_becomes_zero_no_addition_is_left_in_onnx(tmp_path: Path) -> None:
    model = network("root")
    graph = tried_graph(model, SIZE)
    smaller = shrink(model, graph, without(graph, "first"))
    assert nodes_of(tmp_path, smaller) == {"Conv": 2, "Add": 1, "ReduceMean": 1, "Gemm": 1}


@pytest.mark.slow
def test_of_a_branch_nothing_is_left_in_onnx(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    graph = tried_graph(model, (3, 32, 32))
    smaller = shrink(model, graph, without(graph, "layer1.0", "layer2.0", "layer2.1"))
    assert nodes_of(tmp_path, smaller) == {
        "Conv": 20 - 6,
        "Relu": 17 - 5,
        "MaxPool": 1,
        "Add": 8 - 3,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def nodes_of(folder: Path, model: nn.Module) -> Counter[str]:
    """Export a network, which proves that ONNX Runtime computes what it does; count its nodes."""
    export_onnx(model, folder / "model.onnx", example=torch.randn(1, 3, 32, 32))
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


@pytest.mark.parametrize("name", ["resnet", "root", "scaled"])
def test_a_file_rebuilds_a_network_without_its_branches(name: str, tmp_path: Path) -> None:
    model = network(name)
    graph = tried_graph(model, SIZE)
    kept = without(graph, *[branch.name for branch in graph.removable][:2])
    group = graph.prunable[0]
    kept[group.units[group.size // 2 :]] = False
    smaller = copy.deepcopy(model)
    recipe = compress.shrink(smaller, graph, kept)
    file, images = tmp_path / "pruned.safetensors", torch.randn(2, *SIZE)
    compress.save(smaller, file, recipe=recipe)
    loaded = compress.load(file, build=NETWORKS[name][0])
    assert torch.equal(loaded(images), smaller(images))
    assert programs_of(loaded) == programs_of(smaller)
    with pytest.raises(CheckpointError, match="takes other branches out than this network has"):
        compress.save(model, file, recipe=recipe)


RELU = {"op": "relu.default", "of": ["$0"]}


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "the recipe has no branches"),
        ({"layer1.0": 3}, "it has no steps or no result"),
        ({"layer1.0": {"steps": "$0", "result": "$0"}}, "its steps are no list"),
        ({"layer1.0": {"steps": [], "result": "$1"}}, "is no value of it"),
        ({"layer1.0": {"steps": [3], "result": "$0"}}, "step 1 is not understood"),
        ({"layer1.0": {"steps": [{**RELU, "of": ["$1"]}], "result": "$1"}}, "before it is there"),
        ({"layer1.0": {"steps": [{**RELU, "of": [[]]}], "result": "$1"}}, "step 1 reads"),
        ({"layer1.0": {"steps": [{"call": "bn1", "of": [3]}], "result": "$1"}}, "with one value"),
        ({"layer9": {"steps": [], "result": "$0"}}, "the network has no module 'layer9'"),
        ({"": {"steps": [], "result": "$0"}}, "the network has no module ''"),
        (
            {"layer1.0": {"steps": [{"call": "nn", "of": ["$0"]}], "result": "$1"}},
            "no module 'layer1.0.nn'",
        ),
        (
            {"layer1.0": {"steps": [{**RELU, "of": ["forward"]}], "result": "$1"}},
            "no tensor 'layer1.0.forward'",
        ),
        *(
            (
                {"layer1.0": {"steps": [{"op": op, "of": ["$0"]}], "result": "$1"}},
                "no operator .* that computes element by element",
            )
            for op in (
                "conv2d.default",
                "relu",
                "relu.__class__",
                "__class__.default",
                "from_file.default",
            )
        ),
    ],
)
def test_a_recipe_asks_for_nothing_but_what_a_branch_leaves(branches: Any, message: str) -> None:
    model = network("resnet")
    with pytest.raises(CheckpointError, match=message):
        rebuild_(model, {"kept": {}, "cuts": {}, "branches": branches})
    assert not programs_of(model)


def test_a_pruner_takes_blocks_where_they_cost_least_and_goes_on_bit_for_bit() -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, compress.Pruner]:
        model = network("resnet").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        pruner = compress.Pruner(
            model,
            torch.randn(2, *SIZE),
            optimizer=optimizer,
            budget="macs=0.45",
            steps=6,
            interval=1,
            min_channels=4,
            blocks=True,
            rank="importance-per-mac",
            keep_dense=["layer1.0"],
        )
        return model, optimizer, pruner

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: compress.Pruner) -> bool:
        generator = torch.Generator().manual_seed(pruner.at.minibatches)
        images = torch.randn(8, *SIZE, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(8) % 5).backward()
        pruner.score()
        optimizer.step()
        return pruner.step()

    model, optimizer, pruner = begun()
    with torch.no_grad():  # branches that do next to nothing
        for name in ("layer1.0", "layer2.1", "layer3.2"):
            model.get_submodule(name).bn2.weight.mul_(1e-4)
            model.get_submodule(name).bn2.bias.mul_(1e-4)
    dense = copy.deepcopy(model.state_dict())
    while not train(model, optimizer, pruner):
        if pruner.at.step == 3:
            saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    gone = {branch.name for branch in pruner.graph.branches if branch.gone}
    assert {"layer2.1", "layer3.2"} <= gone
    assert "layer1.0" not in gone
    assert set(pruner.recipe["branches"]) == gone
    assert pruner.at.largest_difference <= 1e-9
    assert "layer3.2" in str(pruner.summary())

    other, again, second = begun()
    other.load_state_dict(dense)
    second.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    while not train(other, again, second):
        pass
    for name, expected in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], expected)


def test_blocks_need_a_criterion_that_scores_them() -> None:
    with pytest.raises(ConfigError, match="blocks = true needs criterion = 'taylor-gate'"):
        compress.choose(
            analyse(network("resnet"), SIZE), np.ones(1), blocks=True, criterion="random"
        )


def test_states_of_before_know_no_branches_and_all_are_there() -> None:
    graph = analyse(network("resnet"), SIZE)
    progress = Progress(
        graph.everything(), graph.everything(), Importance(graph.num_units, momentum=0)
    )
    now = progress.tensors()
    channels = graph.num_units - len(graph.branches)
    before = {n: t[:channels] if len(t.shape) and len(t) > channels else t for n, t in now.items()}
    found = Progress.of(before, graph, momentum=0)
    assert (
        found.kept.shape == found.shrunk.shape == found.importance.total.shape == (graph.num_units,)
    )
    assert found.kept.all()
