"""What training minimises: cross entropy, alone or with distillation from the dense network."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compress.config import TrainConfig


def training_loss(
    config: TrainConfig, logits: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean loss over a batch; labels are smoothed where nobody teaches.

    It is computed in float32 at least, whatever the network computes in.

    Args:
        config: the settings.
        logits: (N, classes) with gradient.
        labels: (N,) classes.
        taught: (N, classes) logits of the teacher, if there is one.
    """
    smoothing = config.label_smoothing if taught is None else 0.0
    loss = F.cross_entropy(_wide(logits), labels, label_smoothing=smoothing)
    if taught is None:
        return loss
    soft = distillation_loss(_wide(logits), _wide(taught), config.temperature)
    return (1 - config.distill) * loss + config.distill * soft


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return T^2 KL(teacher || student) of softened softmax outputs (Hinton et al. 2015, eq. 1-2).

    Args:
        student: (N, classes) logits with gradient.
        teacher: (N, classes) logits.
        temperature: softens both; the factor T^2 keeps the gradient's scale.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
