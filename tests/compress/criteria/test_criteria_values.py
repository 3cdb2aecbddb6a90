"""Every criterion against hand-computed values, and against a second derivation where one exists.

The network of the hand computation is linear, so that every figure can be followed on paper:
x = 2 -> conv A (1 -> 2 channels, weights 1 and -3) -> BatchNorm in eval mode with mean 0 and
variance 1 (gamma 2 and 0.5, beta 1 and 4) -> conv B (2 -> 1 channel, weights 3 and 1) -> a loss
f(logit).

    a = (2, -6), y = gamma a + beta = (5, 1), logit = 3 * 5 + 1 * 1 = 16
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import built, lived_in, some_slow
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F

from compress.config import CRITERION_NUMBERS
from compress.criteria import CRITERIA, bind, serving
from compress.criteria.scoring import Context
from compress.errors import ConfigError
from compress.networks.analysis import analyse
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph

Loss = Callable[[torch.Tensor], torch.Tensor]


class ByHand(nn.Module):
    """The two-layer network of the hand computation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.b = nn.Conv2d(2, 1, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
            self.b.weight.copy_(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
            self.norm.weight.copy_(torch.tensor([2.0, 0.5]))
            self.norm.bias.copy_(torch.tensor([1.0, 4.0]))
            assert self.norm.running_var is not None
            self.norm.running_var.fill_(1 - self.norm.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x))).flatten(1)


def by_hand() -> tuple[nn.Module, ChannelGraph]:
    model = ByHand().double().eval()
    return model, analyse(model, (1, 1, 1))


def scores_of(
    name: str,
    model: nn.Module,
    graph: ChannelGraph,
    images: torch.Tensor,
    loss_of: Loss,
    *,
    scale: float = 1.0,
    **context: object,
) -> np.ndarray:
    """Run one minibatch as a training step does and return the (units,) scores."""
    scoring = bind(name, Context(model, graph, **context))  # type: ignore[arg-type]
    model.zero_grad()
    loss = loss_of((scoring.network or model)(images))
    if scoring.before_backward:
        scoring.before_backward(loss)
    (scale * loss).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    return scoring.score(scale).double().numpy()


X = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
IDENTITY: Loss = lambda logits: logits.mean()  # noqa: E731
SQUARE: Loss = lambda logits: logits.square().mean() / 32  # noqa: E731

# With f = identity: dL/dz = B y = (15, 1), no curvature.
# With f = logit^2 / 32: f' = 16 / 16 = 1, f'' = 1/16: dL/dz = (15, 1), h = (15^2, 1) / 16.
BY_HAND = [
    ("taylor-gate", IDENTITY, [225, 1]),
    ("taylor-parts", IDENTITY, [15, 1]),
    ("taylor-gate-fg", IDENTITY, [225, 1]),
    ("taylor-gate-so", IDENTITY, [225, 1]),
    ("taylor-gate-so", SQUARE, [(-15 + 225 / 32) ** 2, (-1 + 1 / 32) ** 2]),
    ("obd", SQUARE, [225 / 32, 1 / 32]),
    # |y dL/dy| = (15, 1), divided by its norm over the layer
    ("taylor-output", IDENTITY, [15 / 226**0.5, 1 / 226**0.5]),
    # dL/dA = B gamma x = (12, 1): A dL/dA = (12, -3)
    ("taylor-weight", IDENTITY, [144, 9]),
    # gamma dL/dgamma = B gamma a = (12, -3), beta dL/dbeta = B beta = (3, 4)
    ("bn-taylor", IDENTITY, [225, 1]),
    ("bn-scale", IDENTITY, [2, 0.5]),
    ("weight-norm", IDENTITY, [1, 9]),
    ("weight-abs", IDENTITY, [1, 3]),
]


@pytest.mark.parametrize(("name", "loss", "expected"), BY_HAND)
def test_two_layers_by_hand(name: str, loss: Loss, expected: list[float]) -> None:
    model, graph = by_hand()
    (group,) = graph.prunable
    scores = scores_of(name, model, graph, X, loss, hessian_samples=0)
    np.testing.assert_allclose(scores[group.units], expected, rtol=1e-6)


def test_every_criterion_but_chance_is_computed_by_hand() -> None:
    assert {name for name, *_ in BY_HAND} | {"random"} == set(CRITERIA)


def test_bn_taylor_as_published_drops_beta() -> None:
    model, graph = by_hand()
    (group,) = graph.prunable
    scores = scores_of("bn-taylor", model, graph, X, IDENTITY, as_published=True)
    np.testing.assert_allclose(scores[group.units], [144, 9], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_the_factor_of_the_loss_does_not_change_a_score(name: str) -> None:
    """Mixed precision multiplies the loss before the backward pass."""
    model, graph = built("resnet20")
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    scores = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        found = scores_of(
            name,
            model.train(),
            graph,
            images,
            lambda logits: F.cross_entropy(logits, labels),
            scale=scale,
            residual_gate="block",
        )
        scores.append(found)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4)
    assert scores[0].any()


# Second derivations


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64), torch.arange(count) % 4


