"""Second-order criteria: the diagonal of the Hessian of the loss by the gates."""

from __future__ import annotations

import numpy as np
import torch

from compress.criteria.scoring import NO_PASS, Context, Scale, Scoring, placing
from compress.errors import UsageError
from compress.networks.gates import GatedNetwork


class GateHessian:
    """Gradient and Hessian diagonal of the loss of a minibatch with respect to the gates.

    With ``samples`` = 0 the diagonal is exact, at one backward pass per unit. Otherwise it is
    estimated as the mean of v * Hv over random vectors v of signs (Hutchinson's estimator; Bekas,
    Kokiopoulou and Saad 2007), at one backward pass per vector.
    """

    def __init__(self, context: Context) -> None:
        with placing():
            self.network = GatedNetwork(context.model, context.graph, context.residual_gate)
        self.samples, self.world = context.hessian_samples, context.world
        self.signs: list[torch.Tensor] = []
        self.losses = 0
        self.units = np.concatenate([group.units for group in context.graph.prunable])
        self.gradient = self.diagonal = torch.zeros_like(self.network.gates)
        self.asked = torch.zeros_like(self.gradient)
        """Ones where a unit may go: the others would only add variance."""
        self.asked[context.units(self.units)] = 1

    def __call__(self, loss: torch.Tensor) -> None:
        """Differentiate the loss twice; its graph stays for the training step's backward."""
        gates = self.network.gates
        (gradient,) = torch.autograd.grad(loss, gates, create_graph=True, allow_unused=True)
        if gradient is None:
            raise UsageError(NO_PASS)
        self.losses += 1
        self.gradient = self.gradient + gradient.detach()
        diagonal = self._estimate(gradient) if self.samples else self._exact(gradient)
        self.diagonal = self.diagonal + diagonal

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient and the diagonal of the joined minibatch, and begin anew."""
        if not self.losses:
            raise UsageError(
                "the criterion needs the loss before it is differentiated: call "
                "before_backward(loss) before loss.backward()"
            )
        self.losses = 0
        joined = self.world.sum(torch.stack([self.gradient, self.diagonal])) / self.world.size
        self.network.gates.grad = None
        self.gradient = self.diagonal = torch.zeros_like(self.gradient)
        self.signs = []
        return joined[0], joined[1]

    def _estimate(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.signs:  # the parts of a minibatch are asked along the same vectors
            # From the CPU's global generator, which a training step seeds: resuming repeats them.
            draws = [torch.randint(0, 2, gradient.shape) for _ in range(self.samples)]
            self.signs = [(2 * draw - 1).to(gradient) * self.asked for draw in draws]
        products = [signs * self._product(gradient, signs) for signs in self.signs]
        return torch.stack(products).mean(0)

    def _exact(self, gradient: torch.Tensor) -> torch.Tensor:
        diagonal = torch.zeros_like(gradient)
        for unit in self.units.tolist():
            one = torch.zeros_like(gradient)
            one[unit] = 1
            diagonal[unit] = self._product(gradient, one)[unit]
        return diagonal

    def _product(self, gradient: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        (product,) = torch.autograd.grad(gradient, self.network.gates, vector, retain_graph=True)
        return product.detach()


def obd(context: Context) -> Scoring:
    """10: Optimal Brain Damage, h / 2 for a gate of 1 (LeCun, Denker and Solla 1990)."""
    hessian = GateHessian(context)

    def score(scale: Scale) -> torch.Tensor:
        _, diagonal = hessian.take()
        return diagonal / 2

    return Scoring(score, True, network=hessian.network, before_backward=hessian)


def taylor_gate_so(context: Context) -> Scoring:
    """11: the squared change of the loss to second order, (-g + h / 2)^2 ("Taylor SO")."""
    hessian = GateHessian(context)

    def score(scale: Scale) -> torch.Tensor:
        gradient, diagonal = hessian.take()
        return (diagonal / 2 - gradient).square()

    return Scoring(score, True, network=hessian.network, before_backward=hessian)
