"""The prefixes that wrappers give to the name of every tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def without_prefixes(state: Mapping[str, T]) -> dict[str, T]:
    """Take off the prefixes that wrappers such as DistributedDataParallel give to every name."""
    names = list(state)
    while names and all(re.match(r"(module|_orig_mod)\.", name) for name in names):
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, state.values(), strict=True))
