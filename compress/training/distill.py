"""Knowledge distillation from the dense network."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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
