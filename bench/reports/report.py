"""The report: built from measurements, written whole or not at all, read back with every check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.measuring.answers import Predictions
from bench.measuring.latency import HOST, LatencyResult
from bench.measuring.records import Artefact, Sha256, pack_outcomes
from bench.measuring.session import Measured
from bench.measuring.subject import About
from bench.reports.schema import (
    SCHEMA_VERSION,
    Against,
    Comparison,
    LatencyComparison,
    LatencyRecord,
    NetworkRecord,
    Networks,
    Report,
)
from bench.reports.soundness import LARGEST, MOST_RATIO
from bench.statistics.latency_ratios import summary
from compress.errors import CheckpointError
from compress.files.atomic import write_atomically
from compress.files.documents import MOST_MISTAKES, parsed_json, shown

REPORT = "report.json"
"""The one file that all others of a report are made of."""

_BEFORE = (2, 3)  # versions that are read besides: 2 says budgets for limits, none has predictions
MOST_NUMBER = MOST_RATIO * 10
"""Of fractions: nothing that is measured or derived comes near it."""
MOST_BYTES = 2**24
"""Largest report: that of 50,000 images with a hundred layers takes half a MiB."""


def build_report(
    about: About,
    measured: Measured,
    *,
    against: Against = "dense",
    created: datetime | None = None,
) -> Report:
    """Put together what is known of two networks and what was measured of them.

    Args:
        about: what is known of both.
        measured: what a session gave.
        against: what the reference is.
        created: when it was measured; default now.
    """
    reference, pruned = about.artefacts
    said = measured.predictions or (None, None)
    alike = reference.file is None or _suffix(reference) == _suffix(pruned)
    return Report(
        created=created or datetime.now(timezone.utc).replace(microsecond=0),
        runtime=measured.runtime,
        against=against,
        architecture=about.architecture,
        target=about.target,
        precision=about.precision,
        notes=measured.notes,
        validation=measured.validation,
        networks=Networks(
            reference=_network(reference, said[0], measured.latency, "reference"),
            pruned=_network(pruned, said[1], measured.latency, "pruned"),
        ),
        comparison=Comparison(
            latency=tuple(map(_compare_latency, measured.latency)),
            accuracy=measured.accuracy,
            agreement=measured.agreement,
            macs_ratio=_ratio(reference.macs, pruned.macs),
            params_ratio=_ratio(reference.params, pruned.params),
            # Files of two kinds hold different things.
            bytes_ratio=_ratio(reference.bytes, pruned.bytes) if alike else None,
        ),
        layers=tuple(measured.layers),
        groups=about.groups,
        environment=measured.environment,
        config=measured.config,
        pruning=about.pruning,
    )


def sealed(report: Report) -> dict[str, Any]:
    """Return a report as JSON can hold it, with the digest of everything else in it.

    The digest is SHA-256 of the document without ``sha256``, written with sorted keys, no spaces
    and ASCII only.
    """
    document = report.model_dump(mode="json")
    return {**document, "sha256": _digest(document)}


def save_report(report: Report, path: Path) -> None:
    """Write a report as JSON; a reader sees the old file or the new one, never half of one.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(sealed(report), indent=2, allow_nan=False) + "\n"
    write_atomically(path, text)


def load_report(path: Path) -> Report:
    """Read a report of this or an earlier schema version, from 2 on, and check every field of it.

    Raises:
        CheckpointError: missing, truncated, edited, not a report, or of another schema version.
    """
    document = _read(path)
    version = document["schema_version"]
    if version not in (*_BEFORE, SCHEMA_VERSION):
        raise CheckpointError(
            f"{path} has schema_version {shown(version)} and this tool reads {_BEFORE[0]} to "
            f"{SCHEMA_VERSION}; measure again with `compress bench`"
        )
    digest = document.pop("sha256", None)
    try:
        report = Report.model_validate({**document, "schema_version": SCHEMA_VERSION})
        found = _digest(document)
        _require_numbers(document)
        _require_no_text_for_a_number(document, report.model_dump(mode="json"))
    except ValidationError as error:
        raise CheckpointError(f"{path} is a damaged report: {_first(error)}") from error
    except (ValueError, RecursionError) as error:  # infinities, or depth, where anything may be
        why = error if "measurement" in str(error) else "JSON does not hold it"
        raise CheckpointError(f"{path} is a damaged report: {why}") from error
    if digest != found:
        raise CheckpointError(
            f"{path} was changed after it was written: its sha256 is not that of its content; "
            "measure again with `compress bench`"
        )
    return report


