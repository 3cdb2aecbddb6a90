"""Deployment targets: what the runtime on the other side understands, and what pays there.

A target is a TOML file under ``configs/targets``, or one of the user's own at any path. It holds
ceilings, not wishes: an export that does not fit them is refused before it leaves this machine.
Pruning rounds widths for it, export and engine building obey it, ``compress doctor`` compares
this machine with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from compress.config.deployment import Precision
from compress.errors import ConfigError
from compress.files.documents import Section, read_toml, validated

VersionRange = Annotated[
    str, Field(pattern=r"^(>=|<=|==|!=|<|>)\d+(\.\d+)*(,(>=|<=|==|!=|<|>)\d+(\.\d+)*)*$")
]
"""Versions as pip writes them: ``>=8.5,<10.5``."""


Component = Literal[
    "python", "torch", "onnxruntime", "cudnn", "tensorrt", "tensorrt_rtx", "gpu", "driver"
]
"""What a target can ask of a machine."""


class Requirement(Section):
    """One thing that a machine must have to serve a target."""

    versions: VersionRange | None = None
    """Versions that fit, of a GPU its compute capability; None where another key decides: ``sm``
    for torch, ``tensorrt`` for TensorRT."""
    why: str
    """Half a sentence: what happens with another version."""
    mend: str
    """What brings it, as a command line where there is one."""


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
    """CUDA compute capability of the GPU; None where there is none, or where any will do."""
    builder: Literal["tensorrt", "tensorrt_rtx"] | None = None
    """The library that builds engines for it; None where engines have no part."""
    tensorrt: VersionRange | None = None
    """Releases of the builder that build for it."""
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d+$")], ...] = ()
    """For TensorRT-RTX: those that an engine is built for; none leaves that to the library."""
    onnxruntime: tuple[str, ...] = Field(min_length=1)
    """ONNX Runtime's execution providers, the wanted one first."""
    channel_multiple: dict[Precision, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """For every precision that the target computes, the multiple at which widths run best."""
    precisions: tuple[Precision, ...] = Field(min_length=1)
    """The precisions that pay there, the best first."""
    warnings: dict[Precision, str] = Field(default_factory=dict)
    """For a precision that is allowed and rarely pays: one sentence that says why."""
    int8_form: Literal["tensorrt", "onnxruntime"] = "tensorrt"
    """Whose kernels the 8 bits of a file are written for; see docs/export.md."""
    two_input_reduce_mean: bool = True
    """Whether ReduceMean may read its axes from a second input, as it does since opset 18."""
    requires: dict[Component, Requirement] = Field(default_factory=dict)
    """What a machine must have, beside what every machine must."""

    @field_validator("onnxruntime")
    @classmethod
    def _check_providers(cls, providers: tuple[str, ...]) -> tuple[str, ...]:
        for provider in providers:
            if not provider.endswith("ExecutionProvider"):
                raise ValueError(f"{provider!r} is no provider; they end in ExecutionProvider")
        return providers

    @model_validator(mode="after")
    def _check(self) -> Target:
        if (self.builder is None) != (self.tensorrt is None):
            raise ValueError("builder and tensorrt are given both or neither")
        if self.compute_capabilities and self.builder != "tensorrt_rtx":
            raise ValueError(
                "compute_capabilities are for the builder tensorrt_rtx; others have sm"
            )
        for precision in (*self.precisions, *self.warnings):
            if precision not in self.channel_multiple:
                raise ValueError(f"channel_multiple has no {precision}")
        return self

    def require(self, precision: Precision) -> None:
        """Refuse a precision that the target does not compute.

        Raises:
            ConfigError: it does not.
        """
        if precision not in self.channel_multiple:
            raise ConfigError(
                f"target {self.name} does not compute {precision}; "
                f"it computes {', '.join(self.channel_multiple)}"
            )

    def rounding(self, precision: Precision) -> int:
        """Return the multiple of channels for a precision, and for the one that pays best."""
        best = self.channel_multiple[self.precisions[0]]
        return max(best, self.channel_multiple.get(precision, 1))


def load_target(name: str) -> Target:
    """Read a target: a bare word names one under ``configs/targets``, anything else is a path.

    Raises:
        ConfigError: no such target, text that is not TOML, an unknown key or an unfit value.
    """
    document = {"name": Path(name).stem, **read_toml(name, "targets")}
    return validated(Target, document, source=f"target {name}")