def cross_entropy(labels: torch.Tensor) -> Loss:
    return lambda logits: F.cross_entropy(logits, labels)


def trained(name: str) -> tuple[nn.Module, ChannelGraph]:
    model = lived_in(NETWORKS[name]()).double().eval()
    return model, analyse(model, (3, 12, 12))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_per_example_gates_equal_a_loop_over_single_examples(name: str) -> None:
    """In eval mode, where BatchNorm does not mix examples."""
    model, graph = trained(name)
    images, labels = batch()
    found = scores_of("taylor-gate-fg", model, graph, images, cross_entropy(labels))
    singles = []
    for image, label in zip(images, labels, strict=True):
        gated = GatedNetwork(model, graph, "read")
        F.cross_entropy(gated(image[None]), label[None]).backward()
        assert gated.gates.grad is not None
        singles.append(gated.gates.grad.square().numpy())
    expected = np.mean(singles, axis=0)
    units = np.concatenate([group.units for group in graph.prunable])
    np.testing.assert_allclose(found[units], expected[units], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sites", ["read", "block"])
@pytest.mark.parametrize("name", ["Dense", "Grouped", "PreActivation", "Shared"])
def test_exact_diagonal_equals_that_of_the_full_hessian(name: str, sites: str) -> None:
    model, graph = trained(name)
    images, labels = batch()
    gated = GatedNetwork(model, graph, sites)

    def loss_at(z: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(gated, {"gates": z}, (images,), tie_weights=True)
        return F.cross_entropy(logits, labels)

    for layer in gated.network.modules():  # all layers share the one vector that is replaced
        if hasattr(layer, "gates"):
            assert layer.gates is gated.gates
    hessian = torch.autograd.functional.hessian(loss_at, gated.gates.detach())
    assert isinstance(hessian, torch.Tensor)
    found = scores_of(
        "obd",
        model,
        graph,
        images,
        cross_entropy(labels),
        hessian_samples=0,
        residual_gate=sites,
    )
    units = np.concatenate([group.units for group in graph.prunable])
    expected = hessian.diagonal().numpy()[units] / 2
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found[units], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_estimated_diagonal_approaches_the_exact_one() -> None:
    """Hutchinson's estimator is unbiased: its error falls as one over the root of the samples."""
    model, graph = trained("Dense")
    images, labels = batch()
    exact, few, many = (
        scores_of("obd", model, graph, images, cross_entropy(labels), hessian_samples=samples)
        for samples in (0, 16, 1600)
    )
    units = np.concatenate([group.units for group in graph.prunable])
    exact = exact[units]
    error = [np.linalg.norm(found[units] - exact) for found in (few, many)]
    assert error[1] < 0.3 * error[0]
    assert error[1] < 0.2 * np.linalg.norm(exact)


def test_second_order_predicts_the_change_of_a_quadratic_loss() -> None:
    """By hand: for a loss that is quadratic in every gate, (-g + h / 2)^2 is the squared change."""
    model, graph = by_hand()
    (group,) = graph.prunable
    images = torch.randn(6, 1, 1, 1, dtype=torch.float64)
    gated = GatedNetwork(model, graph, "read")
    changes = []
    with torch.no_grad():
        dense = SQUARE(gated(images))
        for unit in group.units.tolist():
            gated.gates[unit] = 0
            changes.append(float(SQUARE(gated(images)) - dense) ** 2)
            gated.gates[unit] = 1
    scores = scores_of("taylor-gate-so", model, graph, images, SQUARE, hessian_samples=0)
    np.testing.assert_allclose(scores[group.units], changes, rtol=1e-9)


def test_taylor_output_by_retained_gradients() -> None:
    model, graph = built("resnet20")
    model = model.double().train()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    handle = model.layer2[1].conv2.register_forward_pre_hook(keep)  # type: ignore[union-attr,index]
    F.cross_entropy(model(images), labels).backward()
    handle.remove()
    (activation,) = kept
    assert activation.grad is not None
    mean = (activation * activation.grad).detach().abs().mean((0, 2, 3))
    found = scores_of("taylor-output", model, graph, images, cross_entropy(labels))
    group = next(g for g in graph.groups if g.name == "layer2.1.conv1")
    expected = (mean / torch.linalg.vector_norm(mean)).numpy()
    np.testing.assert_allclose(found[group.units], expected, rtol=1e-5)


def test_taylor_output_behind_a_flatten_averages_over_positions() -> None:
    model, graph = trained("Plain")
    images, labels = batch()
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    handle = model.hidden.register_forward_pre_hook(keep)  # type: ignore[union-attr]
    F.cross_entropy(model(images), labels).backward()
    handle.remove()
    assert kept[0].grad is not None
    mean = (kept[0] * kept[0].grad).detach().abs().view(5, 8, 9).mean((0, 2))
    found = scores_of("taylor-output", model, graph, images, cross_entropy(labels))
    group = next(g for g in graph.groups if "hidden.weight" in g.readers)
    expected = (mean / torch.linalg.vector_norm(mean)).numpy()
    np.testing.assert_allclose(found[group.units], expected, rtol=1e-5)


@pytest.mark.parametrize("name", some_slow(["resnet20", "resnet50"], ["resnet50"]))
def test_bn_taylor_equals_the_gate_where_activations_are_relu(name: str) -> None:
    """Scaling all that a channel is written by scales what its readers see, also of a stream."""
    model, graph = built(name)
    size = 32 if name == "resnet50" else 16
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    loss = cross_entropy(torch.arange(3))
    model = model.double().train()
    gate, norm = (
        scores_of(criterion, model, graph, images, loss)
        for criterion in ("taylor-gate", "bn-taylor")
    )
    units = np.concatenate([g.units for g in graph.prunable])
    np.testing.assert_allclose(norm[units], gate[units], rtol=1e-6, atol=1e-9 * gate.max())


@pytest.mark.parametrize("name", ["resnet20", "Dense", "Separable", "vgg11_bn_cifar"])
def test_parts_are_what_each_reader_has_in_a_gate(name: str) -> None:
    """By hooks: |x dL/dx| of what every layer reads, summed over all but the unit."""
    if name in NETWORKS:
        model = lived_in(NETWORKS[name]()).double().eval()
        graph, size = analyse(model, (3, 12, 12)), 12
    else:
        (model, graph), size = built(name), 32
        model = model.double()
    read: dict[str, torch.Tensor] = {}

    def watch(layer: str) -> Callable[..., tuple[torch.Tensor]]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            read[layer] = inputs[0].clone().requires_grad_()
            read[layer].retain_grad()
            return (read[layer],)

        return hook

    for layer in {axis.layer for axis in graph.readers}:
        model.get_submodule(layer).register_forward_pre_hook(watch(layer))
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    found = scores_of("taylor-parts", model, graph, images, cross_entropy(torch.arange(4)))
    expected = np.zeros(graph.num_units)
    for axis in graph.readers:
        x = read[axis.layer]
        assert x.grad is not None
        channels = (x * x.grad).detach().transpose(0, 1).flatten(1).sum(1).numpy()
        expected += np.abs(np.bincount(axis.units, channels, minlength=graph.num_units))
    channels = np.concatenate([group.units for group in graph.groups])
    np.testing.assert_allclose(found[channels], expected[channels], rtol=1e-8, atol=1e-12)
    assert (found[[branch.unit for branch in graph.removable]] > 0).all()


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("resnet34", [3, 4, 6, 3]),
        ("resnet50", [3, 4, 6, 3]),
        pytest.param("resnet101", [3, 4, 23, 3], marks=pytest.mark.slow),
        pytest.param("resnet152", [3, 4, 3, 3], marks=pytest.mark.slow),
        ("resnet18", [3, 4, 3, 3]),
    ],
)
def test_published_divisors(name: str, streams: list[int]) -> None:
    """The research code divides every layer by 3, and only two streams by their blocks."""
    from compress.criteria.taylor import blocks_per_unit, published_divisors

    model, graph = built(name)
    divisors = published_divisors(graph)
    residual = [g for g in graph.groups if g.residual]
    assert [set(divisors[g.units]) for g in residual] == [{n} for n in streams]
    assert all((divisors[g.units] == 3).all() for g in graph.prunable if not g.residual)
    blocks = [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)]
    assert [blocks_per_unit(graph)[g.units[0]] for g in residual] == blocks


