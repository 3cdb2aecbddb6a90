"""Widths and branches chosen together under a limit of time."""
