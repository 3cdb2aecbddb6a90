"""Networks that round to 8 bits where their exported files will, to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.config.targets import load_target
from compress.networks.capture import Example
from compress.networks.copies import copied
from compress.networks.wrappers import unwrapped
from compress.quantization.network import QuantizedNetwork
from export.checkpoint_to_onnx import LOOKED_AT, Samples, measured_ranges, samples_of
from export.module_to_onnx import traced_call
from export.onnx.trace import onnx_from_network
from export.precision.calibration import range_of, require_calibration
from export.precision.planning import plan_rounding

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from compress.config import RunConfig
    from compress.data.batches import ImageData
    from compress.quantization.plan import Plan


def quantized(
    model: nn.Module,
    example: Any,
    *,
    target: str = "cpu",
    ranges: Mapping[str, float] | None = None,
    dynamic_batch: bool = True,
) -> QuantizedNetwork:
    """Return a network with the rounding of its 8-bit file around it, to be trained.

    It shares the network's parameters, and has one more: the scales of activations, which are
    learned. ``export_onnx`` writes it in 8 bits.

    Args:
        model: trained, or pruned and trained on, wherever it lies.
        example: real inputs, as ``export_onnx`` takes them; without ``ranges``, those of
            activations are measured on them, so give a whole batch.
        target: name or path of the deployment target that the file is for.
        ranges: of activations, as ``QuantizedNetwork.ranges`` gave them.
        dynamic_batch: as ``export_onnx`` will be told.

    Raises:
        ModelError: the network cannot be written as such a file, or the file rounds what is no
            tensor of the network.
        ConfigError: the target does not compute INT8.
    """
    aim = load_target(target)
    aim.require("int8")
    network = unwrapped(model)
    apart = copied(network, "cpu")
    traced = traced_call(apart, example, aim, dynamic_batch=dynamic_batch)
    args, kwargs = traced.call.arguments(traced.call.tensors)
    planned = plan_rounding(
        *(apart, traced.proto, Example(args, kwargs)), form=aim.int8_form, names=traced.inputs
    )
    if ranges is None:
        ranges = {name: range_of(values) for name, values in planned.values.items()}
    return QuantizedNetwork(network, planned.plan, ranges)


def quantizer_for(config: RunConfig, data: ImageData) -> RunQuantizer | None:
    """Return what a run's pruned network is finetuned in 8 bits with; None if it is not.

    Raises:
        ConfigError: the target of the run's export does not compute INT8.
    """
    if not config.finetune.quantize:
        return None
    load_target(config.export.target).require("int8")
    return RunQuantizer(config, data)


class RunQuantizer:
    """Makes the pruned network of a run round where its exported file will.

    Args:
        config: the run's; the target of its export decides the form.
        data: the images that ranges are measured on.
    """

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        self._config, self._data = config, data

    def __call__(self, network: nn.Module, *, calibrated: bool = True) -> QuantizedNetwork:
        """Return the network with rounding around it, as ``Quantizer`` says.

        Raises:
            ModelError: its file cannot be written, or rounds what is none of its tensors.
            DataError: there are too few images, or all are of one class.
        """
        config, samples = self._config.export, samples_of(self._data, self._config)
        proto, plan = self._planned(network, samples)
        if calibrated:
            ranges, _ = measured_ranges(
                *(proto, load_target(config.target), samples),
                config=config,
                num_classes=self._data.num_classes,
            )
        else:
            ranges = {each.name: 1.0 for each in plan.activations}
        return QuantizedNetwork(network, plan, ranges)

    def check(self, network: nn.Module) -> None:
        """Find out whether a network could be given to this.

        Raises:
            ModelError, DataError: as when it is.
        """
        samples = samples_of(self._data, self._config)
        labels = [int(label) for batch in samples.training() for label in batch.labels]
        asked = self._config.export.calibration_images
        require_calibration(labels, self._data.num_classes, asked)
        self._planned(network, samples)

    def _planned(self, network: nn.Module, samples: Samples) -> tuple[onnx.ModelProto, Plan]:
        """Return the network's file in float32, and where it will round."""
        import torch

        target = load_target(self._config.export.target)
        apart = copied(network, "cpu").eval()
        proto = onnx_from_network(apart, target=target, input_size=self._data.input_size)
        images = Example((torch.from_numpy(samples.validation[:LOOKED_AT]),))
        return proto, plan_rounding(apart, proto, images, form=target.int8_form).plan
