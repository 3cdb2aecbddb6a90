"""What a captured graph does not show, or cannot hold: found before anything is trained."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import conv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from compress.errors import ModelError
from compress.networks import cost
from compress.networks.capture import Example, capture, in_mode
from compress.networks.groups import ChannelGraph
from compress.networks.rules import RULES, register_rule
from compress.networks.shrink import difference_of
from compress.networks.trial import tried_graph
from compress.networks.walk import Call, Value

IMAGES = Example.images((3, 12, 12))
WIDTH = "forward uses a width, or the channels, in a way that the graph does not show"


class Net(nn.Module):
    """Two convolutions; ``between`` them lies what a test is about, or ``after`` them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.between(self.n(self.a(x)).relu())
        return self.head(self.after(self.b(y)).relu().mean((2, 3)))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return y


def exact_graph(model: nn.Module, example: Example = IMAGES) -> ChannelGraph:
    """Return the tried graph; assert that what it lets go goes exactly."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = tried_graph(model, example)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for seed in range(3):
        kept, generator = graph.everything(), np.random.default_rng(seed)
        for group in graph.prunable:
            left = int(generator.integers(group.fewest, group.size + 1))
            kept[generator.permutation(group.units)[left:]] = False
        assert difference_of(model, graph, kept, example) <= 1e-9
    return graph


def frozen(graph: ChannelGraph) -> dict[str, str]:
    """Return why groups between input and output stay dense, by name."""
    ends = ("network input", "network output")
    return {g.name: str(g.frozen) for g in graph.groups if g.frozen and g.frozen not in ends}


def refusal(model: nn.Module, example: Example = IMAGES) -> str:
    """Return the sentence with which a network is refused."""
    with pytest.raises(ModelError) as refused:
        tried_graph(model, example)
    message = str(refused.value)
    assert message.isprintable(), message
    assert len(message) < 400, message
    said, _, _ = message.partition(" at test_faults.py:")
    assert not re.search(r"\. [A-Z]|Traceback|defect", said), message
    return message


# Handled exactly


class CatByAxis(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        half = y.shape[1] // 2
        return torch.cat((y[:, half:].tanh(), y[:, :half]), axis=1)


class ReshapeByKeyword(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        rows = torch.reshape(input=y, shape=(y.shape[0], -1))
        return torch.reshape(input=rows, shape=y.shape)


class ViewByNumFeatures(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y.view(len(y), self.n.num_features, -1).view(y.shape)


class ForwardKeepsAnActivation(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        self.seen = y
        return y


class Checkpointed(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda t: self.n(t).relu(), y, use_reentrant=False)


class WithoutGradient(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.n(y)
        return y * scale.sigmoid()


class InAutocast(Net):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class OwnFunction(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return Twice.apply(y)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "logits"


class InDataclass(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return Output(super().forward(x))


class Printing(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        print(y.shape)
        return y


@pytest.mark.parametrize(
    "network",
    [
        *(CatByAxis, ReshapeByKeyword, ViewByNumFeatures, OwnFunction),
        *(ForwardKeepsAnActivation, Checkpointed, WithoutGradient, InAutocast, InDataclass),
        Printing,
    ],
)
def test_handled_exactly(network: Callable[[], Net]) -> None:
    model = network()
    graph = exact_graph(model)
    assert not frozen(graph)
    assert cost.totals(graph, graph.everything()).items() >= cost.measured(model, IMAGES).items()
    assert {"a", "b"} <= {group.name for group in graph.prunable}
    assert not hasattr(model, "seen") or not type(model.seen).__name__.startswith("Fake")


class Squeezed(Net):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.b(self.n(self.a(x)).relu())
        return self.head(y.mean((2, 3), keepdim=True).squeeze())


class SqueezedByView(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y.unsqueeze(2).squeeze(1).reshape(len(y), -1, 12, 12) if y.shape[1] > 1 else y[:, 0]


@pytest.mark.parametrize(("network", "name"), [(Squeezed, "b"), (SqueezedByView, "a")])
def test_more_than_one_channel_is_left(network: Callable[[], Net], name: str) -> None:
    graph = exact_graph(network())
    assert {g.name: g.fewest for g in graph.prunable}[name] == 2
    assert not frozen(graph)


def test_no_output_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    capture(Printing(), IMAGES)
    assert capsys.readouterr() == ("", "")


# Frozen, each by its name and for its reason


class WeightElsewhere(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        again = self.n(self.a(torch.ones(1, 3, 5, 5).to(y)))
        return y * F.conv2d(again, self.b.weight).mean((2, 3), keepdim=True)


class MeanOfWeight(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.n.weight.mean()


class SumOfBias(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y + self.a.bias.sum()


class ByOutChannels(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y / self.a.out_channels


class ByNumFeatures(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.n.num_features


class ByGroups(Net):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = conv(8, 8, groups=8)

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return self.depthwise(y) * self.depthwise.groups


class SlopeOfSize(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(y - 0.5, 1 / y.shape[1])


class MeanBySize(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y - y.sum(1, keepdim=True) / y.shape[1]


class TrainedOtherwise(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(y, 1) if self.training else y


class TrainedAtOneWidth(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y + torch.ones(8, 1, 1) if self.training else y


class EvaluatedOtherwise(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.training else y * self.a.out_channels


class FlippedInEvaluation(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.training else y.flip(1)


class FixedView(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y.view(len(y), 8, 12, 12)


class ConstantScale(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * torch.arange(1.0, 9, dtype=y.dtype).view(8, 1, 1)


@pytest.mark.parametrize(
    ("network", "name", "reason"),
    [
        (MeanOfWeight, "a", "statistics of a weight are taken over it"),
        (SumOfBias, "a", "statistics of a weight are taken over it"),
        (ByOutChannels, "a", WIDTH),
        (ByNumFeatures, "a", WIDTH),
        (ByGroups, "a", WIDTH),
        (SlopeOfSize, "a", WIDTH),
        (MeanBySize, "a", "sum over channels"),
        (TrainedOtherwise, "a", "forward does something else there"),
        (FlippedInEvaluation, "a", "forward does something else there"),
        (TrainedAtOneWidth, "a", "test_faults.py:"),
        (EvaluatedOtherwise, "a", WIDTH),
        (FixedView, "a", "test_faults.py:"),
        (ConstantScale, "a", "mul with a fixed width"),
    ],
)
def test_frozen_before_training(network: Callable[[], Net], name: str, reason: str) -> None:
    graph = exact_graph(network())
    assert list(frozen(graph)) == [name]
    message = frozen(graph)[name]
    assert reason in message
    assert message.isprintable()
    assert "b" in {group.name for group in graph.prunable}


def test_a_weight_that_is_used_in_two_places() -> None:
    assert "a" not in frozen(exact_graph(WeightElsewhere()))


class OtherWidth(Net):
    """The view that ``c`` returns has the width of ``a``, which is the same only by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(8, 8)

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return self.c(y).relu().view(len(y), y.shape[1], -1, 12)


