"""Criteria: from a network and its gradients to one number for every unit."""

from compress.criteria.registry import CRITERIA, bind, serving

__all__ = ["CRITERIA", "bind", "serving"]
