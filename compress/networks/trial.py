"""Try an analysis before anything is trained: removal of a part of every group must be exact.

The graph does not show everything: a width that ``forward`` reads, a view with a fixed number, a
path that training alone takes. So a random part of every group is removed from a copy, and masked
and shrunk are compared. A group that fails is found by bisection, frozen and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError, first_sentence
from compress.networks.analysis import analyse
from compress.networks.capture import Example, place_of
from compress.networks.copies import copied
from compress.networks.groups import ChannelGraph, Group, Mask, Removable
from compress.networks.shrink import (
    difference_of,
    largest_difference,
    mask_,
    outputs_of,
    precision_for,
    shrink_,
    tolerance_of,
)

TRAINING_TOLERANCE = 1e-2
"""Of float32 in training mode, where statistics of two images can magnify its rounding."""

Failure = str | None
Choice = Callable[[Removable], int]
"""How many units of a group are left."""


def tried_graph(
    model: nn.Module, inputs: Example | Sequence[int], *, whole_groups: bool = False
) -> ChannelGraph:
    """Analyse a network and try the result; see ``analyse`` and ``try_out``."""
    example = inputs if isinstance(inputs, Example) else Example.images(inputs)

    def tried(outer: frozenset[str]) -> ChannelGraph:
        graph = analyse(model, example, whole_groups=whole_groups, outer=outer)
        return try_out(model, graph, example)

    graph = tried(frozenset())
    free = {unit for group in graph.prunable for unit in group.units.tolist()}
    failed = frozenset(name for name, units in graph.splits if not free.issuperset(units.tolist()))
    if not failed:
        return graph
    other = tried(failed)
    return max(graph, other, key=lambda g: sum(group.size * group.width for group in g.prunable))


def try_out(model: nn.Module, graph: ChannelGraph, example: Example) -> ChannelGraph:
    """Remove a part of every group from a copy, and freeze the groups for which that is not exact.

    Args:
        model: the network; it is not changed.
        graph: what the analysis found.
        example: inputs; at least two rows, so that training mode can be tried.

    Returns:
        The graph, with groups frozen or asked to keep more units.

    Raises:
        ModelError: the network's outputs are not finite, or not the same for the same inputs.
    """
    trial = _Trial(model, example)
    trial.require_sane(graph)
    for tried, beside, left in (
        (_removable, _none, _half),
        (_removable, _none, _fewest),
        (_some_branches, _removable, _other_half),
        (_all_branches, _none, _half),
    ):
        while failure := trial.failure(graph, [*beside(graph), *tried(graph)], left):
            graph = trial.without_culprits(graph, beside(graph), tried(graph), left, failure)
    return graph


def _half(group: Removable) -> int:
    """About half: groups of one size keep different numbers, or one's could stand for another's."""
    third = group.size // 3
    return max(group.fewest, third + int(group.units[0]) % (third + 1))


def _other_half(group: Removable) -> int:
    """The same, where training mode, which takes as long again, is not tried anew."""
    return _half(group)


def _fewest(group: Removable) -> int:
    return group.fewest


def _removable(graph: ChannelGraph) -> list[Removable]:
    return [group for group in graph.prunable if group.size > group.fewest]


def _some_branches(graph: ChannelGraph) -> list[Removable]:
    """Every other branch: what stays and what goes must do beside each other."""
    return list(graph.removable[::2])


def _all_branches(graph: ChannelGraph) -> list[Removable]:
    return list(graph.removable)


def _none(graph: ChannelGraph) -> list[Removable]:
    return []


class _Trial:
    """A copy of a network whose values let every channel matter, and what it is run on."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model = copied(model, "cpu").eval()
        _wake_(self.model)
        self.example = example.to(torch.device("cpu"))
        self.row, self.dtype = self._compared()

    def _compared(self) -> tuple[Example, torch.dtype]:
        """Return what is compared in float64: one row where the network takes it."""
        row = self.example.row()
        try:
            return row, precision_for(self.model, row)
        except Exception:  # a number of rows may be written into forward
            pass
        try:
            return self.example, precision_for(self.model, self.example)
        except Exception as error:  # forward may cast to what other layers do not read
            raise ModelError(
                f"{type(self.model).__name__} cannot be compared with itself: "
                + _explained("in float64 and in float32", error)
            ) from error

    def require_sane(self, graph: ChannelGraph) -> None:
        """Refuse a network that cannot be compared with itself."""
        name = type(self.model).__name__
        with torch.no_grad():
            first, second = (outputs_of(self.model, self.example) for _ in range(2))
        if not first:
            raise ModelError(f"{name} returns no tensor")
        if not all(torch.isfinite(tensor).all() for tensor in first):
            raise ModelError(
                f"{name} gives outputs that are not finite for random inputs in evaluation mode"
            )
        if any(tensor.numel() for tensor in first) and not any(tensor.any() for tensor in first):
            raise ModelError(
                f"{name} gives nothing but zeros for these inputs in evaluation mode, which would "
                "hide any difference: give real ones"
            )
        same = len(first) == len(second) and all(map(torch.equal, first, second))
        if not same:
            always = f"something random is always on: {', '.join(graph.random[:1])}"
            raise ModelError(
                f"{name} gives different outputs for the same inputs in evaluation mode, because "
                + (always if graph.random else "its forward changes what it computes from")
            )

    def failure(self, graph: ChannelGraph, groups: Sequence[Removable], left: Choice) -> Failure:
        """Return why some groups cannot shrink together, or None."""
        if not groups:
            return None
        kept = _mask(graph, groups, left)
        try:
            difference = difference_of(self.model, graph, kept, self.row, self.dtype)
        except Exception as error:  # the user's forward may raise anything
            return _explained("without some of them", error)
        if not difference <= tolerance_of(self.dtype):
            return (
                f"without some of them the outputs differ by {difference:.1e} from what they are "
                "with their weights at zero: forward uses a width, or the channels, in a way that "
                "the graph does not show"
            )
        # What training alone does shows at any width; squeezes show at the fewest.
        return self._training_failure(graph, kept) if left is _half else None

    @cached_property
    def can_be_trained(self) -> bool:
        """Whether the whole network runs forward and backward in training mode."""
        try:
            _trained(copied(self.model).train(), self.example, backward=True)
        except Exception:  # an operator of the user's own may have no backward
            return False
        return True

    def _training_failure(self, graph: ChannelGraph, kept: Mask) -> Failure:
        masked = copied(self.model).train()
        mask_(masked, graph, kept)
        smaller = copied(masked)
        shrink_(smaller, graph, kept)
        try:
            expected, chance = _trained(masked, self.example, backward=False)
        except Exception:  # it cannot be trained on such inputs at all
            return None
        try:
            found, _ = _trained(smaller, self.example, backward=True)
        except Exception as error:  # the user's forward may raise anything
            trains = self.can_be_trained
            return _explained("in training mode, without some of them,", error) if trains else None
        difference = largest_difference(expected, found)
        if not chance and not difference <= TRAINING_TOLERANCE:
            return (
                f"in training mode the outputs without some of them differ by {difference:.1e} "
                "from what they are with their weights at zero: forward does something else there"
            )
        return None

    def without_culprits(
        self,
        graph: ChannelGraph,
        passing: list[Removable],
        failing: list[Removable],
        left: Choice,
        failure: str,
    ) -> ChannelGraph:
        """Freeze what fails, or ask for more of a group's units; something always changes."""
        culprit, reason = self._culprit(graph, passing, failing, left, failure)
        if (
            isinstance(culprit, Group)
            and left is _fewest
            and 1 == culprit.fewest < culprit.size - 1
        ):
            return _replaced(graph, replace(culprit, fewest=2))
        return graph.freezing({culprit.name: reason})

    def _culprit(
        self,
        graph: ChannelGraph,
        passing: list[Removable],
        failing: list[Removable],
        left: Choice,
        failure: str,
    ) -> tuple[Removable, str]:
        """Find a group with which ``passing`` no longer passes, by halves."""
        while len(failing) > 1:
            half = failing[: len(failing) // 2]
            found = self.failure(graph, [*passing, *half], left)
            if found:
                failing, failure = half, found
            else:
                passing, failing = [*passing, *half], failing[len(half) :]
        return failing[0], failure


def _mask(graph: ChannelGraph, groups: Sequence[Removable], left: Choice) -> Mask:
    kept = graph.everything()
    for group in groups:
        # What a group loses must not depend on which others are tried beside it.
        generator = np.random.default_rng(int(group.units[0]))
        kept[generator.permutation(group.units)[left(group) :]] = False
    return graph.closed(kept)


def _replaced(graph: ChannelGraph, group: Group) -> ChannelGraph:
    groups = tuple(group if g.name == group.name else g for g in graph.groups)
    return replace(graph, groups=groups)


@torch.no_grad()
def _wake_(model: nn.Module) -> None:
    """Draw tensors whose numbers are all the same, as fresh scales and shifts are, at random.

    Behind a last BatchNorm or a classifier that starts at zero nothing would be seen to differ.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        level = float(tensor.flatten()[0])
        if bool((tensor == level).all()):
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            positive = level > 0 or "var" in name
            tensor.copy_(noise + 0.5 if positive else noise / 2 - 0.25)


def _trained(
    model: nn.Module, example: Example, *, backward: bool
) -> tuple[list[torch.Tensor], bool]:
    """Run a network in training mode; return its outputs and whether chance had a part in them."""
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(backward):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        outputs = outputs_of(model, example, detached=not backward)
        chance = not torch.equal(before, torch.get_rng_state())
        loss: Any = sum(t.sum() for t in outputs if t.is_floating_point() and t.requires_grad)
        if backward and isinstance(loss, torch.Tensor):
            loss.backward()  # type: ignore[no-untyped-call]
    return [tensor.detach() for tensor in outputs], chance


def _explained(when: str, error: BaseException) -> str:
    place = place_of(error)
    where = f" at {place}" if place else ""
    return f"{when} forward fails: {type(error).__name__}: {first_sentence(error)}{where}"
