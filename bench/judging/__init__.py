"""Judges a report by limits."""
