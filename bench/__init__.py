"""Measure a pruned network against its dense parent, and judge the result."""
