"""Measures: latency, accuracy, layers, and what the machine did meanwhile."""
