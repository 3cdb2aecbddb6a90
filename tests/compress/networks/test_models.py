from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import some_slow
from torch import nn
from torch.nn import functional as F

from compress.config import ModelConfig
from compress.errors import EnvironmentUnfitError, ModelError
from compress.networks.architectures import ChannelPad, CifarBlock
from compress.networks.models import (
    BUILTIN_MODELS,
    CIFAR_DEPTHS,
    SMALL_IMAGE_MODELS,
    TORCHVISION_MODELS,
    build_model,
    build_network,
    ends_in,
    head_of,
    is_builtin,
)
from compress.networks.registries import READERS, usual_images

# As torchvision documents them for 1000 classes, and for 10 classes as the layers of the papers add
# up to; test_cost.py and test_architectures.py have the sums.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "resnext50_32x4d": 25_028_904,
    "vgg11_bn": 132_868_840,
    "vgg16_bn": 138_365_992,
    "densenet121": 7_978_856,
    "densenet201": 20_013_928,
    "resnet8": 75_290,
    "resnet14": 172_506,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "preact_resnet18": 11_172_170,
    "preact_resnet50": 23_513_162,
    "preact_resnet101": 42_505_290,
    "preact_resnet152": 58_148_938,
    "vgg11_bn_cifar": 9_228_362,
    "vgg16_bn_cifar": 14_724_042,
    "densenet_cifar": 769_162,
    "lenet": 62_006,
}


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10 if name in SMALL_IMAGE_MODELS else 1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", some_slow(BUILTIN_MODELS))
def test_logits(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=13).eval()
        assert model(torch.empty(2, 3, 40, 40)).shape == (2, 13)


@pytest.mark.parametrize(("name", "depth"), CIFAR_DEPTHS.items())
def test_depth_is_the_number_of_layers_with_weights(name: str, depth: int) -> None:
    model = build_model(name, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.parametrize("in_channels", [1, 2, 4])
def test_cifar_resnets_take_any_number_of_image_channels(in_channels: int) -> None:
    with torch.device("meta"):
        model = build_model("resnet20", num_classes=3, in_channels=in_channels).eval()
        assert model(torch.empty(2, in_channels, 28, 28)).shape == (2, 3)


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_grey_images_are_refused_for_torchvision(name: str) -> None:
    with pytest.raises(ModelError, match="takes images of 3 channels and the data has 1: choose"):
        build_model(name, num_classes=10, in_channels=1)


@pytest.mark.parametrize(("stride", "front", "back"), [(1, 0, 0), (2, 8, 8), (2, 3, 5), (3, 0, 1)])
@pytest.mark.parametrize("size", [7, 8])
def test_channel_pad_by_a_plain_formula(stride: int, front: int, back: int, size: int) -> None:
    x = torch.randn(2, 4, size, size)
    actual = ChannelPad(stride, front, back)(x)
    side = -(-size // stride)
    expected = torch.zeros(2, front + 4 + back, side, side)
    for channel in range(4):
        for row in range(side):
            for column in range(side):
                expected[:, front + channel, row, column] = x[
                    :, channel, row * stride, column * stride
                ]
    assert torch.equal(actual, expected)


def test_a_block_by_its_formula() -> None:
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut), with fresh BatchNorm in eval mode."""
    block = CifarBlock(4, 8, stride=2).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    norm = 1 / (1 + block.bn1.eps) ** 0.5
    y = F.relu(norm * F.conv2d(x, block.conv1.weight, stride=2, padding=1))
    y = norm * F.conv2d(y, block.conv2.weight, padding=1)
    zeros = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    expected = F.relu(y + torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_only_the_first_block_of_a_stage_changes_the_shortcut() -> None:
    model = build_model("resnet20", num_classes=10)
    pads = {n: m for n, m in model.named_modules() if isinstance(m, ChannelPad)}
    assert {n: (m.stride, m.front, m.back) for n, m in pads.items()} == {
        "layer2.0.shortcut": (2, 8, 8),
        "layer3.0.shortcut": (2, 16, 16),
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet500", "resnet50"), ("resnet-20", "resnet20"), ("wide_resnet50", "wide_resnet50_2")],
)
def test_an_unknown_name_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=f"{name!r}: did you mean {nearest!r}") as caught:
        build_model(name, num_classes=10)
    assert "package.module:callable" in str(caught.value)


def test_a_name_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(ModelError) as caught:
        build_model("vgg", num_classes=10)
    assert all(name in str(caught.value) for name in BUILTIN_MODELS)


# The user's own


OWN = """
from torch import nn

def both(num_classes, in_channels):
    conv = nn.Conv2d(in_channels, num_classes, 1)
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def neither():
    return nn.Identity()

def anything(**options):
    assert options == {"num_classes": 5, "in_channels": 2}
    return nn.Identity()

class Network(nn.Linear):
    def __init__(self, num_classes, width=3):
        super().__init__(width, num_classes)

def wrong():
    return "a string"

def needs(depth):
    return nn.Identity()

def fails(num_classes):
    raise RuntimeError("out of luck")

def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(num_classes))

def deep(num_classes, depth=1, kind="plain"):
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)), nn.Linear(3, num_classes))

