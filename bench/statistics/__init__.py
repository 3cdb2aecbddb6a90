"""Intervals, bounds and tests: pure functions of figures."""
