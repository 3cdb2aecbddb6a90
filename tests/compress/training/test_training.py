from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import lived_in
from judges import Scores
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F

from compress.config import SEED2019, TrainConfig
from compress.criteria import bind
from compress.criteria.scoring import Context, Scoring
from compress.data.loading import Batch
from compress.errors import CheckpointError, EnvironmentUnfitError, TrainingError
from compress.networks.analysis import analyse
from compress.networks.architectures import CifarResNet
from compress.training.compute import memory_format_for, pick_device
from compress.training.optimizer import learning_rate, sgd
from compress.training.trainer import Trainer

STEPS_PER_EPOCH = 10

# The reference loops below take the same steps in the same order on the same kernels; what is left
# is the rounding of float32 (6e-8) over a few steps. Every setting under test moves the weights by
# 1e-4 and more, which `moved` asserts.
EXACT = {"rtol": 1e-5, "atol": 1e-6}


def batch_of(count: int, seed: int = 0, classes: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 12, 12, generator=generator)
    return Batch(images, torch.randint(classes, (count,), generator=generator), skipped=0)


def plain(**settings: object) -> TrainConfig:
    """Return settings without anything but SGD at a constant rate, apart from those given."""
    bare = {
        "lr": 0.05,
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
    }
    return TrainConfig.model_validate(bare | settings)


