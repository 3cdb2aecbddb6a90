"""Latency tables are measured here: layers by themselves, whole networks that correct them."""
