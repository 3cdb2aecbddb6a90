"""One limit, judged, and the plain sentence that says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bench import units
from compress.errors import ConfigError

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "SKIPPED"]

EXIT_CODES: dict[Status, int] = {"FAIL": 3, "INCONCLUSIVE": 4, "SKIPPED": 5, "PASS": 0}
"""Exit code of each status; of several verdicts the first status in this order decides."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One limit, judged."""

    name: str
    """Of the limit: its key, as ``latency.max_ratio``."""
    batch_size: int | None
    limit: float
    measured: float | None
    interval: tuple[float, float] | None
    """The two one-sided bounds that decided; None for what is counted exactly."""
    status: Status
    sentence: str
    allowed: bool = False
    """Whether a SKIPPED one counts as passed, since the limits say so."""


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Return 0 when all passed, else 3 (FAIL) before 4 (INCONCLUSIVE) before 5 (SKIPPED).

    A SKIPPED verdict that the limits allow counts as passed.

    Raises:
        ConfigError: there are no verdicts; nothing judged is nothing proved.
    """
    seen = {"PASS" if verdict.allowed else verdict.status for verdict in verdicts}
    if not seen:
        raise ConfigError("no limit was judged; name at least one")
    return next(code for status, code in EXIT_CODES.items() if status in seen)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a limit is about, and how its verdict is worded."""

    name: str
    subject: str
    limit: float
    batch_size: int | None = None
    allow_skipped: bool = False
    """Whether it counts as passed where it cannot be measured."""
    least: bool = False
    """Whether the limit is the least that is allowed, and not the most."""

    def decide(
        self, measured: float, bounds: tuple[float, float], confidence: float, *, advice: str
    ) -> Verdict:
        """Judge an estimate by its one-sided bounds: (at least, at most)."""
        at_least, at_most = bounds
        below = f"at most {self._write(at_most)} with {units.level(confidence)} confidence"
        above = f"at least {self._write(at_least)} with {units.level(confidence)} confidence"
        good, bad = (above, below) if self.least else (below, above)
        if at_least >= self.limit if self.least else at_most <= self.limit:
            return self._verdict("PASS", f"is {self._write(measured)}, {good}", measured, bounds)
        if at_most < self.limit if self.least else at_least > self.limit:
            return self._verdict("FAIL", f"is {self._write(measured)}, {bad}", measured, bounds)
        between = f"lies between {self._write(at_least)} and {self._write(at_most)}"
        return self._verdict("INCONCLUSIVE", between, measured, bounds, advice)

    def doubtful(self, measured: float, bounds: tuple[float, float] | None, reason: str) -> Verdict:
        """Leave open what too little was measured of."""
        said = f"came out as {self._write(measured)}"
        return self._verdict("INCONCLUSIVE", said, measured, bounds, reason)

    def exact(self, measured: float, note: str = "") -> Verdict:
        """Judge what is counted and not estimated."""
        status: Status = "PASS" if measured <= self.limit else "FAIL"
        return self._verdict(status, f"is {self._write(measured)}", measured, advice=note)

    def skipped(self, said: str, advice: str = "") -> Verdict:
        """Say what could not be measured here; the limits may allow it."""
        return self._verdict("SKIPPED", said, advice=advice, allowed=self.allow_skipped)

    def unfit(self, reason: str) -> Verdict:
        """Say that the machine was not fit to measure it, which no limit allows."""
        return self._verdict("SKIPPED", "could not be measured here", advice=reason)

    def _write(self, value: float) -> str:
        return units.of_limit(self.name)(value)

    def _verdict(
        self,
        status: Status,
        said: str,
        measured: float | None = None,
        interval: tuple[float, float] | None = None,
        advice: str = "",
        *,
        allowed: bool = False,
    ) -> Verdict:
        where = f" at batch size {self.batch_size}" if self.batch_size is not None else ""
        tail = f": {advice}" if advice else ""
        return Verdict(
            name=self.name,
            batch_size=self.batch_size,
            limit=self.limit,
            measured=measured,
            interval=interval,
            status=status,
            sentence=f"{self.subject}{where} {said}; the limit is {self._write(self.limit)}{tail}",
            allowed=allowed,
        )
