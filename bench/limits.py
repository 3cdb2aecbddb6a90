"""Limits: what the pruned network must hold, read from TOML; the size to prune to is a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, field_validator, model_validator

from bench import units
from bench.statistics.shares import images_to_resolve, most_shown, resolution, trials_to_show
from compress.config import Precision
from compress.errors import ConfigError
from compress.files.documents import Section, apply_setting, merged, read_toml, validated

_MODIFIERS = {"allow_skipped", "batch_sizes"}  # keys that are no limits themselves
_AGAINST_BASELINE = ("max_regression", "max_median_regression")  # beginnings of keys
USUAL_REGRESSION = 1.03
"""The ``latency.max_regression`` that configs/limits/default.toml suggests."""
_LEAST_REGRESSION = 0.5  # below it somebody wrote a share where a ratio belongs


class Judged(Section):
    """One section of limits."""

    allow_skipped: bool = False
    """Whether what cannot be measured here counts as passed: a batch size, an accuracy or a cost
    that the report lacks, or a baseline from another machine. Never what was measured on a machine
    that was not fit for it, since that is for measuring again."""

    @property
    def given(self) -> dict[str, Any]:
        """The limits that are set, by their keys."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in _MODIFIERS and getattr(self, name) is not None
        }

    @model_validator(mode="after")
    def _no_modifier_alone(self) -> Judged:
        for name in sorted(_MODIFIERS & type(self).model_fields.keys()):
            if getattr(self, name) and not self.given:
                raise ValueError(f"{name} is set, but there is no limit for it to apply to")
        return self


class AccuracyLimits(Judged):
    """On the validation images."""

    max_drop_pp: float | None = Field(default=None, ge=0, le=100)
    """Most top-1 accuracy that may be lost against the reference, in percentage points."""
    max_top5_drop_pp: float | None = Field(default=None, ge=0, le=100)
    """Most top-5 accuracy that may be lost against the reference, in percentage points."""
    max_regression_pp: float | None = Field(default=None, ge=0, le=100)
    """Most top-1 accuracy that may be lost against the baseline, image by image, in percentage
    points."""


class AgreementLimits(Judged):
    """On what the two networks answer to the same inputs, labelled or not."""

    min_same_top1: float | None = Field(default=None, ge=0, le=1)
    """Least share of the inputs for which both name the same class."""
    max_relative_error: float | None = Field(default=None, gt=0)
    """Largest difference of a value of any output over the reference's largest value there."""


class LatencyLimits(Judged):
    """On the machine of the report, but for what is predicted."""

    max_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio of latencies, pruned over reference."""
    max_regression: float | None = Field(default=None, gt=0)
    """Largest ratio now over the ratio of the baseline: 1.03 allows 3 % slower."""
    max_median_regression: float | None = Field(default=None, gt=0)
    """Largest median of the pruned network now over that of the baseline; judged on the same
    machine with the same software only."""
    median_ms: float | None = Field(default=None, gt=0)
    """Largest median of the pruned network, in milliseconds."""
    p99_ms: float | None = Field(default=None, gt=0)
    """Largest 99th percentile of the pruned network, in milliseconds."""
    predicted_max_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio that a latency table predicts on the target; only predictions are judged by it,
    and by no other limit."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    """Batch sizes that are judged; default every measured one, or every predicted one."""

    @model_validator(mode="after")
    def _consistent(self) -> LatencyLimits:
        sizes = self.batch_sizes or ()
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"batch_sizes = {list(sizes)} names a batch size twice")
        if self.median_ms and self.p99_ms and self.p99_ms < self.median_ms:
            raise ValueError(
                f"p99_ms = {self.p99_ms:g} is below median_ms = {self.median_ms:g}, "
                "and no latency has a 99th percentile below its median"
            )
        for name in ("max_regression", "max_median_regression"):
            limit = getattr(self, name)
            if limit is not None and limit < _LEAST_REGRESSION:
                raise ValueError(
                    f"{name} = {limit:g} asks for a network {1 / limit:.1f} times as fast as the "
                    "baseline's; it is a ratio, now over then, and 1.03 allows 3 % slower"
                )
        return self


class RatioLimits(Judged):
    """On a cost that is counted, not measured."""

    max_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio, pruned over reference."""


class ParityLimits(Judged):
    """On the agreement with torch that was found at export."""

    max_relative_error: dict[Precision, Annotated[float, Field(gt=0)]] | None = None
    """Largest difference of the logits over the largest logit, of either network: one limit for
    each precision, or one number for all. A TensorRT engine of fp32 is held to the limit of fp16
    where it computes in TF32, that is from SM 8.0 on."""

    @field_validator("max_relative_error", mode="before")
    @classmethod
    def _for_all(cls, value: Any) -> Any:
        one = isinstance(value, int | float | str) and not isinstance(value, bool)
        return dict.fromkeys(get_args(Precision), value) if one else value


