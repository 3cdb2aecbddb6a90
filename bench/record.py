"""What every part of a report is."""

from __future__ import annotations

from pydantic import ConfigDict

from compress.files.documents import Section

Sha256 = str


class Record(Section):
    """Base of every part of a report: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
