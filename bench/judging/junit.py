"""Verdicts as JUnit XML, which CI systems show beside their tests: one case per budget.

There is no standard; the document keeps to what the schema of Jenkins' xUnit plugin
(junit-10.xsd) allows, and tells neither host nor path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timezone
from xml.etree import ElementTree as ET

from bench.judging.verdicts import Verdict
from bench.reports.schema import Report

# What XML 1.0 (section 2.2) cannot hold, escaped or not.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REPLACEMENT = "\ufffd"


def render_junit(report: Report, verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as an XML document; what did not pass carries its sentence.

    FAIL is a failure. INCONCLUSIVE, and SKIPPED where the budgets do not allow it, are errors: the
    check could not be made. SKIPPED where they do is a skipped case.
    """
    cases = [_case(verdict) for verdict in verdicts]
    counts = {"tests": len(cases)}
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[name] = sum(case.find(tag) is not None for case in cases)
    attributes = {name: str(count) for name, count in counts.items()}
    suite = _element(
        "testsuite",
        name="compress quality gate",
        **attributes,
        time="0",
        timestamp=f"{report.created.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        properties.append(_element("property", name=name, value=value))
    suite.extend(cases)
    root = _element("testsuites", name="compress", tests=attributes["tests"])
    root.append(suite)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _properties(report: Report) -> dict[str, str]:
    return {
        "architecture": report.architecture or "unknown",
        "target": report.target or "unknown",
        "runtime": report.runtime,
        "precision": report.precision or "unknown",
        "against": report.against,
        "created": report.created.astimezone(timezone.utc).isoformat(),
    }


def _case(verdict: Verdict) -> ET.Element:
    section, _, key = verdict.budget.partition(".")
    where = f", batch size {verdict.batch_size}" if verdict.batch_size is not None else ""
    case = _element("testcase", classname=f"quality_gate.{section}", name=key + where, time="0")
    case.append(_outcome(verdict))
    return case


def _outcome(verdict: Verdict) -> ET.Element:
    if verdict.status == "PASS":
        found = ET.Element("system-out")
    elif verdict.allowed:
        found = _element("skipped", message=verdict.sentence)
    else:
        tag = "failure" if verdict.status == "FAIL" else "error"
        found = _element(tag, message=verdict.sentence, type=verdict.status)
    found.text = _legal(verdict.sentence)
    return found


def _element(tag: str, **attributes: str) -> ET.Element:
    return ET.Element(tag, {name: _legal(value) for name, value in attributes.items()})


def _legal(text: str) -> str:
    return _ILLEGAL.sub(_REPLACEMENT, text)
