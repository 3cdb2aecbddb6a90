"""Which weights of a file: many hold several sets, raw and averaged, or of student and teacher.

A set is what a state dict is, under a key of a dictionary, or under a prefix of all names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from compress.checkpoints.wrapped import without_prefixes
from compress.errors import CheckpointError, nearest

log = logging.getLogger("compress")

State = dict[str, torch.Tensor]
StateT = TypeVar("StateT", bound=Mapping[str, Any])
Fits = Callable[[Mapping[str, torch.Tensor]], bool]

USUAL = (
    *("state_dict", "model_state_dict", "model", "net"),
    *("model_state", "network", "module", "params", "weights", "student", "backbone"),
)
"""Keys of the weights that are trained, before those of averages and teachers."""
_AVERAGE = re.compile(r"ema|teacher|averag|shadow|swa|target", re.IGNORECASE)
DEPTH = 3
"""Of dictionaries in dictionaries that sets are looked for in."""
MOST_NAMED = 6


def chosen(content: Any, path: Path, key: str | None, fits: Fits) -> State:
    """Return the set of weights that is asked for, or the usual one of those that fit.

    Args:
        content: what a file holds.
        path: the file.
        key: of the set; None for the usual one, which a warning names where there are others.
        fits: whether a set is of the network, by its names.

    Raises:
        CheckpointError: there is no set, or none of that key.
    """
    sets = dict(_sets(content))
    if not sets:
        raise CheckpointError(
            f"{path} holds no state dict{_keys(content)}: save model.state_dict()"
        )
    if key is not None:
        return _named(sets, path, key, fits)
    ways = (_as_they_are, _without_a_common_prefix, _by_prefix)
    for way in ways:
        fitting = {name: state for name, state in way(sets).items() if fits(state)}
        if fitting:
            return _usual(fitting, path)
    return _usual(sets, path)  # whose first difference is told


def _named(sets: dict[str, State], path: Path, key: str, fits: Fits) -> State:
    """Return the set of a key, or of a prefix."""
    known = {name: state for name, state in {**_by_prefix(sets), **sets}.items() if name}
    if not known:
        raise CheckpointError(
            f"{path} holds one set of weights, which has no name, and {key!r} is asked for"
        )
    if key not in known:
        raise CheckpointError(f"{path} holds no weights {key!r}: {nearest(key, known)}")
    state = known[key]
    bare = _stripped(state)
    return bare if not fits(state) and fits(bare) else state


def _usual(sets: dict[str, State], path: Path) -> State:
    """Return the set that is trained, else the first; say so where there are several."""
    trained = [name for name in sets if not _AVERAGE.search(name)]
    known = {name.rpartition(".")[2]: name for name in reversed(trained)}
    usual = [known[name] for name in USUAL if name in known]
    name = (*usual, *trained, *sets)[0]
    if len(sets) > 1:
        _warn(path, tuple(sets), name)
    return sets[name]


@cache
def _warn(path: Path, sets: tuple[str, ...], taken: str) -> None:
    """Say which weights are taken, once however often a command reads them."""
    named = ", ".join(map(repr, sets[:MOST_NAMED]))
    log.warning("%s holds %d sets of weights, %s: %r is taken", path, len(sets), named, taken)


def _sets(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield every set of tensors in dictionaries, by its key; '' if it is the whole file."""
    if not isinstance(content, Mapping) or not content or depth > DEPTH:
        return
    if all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        if any(tensor.dim() > 1 for tensor in content.values()):  # no state of random numbers
            yield name, without_prefixes(_without_a_counter(content))
        return
    for key, part in content.items():
        if isinstance(key, str):
            yield from _sets(part, f"{name}.{key}" if name else key, depth + 1)


def _without_a_counter(state: Mapping[str, torch.Tensor]) -> State:
    """Leave out the count that AveragedModel keeps beside its ``module``."""
    names = [name for name in state if name != "n_averaged"]
    averaged = names and all(name.startswith("module.") for name in names)
    return {name: state[name] for name in names} if averaged else dict(state)


def _as_they_are(sets: dict[str, State]) -> dict[str, State]:
    return sets


def _without_a_common_prefix(sets: dict[str, State]) -> dict[str, State]:
    return {name: _stripped(state) for name, state in sets.items()}


def _stripped(state: StateT) -> StateT:
    """Take off the first part of all names while they share it, such as ``model.``."""
    names = list(state)
    while names and all("." in name for name in names) and len({_first(n) for n in names}) == 1:
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, state.values(), strict=True))  # type: ignore[return-value]


def _by_prefix(sets: dict[str, State]) -> dict[str, State]:
    """Return the parts of sets that share the first part of their names, by key and prefix."""
    found: dict[str, State] = {}
    for key, state in sets.items():
        for name, tensor in state.items():
            if "." in name:
                first, _, rest = name.partition(".")
                found.setdefault(f"{key}.{first}" if key else first, {})[rest] = tensor
    return found


def _first(name: str) -> str:
    return name.partition(".")[0]


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f" but {type(content).__name__}"
    named = ", ".join(repr(str(key)) for key in list(content)[:MOST_NAMED])
    return f"; its keys are {named}{', ...' if len(content) > MOST_NAMED else ''}" if named else ""
