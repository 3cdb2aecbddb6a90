from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import pytest
import torch
from conftest import lived_in
from networks import NETWORKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.data.loading import Batch
from compress.networks.capture import Example
from compress.training.recalibration import reestimate_batchnorm


def batches_of(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(size, 3, 12, 12, generator=generator), torch.zeros(size).long(), 0)
        for size in sizes
    ]


def inputs_of(batches: Iterable[Batch]) -> list[Example]:
    return [Example((batch.images,)) for batch in batches]


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def expected_statistics(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Mean over batches of each batch's mean and unbiased variance, from the activations."""
    model = copy.deepcopy(model).double().eval()
    found: dict[str, list[torch.Tensor]] = {}

    def look(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].transpose(0, 1).flatten(1)  # channels, everything else
            mean = x.sum(1) / x.shape[1]
            variance = (x - mean[:, None]).square().sum(1) / (x.shape[1] - 1)
            found.setdefault(f"{name}.running_mean", []).append(mean)
            found.setdefault(f"{name}.running_var", []).append(variance)

        return hook

    for name, norm in norms_of(model).items():
        norm.register_forward_pre_hook(look(name))  # type: ignore[arg-type]
        # Every layer downstream sees what this one puts out when it normalises by the batch.
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch.images.double())
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


@pytest.mark.parametrize("name", ["PreActivation", "Separable", "Plain"])
def test_statistics_are_those_of_the_activations(name: str) -> None:
    """Plain has dropout behind its BatchNorm, which must be off, and a BatchNorm1d."""
    model = lived_in(NETWORKS[name]())
    batches = batches_of(8, 8, 5)
    expected, before = expected_statistics(model, batches), statistics(model)
    assert reestimate_batchnorm(model, inputs_of(batches)) == 3
    after = statistics(model)
    assert set(after) == set(expected)
    for key, value in expected.items():
        # float32 rounding (6e-8) of convolution sums, against float64
        torch.testing.assert_close(after[key].double(), value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[key], after[key], rtol=1e-2)


def test_the_order_of_batches_does_not_matter() -> None:
    model = lived_in(NETWORKS["PreActivation"]())
    other = copy.deepcopy(model)
    batches = batches_of(8, 4, 6, 8)
    reestimate_batchnorm(model, inputs_of(batches))
    reestimate_batchnorm(other, inputs_of(reversed(batches)))
    for key, value in statistics(model).items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_old_statistics_leave_no_trace() -> None:
    first, second = (lived_in(NETWORKS["PreActivation"](), seed) for seed in (0, 1))
    assert not torch.equal(first.norm1.running_mean, second.norm1.running_mean)  # type: ignore
    weights = dict(first.named_parameters())
    second.load_state_dict(weights, strict=False)
    for norm in norms_of(second).values():
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(100)
    for model in (first, second):
        reestimate_batchnorm(model, inputs_of(batches_of(8, 8)))
    for key, value in statistics(first).items():
        assert torch.equal(value, second.state_dict()[key])


def test_weights_modes_and_momenta_stay() -> None:
    model = lived_in(NETWORKS["Plain"]()).train()
    model.features.eval()  # type: ignore[union-attr]
    model.norm.momentum = 0.37  # type: ignore[union-attr]
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.named_parameters()}
    reestimate_batchnorm(model, inputs_of(batches_of(6)))
    assert [m.training for m in model.modules()] == modes
    assert len(set(modes)) == 2
    assert model.norm.momentum == 0.37  # type: ignore[union-attr]
    for key, value in model.named_parameters():
        assert torch.equal(value, weights[key])
        assert value.grad is None


def test_modes_and_momenta_come_back_when_a_batch_raises() -> None:
    model = lived_in(NETWORKS["PreActivation"]()).train()
    model.norm2.eval()  # type: ignore[union-attr]
    model.norm3.momentum = None  # type: ignore[union-attr]

    def broken() -> Iterator[Example]:
        yield from inputs_of(batches_of(4))
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        reestimate_batchnorm(model, broken())
    norms = norms_of(model)
    assert {n: m.training for n, m in norms.items()} == {
        "norm1": True,
        "norm2": False,
        "norm3": True,
    }
    assert [m.momentum for m in norms.values()] == [0.1, 0.1, None]


@pytest.mark.parametrize("sizes", [(), (0, 1, 1)])
def test_without_a_usable_batch_the_statistics_stay(sizes: tuple[int, ...]) -> None:
    model = lived_in(NETWORKS["PreActivation"]())
    before = statistics(model)
    assert reestimate_batchnorm(model, inputs_of(batches_of(*sizes))) == 0
    for key, value in statistics(model).items():
        assert torch.equal(value, before[key])


def test_batches_left_small_by_broken_images_do_not_count() -> None:
    model = lived_in(NETWORKS["PreActivation"]())
    other = copy.deepcopy(model)
    first, small, second = batches_of(8, 1, 8)
    assert reestimate_batchnorm(model, inputs_of([first, small, second])) == 2
    assert reestimate_batchnorm(other, inputs_of([first, second])) == 2
    for key, value in statistics(model).items():
        assert torch.equal(value, other.state_dict()[key])


def test_a_network_without_batchnorm_reads_no_images() -> None:
    def never() -> Iterator[Example]:
        raise AssertionError("nobody needs these")
        yield

    assert reestimate_batchnorm(nn.Linear(2, 2), never()) == 0
