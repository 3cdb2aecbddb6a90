"""Which networks can be pruned, and by how much, beside Torch-Pruning; and whether it is exact.

    python benchmarks/network_coverage.py [--networks torchvision:resnet18] [--size 224] [--json]
    python benchmarks/network_coverage.py --speed [--networks torchvision:resnet50]
    python benchmarks/network_coverage.py --smoke

Every network has random weights. "ours" is the share of MACs left when every group that the
analysis and its trial leave free really loses half of its units; "TP" the same with Torch-Pruning
(magnitude, half of every layer, uniform), counted by torch in the same way. "seconds" are those of
capture, analysis and trial. "difference" is the largest of masked and shrunk outputs in float64,
relative to the largest output. "counted" says whether MACs and parameters equal torch's own count,
dense and shrunk. "ONNX" is the largest relative difference of the exported shrunk network in ONNX
Runtime from torch, by the first of its outputs; "nodes" how many it has, and how many OnnxSlim
leaves of them. A dash for Torch-Pruning says that it failed, or
took more than a minute. ``--speed`` prints seconds and peak memory of each step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import torch
from onnxruntime import InferenceSession
from pruners import halved, halved_by_torch_pruning
from rich.console import Console
from rich.table import Table
from smoke import parsed
from torch import nn

from compress.config.targets import load_target
from compress.errors import CompressError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.capture import Example, capture
from compress.networks.outputs import PickOutput
from compress.networks.shrink import difference_of, largest_difference, shrink
from compress.networks.trial import tried_graph, try_out
from export.onnx.check import INPUT
from export.onnx.trace import onnx_from_network

TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large"),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0"),
    *("squeezenet1_1", "vgg11", "vgg11_bn", "wide_resnet50_2"),
    *("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    *("retinanet_resnet50_fpn.backbone", "ssd300_vgg16.backbone"),
)
TIMM = (
    *("resnet50d", "seresnet50", "resnetv2_50", "mobilenetv2_100", "mobilenetv3_small_100"),
    *("efficientnet_b0", "tf_efficientnet_lite0", "regnety_002", "repvgg_a0", "darknet53"),
    *("cspresnet50", "convnext_atto", "ghostnet_100", "dla34", "hrnet_w18_small", "xception41"),
    *("res2net50_26w_4s", "skresnet18", "mixnet_s", "rexnet_100", "fbnetc_100", "lcnet_050"),
    *("gernet_s", "resnest14d", "selecsls42", "vovnet39a", "dpn48b", "inception_v4"),
    *("mobileone_s0", "mobilenetv4_conv_small", "eca_resnet33ts", "gcresnet33ts"),
    *("edgenext_xx_small", "focalnet_tiny_srf", "poolformer_s12", "nf_resnet26"),
    *("resnetv2_50x1_bit", "tinynet_e", "hardcorenas_a", "ese_vovnet19b_dw", "resmlp_12_224"),
)
NETWORKS = (*(f"torchvision:{n}" for n in TORCHVISION), *(f"timm:{n}" for n in TIMM))
FIXED = {"timm:resmlp_12_224": 224}
"""Networks that take images of one size."""
LEAST = {"torchvision:inception_v3": 96, "torchvision:ssd300_vgg16.backbone": 300}
"""Smaller images would vanish on their way."""


PATIENCE = 60
"""Seconds."""


@dataclass(frozen=True)
class Row:
    """One network."""

    network: str
    ours: float | None
    torch_pruning: float | None
    seconds: float
    difference: float | None
    counted: bool
    onnx: float | None
    nodes: float | None = None
    slim: float | None = None
    note: str = ""


def build(name: str) -> nn.Module:
    """Return a network with random weights whose statistics are none of ones and zeros."""
    torch.manual_seed(0)
    library, _, architecture = name.partition(":")
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(architecture)
    else:
        from torchvision import models

        architecture, _, part = architecture.partition(".")
        options: dict[str, Any] = {}
        if architecture in ("googlenet", "inception_v3"):
            options = {"init_weights": False}
        elif architecture.startswith(("fcn", "deeplab", "lraspp", "retinanet", "ssd")):
            options = {"weights_backbone": None}
        model = models.get_model(architecture, weights=None, **options)
        model = model.get_submodule(part) if part else model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for label, parameter in model.named_parameters():
        if parameter.dim() < 2 or "gamma" in label or "layer_scale" in label:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def size_of(name: str, size: int) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of a network."""
    side = FIXED.get(name, max(size, LEAST.get(name, 0)))
    return (3, side, side)


