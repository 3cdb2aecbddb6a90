"""Budgets: what the pruned network must hold, read from TOML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, get_args

from pydantic import Field, field_validator

from compress.config import Precision
from compress.documents import Section, apply_setting, read_toml, validated
from compress.errors import ConfigError


class AccuracyBudget(Section):
    """On the validation images."""

    max_drop_pp: float | None = Field(default=None, ge=0, le=100)
    """Most top-1 accuracy that may be lost, in percentage points."""


class LatencyBudget(Section):
    """On the machine of the report."""

    max_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio of median latencies, pruned over dense."""
    p99_ms: float | None = Field(default=None, gt=0)
    """Largest 99th percentile of the pruned network, in milliseconds."""
    batch_sizes: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Batch sizes that are judged; default every measured one."""


class RatioBudget(Section):
    """On a cost that is counted, not measured."""

    max_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio, pruned over dense."""


class ParityBudget(Section):
    """On the agreement of ONNX Runtime with torch."""

    max_relative_error: dict[Precision, Annotated[float, Field(gt=0)]] | None = None
    """Largest difference of the logits over the largest logit, of either network: one limit for
    each precision, or one number for all."""

    @field_validator("max_relative_error", mode="before")
    @classmethod
    def _for_all(cls, value: Any) -> Any:
        one = isinstance(value, int | float | str) and not isinstance(value, bool)
        return dict.fromkeys(get_args(Precision), value) if one else value


class Budgets(Section):
    """What the pruned network must hold; a key that is absent is not judged."""

    accuracy: AccuracyBudget = AccuracyBudget()
    latency: LatencyBudget = LatencyBudget()
    macs: RatioBudget = RatioBudget()
    params: RatioBudget = RatioBudget()
    size: RatioBudget = RatioBudget()
    """On the ONNX file, in bytes."""
    parity: ParityBudget = ParityBudget()


def load_budgets(name: str, settings: Iterable[str] = ()) -> Budgets:
    """Read budgets: a bare word names a file under ``configs/budgets``, anything else is a path.

    ``section.key=value`` settings are laid over what the file says.

    Raises:
        ConfigError: no such file, an unknown key, an unfit value, or no budget at all.
    """
    document = read_toml(name, "budgets")
    for setting in settings:
        apply_setting(document, setting)
    budgets = validated(Budgets, document, source=f"budgets {name}")
    require_any(budgets)
    return budgets


def require_any(budgets: Budgets) -> None:
    """Raise a ConfigError unless at least one budget is named."""
    limits = (
        budgets.accuracy.max_drop_pp,
        budgets.latency.max_ratio,
        budgets.latency.p99_ms,
        budgets.macs.max_ratio,
        budgets.params.max_ratio,
        budgets.size.max_ratio,
        budgets.parity.max_relative_error,
    )
    if all(limit is None for limit in limits):
        raise ConfigError(
            "there is no budget to judge: name at least one, for example [accuracy] "
            "max_drop_pp = 1.0"
        )
