"""The importance of every criterion, on the images of the oracle and without training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from compress.criteria import CRITERIA, bind, serving
from compress.criteria.scoring import Context, Scoring
from compress.errors import ConfigError, nearest
from compress.oracle.correlation import Values
from compress.pruning.importance import Importance

BLOCK = ":block"
"""Behind the name of a criterion: with one gate after each residual block, as published."""
GATED = ("taylor-gate", "taylor-gate-fg", "taylor-gate-so", "taylor-output", "obd")
"""Criteria that depend on where the gates are."""


def row_names(context: Context, wanted: str | None) -> list[str]:
    """Return the rows to compare: those that are named, or all that can score the network.

    Args:
        context: of the dense network.
        wanted: criteria with commas between them, ``taylor-gate:block`` for the published gate.

    Raises:
        ConfigError: a criterion is not known, cannot score the network, or has no gates to move.
    """
    if wanted is None:
        block = ["taylor-gate" + BLOCK] if len(context.graph.residual_units) else []
        return [*serving(context), *block]
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        _bound(context, name)
    return names


def check_names(wanted: str | None) -> None:
    """Refuse a misspelt criterion before anything is loaded.

    Raises:
        ConfigError: no criterion has this name.
    """
    for name in wanted.split(",") if wanted is not None else []:
        plain = name.strip().removesuffix(BLOCK)
        if plain not in CRITERIA:
            raise ConfigError(f"no criterion is named {plain!r}: {nearest(plain, CRITERIA)}")


def importance_of(
    name: str,
    context: Context,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
) -> Values:
    """Return the (units,) importance of one row: the mean of the scores of minibatches.

    The network is in evaluation mode and no weight moves. As in training, a last minibatch that is
    not full is left out unless it is the only one.

    Args:
        name: a criterion, perhaps with ``:block``.
        context: of the dense network; a copy of it is differentiated.
        images: (N, C, H, W), normalised; minibatches move to the network's device.
        labels: (N,).
        batch_size: images of one minibatch; the size of scores depends on it.
        check_stop: called after each minibatch; may raise.
    """
    model = copy.deepcopy(context.model).eval().requires_grad_(True)
    scoring = _bound(replace(context, model=model), name)
    importance = Importance(context.graph.num_units, momentum=0)
    for index in range(max(1, len(images) // batch_size) if scoring.per_minibatch else 1):
        part = slice(index * batch_size, (index + 1) * batch_size)
        if scoring.per_minibatch:
            model.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed + index)  # for what draws random vectors
                network = scoring.network or model
                logits = network(images[part].to(context.device))
                loss = F.cross_entropy(logits, labels[part].to(context.device))
                if scoring.before_backward:
                    scoring.before_backward(loss)
                loss.backward()  # type: ignore[no-untyped-call]
        importance.add(scoring.score(1.0))
        check_stop()
    return np.asarray(importance.close_interval())


def _bound(context: Context, name: str) -> Scoring:
    plain = name.removesuffix(BLOCK)
    if name == plain:
        return bind(name, context)
    if plain in CRITERIA and plain not in GATED:
        raise ConfigError(
            f"{name} is not possible, because {plain} has no gates: {BLOCK} goes with "
            f"{', '.join(GATED)}"
        )
    if not len(context.graph.residual_units):
        raise ConfigError(f"{name} is not possible: the network has no residual blocks")
    return bind(plain, replace(context, residual_gate="block"))