def network(name: str = "PreActivation", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = lived_in(NETWORKS[name](), seed).train()
    return model.to(memory_format=memory_format_for(model, (3, 12, 12)))


def trainer_of(model: nn.Module, config: TrainConfig, **options: object) -> Trainer:
    settings: dict[str, object] = {
        "steps_per_epoch": STEPS_PER_EPOCH,
        "epochs": 10,
        "memory_format": memory_format_for(model, (3, 12, 12)),
    }
    return Trainer(copy.deepcopy(model), config, **(settings | options))  # type: ignore[arg-type]


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """- sum_k q_k log p_k, with q = (1 - smoothing) onehot + smoothing / classes."""
    log_p = logits - logits.logsumexp(1, keepdim=True)
    q = F.one_hot(labels, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    return -(q * log_p).sum(1).mean()


Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def unadorned(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(images), labels)


def reference(
    model: nn.Module,
    steps: int,
    *,
    loss_of: Loss = unadorned,
    lr: float = 0.05,
    momentum: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
    decay_all: bool = False,
) -> nn.Module:
    """Train a copy by the formulas: v = mu v + g, w -= lr (g + mu v with Nesterov, else v)."""
    model = copy.deepcopy(model)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(steps):
        batch = batch_of(16, step)
        images = batch.images.to(memory_format=memory_format_for(model, (3, 12, 12)))
        loss = loss_of(model, images, batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                g = gradient + decay * p if p.dim() > 1 or decay_all else gradient
                v = velocity[name] = momentum * velocity[name] + g
                p -= lr * (g + momentum * v if nesterov else v)
    return model


def train(trainer: Trainer, steps: int) -> nn.Module:
    for step in range(steps):
        trainer.step(batch_of(16, step))
    return trainer.model


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    wanted = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        torch.testing.assert_close(
            parameter, wanted[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference of two networks' parameters."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# Learning rate


def rate(config: TrainConfig, step: int, *, hold: int = 0, total: int = 100) -> float:
    return learning_rate(config, step, steps_per_epoch=STEPS_PER_EPOCH, hold=hold, total=total)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = TrainConfig(lr=0.4, warmup_epochs=2.0)
    assert rate(config, 0) == pytest.approx(0.4 / 20)
    assert rate(config, 9) == pytest.approx(0.2)
    assert rate(config, 19) == rate(config, 20) == pytest.approx(0.4)


def test_a_fractional_warm_up_never_passes_the_peak() -> None:
    config = TrainConfig(lr=1.0, warmup_epochs=0.25)  # two and a half steps
    assert [rate(config, step) for step in range(3)] == pytest.approx([0.4, 0.8, 1.0])
    assert max(rate(config, step) for step in range(101)) == 1.0


def test_epochs_at_a_rate_of_zero_move_nothing_of_the_schedule() -> None:
    plain_, still = (TrainConfig(lr=0.2, zero_lr_epochs=epochs) for epochs in (0.0, 1.5))
    assert {rate(still, step) for step in range(15)} == {0.0}
    assert [rate(still, s) for s in range(15, 100)] == [rate(plain_, s) for s in range(15, 100)]


def test_cosine_by_hand() -> None:
    config = TrainConfig(lr=0.2, warmup_epochs=1.0)  # the cosine spans steps 10 to 90
    assert rate(config, 10, total=90) == pytest.approx(0.2)
    assert rate(config, 30, total=90) == pytest.approx(0.1 * (1 + math.sqrt(0.5)))
    assert rate(config, 50, total=90) == pytest.approx(0.1)
    assert rate(config, 70, total=90) == pytest.approx(0.1 * (1 - math.sqrt(0.5)))
    assert rate(config, 90, total=90) == pytest.approx(0.0, abs=1e-15)


def test_cosine_falls_and_is_never_negative() -> None:
    config = TrainConfig(lr=0.2, warmup_epochs=1.0)
    rates = [rate(config, step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= 0
    assert rates[-2] <= 0.2 * 1e-3  # the last step that is taken


def test_the_peak_is_held_until_pruning_ends() -> None:
    config = TrainConfig(lr=0.2, warmup_epochs=1.0)
    assert [rate(config, s, hold=40) for s in (10, 25, 39, 40)] == pytest.approx([0.2] * 4)
    assert rate(config, 70, hold=40) == pytest.approx(0.1)  # halfway from 40 to 100
    assert rate(config, 100, hold=40) == pytest.approx(0.0, abs=1e-15)


def test_a_warm_up_longer_than_pruning_is_finished_first() -> None:
    config = TrainConfig(lr=0.2, warmup_epochs=2.0)
    assert rate(config, 9, hold=5) == pytest.approx(0.1)
    assert rate(config, 20, hold=5) == pytest.approx(0.2)
    assert rate(config, 60, hold=5) == pytest.approx(0.1)  # halfway from 20 to 100


def test_constant_is_constant_after_warm_up() -> None:
    config = TrainConfig(lr=0.3, schedule="constant", warmup_epochs=1.0)
    assert rate(config, 4) == pytest.approx(0.15)
    assert {rate(config, step) for step in range(9, 101)} == {0.3}


@pytest.mark.parametrize("hold", [0, 7])
def test_seed2019_decays_in_epochs_10_and_20_counted_from_one(hold: int) -> None:
    config = TrainConfig.model_validate({"preset": "seed2019"})
    total = hold + SEED2019["epochs"] * STEPS_PER_EPOCH
    for epoch in range(1, 26):
        expected = 1e-3 if epoch <= 9 else 1e-4 if epoch <= 19 else 1e-5
        first = hold + (epoch - 1) * STEPS_PER_EPOCH
        for step in (first, first + STEPS_PER_EPOCH - 1):
            assert rate(config, step, hold=hold, total=total) == pytest.approx(expected), epoch


def test_the_optimizer_takes_the_scheduled_rate() -> None:
    trainer = trainer_of(network(), TrainConfig(lr=0.2, warmup_epochs=1.0))
    before = copy.deepcopy(trainer.model)
    trainer.step(batch_of(16))
    assert [g["lr"] for g in trainer.optimizer.param_groups] == pytest.approx([0.02, 0.02])
    assert trainer.lr == pytest.approx(0.04)
    assert moved(trainer.model, before) > 1e-4


# One step against the formulas


def test_a_step_is_sgd() -> None:
    model = network()
    trained = train(trainer_of(model, plain()), 3)
    assert_same_weights(trained, reference(model, 3))
    assert moved(trained, model) > 1e-2


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(nesterov: bool) -> None:
    model = network()
    trained = train(trainer_of(model, plain(momentum=0.9, nesterov=nesterov)), 4)
    assert_same_weights(trained, reference(model, 4, momentum=0.9, nesterov=nesterov))
    other = reference(model, 4, momentum=0.9, nesterov=not nesterov)
    assert moved(trained, other) > 1e-4


@pytest.mark.parametrize("everywhere", [False, True])
def test_weight_decay_is_for_weights_unless_asked_for_everywhere(everywhere: bool) -> None:
    model = network()
    config = plain(weight_decay=0.1, decay_norm_and_bias=everywhere, momentum=0.5)
    trained = train(trainer_of(model, config), 3)
    options = {"decay": 0.1, "momentum": 0.5}
    assert_same_weights(trained, reference(model, 3, decay_all=everywhere, **options))  # type: ignore[arg-type]
    other = reference(model, 3, decay_all=not everywhere, **options)  # type: ignore[arg-type]
    assert moved(trained, other) > 1e-3


def test_frozen_parameters_stay() -> None:
    model = network()
    model.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    trainer = trainer_of(model, plain(weight_decay=0.1))
    trained = train(trainer, 2)
    assert torch.equal(trained.stem.weight, model.stem.weight)  # type: ignore[union-attr]
    assert moved(trained, model) > 1e-3
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert id(trained.stem.weight) not in held  # type: ignore[union-attr]


def test_label_smoothing() -> None:
    model = network()

    def smoothed(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(m(x), y, smoothing=0.2)

    trained = train(trainer_of(model, plain(label_smoothing=0.2)), 3)
    assert_same_weights(trained, reference(model, 3, loss_of=smoothed))
    assert moved(trained, reference(model, 3)) > 1e-3


def test_distillation_replaces_label_smoothing() -> None:
    """(1 - a) CE + a T^2 sum p_t (log p_t - log p_s), the teacher in eval mode."""
    model, teacher = network(), network(seed=1)
    before = copy.deepcopy(teacher.state_dict())

    def distilled(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = m(x)
        with torch.no_grad():
            taught = (copy.deepcopy(teacher).eval()(x) / 3.0).softmax(1)
        own = (logits / 3.0).softmax(1)
        divergence = (taught * (taught.log() - own.log())).sum(1).mean()
        return 0.3 * cross_entropy(logits, y) + 0.7 * 9.0 * divergence

    config = plain(distill=0.7, temperature=3.0, label_smoothing=0.4)
    trained = train(trainer_of(model, config, teacher=teacher), 3)
    assert_same_weights(trained, reference(model, 3, loss_of=distilled))
    assert moved(trained, reference(model, 3)) > 1e-3
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_teacher_is_not_asked_when_nothing_is_distilled() -> None:
    model = network()
    trained = train(trainer_of(model, plain(), teacher=network(seed=1)), 2)
    assert_same_weights(trained, reference(model, 2))


def test_group_lasso_by_its_formula() -> None:
    """0.01 sum over filters sqrt(sum w^2); linear layers are not filters."""
    model = network()

    def penalised(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        filters = [p for name, p in m.named_parameters() if p.dim() == 4]
        assert len(filters) == 3
        norms = [w.square().sum((1, 2, 3)).sqrt().sum() for w in filters]
        return cross_entropy(m(x), y) + 0.01 * sum(norms)

    trained = train(trainer_of(model, plain(group_lasso=0.01)), 3)
    assert_same_weights(trained, reference(model, 3, loss_of=penalised))
    assert moved(trained, reference(model, 3)) > 1e-4


def looking(look: Callable[[], object]) -> Scores:
    """A judge that calls ``look`` when the gradients are there."""

    def score(scale: float) -> torch.Tensor:
        assert scale == 1  # nothing is scaled in float32
        look()
        return torch.zeros(1)

    return Scores(Scoring(score, per_minibatch=True))


def test_group_lasso_is_of_the_update_and_not_of_the_loss() -> None:
    """No gate is part of it, so whoever looks at the gradients of the loss must not see it."""
    model = network()
    gradients, losses = [], []
    for coefficient in (0.0, 10.0):
        trainer = trainer_of(model, plain(group_lasso=coefficient))
        weight = trainer.model.stem.weight

        def look(weight: torch.Tensor = weight) -> None:  # type: ignore[assignment]
            assert weight.grad is not None
            gradients.append(weight.grad.clone())

        trainer.step(batch_of(16), judge=looking(look))
        losses.append(trainer.mean_loss())
        assert (moved(trainer.model, model) > 0.1) == (coefficient > 0)
    assert torch.equal(*gradients)
    assert losses[0] == losses[1]


def test_group_lasso_of_a_zero_filter_pulls_nowhere() -> None:
    model = network()
    with torch.no_grad():
        model.stem.weight[0] = 0  # type: ignore[index]
    trained = train(trainer_of(model, plain(group_lasso=0.01)), 1)
    for parameter in trained.parameters():
        assert torch.isfinite(parameter).all()


def test_group_lasso_of_a_network_without_convolutions_is_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    trained = train(trainer_of(model, plain(group_lasso=0.01)), 2)
    assert_same_weights(trained, reference(model, 2))


def test_moving_average_by_its_recurrence() -> None:
    """d_n = min(ema, (1 + n) / (10 + n)) over the steps since the hold; statistics too."""
    model = network()
    trainer = trainer_of(model, plain(ema=0.3))
    train(trainer, 2)
    trainer.begin_schedule(9)
    trainer.start_averaging()
    average = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for n in range(8):
        trainer.step(batch_of(16, n))
        decay = min(0.3, (1 + n) / (10 + n))
        for name, tensor in trainer.model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * tensor
            else:
                average[name] = tensor.clone()
    assert trainer.result is not trainer.model
    for name, tensor in trainer.result.state_dict().items():
        torch.testing.assert_close(tensor, average[name], **EXACT)
    assert moved(trainer.result, trainer.model) > 1e-3
    assert {1 / 10, 2 / 11, 3 / 12} < {min(0.3, (1 + n) / (10 + n)) for n in range(8)}


def test_without_ema_the_result_is_the_model() -> None:
    trainer = trainer_of(network(), plain())
    trainer.start_averaging()
    assert trainer.result is trainer.model


def test_averaging_does_not_change_training() -> None:
    model = network()
    with_average = trainer_of(model, plain(ema=0.9, momentum=0.9))
    with_average.start_averaging()
    without = trainer_of(model, plain(momentum=0.9))
    for first, second in zip(
        train(with_average, 3).parameters(), train(without, 3).parameters(), strict=True
    ):
        assert torch.equal(first, second)


def test_default_recipe_decays_convolutions_and_classifier_only() -> None:
    model = CifarResNet(20)
    decayed, untouched = sgd(model, TrainConfig()).param_groups
    assert decayed["weight_decay"] == 1e-4
    assert untouched["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("conv" in names[id(p)] or names[id(p)] == "fc.weight" for p in decayed["params"])
    assert len(decayed["params"]) == 20
    assert len(decayed["params"]) + len(untouched["params"]) == len(names)
    assert decayed["nesterov"]


# Chance


@pytest.mark.parametrize("entry", [0, 12345])
def test_dropout_follows_from_seed_and_step_alone(entry: int) -> None:
    """Whatever drew from torch's global generator before, and however often."""
    expected = train(trainer_of(network("Plain"), plain(), seed=3), 2)
    trainer = trainer_of(network("Plain"), plain(), seed=3)
    for step in range(2):
        torch.manual_seed(entry)
        torch.rand(step + 1)
        trainer.step(batch_of(16, step))
    for first, second in zip(expected.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_dropout_differs_between_seeds_and_steps() -> None:
    model = network("Plain")
    first, second = (train(trainer_of(model, plain(), seed=seed), 1) for seed in (0, 1))
    assert moved(first, second) > 1e-4
    late = trainer_of(model, plain(), seed=0)
    late.step_index = 1
    assert moved(train(late, 1), first) > 1e-4


# What may go wrong


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "nan|inf")])
def test_a_loss_that_is_no_number_names_epoch_step_and_rate(value: float, word: str) -> None:
    trainer = trainer_of(network(), TrainConfig(lr=0.5, warmup_epochs=2.0))
    train(trainer, 9)
    good = batch_of(16)
    bad = Batch(torch.full_like(good.images, value), good.labels, 0)
    # The tenth step is the last of the first epoch; warm-up is halfway.
    with pytest.raises(TrainingError, match=rf"became ({word}) in epoch 1 at step 10 .* rate 0.25"):
        trainer.step(bad)


def test_diverged_training_has_no_state() -> None:
    trainer = trainer_of(network(), plain(lr=1e30))
    with pytest.raises(TrainingError):
        train(trainer, 5)
    with pytest.raises(TrainingError):
        trainer.state()


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_too_small_for_batchnorm_is_passed_over(count: int) -> None:
    model = network()
    trainer = trainer_of(model, plain(ema=0.5))
    trainer.start_averaging()
    called: list[bool] = []
    small = Batch(torch.zeros(count, 3, 12, 12), torch.zeros(count, dtype=torch.int64), 16 - count)
    trainer.step(small, judge=looking(lambda: called.append(True)))
    assert not called
    assert (trainer.step_index, trainer.skipped) == (1, 16 - count)
    assert trainer.mean_loss() == 0
    for first, second in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(first, second)
    trainer.step(batch_of(16))  # and training goes on
    assert moved(trainer.model, model) > 1e-3


def test_mean_loss_weighs_images_and_starts_anew() -> None:
    model = network()
    trainer = trainer_of(model, plain(lr=1e-12))  # weights stay, so both losses are those of model
    trainer.step(batch_of(4, 0))
    trainer.step(batch_of(12, 1))
    with torch.no_grad():
        losses = [
            float(cross_entropy(model(batch.images), batch.labels))
            for batch in (batch_of(4, 0), batch_of(12, 1))
        ]
    assert trainer.mean_loss() == pytest.approx((4 * losses[0] + 12 * losses[1]) / 16, rel=1e-5)
    assert trainer.mean_loss() == 0


def test_a_criterion_sees_the_gradients_before_the_weights_move() -> None:
    model = network()
    trainer = trainer_of(model, plain())
    seen: list[torch.Tensor] = []

    def look() -> None:
        weight = trainer.model.head.weight
        assert torch.equal(weight, model.head.weight)  # type: ignore[union-attr]
        seen.append(weight.grad.clone())  # type: ignore[union-attr]

    trainer.step(batch_of(16), judge=looking(look))
    expected = model.head.weight - 0.05 * seen[0]  # type: ignore[union-attr,operator]
    torch.testing.assert_close(trainer.model.head.weight, expected, **EXACT)  # type: ignore[union-attr]


# Memory


@pytest.mark.parametrize("name", [*sorted(NETWORKS), "resnet20"])
def test_channels_last_is_for_networks_that_compute_in_it(name: str) -> None:
    """Plain views feature maps as vectors, which channels_last does not allow."""
    model = NETWORKS[name]() if name in NETWORKS else CifarResNet(20, num_classes=4)
    before = copy.deepcopy(model.state_dict())
    chosen = memory_format_for(model, (3, 12, 12))
    assert chosen is (torch.contiguous_format if name == "Plain" else torch.channels_last)
    assert all(m.training for m in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert tensor.stride() == before[key].stride()
    trainer = trainer_of(model, plain())
    trainer.step(batch_of(8))
    for parameter in trainer.model.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=chosen)


# State


def test_state_of_another_network_is_refused() -> None:
    state = trainer_of(network("PreActivation"), plain()).state()
    with pytest.raises(CheckpointError, match="another network: start anew with --overwrite"):
        trainer_of(network("Plain"), plain()).load_state(state)


def test_state_carries_every_number_of_a_loss_scaler() -> None:
    first, second = (trainer_of(network(), plain()) for _ in range(2))
    for trainer in (first, second):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    train(first, 2)
    second.load_state(first.state())
    for trainer in (first, second):
        trainer.step(batch_of(16, 2))  # the third good step doubles the scale
        assert trainer.scaler.get_scale() == 2048.0


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "gpu"):
        with pytest.raises(EnvironmentUnfitError, match=f"device '{name}' cannot be used here"):
            pick_device(name)


# What the research code of 2019 does besides


def gradient_of(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    images = batch.images.to(memory_format=memory_format_for(model, (3, 12, 12)))
    gradients = torch.autograd.grad(
        cross_entropy(model(images), batch.labels), list(model.parameters())
    )
    return dict(zip((n for n, _ in model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize("limit", [0.05, 1e4])
def test_gradients_are_clipped_together(limit: float) -> None:
    """A step moves weights by lr * g * min(1, limit / |g|), with |g| over all parameters."""
    model, batch = network().double(), batch_of(16)
    batch = replace(batch, images=batch.images.double())
    gradients = gradient_of(model, batch)
    norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
    trainer = trainer_of(model, plain(clip_gradients=limit))
    trainer.step(batch)
    factor = min(1.0, limit / norm)
    assert (factor < 1) == (limit < 1)
    before = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        expected = before[name] - 0.05 * factor * gradients[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("criterion", ["taylor-gate", "bn-taylor", "taylor-gate-fg"])
def test_clipped_gradients_are_scored_alike_wherever_they_are_taken(criterion: str) -> None:
    """Gates of streams are no parameters, and must not weigh more for it."""
    batch = batch_of(16)
    batch = replace(batch, images=batch.images.double())
    scores = []
    for limit in (0.0, 0.05):
        model = network().double()
        graph = analyse(model.eval(), (3, 12, 12))
        model.train()
        trainer = Trainer(model, plain(clip_gradients=limit), steps_per_epoch=10, epochs=10)
        context = Context(model, graph, residual_gate="block", as_published=True)
        judge = Scores(bind(criterion, context))
        trainer.step(batch, judge=judge)
        scores.append(judge.found[0])
    whole, clipped = scores
    gradients = gradient_of(network().double(), batch)
    norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
    assert any(group.residual for group in graph.prunable)
    units = np.concatenate([group.units for group in graph.prunable])
    factor = (0.05 / norm) ** 2
    torch.testing.assert_close(clipped[units], factor * whole[units], rtol=1e-4, atol=1e-18)


def test_training_in_evaluation_mode_keeps_statistics_and_uses_them() -> None:
    model, batch = network(), batch_of(16)
    trainer = trainer_of(model, plain(evaluation_mode=True))
    assert not trainer.model.training
    trainer.step(batch)
    gradients = gradient_of(model.eval(), batch)
    before = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.05 * gradients[name], **EXACT)
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name])


def test_a_rate_of_zero_moves_no_weight() -> None:
    model = network()
    trainer = trainer_of(model, plain(zero_lr_epochs=0.2))  # of ten steps
    train(trainer, 2)
    assert moved(trainer.model, model) == 0
    train(trainer, 1)
    assert moved(trainer.model, model) > 0


def test_the_peak_holds_until_the_schedule_is_begun() -> None:
    """Warm-up, the peak while nobody knows when pruning ends, then the cosine from there."""
    config = plain(schedule="cosine", warmup_epochs=0.5, lr=0.2)
    trainer = trainer_of(network(), config, epochs=None)
    rates = []
    for n in range(9):
        rates.append(trainer.lr)
        trainer.step(batch_of(16, n))
        assert not trainer.finished
    assert rates == pytest.approx([0.2 * k / 5 for k in (1, 2, 3, 4, 5)] + [0.2] * 4)
    trainer.begin_schedule(2)
    rates = []
    while not trainer.finished:
        rates.append(trainer.lr)
        trainer.step(batch_of(16, trainer.step_index))
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * n / 20)) for n in range(20)])
