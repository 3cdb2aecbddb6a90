"""What the pruned network may cost, and how channels are chosen and removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compress.files.documents import Section


class Budget(Section):
    """What the pruned network may cost."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: Literal["macs", "params", "channels", "removed", "latency"]
    """MACs, parameters, channels kept, channels removed, or time."""
    value: float = Field(gt=0, le=1e15)
    """A share of the dense network up to 1, or an absolute number above 1."""
    unit: Literal["", "ms"] = ""
    """Of an absolute latency, which may be below 1."""

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            kind, separator, number = value.partition("=")
            if not separator:
                raise ValueError("a budget is written KIND=VALUE, for example macs=0.5")
            number, unit = number.strip(), ""
            if "," in number:
                raise ValueError("a budget is one KIND=VALUE, and here are several: give one")
            if number.endswith("ms"):
                number, unit = number.removesuffix("ms").rstrip(), "ms"
            if not _is_number(number):
                raise ValueError("the value of a budget is a number, as in macs=0.5")
            return {"kind": kind.strip(), "value": number, "unit": unit}
        if isinstance(value, int | float | list):
            raise ValueError("a budget is written KIND=VALUE, for example macs=0.5")
        return value

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.kind == "removed" and self.value != int(self.value):
            raise ValueError("removed counts channels and must be a whole number")
        if self.unit and self.kind != "latency":
            raise ValueError(f"{self.kind} is not counted in {self.unit}")
        if self.kind == "latency" and self.value > 1 and not self.unit:
            raise ValueError(
                "a latency is a share of the dense network's up to 1, or milliseconds, as "
                "latency=4.2ms"
            )
        return self

    @property
    def absolute(self) -> bool:
        """Whether the value is no share of the dense network."""
        return bool(self.unit) or self.value > 1 or self.kind == "removed"

    def __str__(self) -> str:
        whole = self.value.is_integer()
        return f"{self.kind}={int(self.value) if whole else self.value}{self.unit}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


CRITERION_NUMBERS = {
    0: "taylor-weight",
    1: "random",
    2: "weight-norm",
    3: "weight-abs",
    6: "taylor-output",
    10: "obd",
    11: "taylor-gate-so",
    22: "taylor-gate",
    23: "taylor-gate-fg",
    30: "bn-scale",
    31: "bn-taylor",
}
"""The criteria by the numbers that the research code of Molchanov et al. 2019 gives them."""


LOSS_CHANGES = (
    *("taylor-gate", "taylor-parts", "taylor-gate-fg", "taylor-gate-so"),
    *("obd", "bn-taylor"),
)
"""The criteria that estimate how much the loss changes without a unit."""

SEED2019_PRUNE: dict[str, Any] = {
    "step_size": 100,
    "interval": 30,
    "first_interval_extra": 1,
    "momentum": 0.9,
    "channel_multiple": 1,
    "hessian_samples": 0,
    "residual_gate": "block",
    "rank": "importance",
    "as_published": True,
    "min_channels": 1,
    "min_share": 0.0,
}
"""Pruning settings of Molchanov et al., CVPR 2019, and the rules of their research code."""


