"""How the same arrays reach the inputs of two networks.

Inputs are matched by name, else by order where types and shapes agree. The names of the reference
are used throughout; the pruned network is given the same arrays under its own names, in its own
floating-point type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import ConfigError, DataError
from export.runners import Feeds, Outputs, TensorSpec

Specs = tuple[TensorSpec, ...]
Names = tuple[str, str]
"""What messages call the reference and the pruned network."""


@dataclass(frozen=True)
class Wiring:
    """The inputs of two networks, matched."""

    inputs: Specs
    """What is fed, by the names and in the types of the reference; a size that either network fixes
    is a number here."""
    names: dict[str, str]
    """The pruned network's name of each."""
    types: dict[str, str]
    """The pruned network's type of each."""
    batched: frozenset[str]
    """Inputs whose first dimension is that of the batch."""
    fixed: int | None
    """The one batch size that they take; None for any."""

    def for_reference(self, feeds: Feeds) -> Feeds:
        """Return arrays as the reference reads them."""
        return feeds

    def for_pruned(self, feeds: Feeds) -> Feeds:
        """Return arrays as the pruned network reads them."""
        return {
            self.names[name]: array.astype(self.types[name], copy=False)
            for name, array in feeds.items()
        }

    def length(self, feeds: Feeds) -> int:
        """Return how many inputs a batch holds."""
        return next((len(feeds[name]) for name in feeds if name in self.batched), 1)

    def repeated(self, feeds: Feeds, size: int) -> dict[str, np.ndarray]:
        """Return a batch of exactly so many inputs: the first ones, again where there are fewer."""
        index = np.arange(size) % self.length(feeds)
        return {
            name: np.ascontiguousarray(array[index] if name in self.batched else array)
            for name, array in feeds.items()
        }

    def cut(self, outputs: Outputs, fed: int, count: int) -> Outputs:
        """Return the outputs without the rows of what a batch was filled up with."""
        if fed == count:
            return outputs
        return {
            name: values[:count] if values.ndim and len(values) == fed else values
            for name, values in outputs.items()
        }

    def batch_sizes(
        self, asked: Sequence[int] | None, usual: Sequence[int], names: Names
    ) -> tuple[int, ...]:
        """Return the batch sizes to time: those asked for, the fixed one, or the usual ones.

        Raises:
            ConfigError: others are asked for than the files take.
        """
        if self.fixed is None:
            return tuple(asked or usual)
        if asked is not None and tuple(asked) != (self.fixed,):
            sizes = ", ".join(map(str, asked))
            raise ConfigError(
                f"batch sizes {sizes} were asked for, and {names[0]} against {names[1]} takes "
                f"batches of {self.fixed} alone: ask for {self.fixed}, or export them with a free "
                "batch dimension"
            )
        return (self.fixed,)


def wired(reference: Specs | None, pruned: Specs | None, names: Names) -> Wiring:
    """Match the inputs of two networks; one that does not say what it reads takes the other's.

    Raises:
        DataError: nothing serves both, or neither says what it reads.
    """
    ours, theirs = reference or pruned, pruned or reference
    if not ours or not theirs:
        raise DataError(
            "networks in memory do not say what they read: give inputs to compare them on"
        )
    matched = _matched(ours, theirs, names)
    fixed, batched = _batch(ours)
    other, also = _batch(theirs)
    if fixed and other and fixed != other:
        raise DataError(
            f"{names[0]} takes batches of {fixed} and {names[1]} of {other}: export one of them "
            "with the other's batch size, or both with a free batch dimension"
        )
    back = {spec.name: name for name, spec in matched.items()}
    return Wiring(
        inputs=tuple(_merged(spec, matched[spec.name], names) for spec in ours),
        names={name: spec.name for name, spec in matched.items()},
        types={name: spec.dtype for name, spec in matched.items()},
        batched=batched | {back[name] for name in also},
        fixed=fixed or other,
    )


def _matched(ours: Specs, theirs: Specs, names: Names) -> dict[str, TensorSpec]:
    """Return the pruned network's input for each of the reference's."""
    by_name = {spec.name: spec for spec in theirs}
    if {spec.name for spec in ours} == by_name.keys():
        pairs = [(spec, by_name[spec.name]) for spec in ours]
    elif len(ours) == len(theirs):
        pairs = list(zip(ours, theirs, strict=True))
    else:
        pairs = []
    if not pairs or not all(_serves(*pair) for pair in pairs):
        reads = [", ".join(map(str, specs)) for specs in (ours, theirs)]
        raise DataError(
            f"{names[0]} reads {reads[0]} and {names[1]} reads {reads[1]}: networks compare where "
            "the same arrays serve both"
        )
    return {spec.name: other for spec, other in pairs}


def _serves(ours: TensorSpec, theirs: TensorSpec) -> bool:
    """Tell whether one array serves two inputs; floats of two widths do, rounded."""
    kinds = {np.dtype(spec.dtype).kind for spec in (ours, theirs)}
    if ours.dtype != theirs.dtype and kinds != {"f"}:
        return False
    if ours.shape is None or theirs.shape is None:
        return True
    pairs = list(zip(ours.shape, theirs.shape, strict=False))
    return len(ours.shape) == len(theirs.shape) and all(
        a == b for a, b in pairs[1:] if isinstance(a, int) and isinstance(b, int)
    )


def _merged(ours: TensorSpec, theirs: TensorSpec, names: Names) -> TensorSpec:
    if ours.shape is None or theirs.shape is None:
        return replace(ours, shape=ours.shape or theirs.shape)
    shape = tuple(
        b if isinstance(b, int) and not isinstance(a, int) else a
        for a, b in zip(ours.shape, theirs.shape, strict=True)
    )
    return replace(ours, shape=shape)


def _batch(inputs: Specs) -> tuple[int | None, frozenset[str]]:
    """Return the fixed batch size of a network, if it is, and the inputs that have a batch.

    A batch is a first dimension that is free; where none is, that of the first input, which is
    then fixed.
    """
    firsts = {spec.name: spec.shape[0] for spec in inputs if spec.shape}
    unknown = {spec.name for spec in inputs if spec.shape is None}
    free = {name for name, size in firsts.items() if not isinstance(size, int)} | unknown
    if free or not firsts:
        return None, frozenset(free)
    fixed = next(iter(firsts.values()))
    assert isinstance(fixed, int)
    return fixed, frozenset(name for name, size in firsts.items() if size == fixed)
