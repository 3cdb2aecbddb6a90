"""Judges a report by budgets."""
