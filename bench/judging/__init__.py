"""Judges a report by limits, and against a baseline that was kept."""
