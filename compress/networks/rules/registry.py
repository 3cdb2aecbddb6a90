"""The table of rules: how dimensions pass through each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compress.networks.walk import Rule

RULES: dict[str, Rule] = {}
"""By the operator's name without namespace ``aten``, overload and the underscore of in-place."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for some ATen operators."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def register_rule(operator: Any, rule: Rule) -> None:
    """Say how dimensions pass through an operator of one's own.

    Args:
        operator: ``torch.ops.mylib.blur``, one of its overloads, or its name ``"mylib::blur"``.
        rule: takes a ``compress.networks.walk.Call`` and returns the ``Value`` of the result, a
            list of them, or None where this use is not understood. What it says is tried before
            anything is trained, like everything else.

    Example::

        register_rule(torch.ops.mylib.blur, lambda call: renamed(call["input"]))
    """
    if isinstance(operator, torch._ops.OpOverload):
        operator = operator._schema.name
    elif isinstance(operator, torch._ops.OpOverloadPacket):
        operator = operator._qualified_op_name
    name = str(operator).removeprefix("aten::").replace("::", ".")
    RULES[name[:-1] if name.endswith("_") and not name.startswith("__") else name] = rule
