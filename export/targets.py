"""Deployment targets: what the runtime on the other side understands.

A target is a TOML file under ``configs/targets``, or one of the user's own at any path. It holds
ceilings, not wishes: an export that does not fit them is refused before it leaves this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from compress.config import Section, read_toml, validated

Precision = Literal["fp32", "fp16", "int8"]
"""The number format of weights and activations in the deployed network."""

_VERSION_RANGE = r"^(>=|<=|==|!=|<|>)\d+(\.\d+)*(,(>=|<=|==|!=|<|>)\d+(\.\d+)*)*$"


class Target(Section):
    """One deployment target."""

    name: str
    """The file's name without its suffix, unless the file says otherwise."""
    description: str
    """One line for people."""
    opset: int = Field(ge=13)
    """Newest ONNX operator set that the runtime reads."""
    ir_version: int = Field(ge=7)
    """Newest ONNX file format that the runtime reads."""
    sm: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    """CUDA compute capability of the GPU; None for a target without one."""
    tensorrt: str | None = Field(default=None, pattern=_VERSION_RANGE)
    """TensorRT releases that build for it, as ``>=8.5,<10.5``; None where TensorRT has no part."""
    onnxruntime: tuple[str, ...] = Field(min_length=1)
    """ONNX Runtime's execution providers, the wanted one first."""
    channel_multiple: dict[Precision, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """For every precision that the target offers, the multiple at which widths run best."""
    two_input_reduce_mean: bool = True
    """Whether ReduceMean may read its axes from a second input, as it does since opset 18."""

    @field_validator("onnxruntime")
    @classmethod
    def _check_providers(cls, providers: tuple[str, ...]) -> tuple[str, ...]:
        for provider in providers:
            if not provider.endswith("ExecutionProvider"):
                raise ValueError(f"{provider!r} is no provider; they end in ExecutionProvider")
        return providers


def load_target(name: str) -> Target:
    """Read a target: a bare word names one under ``configs/targets``, anything else is a path.

    Raises:
        ConfigError: no such target, text that is not TOML, an unknown key or an unfit value.
    """
    document = {"name": Path(name).stem, **read_toml(name, "targets")}
    return validated(Target, document, source=f"target {name}")
