"""The JSON schema of a report.

python -m bench.reports.json_schema > docs/report.schema.json
"""

from __future__ import annotations

import json
from typing import Any

from bench.reports.schema import SCHEMA_VERSION, Report


def report_schema() -> dict[str, Any]:
    """Return the schema of ``report.json``, JSON Schema of 2020-12."""
    schema = Report.model_json_schema(mode="serialization")
    schema["properties"]["sha256"] = {
        "description": (
            "SHA-256 of this document without sha256, written with sorted keys, no spaces and "
            "ASCII only."
        ),
        "pattern": "^[0-9a-f]{64}$",
        "type": "string",
    }
    # A written report holds every key, also those that have a default.
    schema["required"] = sorted(schema["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Report of compress bench, schema_version {SCHEMA_VERSION}",
        **{name: part for name, part in schema.items() if name != "title"},
    }


def main() -> None:
    """Print the schema."""
    print(json.dumps(report_schema(), indent=2))


if __name__ == "__main__":
    main()
