"""This project's own definitions of networks: classics for small images, any number of channels.

Each is built with the number of classes and of image channels, and takes square or oblong images of
16 pixels and more. Their widths are those that are published for 32x32 images.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.jit import TracerWarning, is_tracing  # type: ignore[attr-defined]
from torch.nn import functional as F


class ChannelPad(nn.Module):
    """The parameter-free shortcut of He et al. 2016, section 3.3, option A.

    Takes every ``stride``-th pixel and adds ``front`` and ``back`` channels of zeros:
    (N, C, H, W) -> (N, front + C + back, H / stride, W / stride).
    """

    def __init__(self, stride: int, front: int, back: int) -> None:
        super().__init__()
        self.stride, self.front, self.back = stride, front, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subsample and pad."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Show the settings when printed."""
        return f"stride={self.stride}, front={self.front}, back={self.back}"


class FitTo(nn.Module):
    """Bilinear resize of images to ``side`` x ``side`` pixels; images of that size pass unchanged.

    (N, C, H, W) -> (N, C, side, side). It stands in front of layers that need a known size.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resize where it is needed."""
        if self._fits(x):  # an exported network then holds no resize at all
            return x
        return F.interpolate(x, (self.side, self.side), mode="bilinear")

    def _fits(self, x: torch.Tensor) -> bool:
        if not is_tracing():  # type: ignore[no-untyped-call]
            return x.shape[-2:] == (self.side, self.side)
        with warnings.catch_warnings():  # that the size of images is fixed is what is wanted
            warnings.simplefilter("ignore", TracerWarning)
            return x.shape[-2:] == (self.side, self.side)

    def extra_repr(self) -> str:
        """Show the setting when printed."""
        return f"side={self.side}"


# Residual networks


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        widened = outputs - inputs
        same = stride == 1 and widened == 0
        self.shortcut = (
            nn.Identity() if same else ChannelPad(stride, widened // 2, widened - widened // 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The 6n+2 layer ResNet for 32x32 images of He et al. 2016, section 4.2.

    Args:
        depth: 6n + 2; 20 gives 0.27 M parameters and 40.6 M MACs at 3x32x32.
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions (He et al. 2016, "Identity Mappings").

    A shortcut that changes the size reads what the first convolution reads; any other is the input
    itself.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _projection(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        y = self.relu(self.bn1(x))
        z = self.conv2(self.relu(self.bn2(self.conv1(y))))
        return z + (x if self.shortcut is None else self.shortcut(y))


class PreActBottleneck(nn.Module):
    """The same with three convolutions of 1x1, 3x3 and 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _projection(inputs, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""
        y = self.relu(self.bn1(x))
        z = self.conv2(self.relu(self.bn2(self.conv1(y))))
        z = self.conv3(self.relu(self.bn3(z)))
        return z + (x if self.shortcut is None else self.shortcut(y))


class PreActResNet(nn.Module):
    """The pre-activation ResNet of He et al. 2016, "Identity Mappings", with a stem of 3x3.

    The stages are those of the ImageNet networks and the stem that of the CIFAR ones: no pooling
    before the first stage. BatchNorm and ReLU follow the last block, as in the paper's appendix.

    Args:
        block: PreActBlock, or PreActBottleneck for 50 layers and more.
        counts: blocks per stage of 64, 128, 256 and 512 channels; (2, 2, 2, 2) of PreActBlock is
            PreAct-ResNet-18, with 11.17 M parameters and 0.56 G MACs at 3x32x32.
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        block: type[PreActBlock | PreActBottleneck],
        counts: tuple[int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [64 * block.expansion << stage for stage in range(4)]
        self.conv1 = _conv(in_channels, 64, 3)
        self.layer1 = self._stage(block, 64, 64, counts[0], stride=1)
        self.layer2 = self._stage(block, widths[0], 128, counts[1], stride=2)
        self.layer3 = self._stage(block, widths[1], 256, counts[2], stride=2)
        self.layer4 = self._stage(block, widths[2], 512, counts[3], stride=2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialise(self)

    @staticmethod
    def _stage(
        block: type[PreActBlock | PreActBottleneck],
        inputs: int,
        width: int,
        count: int,
        *,
        stride: int,
    ) -> nn.Sequential:
        outputs = block.expansion * width
        first = block(inputs, width, stride)
        return nn.Sequential(first, *(block(outputs, width, 1) for _ in range(count - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))


# Chains


class LeNet(nn.Module):
    """LeNet-5 of LeCun et al. 1998, with ReLU and max-pooling, which are usual today.

    Two convolutions of 5x5, three linear layers, no BatchNorm: 61,706 parameters at 1 channel and
    10 classes. The first linear layer reads 16x5x5 values, which is what images of 32x32 leave;
    images of any other size, such as MNIST's 28x28, are resized to 32x32 on entry.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.fit = FitTo(32)
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.pool(self.relu(self.conv1(self.fit(x))))
        x = torch.flatten(self.pool(self.relu(self.conv2(x))), 1)
        return self.fc(self.relu(self.fc2(self.relu(self.fc1(x)))))


class CifarVGG(nn.Module):
    """VGG with BatchNorm and one linear layer, as papers on pruning train it on CIFAR-10.

    The convolutions are those of Simonyan and Zisserman 2015, without biases, which BatchNorm makes
    idle. The mean over positions takes the place of the last max-pooling, and one linear layer the
    place of three (Liu et al. 2017, "Network Slimming").

    Args:
        widths: channels of the convolutions of each stage; stages are divided by max-pooling.
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(
        self, widths: tuple[tuple[int, ...], ...], num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for number, stage in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if number else []
            for width in stage:
                layers += [_conv(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


# Densely connected networks


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3; the result is appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, inputs + growth, H, W)."""
        y = self.conv1(self.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(self.relu(self.bn2(y)))], 1)


class CifarDenseNet(nn.Module):
    """DenseNet-BC for 32x32 images of Huang et al. 2017, section 4: three blocks, compression 0.5.

    Args:
        depth: 6n + 4; 100 with a growth of 12 gives 0.77 M parameters and 0.29 G MACs at 3x32x32.
        growth: channels that each layer appends.
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(
        self, depth: int, growth: int, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        count, width = (depth - 4) // 6, 2 * growth
        self.conv1 = _conv(in_channels, width, 3)
        stages: list[nn.Module] = []
        for number in range(3):
            if number:
                stages.append(self._transition(width, width // 2))
                width //= 2
            layers = range(width, width + count * growth, growth)
            stages.append(nn.Sequential(*(DenseLayer(inputs, growth) for inputs in layers)))
            width += count * growth
        self.features = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        _initialise(self)

    @staticmethod
    def _transition(inputs: int, outputs: int) -> nn.Sequential:
        norm, relu = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        return nn.Sequential(norm, relu, _conv(inputs, outputs, 1), nn.AvgPool2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.relu(self.bn(self.features(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width at stride 1, for BatchNorm to follow."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Conv2d | None:
    """Return the shortcut of a block that changes the size; None where it is the identity."""
    return None if stride == 1 and inputs == outputs else _conv(inputs, outputs, 1, stride)


def _initialise(model: nn.Module) -> None:
    """Draw the weights of convolutions as He et al. 2015 do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
