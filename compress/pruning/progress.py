"""Where a pruner stands: all that it changes, as one object, and as tensors to resume from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.importance import Importance

WORK = ("decide", "shrink", "proof")
OF_UNITS = {"kept": 1, "shrunk": 1, "end": 1, "importance.total": 0, "importance.average": 0}
"""What has an entry for every unit, with that of a branch in states of before branches."""


@dataclass
class Progress:
    """Where the pruning stands: masks by dense unit id."""

    kept: Mask
    """Units that are left."""
    shrunk: Mask
    """Units that are physically there; those not kept are masked."""
    importance: Importance
    end: Mask | None = None
    """Units that the last pruning step planned to leave in the end."""
    minibatches: int = 0
    """Training steps so far."""
    step: int = 0
    """Pruning steps taken, with those that only measured."""
    paused: int = 0
    """Pruning steps that were put off because the loss was too high."""
    ended: bool = False
    """Whether pruning is over although the budget is not reached."""
    loss: float | torch.Tensor = 0.0
    """Sum of the losses since the last pruning step."""
    losses: int = 0
    limit: float | None = None
    """The limit of the cost, where a measurement has corrected the budget's."""
    largest_difference: float = 0.0
    """Of masked and shrunk outputs, over all shrinks, relative."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WORK, 0.0))
    """What pruning took, by the kind of work."""

    @property
    def all_gone(self) -> bool:
        """Whether all that was removed is physically gone."""
        return bool((self.kept == self.shrunk).all())

    def snapshot(self) -> Progress:
        """Return what is as it is now; masks and sums are replaced and never written into."""
        return replace(self, importance=copy.copy(self.importance), seconds=dict(self.seconds))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors by name; ``of`` reads them."""
        found = {
            "kept": torch.from_numpy(self.kept.copy()),
            "shrunk": torch.from_numpy(self.shrunk.copy()),
            "importance.total": self.importance.total.detach().clone(),
            "loss": torch.tensor([float(self.loss), self.losses], dtype=torch.float64),
        }
        if self.end is not None:
            found["end"] = torch.from_numpy(self.end.copy())
        if self.importance.average is not None:
            found["importance.average"] = torch.from_numpy(self.importance.average.copy())
        numbers = {
            "training_step": self.minibatches,
            "pruning_step": self.step,
            "paused": self.paused,
            "ended": self.ended,
            "minibatches": self.importance.minibatches,
        }
        exact = {
            "proof": self.largest_difference,
            **({} if self.limit is None else {"limit": self.limit}),
            **{f"seconds.{work}": seconds for work, seconds in self.seconds.items()},
        }
        found |= {name: torch.tensor(number) for name, number in numbers.items()}
        doubles = {n: torch.tensor(number, dtype=torch.float64) for n, number in exact.items()}
        return {**found, **doubles}

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, *, momentum: float
    ) -> Progress:
        """Return the progress that ``tensors`` describe, wherever they lie.

        Those of earlier versions know nothing of the branches of the dense graph, which are there.

        Raises:
            KeyError: one is missing.
            ValueError: one is not of the units of the graph.
        """
        held = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        branches = len(graph.branches)
        for name in filter(held.__contains__, OF_UNITS):
            if held[name].shape == (graph.num_units - branches,):
                there = held[name].new_full((branches,), OF_UNITS[name])
                held[name] = torch.cat([held[name], there])
            if held[name].shape != (graph.num_units,):
                shape = tuple(held[name].shape)
                raise ValueError(f"{name!r} is of shape {shape}, of {graph.num_units} units")
        importance = Importance(graph.num_units, momentum=momentum)
        importance.total = held["importance.total"]
        importance.minibatches = int(held["minibatches"])
        if "importance.average" in held:
            importance.average = held["importance.average"].numpy()
        return cls(
            held["kept"].numpy().astype(bool),
            held["shrunk"].numpy().astype(bool),
            importance,
            held["end"].numpy().astype(bool) if "end" in held else None,
            int(held["training_step"]),
            int(held["pruning_step"]),
            int(held["paused"]),
            bool(held["ended"]),
            float(held["loss"][0]),
            int(held["loss"][1]),
            float(held["limit"]) if "limit" in held else None,
            float(held["proof"]),
            {work: float(held[f"seconds.{work}"]) for work in WORK},
        )
