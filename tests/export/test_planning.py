"""Training in 8 bits rounds what the exported file rounds, to the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from conftest import lived_in, some_slow
from networks import NETWORKS
from onnx_models import arrays, copied, exported, producers, run
from torch import nn
from torch.nn import functional as F
from torchvision import models

from compress.errors import ModelError
from compress.networks.capture import Example
from compress.networks.models import build_model
from compress.quantization.calls import watch
from compress.quantization.network import QuantizedNetwork
from compress.quantization.scales import half_up
from export.precision.calibration import calibrate
from export.precision.int8 import quantised_tensors, to_int8
from export.precision.placement import FORMS
from export.precision.planning import LAYERS, plan_rounding

SIZE = (3, 12, 12)


class MobileNet(nn.Module):
    """Inverted residuals with ReLU6, dropout in place and a pooling to one pixel."""

    def __init__(self) -> None:
        super().__init__()
        settings = [[1, 8, 1, 1], [3, 8, 2, 2]]
        self.inner = models.MobileNetV2(4, 0.5, settings, round_nearest=4, dropout=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class SelfGated(nn.Module):
    """Hard swish, squeeze and excitation, padding of its own, a concatenation, two poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.left, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.norm(self.stem(F.pad(x, (1, 1, 1, 1)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([x * gate, self.left(x)], 1)
        return self.head(F.adaptive_avg_pool2d(F.avg_pool2d(F.silu(x), 2), 1).flatten(1))


class Branches(nn.Module):
    """Additions in place, a projection, and a branch that adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.still = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.side, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        nn.init.zeros_(self.still.weight)
        nn.init.zeros_(self.still.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.norm(self.main(x))
        y += self.side(x)
        y = F.relu(y, inplace=True)
        y = y + self.still(y)
        return self.head(F.relu(y).mean((2, 3)))


def resnet20() -> nn.Module:
    return build_model("resnet20", num_classes=4)


CASES = {**NETWORKS, **{each.__name__: each for each in (MobileNet, SelfGated, Branches, resnet20)}}
QUICK = {"Plain", "MobileNet", "Branches"}
DEEP = {"resnet20"}
"""In which one number that is rounded to its other neighbour moves many of those behind it."""
SHALLOW = some_slow([name for name in CASES if name not in DEEP], CASES.keys() - QUICK)
ALL = some_slow(CASES, CASES.keys() - QUICK)


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(CASES[name]()).eval()


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def planned(
    network: nn.Module, form: str, opset: int = 17
) -> tuple[QuantizedNetwork, onnx.ModelProto]:
    """Return a network that rounds, and its INT8 file, with ranges that clip a little."""
    proto = exported(network, SIZE, opset)
    plan = plan_rounding(network, proto, Example((images(2),)), form=form).plan
    tensors = quantised_tensors(proto, FORMS[form])
    found = calibrate(
        proto.SerializeToString(), tensors, lambda: [images().numpy()], method="max", threads=1
    )
    rounding = QuantizedNetwork(network, plan, {name: 0.9 * r for name, r in found.items()}).eval()
    file = copied(proto)
    rest = "fp16" if plan.half else "fp32"
    to_int8(file, rounding.ranges, form=FORMS[form], rest=rest)  # type: ignore[arg-type]
    return rounding, file


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHALLOW)
def test_the_file_computes_what_torch_does_while_it_trains(name: str, form: str) -> None:
    rounding, file = planned(network_of(name), form)
    with torch.no_grad():
        ours, plain = rounding(images()).numpy(), rounding.network(images()).numpy()
    theirs = run(file, images().numpy(), optimised=False)
    scale = np.abs(ours).max()
    errors = np.abs(ours - theirs).max(1) / scale
    # Sums in another order may round one number in thousands to its other neighbour.
    assert np.median(errors) < 1e-5, errors
    assert errors.max() < 0.05
    assert np.median(np.abs(ours - plain).max(1)) / scale > 1e-3  # which rounding is not


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("opset", [17, pytest.param(20, marks=pytest.mark.slow)])
def test_scales_and_rounded_weights_are_those_in_the_file(name: str, form: str, opset: int) -> None:
    rounding, file = planned(network_of(name), form, opset)
    held, made = arrays(file), producers(file)
    written = {
        node.input[0]: held[node.input[1]]
        for node in file.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in held
    }
    used = rounding.scales.detach()
    if rounding.plan.half:
        used = half_up(used)
    names = [activation.name for activation in rounding.plan.activations]
    scales = {
        name.removesuffix("_fp16"): scale.astype(np.float32) for name, scale in written.items()
    }
    assert scales == dict(zip(names, used.numpy(), strict=True))
    seen = watch(rounding, Example((images(2),))).calls
    calls = [call for call in seen if call.operator in LAYERS]
    weights = [
        held_weight(node, made, held)
        for node in file.graph.node
        if node.op_type in ("Conv", "Gemm")
    ]
    if rounding.plan.half:  # whose weights are stored in half precision
        return
    assert len(calls) == len(weights)
    for call, expected in zip(calls, weights, strict=True):
        ours = call.arguments[1].detach().numpy()
        np.testing.assert_allclose(ours, expected, rtol=3e-7, atol=0)


def held_weight(
    node: onnx.NodeProto, made: dict[str, onnx.NodeProto], held: dict[str, np.ndarray]
) -> np.ndarray:
    """Return the weight that a layer of a file computes with."""
    if node.input[1] in held:
        return held[node.input[1]]
    small = made[made[node.input[1]].input[0]]
    weight, scale = held[small.input[0]], held[small.input[1]]
    axis = next(entry.i for entry in small.attribute if entry.name == "axis")
    factors = scale.reshape([-1 if place == axis else 1 for place in range(weight.ndim)])
    rounded = np.rint(weight / factors)
    assert np.abs(rounded).max() <= 127
    return rounded * factors


class Scaled(nn.Module):
    """A layer whose result is multiplied, which its file has within its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.full((8, 1, 1), 1.5))
        self.last, self.head = nn.Conv2d(8, 4, 3), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.last(F.relu(self.stem(x) * self.scale))).mean((2, 3)))


def test_a_weight_that_is_not_a_layers_own_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"Scaled cannot be trained in 8 bits: .*'/stem/Conv'"):
        planned(Scaled().eval(), "tensorrt")


class Undecided(nn.Module):
    """Runs one layer more for bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.twice = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(x if not self.twice else x + 1).mean((2, 3)))


def test_another_path_through_the_network_is_noticed() -> None:
    network = Undecided().eval()
    rounding, _ = planned(network, "tensorrt")
    network.twice = True
    with pytest.raises(ModelError, match=r"Undecided called .* operators where the plan"):
        rounding(images(2))


def test_running_the_network_with_rounding_leaves_it_alone() -> None:
    network = network_of("MobileNet")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rounding, _ = planned(network, "onnxruntime")
    with torch.no_grad():
        plain = network(images(2))
        rounding.train()(images(2))
        torch.testing.assert_close(network(images(2)), plain, rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_every_weight_shift_and_scale_gets_a_gradient() -> None:
    rounding, _ = planned(network_of("MobileNet"), "onnxruntime")
    rounding(images(4)).square().sum().backward()
    for name, parameter in rounding.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
