"""What was measured so far, beside the table that it is for: a profile that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.files.atomic import write_json

SCHEMA_VERSION = 1


@dataclass
class Partial:
    """Milliseconds by the keys of what was measured."""

    path: Path | None
    """None keeps nothing on disk."""
    plan: Mapping[str, Any]
    """What decides the keys and their meaning; a file of another plan is begun anew."""
    reference_ms: float | None = None
    """Of the network that every part measures, in the first part."""
    ms: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0
    """The largest of the parts."""

    @staticmethod
    def at(path: Path | None, plan: Mapping[str, Any]) -> Partial:
        """Return what lies there of this plan, or nothing measured."""
        fresh = Partial(path, plan)
        if path is None or not path.is_file():
            return fresh
        try:
            found = json.loads(path.read_bytes())
            if found["schema_version"] != SCHEMA_VERSION or found["plan"] != dict(plan):
                return fresh
            ms = {str(key): float(value) for key, value in found["ms"].items()}
            return Partial(path, plan, float(found["reference_ms"]), ms, float(found["spread"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return fresh  # damaged: it is only time that is lost

    def add(self, ms: Mapping[str, float], *, reference_ms: float, spread: float) -> None:
        """Add a part, as fast as the machine was in the first one, and write all.

        Raises:
            OutputError: it cannot be written.
        """
        if self.reference_ms is None:
            self.reference_ms = reference_ms
        drift = self.reference_ms / reference_ms
        self.ms.update((key, drift * value) for key, value in ms.items())
        self.spread = max(self.spread, spread)
        if self.path is not None:
            write_json(
                self.path,
                {
                    "schema_version": SCHEMA_VERSION,
                    "plan": dict(self.plan),
                    "reference_ms": self.reference_ms,
                    "ms": self.ms,
                    "spread": self.spread,
                },
            )
