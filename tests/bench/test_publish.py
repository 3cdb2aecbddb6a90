from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.judging.quality_gate import judge
from bench.judging.verdicts import Verdict
from bench.limits import Limits
from bench.pages.publish import render_junit
from bench.reports.schema import Report

ReportFactory = Callable[..., Report]

# What junit-10.xsd of Jenkins' xUnit plugin allows: attributes (required first), then children.
ALLOWED: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


def checked(text: str) -> ET.Element:
    """Parse a document and hold it against the schema; return its one suite."""
    root = ET.fromstring(text.encode("utf-8"))
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional, children = ALLOWED[element.tag]
        assert required <= set(element.attrib) <= required | optional
        assert {child.tag for child in element} <= children
        assert len(element.findall("properties")) <= 1
    (suite,) = root
    assert re.fullmatch(r"[0-9]+(\.[0-9]*)?", suite.attrib["time"])
    for name, path in (
        ("tests", "testcase"),
        ("failures", "testcase/failure"),
        ("errors", "testcase/error"),
        ("skipped", "testcase/skipped"),
    ):
        assert int(suite.attrib[name]) == len(suite.findall(path))
    return suite


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def verdict(report: Report) -> Verdict:
    (found,) = judge(report, Limits.model_validate({"macs": {"max_ratio": 0.6}}))
    return found


def with_status(verdict: Verdict, status: Any, **facts: Any) -> Verdict:
    return replace(verdict, status=status, sentence=f"it is {status}", **facts)


def test_every_status_has_its_element(report: Report, verdict: Verdict) -> None:
    verdicts = [
        with_status(verdict, "PASS"),
        with_status(verdict, "FAIL", name="latency.max_ratio", batch_size=8),
        with_status(verdict, "INCONCLUSIVE"),
        with_status(verdict, "SKIPPED"),
        with_status(verdict, "SKIPPED", allowed=True),
    ]
    suite = checked(render_junit(report, verdicts))
    cases = suite.findall("testcase")
    assert [case[0].tag for case in cases] == ["system-out", "failure", "error", "error", "skipped"]
    assert [case[0].get("type") for case in cases[1:4]] == ["FAIL", "INCONCLUSIVE", "SKIPPED"]
    assert [case[0].text for case in cases] == [one.sentence for one in verdicts]
    assert [case[0].get("message") for case in cases[1:]] == [v.sentence for v in verdicts[1:]]
    assert cases[1].attrib["classname"] == "quality_gate.latency"
    assert cases[1].attrib["name"] == "max_ratio, batch size 8"
    assert all(len(case) == 1 for case in cases)


def test_a_real_report_has_one_case_per_limit_and_batch_size(report: Report) -> None:
    limits = {"latency": {"max_ratio": 0.9, "p99_ms": 9}, "accuracy": {"max_drop_pp": 1}}
    verdicts = judge(report, Limits.model_validate(limits))
    suite = checked(render_junit(report, verdicts))
    names = [(case.attrib["classname"], case.attrib["name"]) for case in suite.iter("testcase")]
    assert names == [
        ("quality_gate.accuracy", "max_drop_pp"),
        ("quality_gate.latency", "max_ratio, batch size 1"),
        ("quality_gate.latency", "p99_ms, batch size 1"),
        ("quality_gate.latency", "max_ratio, batch size 8"),
        ("quality_gate.latency", "p99_ms, batch size 8"),
    ]
    assert len(set(names)) == len(names)


def test_properties_say_what_was_measured_and_not_where(report: Report, verdict: Verdict) -> None:
    text = render_junit(report, [verdict])
    suite = checked(text)
    properties = {found.get("name"): found.get("value") for found in suite.iter("property")}
    assert properties == {
        "architecture": "resnet20",
        "target": "cpu",
        "runtime": "ONNX Runtime (CPU)",
        "precision": "fp32",
        "against": "dense",
        "created": "2026-01-02T03:04:05+00:00",
    }
    assert suite.attrib["timestamp"] == "2026-01-02T03:04:05"
    assert "hostname" not in text
    assert text == render_junit(report, [verdict])


def test_no_verdict_is_an_empty_suite(report: Report) -> None:
    assert checked(render_junit(report, [])).attrib["tests"] == "0"


LEGAL = st.characters(codec="utf-8").filter(str.isprintable)


@given(st.text(LEGAL), st.sampled_from(["PASS", "FAIL", "SKIPPED"]))
def test_what_can_be_printed_comes_back_as_it_was(
    report: Report, verdict: Verdict, sentence: str, status: Any
) -> None:
    given_one = replace(verdict, status=status, sentence=sentence)
    named = report.model_copy(update={"runtime": sentence})
    suite = checked(render_junit(named, [given_one]))
    (outcome,) = next(suite.iter("testcase"))
    assert (outcome.text or "") == sentence
    assert outcome.get("message", sentence) == sentence
    values = {found.get("name"): found.get("value") for found in suite.iter("property")}
    assert values["runtime"] == sentence


@given(st.text(st.characters()))
def test_whatever_a_sentence_holds_the_document_is_xml(
    report: Report, verdict: Verdict, sentence: str
) -> None:
    checked(render_junit(report, [replace(verdict, status="FAIL", sentence=sentence)]))
