"""A part of a network is pruned while the whole of it trains: the backbone of a detector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection import retinanet_resnet50_fpn, ssdlite320_mobilenet_v3_large

from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.shrink import shrink_
from compress.networks.trial import tried_graph

TARGETS = [
    {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[8.0, 16.0, 60.0, 56.0]]), "labels": torch.tensor([2])},
]


@pytest.mark.slow
@pytest.mark.parametrize("build", [retinanet_resnet50_fpn, ssdlite320_mobilenet_v3_large])
def test_the_backbone_of_a_detector_shrinks_and_the_whole_trains(build) -> None:
    torch.manual_seed(0)
    detector = build(weights=None, weights_backbone=None, num_classes=3)
    detector.transform.fixed_size = None
    detector.transform.min_size, detector.transform.max_size = (64,), 64
    backbone, example = detector.backbone, Example.images((3, 64, 64))
    graph = tried_graph(backbone, example)
    kept = graph.everything()
    for group in graph.prunable:
        kept[group.units[group.size // 2 :]] = False
    shapes = [tuple(t.shape) for t in backbone(example.args[0]).values()]

    left = shrink_(backbone, graph, kept)

    assert cost.macs(left, kept) < 0.5 * cost.macs(graph, graph.everything())
    assert cost.macs(left, kept) == cost.measured(backbone, example)["macs"]
    assert [tuple(t.shape) for t in backbone(example.args[0]).values()] == shapes
    images = list(torch.rand(2, 3, 64, 64))
    losses = detector.train()(images, TARGETS)
    sum(losses.values()).backward()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    assert len(gradients) > 50
    assert all(np.isfinite(float(g.abs().sum())) for g in gradients)
