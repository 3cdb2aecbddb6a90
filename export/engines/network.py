"""From an ONNX file to a TensorRT network with its precision and its optimization profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError, ModelError
from export.onnx.check import INPUT

if TYPE_CHECKING:
    from compress.config import ExportConfig, Precision
    from export.engines.api import TensorRT

_FLAGS: dict[Precision, tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("FP16", "INT8")}
"""What TensorRT 8 may compute in; INT8 alone would leave the rest of the network in FP32."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of one optimization profile, each (N, C, H, W)."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        """Return the shapes by name."""
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}


def parse_network(tensorrt: TensorRT, builder: Any, path: Path) -> Any:
    """Parse an ONNX file into a new network.

    Raises:
        ModelError: the parser refuses it; the message holds the parser's own words.
    """
    network = builder.create_network(tensorrt.network_flags)
    parser = tensorrt.module.OnnxParser(network, tensorrt.logger)
    tensorrt.messages.clear()
    if not parser.parse_from_file(str(path)):
        said = dict.fromkeys(str(parser.get_error(index)) for index in range(parser.num_errors))
        words = "; ".join(" ".join(text.split()) for text in said) or tensorrt.messages.reason()
        raise ModelError(f"{tensorrt.title} cannot parse {path}: {words.rstrip('.')}")
    return network


def set_precision(tensorrt: TensorRT, settings: Any, precision: Precision) -> None:
    """Allow a precision where the ONNX file's own types do not already decide it."""
    if tensorrt.has_strongly_typed:
        return
    for name in _FLAGS[precision]:
        settings.set_flag(getattr(tensorrt.module.BuilderFlag, name))


def set_chips(tensorrt: TensorRT, settings: Any, capabilities: Sequence[str]) -> None:
    """Build for such compute capabilities, where the builder does not build for its own GPU.

    Raises:
        ConfigError: this release knows one of them not.
    """
    if not capabilities:
        return
    kinds = getattr(tensorrt.module, "ComputeCapability", None)
    names = [f"SM{capability.replace('.', '')}" for capability in capabilities]
    for name, capability in zip(names, capabilities, strict=True):
        if not hasattr(kinds, name):
            raise ConfigError(
                f"{tensorrt.title} does not build for SM {capability}: take it out of the target's "
                "compute_capabilities"
            )
    settings.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        settings.set_compute_capability(getattr(kinds, name), index)


def set_allocation(tensorrt: TensorRT, settings: Any) -> None:
    """Rule out that a run allocates memory, which no CUDA graph holds, where a release may do so.

    None of the networks that are exported here has shapes that depend on values.
    """
    if tensorrt.has_user_allocation:
        settings.set_flag(tensorrt.module.BuilderFlag.REQUIRE_USER_ALLOCATION)


def profile_shapes(network: Any, config: ExportConfig) -> list[Shapes]:
    """Return one profile for each batch size, or the one of ``batch = "dynamic"``.

    Raises:
        ModelError: the network has not the one input of our exports, with a symbolic batch.
    """
    ends = [network.get_input(index) for index in range(network.num_inputs)]
    shape = tuple(ends[0].shape) if len(ends) == 1 else ()
    if len(shape) != 4 or shape[0] != -1 or min(shape[1:]) < 1:
        found = ", ".join(f"{end.name} {tuple(end.shape)}" for end in ends) or "none"
        raise ModelError(
            f"an engine is built for one input {INPUT!r} of shape (-1, C, H, W), whose batch is "
            f"symbolic, and the network has {found}; export it again"
        )
    sizes: Sequence[tuple[int, int, int]] = (
        [config.dynamic_batch]
        if config.batch == "dynamic"
        else [(size, size, size) for size in dict.fromkeys(config.batch)]
    )
    return [Shapes(*((size, *shape[1:]) for size in triple)) for triple in sizes]


def add_profiles(builder: Any, settings: Any, network: Any, profiles: Sequence[Shapes]) -> None:
    """Give a build its optimization profiles, in this order."""
    name = network.get_input(0).name
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if settings.add_optimization_profile(profile) < 0:
            raise ModelError(f"TensorRT refuses the optimization profile {shapes.to_dict()}")
