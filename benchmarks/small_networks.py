"""Small networks that benchmarks train; every peer knows what hangs together in the first."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import Conv2dNormActivation


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


class SmallMobileNetV2(MobileNetV2):
    """MobileNetV2 (Sandler et al. 2018) for small images: seven blocks, three with a shortcut.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, num_classes: int = 10) -> None:
        # expansion, width, blocks, stride of the first
        stages = [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 2, 2], [4, 64, 2, 2]]
        super().__init__(num_classes=num_classes, inverted_residual_setting=stages, dropout=0.0)
        self.features[0][0].stride = (1, 1)
        last = self.features[-1][0].in_channels
        self.features[-1] = Conv2dNormActivation(
            last, 256, kernel_size=1, activation_layer=nn.ReLU6
        )
        self.classifier = nn.Linear(256, num_classes)