class Limits(Section):
    """What the pruned network must hold; a key that is absent is not judged."""

    accuracy: AccuracyLimits = AccuracyLimits()
    agreement: AgreementLimits = AgreementLimits()
    latency: LatencyLimits = LatencyLimits()
    macs: RatioLimits = RatioLimits()
    params: RatioLimits = RatioLimits()
    size: RatioLimits = RatioLimits()
    """On the file that the runtime reads, in bytes."""
    parity: ParityLimits = ParityLimits()


AnyLimits = Limits | Mapping[str, Any] | str | Path
"""Limits, or what they are read from: sections by name, or the name or path of a file."""


def load_limits(
    name: str, settings: Iterable[str] = (), *, above: Mapping[str, Any] | None = None
) -> Limits:
    """Read limits: a bare word names a file under ``configs/limits``, anything else is a path.

    What ``[limits]`` of a run's configuration says, ``above``, is laid over the file, and
    ``section.key=value`` settings over both.

    Raises:
        ConfigError: no such file, an unknown key, an unfit value, or no limit at all.
    """
    document = merged(read_toml(name, "limits"), above or {})
    for setting in settings:
        apply_setting(document, setting)
    limits = validated(Limits, document, source=f"limits {name}")
    require_any(limits)
    return limits


def limits_of(given: AnyLimits) -> Limits:
    """Return limits as a caller gives them: themselves, a mapping of sections, or a file.

    Raises:
        ConfigError: as ``load_limits``.
    """
    if isinstance(given, Limits):
        return given
    if isinstance(given, str | Path):
        return load_limits(str(given))
    limits = validated(Limits, given, source="limits")
    require_any(limits)
    return limits


def require_any(limits: Limits) -> None:
    """Raise a ConfigError unless at least one limit is named."""
    if not any(section.given for _, section in limits):
        raise ConfigError(
            "there is no limit to judge by: name at least one, for example [accuracy] "
            "max_drop_pp = 1.0"
        )


def require_judgeable(
    limits: Limits, *, images: int, confidence: float, baseline: bool, inputs: int | None = None
) -> None:
    """Refuse limits that nothing measured could meet, before anything is measured.

    Args:
        limits: the limits.
        images: how many there are to validate on; 0 where there are no labels or nobody knows.
        confidence: level of the bounds.
        baseline: whether there is one.
        inputs: how many there are, labelled or not; default ``images``.

    Raises:
        ConfigError: as ``require_baseline``, ``require_resolvable`` and ``check_agreeable``.
    """
    require_baseline(limits, present=baseline)
    require_resolvable(limits, images, confidence)
    if limits.agreement.min_same_top1 is not None:
        count = images if inputs is None else inputs
        check_agreeable(limits.agreement.min_same_top1, count, confidence)


def check_agreeable(limit: float, inputs: int, confidence: float) -> None:
    """Refuse a share of same answers that so many inputs cannot show; none refuse nothing.

    Raises:
        ConfigError: two networks that agree on all of them may still fall below the limit.
    """
    if not inputs or limit <= (most := most_shown(inputs, confidence=confidence)):
        return
    needed = trials_to_show(limit, confidence=confidence)
    more = "no number of inputs can" if needed is None else f"{needed} inputs could"
    raise ConfigError(
        f"agreement.min_same_top1 = {limit:g} cannot be shown on {inputs} inputs: networks that "
        f"agree on each of them show {units.share(most)} ({units.level(confidence)} confidence); "
        f"{more} show it, or allow less"
    )


def require_baseline(limits: Limits, *, present: bool) -> None:
    """Raise a ConfigError if a limit is about a baseline and there is none."""
    needing = [
        f"{name}.{key}"
        for name, section in limits
        for key in section.given
        if key.startswith(_AGAINST_BASELINE)
    ]
    if needing and not present:
        raise ConfigError(
            f"{' and '.join(needing)} cannot be judged without a baseline; name a stored report "
            "of the same reference"
        )


def require_resolvable(limits: Limits, images: int, confidence: float) -> None:
    """Refuse limits of accuracy that so many images cannot show to be kept, whatever they answer.

    Raises:
        ConfigError: a limit is smaller than the drop that stays possible, at this confidence, for
            a network that answers exactly as its reference.
    """
    for key, limit in limits.accuracy.given.items():
        check_resolvable(f"accuracy.{key}", limit, images, confidence)


def check_resolvable(name: str, limit_pp: float, images: int, confidence: float) -> None:
    """Refuse one of them, as ``require_resolvable`` does all; no images refuse nothing."""
    if not images or limit_pp >= (smallest := resolution(images, confidence=confidence)):
        return
    needed = images_to_resolve(limit_pp, confidence=confidence)
    more = "no number of images can" if needed is None else f"{needed} images could"
    raise ConfigError(
        f"{name} = {limit_pp:g} cannot be shown on {images} images: a network that answers each of "
        f"them as its reference does may still lose {units.points(smallest)} "
        f"({units.level(confidence)} confidence); {more} show it, or allow more"
    )
