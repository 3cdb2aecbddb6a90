"""Networks that round to 8 bits where their exported files will, to be trained."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from compress.config.targets import load_target
from compress.networks.capture import Example
from compress.quantization.network import QuantizedNetwork
from export.checkpoint_to_onnx import LOOKED_AT, measured_ranges, samples_of
from export.onnx.trace import onnx_from_network
from export.precision.planning import plan_rounding

if TYPE_CHECKING:
    from torch import nn

    from compress.config import RunConfig
    from compress.data.batches import ImageData


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
        """Return the network with rounding around it, as ``compress.runs.prune.Quantizer`` says.

        Raises:
            ModelError: its file cannot be written, or rounds what is none of its tensors.
            DataError: there are too few images, or all are of one class.
        """
        import torch

        config = self._config.export
        target, samples = load_target(config.target), samples_of(self._data, self._config)
        apart = copy.deepcopy(network).cpu().eval()
        proto = onnx_from_network(apart, target=target, input_size=self._data.input_size)
        images = Example((torch.from_numpy(samples.validation[:LOOKED_AT]),))
        plan = plan_rounding(apart, proto, images, form=target.int8_form).plan
        if calibrated:
            ranges, _ = measured_ranges(
                *(proto, target, samples), config=config, num_classes=self._data.num_classes
            )
        else:
            ranges = {each.name: 1.0 for each in plan.activations}
        return QuantizedNetwork(network, plan, ranges)
