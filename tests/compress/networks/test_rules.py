"""Rules that random networks (networks_random.py) reach rarely, one use of an operator each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import conv
from torch import nn
from torch.nn import functional as F

from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph
from compress.networks.shrink import difference_of, shrink
from compress.networks.trial import tried_graph

WIDTH = 8
IMAGES = Example.images((3, 6, 6))

Use = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """``a`` writes 8 channels, a use of an operator follows, and ``b`` reads what that returns."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.a, self.use = conv(3, WIDTH), use
        with torch.no_grad():
            after = use(torch.rand(2, WIDTH, 6, 6))
        self.b = nn.Conv2d(after.shape[1], 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.use(self.a(x).tanh())
        return self.head(self.b(y).relu().mean((2, 3)))


def exact_graph(model: nn.Module, example: Example = IMAGES) -> ChannelGraph:
    """Return the tried graph; assert that what it lets go goes exactly, and what that costs."""
    graph = tried_graph(model, example)
    for seed in range(3):
        kept, generator = graph.everything(), np.random.default_rng(seed)
        for group in graph.prunable:
            left = int(generator.integers(group.fewest, group.size + 1))
            kept[generator.permutation(group.units)[left:]] = False
        assert difference_of(model, graph, kept, example) <= 1e-9
        found = cost.measured(shrink(model, graph, kept), example)
        assert cost.totals(graph, kept).items() >= found.items()
    return graph


def written(graph: ChannelGraph) -> tuple[int, str | None]:
    """Return how many units of what ``a`` writes may go, and why the others may not."""
    groups = [group for group in graph.groups if "a" in group.writers]
    reasons = [group.frozen for group in groups if group.frozen]
    return sum(g.size for g in groups if g.frozen is None), reasons[0] if reasons else None


GO: dict[str, Use] = {
    # layout
    "swapaxes": lambda y: y.swapaxes(1, 3).relu().swapaxes(3, 1),
    "movedim": lambda y: y.movedim((1, 2), (-1, 1)).relu().movedim(-1, 1),
    "mT": lambda y: y.flatten(2).mT.relu().mT.unflatten(2, (6, 6)),
    "t": lambda y: y.mean((2, 3)).t().relu().t()[:, :, None, None],
    "view_as": lambda y: y.flatten(2).view_as(y),
    "reshape_as": lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2).reshape_as(y),
    "unflatten": lambda y: y.flatten(0, 1).unflatten(0, (-1, y.shape[1])),
    "squeeze of one": lambda y: y.mean(2, keepdim=True).squeeze(2).unsqueeze(-1),
    "squeeze of several": lambda y: y.mean((2, 3), keepdim=True).squeeze((2, 3))[..., None, None],
    "expand": lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6),
    "broadcast_to": lambda y: y.mean((2, 3), keepdim=True).broadcast_to(y.shape),
    "expand_as": lambda y: y.amax(2, keepdim=True).expand_as(y),
    "tile": lambda y: y.tile(1, 2, 1, 1),
    "repeat of space": lambda y: y.repeat(1, 1, 2, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(3, 1),
    "repeat_interleave of space": lambda y: y.repeat_interleave(2, 2),
    "roll in space": lambda y: y.roll((1, 2), (2, 3)),
    "flip in space": lambda y: y.flip(2, 3),
    "flip": lambda y: y.flip(1),
    "pixel_unshuffle": lambda y: F.pixel_unshuffle(y, 2),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    # joining and taking apart
    "cat in space": lambda y: torch.cat([y, y.relu()], 2),
    "cat with itself": lambda y: torch.cat([y, y, y.relu()], 1),
    "stack and unbind in space": lambda y: torch.stack(y.unbind(3), 3),
    "stack and merge": lambda y: torch.stack([y, y.relu()], 2).flatten(1, 2),
    "stack before": lambda y: torch.stack([y, y.relu()], 1).flatten(1, 2),
    "narrow in space": lambda y: y.narrow(2, 1, 3),
    "narrow of halves": lambda y: y.narrow(1, 0, y.shape[1] // 2),
    "tensor_split": lambda y: y.tensor_split(2, 1)[0] + y.tensor_split(2, 1)[1],
    "split in space": lambda y: y.split([2, 4], 3)[1],
    "chunk of four": lambda y: torch.cat(y.chunk(4, 1)[::-1], 1),
    "slice with a step in space": lambda y: y[:, :, ::2, 1::2],
    "negative slice": lambda y: y[:, -(y.shape[1] // 2) :],
    "index in space": lambda y: y[:, :, torch.tensor([3, 1, 1])],
    "select in space": lambda y: y[:, :, 0, -1][:, :, None, None],
    "pad": lambda y: F.pad(y, (1, 2, 0, 1), value=0.5),
    "replication pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="replicate"),
    "circular pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "negative pad": lambda y: F.pad(y, (-1, 0, 0, -2)),
    # space
    "lp_pool": lambda y: F.lp_pool2d(y, 2.0, 2),
    "max_pool with indices": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    "max_pool1d": lambda y: F.max_pool1d(y.flatten(2), 4).unsqueeze(-1),
    "adaptive_avg_pool1d": lambda y: F.adaptive_avg_pool1d(y.flatten(2), 4).unsqueeze(-1),
    "adaptive_max_pool3d": lambda y: F.adaptive_max_pool3d(y.unsqueeze(2), (1, 2, 3)).squeeze(2),
    "bicubic": lambda y: F.interpolate(y, (9, 9), mode="bicubic"),
    "antialias": lambda y: F.interpolate(y, (4, 4), mode="bilinear", antialias=True),
    "nearest-exact": lambda y: F.interpolate(y, scale_factor=1.5, mode="nearest-exact"),
    "grid_sample": lambda y: F.grid_sample(
        y,
        torch.linspace(-1, 1, 32).view(1, 4, 4, 2).expand(len(y), -1, -1, -1).to(y),
        align_corners=False,
    ),
    # numbers over space, and scans along it
    "max along space": lambda y: y.max(2, keepdim=True).values,
    "var_mean": lambda y: sum(torch.var_mean(y, (2, 3), keepdim=True)),
    "logsumexp": lambda y: y.logsumexp((2, 3), keepdim=True),
    "norm": lambda y: y / y.norm(dim=(2, 3), keepdim=True),
    "prod": lambda y: y.prod(3, keepdim=True),
    "median": lambda y: y.median(3, keepdim=True)[0],
    "softmax in space": lambda y: y * y.flatten(2).softmax(-1).view_as(y),
    "cumsum in space": lambda y: y.cumsum(2),
    "topk in space": lambda y: y.topk(2, 3)[0],
    "sort in space": lambda y: y.sort(3)[0],
    "normalize in space": lambda y: F.normalize(y, dim=3),
    # elementwise
    "masked_fill": lambda y: y.masked_fill(y > 0.2, 0.7),
    "where": lambda y: torch.where(y > 0, y, torch.tensor(0.3, dtype=y.dtype)),
    "and": lambda y: y * ((y > -0.5) & (y < 0.5)),
    "lerp": lambda y: torch.lerp(y, y.sin(), 0.3),
    "addcmul": lambda y: torch.addcmul(y, y.sin(), y.cos(), value=0.5),
    "clamp": lambda y: y.clamp(y.mean((2, 3), keepdim=True)),
    "rsub": lambda y: 1 - y,
    "scalar first": lambda y: 2 / (y + 3),
    "zeros_like": lambda y: torch.zeros_like(y) + torch.ones_like(y) * y,
    "full_like": lambda y: torch.full_like(y, 0.5) * y,
    "new_zeros": lambda y: y + y.new_zeros(y.shape),
    "inplace": lambda y: y.clone().mul_(2).add_(1).clamp_(-1, 1),
    "rrelu": lambda y: F.rrelu(y),
    "setitem of halves": lambda y: set_half(y),
    "glu": lambda y: F.glu(y, 1),
}
"""Uses after which channels go, one by one or several together."""


def set_half(y: torch.Tensor) -> torch.Tensor:
    """Write into the first half of the channels."""
    y = y.clone()
    half = y.shape[1] // 2
    y[:, :half] = y[:, half:] * 2
    return y


UNITS = {
    **dict.fromkeys(("pixel_shuffle", "chunk of four"), 2),
    **dict.fromkeys(("glu", "tensor_split", "setitem of halves", "narrow of halves"), 4),
    "negative slice": 4,
}
"""Units, where there are fewer than channels."""

STAY: dict[str, tuple[Use, str]] = {
    "roll": (lambda y: y.roll(1, 1), "roll along it"),
    "roll of all": (lambda y: y.roll(1), "roll along it"),
    "select": (lambda y: y * y[:, 2:3] * y[:, 1].unsqueeze(1), "picked by number"),
    "index": (lambda y: y[:, [3, 1, 2]], "picked by number"),
    "index_select": (lambda y: y.index_select(1, torch.tensor([1, 0])), "picked by number"),
    "argmax": (lambda y: y.argmax(1, True).to(y.dtype), "argmax over channels"),
    "max": (lambda y: y - y.max(1, True)[0], "max over channels"),
    "max of all": (lambda y: y / y.abs().max(), "max over channels"),
    "topk": (lambda y: y.topk(3, 1)[0], "topk over channels"),
    "sort": (lambda y: y.sort(1)[0], "sort over channels"),
    "normalize": (lambda y: F.normalize(y, dim=1), "over channels"),
    "cosine": (lambda y: y * F.cosine_similarity(y, y.roll(1, 2), 1)[:, None], ""),
    "gram": (lambda y: (y.flatten(2) @ y.flatten(2).mT).unsqueeze(-1), "conv2d along it"),
    "between pixels": (
        lambda y: (y.flatten(2).mT @ y.flatten(2)).unsqueeze(1),
        "a product of activations sums over it",
    ),
    "merged with others": (
        lambda y: (y[:, :, None] * y[:, None].relu()).flatten(1, 2),
        "merges it with other channels",
    ),
    "step": (lambda y: y[:, ::2], "a slice with a step"),
    "unequal chunks": (lambda y: y.chunk(3, 1)[0], "chunk into unequal parts"),
    "pooled along": (lambda y: F.avg_pool1d(y.mean(3).mT, 2).mT.unsqueeze(-1), "along it"),
    "unfold": (lambda y: F.unfold(y, 2).unsqueeze(-1), "unknown operation im2col"),
    "gather": (
        lambda y: y.gather(1, torch.zeros(len(y), 2, 6, 6, dtype=torch.long)),
        "this use of gather",
    ),
    "constant": (lambda y: y + torch.arange(8.0).view(8, 1, 1).to(y), "with a fixed width"),
    "fixed width": (lambda y: y.reshape(-1, 2, 4, 6, 6).sum(1), "over channels"),
    "unbound": (lambda y: torch.stack(y.unbind(1)[::-1], 1), "this use of unbind"),
    "zeros of a width": (
        lambda y: torch.cat([y, torch.zeros(y.shape).to(y)], 1),
        "without some of them forward fails",
    ),
}
"""Uses after which channels stay, and why."""


@pytest.mark.parametrize("name", GO)
def test_channels_go(name: str) -> None:
    graph = exact_graph(Net(GO[name]))
    assert written(graph) == (UNITS.get(name, WIDTH), None)
    assert not graph.unknown


@pytest.mark.parametrize("name", STAY)
def test_channels_stay(name: str) -> None:
    use, reason = STAY[name]
    units, why = written(exact_graph(Net(use)))
    assert (units, reason in str(why)) == (0, True), (units, why)


class Whole(nn.Module):
    """A network whose forward is a function of it and of its inputs."""

    def __init__(self, forward: Callable[[Whole, torch.Tensor], torch.Tensor], **layers: nn.Module):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


def prunable(model: nn.Module, example: Example = IMAGES) -> dict[str, int]:
    """Return the units that may go, by group."""
    return {group.name: group.size for group in exact_graph(model, example).prunable}


def test_norm_groups_of_a_module_without_weights() -> None:
    norm = nn.GroupNorm(4, 8, affine=False)
    model = Whole(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=norm, b=conv(8, 2))
    assert prunable(model) == {"a": 4}


def test_norms_without_weights_say_their_width() -> None:
    norm = nn.InstanceNorm2d(8)
    model = Whole(lambda m, x: m.b(m.n(m.a(x))), a=conv(3, 8), n=norm, b=conv(8, 2))
    graph = exact_graph(model)
    kept = graph.everything()
    kept[next(g for g in graph.prunable if g.name == "a").units[:3]] = False
    assert shrink(model, graph, kept).n.num_features == 5


def test_a_chunk_takes_no_width() -> None:
    """Its number of parts is the module's, and by chance the length of a part."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(x.chunk(self.parts, 1))

    model = Whole(lambda m, x: m.b(m.p(m.a(x))), a=conv(3, 16), p=Parts(), b=conv(4, 2))
    assert prunable(model) == {"a": 4}


def test_bilinear_keeps_what_it_touches() -> None:
    def forward(model: Whole, x: torch.Tensor) -> torch.Tensor:
        y = model.a(x).mean((2, 3))
        return model.head(model.pair(y, y).relu())

    model = Whole(forward, a=conv(3, 8), pair=nn.Bilinear(8, 8, 6), head=nn.Linear(6, 2))
    assert "a" not in prunable(model)


def test_an_embedding_of_numbers() -> None:
    def forward(model: Whole, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return model.b(model.a(x) * model.e(label)[:, :, None, None])

    model = Whole(forward, a=conv(3, 8), e=nn.Embedding(5, 8), b=conv(8, 2))
    example = Example((*IMAGES.args, torch.tensor([1, 4])))
    assert prunable(model, example) == {"a": 8}


def test_addmm_and_baddbmm() -> None:
    def forward(model: Whole, x: torch.Tensor) -> torch.Tensor:
        y = model.a(x).mean((2, 3))
        y = torch.addmm(model.l.bias, y, model.l.weight.t()).relu()
        return model.head(torch.baddbmm(y[:, None], y[:, None], model.m[None].expand(2, -1, -1)))

    model = Whole(forward, a=conv(3, 8), l=nn.Linear(8, 6), head=nn.Linear(6, 2))
    model.m = nn.Parameter(torch.randn(6, 6))
    assert prunable(model)["a"] == 8


@pytest.mark.parametrize(
    "equation", ["nchw,cd->ndhw", "nchw,dc->ndhw", "nchw,cd->nhwd", "nchw, dc -> nd hw"]
)
def test_einsum(equation: str) -> None:
    def forward(model: Whole, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum(equation, model.a(x), model.w)
        return model.b(y.movedim(-1, 1) if equation.endswith("d") else y)

    model = Whole(forward, a=conv(3, 8), b=conv(6, 2))
    model.w = nn.Parameter(torch.randn(*((8, 6) if "cd" in equation else (6, 8))))
    assert prunable(model) == {"a": 8, "w": 6}


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("nchw,ndhw->ncd", "along it"),
        ("nchw,nchw->nhw", "einsum sums over it"),
        ("ncii,ncij->ncj", "this use of einsum"),
        ("...hw,...hw->...h", "this use of einsum"),
    ],
)
def test_einsum_of_activations(equation: str, reason: str) -> None:
    def forward(model: Whole, x: torch.Tensor) -> torch.Tensor:
        y = model.a(x)
        y = torch.einsum(equation, y, y.relu())
        return model.b(y[:, None] if equation.endswith("nhw") else y[..., None])

    channels = 1 if equation.endswith("nhw") else 8
    model = Whole(forward, a=conv(3, 8), b=nn.Conv2d(channels, 2, 1))
    units, why = written(exact_graph(model))
    assert (units, reason in str(why)) == (0, True), why


def test_a_convolution_with_a_weight_that_is_no_parameter() -> None:
    """A weight that the input makes is no reader; what it touches stays and its cost counts."""

    def forward(model: Whole, x: torch.Tensor) -> torch.Tensor:
        y = model.a(x)
        kernel = model.k(y.mean((2, 3))).view(-1, 8, 1, 1)
        return model.b(F.conv2d(y, kernel)).mean((2, 3))

    model = Whole(forward, a=conv(3, 8), k=nn.Linear(8, 16), b=nn.Conv2d(4, 2, 1))
    units, why = written(exact_graph(model))
    assert units == 0
    assert why == "this use of conv2d"
