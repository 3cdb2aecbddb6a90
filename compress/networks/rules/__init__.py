"""How dimensions pass through operators: one rule for each, in a table that users can add to."""

from compress.networks.rules import joining, layers, norms, pointwise, reducing, shaping
from compress.networks.rules.registry import RULES, register_rule

__all__ = [
    "RULES",
    "joining",
    "layers",
    "norms",
    "pointwise",
    "reducing",
    "register_rule",
    "shaping",
]
