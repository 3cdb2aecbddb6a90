"""The milliseconds of a network are the sum of those of its layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import some_slow

from compress.latency.times import network_milliseconds
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.layers import LayerShape

LAYERED = ["resnet18", "mobilenet_v2", "resnext50_32x4d", "efficientnet_b0"]


class MultiplyAdds:
    """A table whose milliseconds are multiply-adds, which the closed form counts as well."""

    fixed = 0.0

    def milliseconds(self, shape: LayerShape, read: np.ndarray, written: np.ndarray) -> np.ndarray:
        each = math.prod(shape.kernel) * math.prod(shape.output_size)
        return np.asarray(each * written * read / shape.groups_at(int(read)), dtype=np.float64)


@pytest.mark.parametrize("name", some_slow(LAYERED, LAYERED[1:]))
def test_layers_hold_every_multiply_add_of_a_network(name: str) -> None:
    torch.manual_seed(0)
    graph = analyse(torchvision.models.get_model(name), (3, 64, 64))
    rng = np.random.default_rng(0)
    for share in (1.0, 0.7, 0.3):
        kept = graph.everything()
        for group in graph.prunable:
            left = max(1, round(share * group.size))
            kept[rng.permutation(group.units)[left:]] = False
        expected = cost.macs(graph, kept)
        assert network_milliseconds(graph, MultiplyAdds(), kept) == expected
        smaller = graph.removed(kept)
        assert [layer.widths(kept) for layer in smaller.layers] == [
            layer.widths(kept) for layer in graph.layers
        ]


def test_a_layer_says_what_it_is() -> None:
    layers = analyse(torchvision.models.resnet18(), (3, 64, 64)).layers
    said = {layer.weight: str(layer.shape) for layer in layers}
    assert said["conv1.weight"] == "conv2d 7x7 stride 2x2 at 32x32 + relu"
    assert said["layer1.0.conv2.weight"] == "conv2d 3x3 at 16x16 + add + relu"
    assert said["layer2.0.downsample.0.weight"].endswith("1x1 stride 2x2 at 8x8 + add + relu")
    assert said["fc.weight"] == "linear at 1"