class PruneConfig(Section):
    """How channels are chosen and removed."""

    renamed: ClassVar = {"recipe": "preset"}
    presets: ClassVar = {"seed2019": SEED2019_PRUNE}
    added_to_presets: ClassVar = {
        "first_interval_extra": 0,
        "hessian_samples": 4,
        "rank": "importance",
    }

    preset: Literal["default", "seed2019"] = "default"
    """``seed2019`` sets what the research code of Molchanov et al. 2019 does; explicit keys win."""
    criterion: str = "taylor-gate"
    """Name of the importance formula, or the original's number of it; see docs/criteria.md."""
    importance_from: Path | None = None
    """File with the importance of every channel, or a mask; nothing is scored then."""
    budget: Budget = Budget(kind="macs", value=0.5)
    """``macs=0.5``, ``params=0.4``, ``channels=0.72``, ``latency=0.5`` (shares), ``latency=4.2ms``
    or ``removed=3200``."""
    latency_table: Path | None = None
    """Latency table that a latency budget is planned with: a file, or the name of one that is
    shipped, as ``v100``; measured if none is given."""
    latency_cache: Path | None = None
    """Folder of the tables that are measured; by default in the run directory."""
    latency_runtime: str = "onnxruntime-cpu"
    """What serves the network whose time is the budget: measured in it."""
    latency_batch: int = Field(default=1, ge=1)
    """Images of a call whose time is the budget."""
    latency_precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """In which the network is served; in a configuration that says nothing, the export's."""
    latency_threads: int = Field(default=1, ge=1)
    """Threads of a runtime on the CPU whose time is the budget."""
    latency_rounds: int = Field(default=3, ge=0)
    """How often the limit is corrected at most when the measured latency misses the budget."""
    steps: int = Field(default=30, ge=1)
    """Pruning steps; the cost falls linearly from dense to the budget over them."""
    step_size: int | None = Field(default=None, ge=1)
    """Channels removed by each step instead, until the budget is reached."""
    max_steps: int | None = Field(default=None, ge=1)
    """Pruning ends after so many pruning steps, even if the budget is not reached."""
    start_after: int = Field(default=0, ge=0)
    """Pruning steps at the start that measure importance and remove nothing."""
    max_loss: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Nothing is removed while the mean training loss since the last pruning step is above."""
    interval: int = Field(default=10, ge=1)
    """Minibatches between two pruning steps, over which importance is averaged."""
    first_interval_extra: int = Field(default=0, ge=0)
    """Minibatches by which the first interval is longer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Exponential average of importance over pruning steps; 0 uses the last interval alone."""
    fixed_criteria: bool = False
    """Score once: the importance of the first interval decides every pruning step."""
    normalize: Literal["none", "l2"] = "none"
    """``l2`` divides the importance of a group by its L2 norm before groups are compared."""
    rank: Literal["auto", "importance", "importance-per-mac"] = "auto"
    """What is compared: the importance, or its ratio to the MACs that the removal saves; ``auto``:
    that ratio where MACs are the budget and the criterion, not corrected otherwise, estimates the
    change of the loss."""
    flops_regularization: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Importance taken off for every MAC that the removal of a channel saves."""
    hessian_samples: int = Field(default=4, ge=0)
    """Random vectors per minibatch that estimate a Hessian's diagonal; 0 computes it exactly."""
    channel_multiple: int = Field(default=1, ge=1)
    """Widths stay multiples of this number; in a configuration that says nothing, the target's."""
    relax_multiple: bool = False
    """Whether the multiple is halved where the budget, if not of time, cannot be reached with it;
    in a configuration that does not say the multiple, it is."""
    min_channels: int = Field(default=4, ge=1)
    """No group is pruned below this many channels."""
    min_share: float = Field(default=0.1, ge=0, le=1)
    """No group is pruned below this share of its dense width."""
    residual_gate: Literal["read", "block"] = "read"
    """Where the gate of a residual stream sits: at its readers, or after add+ReLU of each block."""
    as_published: bool = False
    """Repeat the slips of the original's criteria, for comparison; see docs/criteria.md."""
    blocks: Literal["auto"] | bool = "auto"
    """Whether branches of residual additions may go as a whole; ``auto``: where it buys time."""
    keep_dense: tuple[str, ...] = ()
    """Groups and blocks that are never pruned, by the names of ``compress inspect``, or ``*``."""
    only: tuple[str, ...] = ()
    """If not empty, the only groups that are pruned."""
    shrink_at: float = Field(default=0.3, gt=0, le=1)
    """Shrink during pruning whenever this share of the current MACs is masked away."""
    bn_batches: int = Field(default=50, ge=0)
    """Training batches from which BatchNorm statistics are re-estimated after the last shrink."""
    proof_images: int = Field(default=1, ge=1)
    """Real images on which masked and shrunk are compared in float64."""

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.max_steps is not None and self.max_steps <= self.start_after:
            raise ValueError(
                f"max_steps = {self.max_steps} ends pruning before start_after = "
                f"{self.start_after} lets it begin"
            )
        if self.flops_regularization and self.rank == "importance-per-mac":
            raise ValueError(
                "flops_regularization and rank = 'importance-per-mac' exclude each other"
            )
        if self.blocks is True and not self.can_score_blocks:
            raise ValueError(
                "blocks = true needs criterion = 'taylor-gate' or 'taylor-parts', residual_gate = "
                "'read' and normalize = 'none': nothing else compares blocks with channels"
            )
        if self.budget.kind == "latency" and self.step_size is not None:
            raise ValueError("step_size removes channels, and a latency budget chooses by time")
        return self

    @property
    def can_score_blocks(self) -> bool:
        """Whether the criterion tells what a block is worth beside channels."""
        summable = self.criterion in ("taylor-gate", "taylor-parts")
        scored = summable and self.importance_from is None
        return scored and self.normalize == "none" and self.residual_gate == "read"

    @property
    def ranks_per_mac(self) -> bool:
        """Whether importance is compared by the MACs that a removal saves."""
        if self.rank != "auto":
            return self.rank == "importance-per-mac"
        corrected = self.normalize != "none" or self.flops_regularization > 0
        changes = self.criterion in LOSS_CHANGES and self.importance_from is None
        by_macs = self.budget.kind == "macs" and self.step_size is None
        return by_macs and changes and not corrected

    @property
    def with_blocks(self) -> bool:
        """Whether blocks may go."""
        if self.blocks == "auto":
            return self.budget.kind == "latency" and self.can_score_blocks
        return self.blocks

    @property
    def scored_by(self) -> str:
        """The criterion in the form that is needed: where much goes at once, sums are compared."""
        sums = self.with_blocks or (self.budget.kind == "latency" and self.can_score_blocks)
        return "taylor-parts" if sums else self.criterion

    @field_validator("importance_from", "latency_table", "latency_cache")
    @classmethod
    def _wherever_it_is_resumed(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        shipped = info.field_name == "latency_table" and value and value.parts == (value.stem,)
        return value if shipped else value and value.absolute()

    @field_validator("criterion", mode="before")
    @classmethod
    def _name_of_number(cls, value: Any) -> Any:
        number = str(value).strip()
        if not number.lstrip("-").isdigit():
            return value
        if int(number) not in CRITERION_NUMBERS:
            known = ", ".join(f"{n} {name}" for n, name in CRITERION_NUMBERS.items())
            raise ValueError(f"no criterion has this number: choose one of {known}")
        return CRITERION_NUMBERS[int(number)]
