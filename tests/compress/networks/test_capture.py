"""What a network is captured with, and what capturing leaves alone."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import lived_in, random_mask
from networks import NETWORKS, conv
from torch import nn

from compress.criteria import bind
from compress.criteria.scoring import Context
from compress.errors import ConfigError, ModelError
from compress.networks.analysis import analyse
from compress.networks.capture import Example, capture, source_of
from compress.networks.gates import GatedNetwork
from compress.networks.shrink import difference_of
from compress.networks.trial import tried_graph

CPU = torch.device("cpu")


class Pair(nn.Module):
    """Two inputs, one of them by keyword and in a list; a dictionary comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(2, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, more: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        joined = torch.relu(self.a(x) + self.b(more[0]))
        return {"logits": self.head(joined.mean((2, 3)) * more[1])}


def example() -> Example:
    return Example(
        (torch.randn(2, 3, 6, 6),), {"more": [torch.randn(2, 2, 6, 6), torch.randn(2, 1)]}
    )


def test_an_example_of_several_inputs() -> None:
    given = example()
    assert (len(given.tensors), given.batch) == (3, 2)
    assert str(given) == "2x3x6x6 and 2x2x6x6 and 2x1"
    assert [len(tensor) for tensor in given.row().tensors] == [1, 1, 1]
    doubled = given.to(CPU, torch.float64)
    assert {tensor.dtype for tensor in doubled.tensors} == {torch.float64}
    numbers = Example((torch.arange(4), torch.zeros(3)))
    assert numbers.row() is numbers  # they have not one row each
    assert numbers.to(CPU, torch.float64).tensors[0].dtype == torch.int64
    assert Example(()).batch == 1
    assert str(Example(())) == "no tensors"


def test_images_are_the_same_every_time() -> None:
    first, second = Example.images((3, 4, 4)), Example.images((3, 4, 4))
    assert torch.equal(first.tensors[0], second.tensors[0])
    assert first.tensors[0].shape == (2, 3, 4, 4)
    assert not torch.equal(first.tensors[0], Example.images((3, 4, 4), seed=1).tensors[0])


def test_a_network_of_several_inputs_shrinks_exactly() -> None:
    model, given = Pair().eval(), example()
    graph = tried_graph(model, given)
    assert [(g.name, g.size, g.writers) for g in graph.prunable] == [("a", 8, ("a", "b"))]
    assert difference_of(model, graph, random_mask(graph, 1), given) <= 1e-12


def test_tensors_keep_their_names_and_the_source_is_known() -> None:
    found = capture(NETWORKS["Plain"](), Example.images((3, 12, 12)))
    names = {"features.0.weight", "features.3.bias", "norm.running_var", "head.weight"}
    assert names <= set(found.named.values())
    assert (len(found.inputs), len(found.outputs), found.batch) == (1, 1, 2)
    places = {source_of(node) for node in found.graph.nodes if node.op == "call_function"}
    assert any(place.startswith("networks.py:") for place in places)
    assert any(place.endswith(": x = self.features(x)") for place in places)


def test_capturing_says_nothing_and_leaves_logging_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = logging.root.manager.disable
    capture(NETWORKS["Dense"](), Example.images((3, 12, 12)))
    with pytest.raises(ModelError):
        capture(NETWORKS["Dense"](), Example.images((5, 12, 12)))
    assert logging.root.manager.disable == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_have_the_precision_of_the_network(dtype: torch.dtype) -> None:
    graph = analyse(NETWORKS["Dense"]().to(dtype), (3, 12, 12))
    assert [g.name for g in graph.prunable] == ["a", "b", "c"]


# Explicit gates where the graph does not tell


class AddsInTraining(nn.Module):
    """A sum more in training mode than in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            x = x + torch.zeros_like(x)
        return self.head((x + self.b(x)).mean((2, 3)))


def test_gates_behind_blocks_need_the_same_additions_in_training() -> None:
    model = AddsInTraining().eval()
    graph = analyse(model, (3, 6, 6))
    gated, images = GatedNetwork(model, graph, "residual"), torch.randn(2, 3, 6, 6)
    assert torch.equal(gated(images), model(images))
    model.train()
    with pytest.raises(ModelError, match=r"adds 2 times in training mode and 1 times.*'read'"):
        gated(images)
    assert torch.equal(GatedNetwork(model, graph, "read")(images), model(images))


class Computed(nn.Module):
    """A weight that is a function of a parameter: no gate can be put where it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight, self.head = conv(3, 8), nn.Parameter(torch.randn(6, 8)), conv(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x)).mean((2, 3))
        x = nn.functional.linear(x, torch.tanh(self.weight))
        return self.head(x[:, :, None, None]).flatten(1)


def test_a_computed_weight_serves_no_explicit_gate() -> None:
    model = lived_in(Computed())
    graph = tried_graph(model, (3, 6, 6))
    assert [g.name for g in graph.prunable] == ["a", "weight"]
    context = Context(model, graph)
    for name in ("taylor-gate-fg", "taylor-output", "obd", "taylor-gate-so"):
        with pytest.raises(ConfigError, match="a is read by weight in a computed form"):
            bind(name, context)
    bind("taylor-gate", context)