def test_widths_that_are_equal_by_chance() -> None:
    found = frozen(exact_graph(OtherWidth()))
    assert sorted(found) == ["a", "c"]
    assert all("test_faults.py:" in reason for reason in found.values())


# Operators of one's own


@torch.library.custom_op("test_faults::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class OwnOperator(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return doubled(y)


@pytest.fixture
def _rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_an_operator_without_a_rule_is_named_and_frozen() -> None:
    graph = exact_graph(OwnOperator())
    assert graph.unknown == ("test_faults.doubled",)
    assert frozen(graph)["a"] == "unknown operation test_faults.doubled"
    assert "b" in {group.name for group in graph.prunable}


@pytest.mark.parametrize(
    "operator", ["test_faults::doubled", "packet", "overload"], ids=["name", "packet", "overload"]
)
@pytest.mark.usefixtures("_rules")
def test_an_operator_with_a_rule(operator: str) -> None:
    packet = torch.ops.test_faults.doubled
    given = {"packet": packet, "overload": packet.default}.get(operator, operator)
    register_rule(given, lambda call: call["x"].same())
    graph = exact_graph(OwnOperator())
    assert not graph.unknown
    assert not frozen(graph)


@pytest.mark.usefixtures("_rules")
def test_a_wrong_rule_is_found_out() -> None:
    def backwards(call: Call) -> Value:
        x = call["x"]
        return x.with_dim(1, x.dims[1][::-1].copy(), x.shape[1])

    register_rule(torch.ops.test_faults.doubled, backwards)
    assert WIDTH in frozen(exact_graph(OwnOperator()))["a"]


@torch.library.custom_op("test_faults::shapeless", mutates_args=())
def shapeless(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class OwnOperatorWithoutShapes(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return shapeless(y)


# Refused in a sentence


class DecidesByValue(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        if y.mean() > 0:
            return y * 2
        return y


class DecidesByBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor(1))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y * 2 if self.flag > 0 else y


class SlicesByValue(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        count = int((y > 0).sum())
        return y[:, :count]


class TakesAsManyAsNotZero(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return y + y.nonzero().sum()


class DecidingFunction(Twice):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class OwnDecidingFunction(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return DecidingFunction.apply(y)


class ByNumpy(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(y.detach().numpy())


class AlwaysDropout(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return F.dropout(y, 0.5)


class AlwaysNoise(Net):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y + torch.randn_like(y)


class CountsItsCalls(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return y * self.calls


class NotFinite(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return (y - 1e4).log()


class NoTensor(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return {"name": "logits", "value": super().forward(x).shape}


class Raising(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        raise ValueError("first line. Second sentence\nsecond line")


class DoesNotFit(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = conv(9, 6)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.LazyConv2d(6, 3)


class LazyNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LazyBatchNorm2d(affine=False)


class BatchStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.BatchNorm2d(8, track_running_stats=False)


class OnMeta(Net):
    def __init__(self) -> None:
        super().__init__()
        self.to("meta")


class HoldsItself(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [lambda y: self.b(y)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.steps[0](self.a(x).relu()).mean((2, 3)))


class OnlyZeros(Net):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.head(y.relu().mean((2, 3))) * 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.b(self.a(x)))


class CastsBetween(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).bfloat16()).float().mean((2, 3)))


class Quantized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.ao.nn.quantized.dynamic.Linear(6, 4)


VALUE = "takes a decision by the value of a tensor at test_faults.py:"


@pytest.mark.parametrize(
    ("network", "says", "place"),
    [
        (DecidesByValue, VALUE, "if y.mean() > 0:"),
        (DecidesByBuffer, VALUE, "if self.flag > 0"),
        (SlicesByValue, VALUE, "count = int((y > 0).sum())"),
        (OwnDecidingFunction, VALUE, "if float(x.sum()) > 0"),
        (TakesAsManyAsNotZero, "the shape of a tensor depends on the values", "test_faults.py:"),
        (ByNumpy, "test_faults.py:", "torch.from_numpy"),
        (AlwaysDropout, "something random is always on: dropout", "test_faults.py:"),
        (AlwaysNoise, "something random is always on: randn_like", "test_faults.py:"),
        (CountsItsCalls, "forward changes what it computes from", ""),
        (NotFinite, "outputs that are not finite", ""),
        (NoTensor, "returns no tensor", ""),
        (Raising, "ValueError: first line at test_faults.py:", "raise ValueError"),
        (DoesNotFit, "to have 9 channels, but got 8", "test_faults.py:"),
        (Lazy, "b.weight has no shape yet", ""),
        (LazyNorm, "n.running_mean has no shape yet", ""),
        (BatchStatistics, "a BatchNorm (n)", "track_running_stats=True"),
        (OnMeta, "cannot be copied", "meta"),
        (HoldsItself, "HoldsItself holds in steps a function that uses the network", ""),
        (OnlyZeros, "nothing but zeros", ""),
        (CastsBetween, "in float64 and in float32 forward fails", "test_faults.py:"),
        (OwnOperatorWithoutShapes, "no fake impl registered", "test_faults.py:"),
    ],
)
def test_refused_in_a_sentence(network: Callable[[], Net], says: str, place: str) -> None:
    message = refusal(network())
    assert says in message
    assert place in message
    assert network.__name__ in message or "BatchNorm" in message


class KeepsTensors(Net):
    """As the losses and maps that a forward leaves for whoever trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def after(self, y: torch.Tensor) -> torch.Tensor:
        self.kept = y.relu()
        self.seen.append(y.detach().sum((0, 2, 3)))
        return y


class Merging(nn.Conv2d):
    """Its weight is whole in evaluation mode alone, as that of low-rank adapters."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.delta, self.merged = nn.Parameter(torch.randn(8, 8, 1, 1)), False

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            with torch.no_grad():
                self.weight += -self.delta if mode else self.delta
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight if self.merged else self.weight + self.delta, self.bias)


class Adapted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = Merging()

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return self.adapter(y)


def test_what_forward_keeps_is_the_users() -> None:
    model = KeepsTensors()
    model(*IMAGES.args).sum().backward()  # so that what is kept has a history
    kept, seen = model.kept, list(model.seen)
    graph = exact_graph(model)
    assert {group.name for group in graph.prunable} >= {"a", "b"}
    assert cost.measured(model, IMAGES)["macs"] == cost.macs(graph, graph.everything())
    assert model.kept is kept
    assert len(model.seen) == len(seen)
    assert all(now is before for now, before in zip(model.seen, seen, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_changes_weights_is_left_as_it_was(training: bool) -> None:
    model = Adapted().train()
    model.adapter.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    capture(model, IMAGES)
    cost.measured(model, IMAGES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with in_mode(model):
        assert model.adapter.merged
    assert model.training
    assert (model.adapter.training, model.adapter.merged) == (training, not training)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_layers_are_refused() -> None:
    assert "Quantized" in refusal(Quantized())


@pytest.mark.parametrize(
    "example",
    [
        Example.images((4, 12, 12)),
        Example((torch.randn(2, 3),)),
        Example((torch.randn(2, 3, 12, 12), torch.randn(2, 3))),
        Example((), {"images": torch.randn(2, 3, 12, 12)}),
        Example((torch.zeros(2, 3, 12, 12, dtype=torch.long),)),
        Example(("a text",)),
        Example(()),
    ],
    ids=["channels", "rank", "too many", "keyword", "integers", "text", "none"],
)
def test_inputs_that_do_not_fit(example: Example) -> None:
    assert refusal(Net(), example).startswith("Net cannot be captured with inputs of ")


def test_refusals_change_nothing() -> None:
    for network in (DecidesByValue, Raising, AlwaysDropout, Lazy):
        model = network().train()
        model.head.eval()
        held = [dict(vars(module)) for module in model.modules()]
        refusal(model)
        assert [dict(vars(module)) for module in model.modules()] == held


# Computed weights


@pytest.mark.parametrize(
    "parametrise", [parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrised_weights(parametrise: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    parametrise(model.b)
    graph = exact_graph(copy.deepcopy(model).eval())
    assert "a" in frozen(graph)
