"""Finds two networks and their inputs, lets both answer, times and profiles them, and watches."""
