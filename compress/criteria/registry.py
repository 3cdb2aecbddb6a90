"""The criteria by name. Formulas, shapes and sources: docs/criteria.md."""

from __future__ import annotations

from collections.abc import Callable

from compress.criteria import activation, hessian, magnitude, taylor
from compress.criteria.published import with_published_gates
from compress.criteria.scoring import Context, Scoring, UnservedError
from compress.errors import ConfigError, nearest

CRITERIA: dict[str, Callable[[Context], Scoring]] = {
    "taylor-gate": taylor.taylor_gate,
    "taylor-gate-fg": activation.taylor_gate_fg,
    "taylor-gate-so": hessian.taylor_gate_so,
    "taylor-parts": taylor.taylor_parts,
    "taylor-weight": taylor.taylor_weight,
    "taylor-output": activation.taylor_output,
    "bn-taylor": taylor.bn_taylor,
    "bn-scale": magnitude.bn_scale,
    "obd": hessian.obd,
    "weight-norm": magnitude.weight_norm,
    "weight-abs": magnitude.weight_abs,
    "random": magnitude.random,
}


def bind(name: str, context: Context) -> Scoring:
    """Bind a criterion to a network.

    Raises:
        ConfigError: no criterion has this name, or it cannot score this network; the message names
            those that can.
    """
    if name not in CRITERIA:
        raise ConfigError(f"no criterion is named {name!r}: {nearest(name, CRITERIA)}")
    try:
        scoring = CRITERIA[name](context)
        return with_published_gates(name, context, scoring) if context.as_published else scoring
    except UnservedError as error:
        able = ", ".join(serving(context))
        raise ConfigError(
            f"the criterion {name} cannot score this network, because {error}: use {able}"
        ) from error


def serving(context: Context) -> list[str]:
    """Return the names of the criteria that can score a network."""
    able = []
    for name, criterion in CRITERIA.items():
        try:
            criterion(context)
        except UnservedError:
            continue
        able.append(name)
    return able
