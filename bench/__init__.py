"""Measure a pruned network against its dense parent, and judge the result.

``compare`` begins and ends it: it finds two networks and their inputs, and returns a report.
``commands`` is what the command line does with that, ``request`` what it is asked for.

    measuring    finds networks and inputs, lets both answer, times and profiles them
    statistics   intervals, bounds and tests of what was measured
    reports      the report as data, built, written and read
    limits       what the pruned network must hold
    judging      verdicts on a report, by limits and against a baseline
    pages        a report as tables, Markdown, one HTML page and JUnit XML
"""
