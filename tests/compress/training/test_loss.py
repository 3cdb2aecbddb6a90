from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from compress.training.loss import distillation_loss


def test_loss_by_hand() -> None:
    """Two classes, T = 2: softened odds are exp(difference / 2)."""
    student = torch.tensor([[2 * math.log(3.0), 0.0]])  # 3 : 1
    teacher = torch.tensor([[0.0, 0.0]])  # 1 : 1
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    loss = distillation_loss(student, teacher, 2.0)
    assert float(loss) == pytest.approx(4 * divergence, rel=1e-6)


def test_loss_is_the_mean_over_images() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    each = [distillation_loss(student[i : i + 1], teacher[i : i + 1], 3.0) for i in range(6)]
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), torch.stack(each).mean())


def test_loss_is_zero_for_the_same_distribution_only() -> None:
    teacher = torch.randn(4, 5, dtype=torch.float64)
    shifted = teacher + torch.randn(4, 1, dtype=torch.float64)  # softmax does not see it
    assert float(distillation_loss(shifted, teacher, 2.0)) == pytest.approx(0, abs=1e-14)
    assert float(distillation_loss(teacher.flip(1), teacher, 2.0)) > 1e-2


def test_gradient_by_its_closed_form() -> None:
    """d/dz_s = T (softmax(z_s / T) - softmax(z_t / T)) / N."""
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    distillation_loss(student, teacher, 4.0).backward()
    expected = 4 * (F.softmax(student / 4, 1) - F.softmax(teacher / 4, 1)) / 3
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected.detach())


def test_high_temperature_matches_logits() -> None:
    """Hinton et al. 2015, section 2.1: half the squared distance of centred logits / classes."""
    student, teacher = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    difference = (student - student.mean(1, keepdim=True)) - (
        teacher - teacher.mean(1, keepdim=True)
    )
    expected = difference.square().sum(1).mean() / (2 * 5)
    # The next term of the expansion is of relative order 1 / T.
    torch.testing.assert_close(
        distillation_loss(student, teacher, 1e4), expected, rtol=1e-3, atol=0
    )