number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in the folder that a command is called from."""
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "broken_models.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "mistyped_models.py").write_text("def build(:\n")
    (tmp_path / "raising_models.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


@pytest.mark.usefixtures("own")
def test_a_callable_gets_what_it_takes() -> None:
    model = build_model("own_models:both", num_classes=5, in_channels=2)
    assert model(torch.randn(1, 2, 4, 4)).shape == (1, 5)
    linear = build_model("own_models:Network", num_classes=5, in_channels=2)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (3, 5)
    assert isinstance(build_model("own_models:neither", num_classes=5), nn.Identity)
    build_model("own_models:anything", num_classes=5, in_channels=2)
    assert not is_builtin(ModelConfig(name="own_models:both"))
    assert all(is_builtin(ModelConfig(name=name)) for name in BUILTIN_MODELS)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_models:build", "cannot import 'no_such_models' for --model no_such_models:build"),
        ("broken_models:build", "cannot import 'broken_models'.*nothing_of_this_name"),
        ("mistyped_models:build", "cannot import 'mistyped_models'"),
        ("raising_models:build", "cannot import 'raising_models'.*division by zero"),
        (":build", "cannot import ''"),
        ("own_models:absent", "'own_models' has no callable 'absent'"),
        ("own_models:", "'own_models' has no callable ''"),
        ("own_models:number", "'own_models' has no callable 'number'"),
        ("own_models:wrong", "own_models:wrong returned str, not a torch.nn.Module"),
        ("own_models:needs", "own_models:needs failed: TypeError: .*depth"),
        ("own_models:fails", "own_models:fails failed: RuntimeError: out of luck"),
        ("own_models:lazy", r"a LazyConv2d \(0\), whose width only .* as nn.Conv2d takes them"),
    ],
)
def test_a_callable_that_is_none(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, num_classes=5)


@pytest.mark.usefixtures("own")
def test_options_of_a_callable() -> None:
    model = ModelConfig(name="own_models:deep", options={"depth": 3})
    assert len(list(build_network(model, num_classes=5).children())) == 4
    for option, message in (("num_classes", "follows from the data"), ("width", "unexpected key")):
        wrong = ModelConfig(name="own_models:deep", options={option: 1})
        with pytest.raises(ModelError, match=message):
            build_network(wrong, num_classes=5)


def test_options_of_a_built_in_network() -> None:
    options = {"zero_init_residual": True}
    network = build_network(ModelConfig(name="resnet18", options=options), num_classes=2)
    assert not network.get_parameter("layer1.0.bn2.weight").any()
    with pytest.raises(ModelError, match=r"resnet20 failed: TypeError: .*zero_init_residual"):
        build_network(ModelConfig(name="resnet20", options=options), num_classes=2)


# timm and torchvision


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_timm(channels: int) -> None:
    model = build_model("timm:test_resnet", num_classes=5, in_channels=channels)
    assert type(model).__module__.startswith("timm.")
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)
    tagged = build_model("timm:test_resnet.r160_in1k", num_classes=5)
    assert tagged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_network_of_torchvision(name: str) -> None:
    model = build_model(f"torchvision:{name}", num_classes=5).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ModelError, match="takes images of 3 channels and the data has 1"):
        build_model(f"torchvision:{name}", num_classes=5, in_channels=1)


def test_a_backbone_fetches_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetched)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    model = ModelConfig(name="torchvision:lraspp_mobilenet_v3_large", output="out")
    network = build_network(model, num_classes=4).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 4, 64, 64)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:test_resne", "did you mean timm:test_resnet"),
        ("timm:hf-hub:timm/test_resnet", "did you mean"),
        ("timm:local-dir:/tmp/x", "see timm.list_models"),
        ("timm:../x", "see timm.list_models"),
        ("timm:", "see timm.list_models"),
        ("torchvision:resnet51", "did you mean torchvision:resnet"),
        ("torchvision:https://x/y.pth", "see torchvision.list_models"),
    ],
)
def test_a_name_that_a_registry_does_not_know(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        build_model(name, num_classes=5)


@pytest.mark.parametrize("option", sorted(READERS))
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:squeezenet1_1", "resnet18"])
def test_an_option_that_would_read_weights(name: str, option: str) -> None:
    model = ModelConfig(name=name, options={option: "x"})
    with pytest.raises(ModelError, match=f"model.options.{option} would read weights"):
        build_network(model, num_classes=5)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentUnfitError, match=r"pip install 'compress-convnets\[timm\]'"):
        build_model("timm:test_resnet", num_classes=5)


def test_how_published_weights_saw_images() -> None:
    assert usual_images("timm:resnet10t") == {
        "image_size": 176,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop": 0.875,
    }
    assert usual_images("timm:test_resnet.r160_in1k")["mean"] == (0.5, 0.5, 0.5)
    seen = usual_images("torchvision:resnet50")
    assert (seen["image_size"], seen["interpolation"]) == (224, "bilinear")
    assert seen["crop"] == pytest.approx(224 / 232)
    assert usual_images("torchvision:fcn_resnet50") == {}
    assert usual_images("resnet50") == usual_images("own_models:both") == {}


def test_the_ends_of_a_network_that_is_not_built_in() -> None:
    assert ends_in(ModelConfig(name="timm:test_resnet")) == ("conv1.0", "fc")
    assert ends_in(ModelConfig(name="torchvision:squeezenet1_1")) == ("features.0", "classifier.1")
    head = head_of(ModelConfig(name="resnet20"), num_classes=3)
    assert head == {"fc.weight", "fc.bias"}


def test_quantized_weights() -> None:
    model = ModelConfig(name="torchvision:quantized_resnet18", options={"quantize": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that quantization moves to another package
        with pytest.raises(ModelError, match=r"is quantized \(conv1.weight\): prune"):
            build_network(model, num_classes=5)
    assert build_model("torchvision:quantized_resnet18", num_classes=5)  # float, to be quantized