def _read(path: Path) -> dict[str, Any]:
    """Return the document in a file, which names its version and may be anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path} is a directory: name the report in it, {path / REPORT}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"cannot read the report {path}: {reason}; write one with `compress bench`"
        ) from error
    if len(data) > MOST_BYTES:
        raise CheckpointError(
            f"{path} is no report of `compress bench`: none is larger than 16 MiB"
        )
    try:
        document = parsed_json(data.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON or is cut short ({error}); measure again with `compress bench`"
        ) from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise CheckpointError(f"{path} is JSON but not a report of `compress bench`")
    return document


def _require_numbers(value: Any) -> None:
    """Refuse numbers that nothing measured and that no figure can be derived from.

    Raises:
        ValueError: there is one.
    """
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _require_numbers(part)
    elif isinstance(value, int | float) and not abs(value) <= (
        MOST_NUMBER if isinstance(value, float) else LARGEST
    ):
        raise ValueError(f"{shown(value)} is no number of a measurement")


def _require_no_text_for_a_number(told: Any, kept: Any, place: str = "") -> None:
    """Refuse text that was understood as a number or as a truth value.

    Raises:
        ValueError: naming the first.
    """
    if isinstance(told, str) and isinstance(kept, int | float):
        raise ValueError(f"{place} is text and no number of a measurement")
    if isinstance(told, dict) and isinstance(kept, dict):
        for key in told.keys() & kept.keys():
            _require_no_text_for_a_number(told[key], kept[key], f"{place}.{key}".strip("."))
    elif isinstance(told, list) and isinstance(kept, list):
        for one, other in zip(told, kept, strict=False):
            _require_no_text_for_a_number(one, other, place)


def _digest(document: dict[str, Any]) -> Sha256:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _network(
    artefact: Artefact, found: Predictions | None, latency: Sequence[LatencyResult], slot: str
) -> NetworkRecord:
    records = tuple(
        LatencyRecord(
            batch_size=result.batch_size,
            summary=summary(result.samples_ms[slot]),
            images_per_second=_rate(result, slot),
            stages={name: summary(calls) for name, calls in result.stages_ms[slot].items()},
            iterations=result.iterations[slot],
            block_medians_ms=result.blocks_ms[slot],
            warmup=result.warmup[slot],
        )
        for result in latency
    )
    return NetworkRecord(
        **{name: getattr(artefact, name) for name in Artefact.model_fields},
        top1=found.top1_share if found else None,
        top5=found.top5_share if found else None,
        outcomes=pack_outcomes(found.top1, found.correct, found.top5_correct) if found else None,
        latency=records,
    )


def _suffix(artefact: Artefact) -> str:
    return Path(artefact.file or "").suffix


def _compare_latency(result: LatencyResult) -> LatencyComparison:
    return LatencyComparison(
        batch_size=result.batch_size,
        ratio=result.ratio,
        speed_up=1 / result.ratio.ratio,
        control=result.control,
        control_block_medians_ms=result.blocks_ms["control"],
        seconds=result.seconds,
        converged=result.converged,
        conditions=result.conditions,
    )


def _rate(result: LatencyResult, slot: str) -> float:
    calls = result.stages_ms[slot].get(HOST) or result.samples_ms[slot]
    return 1000 * result.batch_size * len(calls) / sum(calls)


def _ratio(reference: int | None, pruned: int | None) -> float | None:
    return pruned / reference if reference and pruned else None


def _first(error: ValidationError) -> str:
    """Return the first thing that is wrong, by its place in the document."""
    if error.error_count() > MOST_MISTAKES:
        return f"it has {error.error_count()} mistakes"
    detail = error.errors()[0]
    place, said = ".".join(map(str, detail["loc"])), detail["msg"].lower()
    return f"{place}: {said}" if place else said.removeprefix("value error, ")
