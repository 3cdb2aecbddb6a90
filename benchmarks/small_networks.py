"""A network of which every peer of this project can tell how its channels hang together."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class SmallResNet(ResNet):
    """ResNet-20 of He et al. 2016 for small images, but with projections (option B).

    Args:
        num_classes: number of logits.
        blocks: in each of the three stages; five of them are ResNet-32.
    """

    def __init__(self, num_classes: int = 10, blocks: int = 3) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(BasicBlock, 16, blocks)
        self.layer2 = self._make_layer(BasicBlock, 32, blocks, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        del self.layer4, self.maxpool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, (N, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