def test_published_block_gate_divides_everything() -> None:
    model, graph = built("resnet50")
    images, loss = torch.randn(3, 3, 32, 32), cross_entropy(torch.arange(3))
    right, published = (
        scores_of(
            "taylor-gate",
            model.train(),
            graph,
            images,
            loss,
            residual_gate="block",
            as_published=slips,
        )
        for slips in (False, True)
    )
    for group in graph.prunable:
        # stages 1 and 4 have three blocks, stage 2 has 4, stage 3 has 6: those are right
        factor = 1 if group.residual else 1 / 3
        np.testing.assert_allclose(
            published[group.units], factor * right[group.units], rtol=1e-5, atol=1e-12
        )


# Names, numbers and refusals


def test_numbers_name_the_criteria() -> None:
    assert {*CRITERION_NUMBERS.values(), "taylor-parts"} == set(CRITERIA)


@pytest.mark.parametrize("name", ["bn-scale", "bn-taylor"])
def test_a_criterion_that_cannot_serve_names_those_that_can(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 3)
    )
    context = Context(model, analyse(model, (3, 8, 8)))
    with pytest.raises(ConfigError) as refused:
        bind(name, context)
    assert f"{name} cannot score this network" in str(refused.value)
    assert "0 pass through no BatchNorm" in str(refused.value)
    able = set(CRITERIA) - {"bn-scale", "bn-taylor"}
    assert set(serving(context)) == able
    assert all(other in str(refused.value) for other in able)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_scores_change_neither_weights_nor_gradients(name: str) -> None:
    model, graph = trained("Dense")
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    gradients = {n: g.clone() for n, (_, g) in before.items() if g is not None}
    scores_of(name, model, graph, images, cross_entropy(labels))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key][0])
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-9, atol=1e-12)
