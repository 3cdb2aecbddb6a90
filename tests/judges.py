"""A criterion as a judge of training steps, without a pruner."""

from __future__ import annotations

import torch

from compress.criteria.scoring import Scoring


class Scores:
    """Keeps what a criterion says of every minibatch."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self.found: list[torch.Tensor] = []
        if scoring.network is not None:
            scoring.network.attach()

    def before_backward(self, loss: torch.Tensor) -> None:
        """Hand on the loss."""
        if self.scoring.before_backward:
            self.scoring.before_backward(loss)

    def score(self, scaler: torch.amp.GradScaler, *, clipped: float | torch.Tensor = 1.0) -> None:
        """Keep the scores."""
        if self.scoring.per_minibatch:
            self.found.append(self.scoring.score(scaler.get_scale() / clipped))
