from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.quantization.rounding import rounded, rounded_weight
from compress.quantization.scales import half_up, room_for, weight_scales

SCALE = 0.5


def test_numbers_round_half_to_even_and_stop_at_the_bounds() -> None:
    values = torch.tensor([[-70.0, -64.0, -0.75, -0.25, 0.0, 0.2, 0.25, 0.75, 1.0, 63.5, 80.0]])
    signed = [-64, -64, -1, 0, 0, 0, 0, 1, 1, 63.5, 63.5]  # -0.75 / 0.5 = -1.5 becomes -2
    found = rounded(values, torch.tensor(SCALE), -128, 127)
    torch.testing.assert_close(found, torch.tensor([signed]), rtol=0, atol=0)
    found = rounded(values, torch.tensor(SCALE), 0, 255)
    unsigned = [0, 0, 0, 0, 0, 0, 0, 1, 1, 63.5, 80]
    torch.testing.assert_close(found, torch.tensor([unsigned]), rtol=0, atol=0)


def test_gradients_are_those_computed_by_hand() -> None:
    values = torch.tensor([[-70.0, 0.3, 0.5, 100.0]], requires_grad=True)
    scale = torch.tensor(SCALE, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (rounded(values, scale, -128, 127) * weights).sum().backward()
    assert values.grad is not None
    assert scale.grad is not None
    assert values.grad.tolist() == [[0.0, 2.0, 3.0, 0.0]]  # straight through, but for what is cut
    # The low bound; 0.3 / 0.5 = 0.6 becomes 1; 1 is exact; the high bound. Four numbers a row.
    by_hand = (1 * -128 + 2 * (1 - 0.6) + 3 * 0 + 4 * 127) / np.sqrt(4 * 127)
    assert scale.grad.item() == pytest.approx(by_hand, rel=1e-6)


def test_values_may_be_changed_in_place_after_they_were_rounded() -> None:
    leaf = torch.tensor([[-1.0, 0.3]], requires_grad=True)
    values = leaf * 1
    result = rounded(values, torch.tensor(SCALE), -128, 127)
    (result.sum() + torch.relu_(values).sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[1.0, 2.0]]


def test_half_precision_is_rounded_in_float32() -> None:
    values = torch.tensor([[0.3, 2.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = rounded(values, torch.tensor(0.003), -128, 127)
    assert found.dtype == torch.float32
    wide = np.rint(values.float().numpy() / np.float32(0.003)).clip(-128, 127) * np.float32(0.003)
    np.testing.assert_array_equal(found.numpy(), wide)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_rounded_by_channel_and_its_gradient_passes(axis: int) -> None:
    weight = torch.tensor([[1.0, -0.3], [0.0, 0.2]], requires_grad=True)
    scales = weight_scales(weight, axis, 127).float()
    result = rounded_weight(weight, scales, axis)
    (result * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    factors = scales.numpy()[:, None] if axis == 0 else scales.numpy()[None]
    expected = np.rint(weight.detach().numpy() / factors) * factors
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=0, atol=1e-7)


def test_a_channel_of_zeros_has_scale_one() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, -2.0], [1e-45, 0.0]])
    assert weight_scales(weight, 0, 127).tolist() == [1.0, 2.0 / 127, 1.0]


def test_a_bias_fits_into_32_bits_of_the_scales_product() -> None:
    bias, scale = torch.tensor([3.0, -5e4, 0.0]), torch.tensor(0.02)
    least = room_for(bias, scale)
    steps = bias.double().abs() / (scale.double() * least.clamp(min=1e-300))
    assert steps[:2].tolist() == pytest.approx([2**30, 2**30])


@given(st.floats(min_value=2.0**-30, max_value=60000.0, width=32))
def test_scales_round_up_to_half_precision(number: float) -> None:
    found = half_up(torch.tensor([number]))
    assert found.dtype == torch.float32
    above = np.float16(found.item())
    assert float(above) == found.item() >= number  # a number of half precision, and none below
    below = np.nextafter(above, np.float16(0))
    assert float(below) < number