def measure(name: str, size: int) -> Row:
    """Analyse, halve, compare and export one network."""
    shape = size_of(name, size)
    model, one = build(name), Example.images(shape, count=1)
    start = time.perf_counter()
    graph = tried_graph(model, shape)
    seconds = time.perf_counter() - start
    kept = halved(graph)
    smaller = shrink(model, graph, kept)
    dense, now = cost.measured(model, one), cost.measured(smaller, one)
    everything = graph.everything()
    counted = all(
        function(graph, mask) == measured[key]
        for key, function in (("macs", cost.macs), ("params", cost.params))
        for mask, measured in ((everything, dense), (kept, now))
    )
    exported: list[onnx.ModelProto] = []
    reasons = {g.frozen for g in graph.frozen} - {"network input", "network output"}
    return Row(
        network=name,
        ours=now["macs"] / dense["macs"],
        torch_pruning=tolerant(lambda: torch_pruning(model, one) / dense["macs"]),
        seconds=seconds,
        difference=difference_of(model, graph, kept, one),
        counted=counted,
        onnx=tolerant(lambda: onnx_difference(smaller, shape, exported)),
        nodes=tolerant(lambda: len(exported[0].graph.node)),
        slim=tolerant(lambda: len(slim(exported[0]).graph.node)),
        note="; ".join(sorted(str(reason) for reason in reasons)),
    )


def torch_pruning(model: nn.Module, example: Example) -> int:
    """Return the MACs that are left when Torch-Pruning halves every layer."""
    pruned = halved_by_torch_pruning(copy.deepcopy(model), example.args[0])
    return cost.measured(pruned, example)["macs"]


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what OnnxSlim makes of a model."""
    import onnxslim

    slimmed: onnx.ModelProto = onnxslim.slim(model)
    return slimmed


def onnx_difference(
    model: nn.Module, size: tuple[int, int, int], exported: list[onnx.ModelProto]
) -> float:
    """Export for a V100 and return the largest relative difference from torch in ONNX Runtime.

    The file is added to ``exported``.
    """
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(images)
    if isinstance(output, dict):
        first = next(iter(output))
        model.register_forward_hook(PickOutput(first))
        output = output[first]
    proto = onnx_from_network(model, target=load_target("v100"), input_size=size)
    onnx.checker.check_model(proto, full_check=True)
    exported.append(proto)
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT: images.numpy()})
    return largest_difference([output], [torch.from_numpy(found)])


@contextmanager
def within(seconds: int, *, of_cpu: bool = False) -> Iterator[None]:
    """Raise TimeoutError when the work inside takes longer, by the clock or by the processor's."""
    timer, number = signal.ITIMER_REAL, signal.SIGALRM
    if of_cpu:
        timer, number = signal.ITIMER_PROF, signal.SIGPROF

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(number, late)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)


def tolerant(work: Callable[[], float]) -> float | None:
    """Return a figure, or None where another library or the exporter gives none in PATIENCE."""
    try:
        with within(PATIENCE):
            return work()
    except Exception:  # whatever another library raises is its answer
        return None


def speed(name: str, size: int) -> dict[str, Any]:
    """Time capture, analysis and trial of one network."""
    model, example = build(name), Example.images(size_of(name, size))
    clock = [time.perf_counter()]
    capture(model, example)
    clock.append(time.perf_counter())
    graph = analyse(model, example)
    clock.append(time.perf_counter())
    try_out(model, graph, example)
    clock.append(time.perf_counter())
    captured, analysed, tried = (b - a for a, b in itertools.pairwise(clock))
    return {
        "network": name,
        "capture_s": captured,
        "capture_and_analysis_s": analysed,
        "trial_s": tried,
        "together_s": analysed + tried,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def shown(value: float | None, form: str) -> str:
    """Return a figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--speed", action="store_true", help="seconds and memory of each step")
    parser.add_argument("--json", action="store_true")
    return parsed(parser, arguments, networks="torchvision:squeezenet1_1", size=64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    options = parse(arguments)
    warnings.simplefilter("ignore")
    names = options.networks.split(",")
    if options.speed:
        torch.set_num_threads(1)
        for name in names:
            print(json.dumps(speed(name, options.size)))
        return
    heads = ("network", "ours", "TP", "seconds", "difference", "counted", "ONNX", "nodes", "dense")
    table = Table(*heads)
    for name in names:
        try:
            row = measure(name, options.size)
        except CompressError as error:  # it may want larger images; the others go on
            row = Row(name, None, None, 0.0, None, False, None, note=str(error))
        if options.json:  # a line for each, as it comes
            print(json.dumps(asdict(row)), flush=True)
            continue
        figures = shown(row.ours, ".3f"), shown(row.torch_pruning, ".3f"), f"{row.seconds:.1f}"
        proofs = shown(row.difference, ".0e"), str(row.counted), shown(row.onnx, ".0e")
        nodes = f"{shown(row.nodes, '.0f')} ({shown(row.slim, '.0f')})"
        table.add_row(name, *figures, *proofs, nodes, row.note)
    if not options.json:
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
