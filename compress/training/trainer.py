"""One training step and its schedule: dense training, pruning and finetuning share them."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.config import ComputeConfig, TrainConfig
from compress.data.loading import Batch
from compress.distributed.batchnorm import join_batchnorms
from compress.distributed.world import ALONE, World
from compress.errors import CheckpointError, ModelError, TrainingError
from compress.quantization.network import QuantizedNetwork
from compress.training.compute import amp_dtype
from compress.training.loss import training_loss
from compress.training.optimizer import add_lasso_gradient, cosine, learning_rate, sgd

OTHER_NETWORK = "the state to go on from is of another network: start anew with --overwrite"

SMALLEST_BATCH = 2
"""Images of which BatchNorm can take a variance; smaller batches are passed over."""

CLIP_EPSILON = 1e-6
"""What torch adds to a norm before it divides by it."""

CHECK_EVERY = 20
"""Steps between two looks at the loss; every look waits for the GPU and for other processes."""


class Judge(Protocol):
    """What judges a minibatch by its gradients, as ``compress.Pruner`` does."""

    def before_backward(self, loss: torch.Tensor) -> None:
        """Be shown a loss that is not scaled yet."""

    def score(self, scaler: torch.amp.GradScaler, *, clipped: float | torch.Tensor = 1.0) -> None:
        """Be shown the gradients, in the parameters, and the factor by which they were clipped."""


class Trainer:
    """A network with its optimizer, schedule, averages and position in the run.

    Args:
        model: the network on its device; it may shrink between steps. It is put into the mode in
            which it is trained.
        config: the training settings.
        steps_per_epoch: minibatches of one epoch.
        epochs: over which the schedule of the learning rate goes; None stays at the peak, after
            warm-up, until ``begin_schedule``.
        seed: dropout and the like draw from this and the number of the step.
        teacher: the dense network, for distillation.
        memory_format: of weights and images, see ``memory_format_for``.
        compute: how the machine computes.
        world: the processes that train the network together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        epochs: int | None,
        seed: int = 0,
        teacher: nn.Module | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        compute: ComputeConfig | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.compute, self.world = compute or ComputeConfig(), world
        self.memory_format = memory_format
        self._joined: nn.Module | None = None
        if self.compute.sync_batchnorm and not world.alone:
            join_batchnorms(model)
        model.to(memory_format=memory_format)
        model.train(not config.evaluation_mode)
        self.steps_per_epoch, self.step_index = steps_per_epoch, 0
        self.hold: int | None = None
        """The step at which the schedule begins."""
        self.total: int | None = None
        """The step at which it ends."""
        self._rounds_from: tuple[int, float] | None = None
        """The first step that rounds to 8 bits, and the learning rate of it."""
        if epochs is not None:
            self.begin_schedule(epochs)
        self.device = next(model.parameters()).device
        self.optimizer = sgd(model, config)
        self.teacher = teacher.eval() if teacher is not None and config.distill > 0 else None
        self.averaged: nn.Module | None = None
        self.amp_dtype = amp_dtype(config.amp, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype is torch.float16
        )
        self.skipped = 0
        self._loss_sum = torch.zeros((), device=self.device)
        self._images = 0

    def begin_schedule(self, epochs: int, at: int | None = None) -> None:
        """Have the learning rate follow its schedule over so many epochs, from a step or from here.

        Args:
            epochs: how many.
            at: the step; default the next one.
        """
        self.hold = self.step_index if at is None else at
        self.total = self.hold + epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.total is not None and self.step_index >= self.total

    @property
    def scheduled(self) -> int:
        """Steps since the schedule began."""
        return self.step_index - (self.hold or 0)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        if self._rounds_from is not None and self.total is not None:
            start, peak = self._rounds_from
            return cosine(peak, (self.step_index - start) / (self.total - start))
        return learning_rate(
            self.config,
            self.step_index,
            steps_per_epoch=self.steps_per_epoch,
            hold=self.hold,
            total=self.total,
        )

    def step(self, batch: Batch, *, judge: Judge | None = None) -> bool:
        """Train on one minibatch.

        Args:
            batch: (N, C, H, W) images and (N,) labels, this process's share.
            judge: is shown the loss and the gradients.

        Returns:
            Whether there were images enough.

        Raises:
            TrainingError: the loss is NaN or infinite.
            ModelError: processes cannot join the gradient of a parameter.
        """
        self.skipped += batch.skipped
        counts = self.world.each(len(batch.labels))
        if min(counts) < SMALLEST_BATCH:  # broken images left too little
            self.step_index += 1
            return False
        torch.manual_seed(_mix(self.seed, self.step_index))
        if self.device.type == "cuda" and not self.world.main:  # dropout of its own
            torch.cuda.manual_seed(_mix(self.seed + self.world.rank, self.step_index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad(set_to_none=True)
        network = self._parallel()
        # As many parts in every process: BatchNorm may meet the others in each.
        parts = min(self.compute.accumulate, min(counts) // SMALLEST_BATCH)
        for number, part in enumerate(batch.parts(parts), start=1):
            weight = self.world.size * len(part.labels) / sum(counts)
            with nullcontext() if number == parts else _apart(network):
                self._pass(network, part, weight, judge)
        if not self.world.alone:
            self._require_all_used()
        self.scaler.unscale_(self.optimizer)
        clipped = self._clip()
        if judge is not None:
            judge.score(self.scaler, clipped=clipped)
        if self.config.group_lasso:  # like weight decay, of the update but not of the loss
            add_lasso_gradient(self.model, self.config.group_lasso)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self._average()
        self._images += len(batch.labels)
        self.step_index += 1
        often = self.device.type == "cpu" and self.world.alone
        if often or self.step_index % CHECK_EVERY == 0:
            self.check()
        return True

    def _clip(self) -> float | torch.Tensor:
        """Clip the gradients, if the settings ask for it; return the factor, up to 1."""
        limit = self.config.clip_gradients
        if not limit:
            return 1.0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return (limit / (norm + CLIP_EPSILON)).clamp(max=1.0)

    def _require_all_used(self) -> None:
        """Say what torch would say at the next step, in words and with a name."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise ModelError(
                    f"the parameter {name} takes no part in the output, so processes cannot join "
                    "its gradient: freeze it (requires_grad_(False)), or train in one process"
                )

    def _pass(
        self,
        network: nn.Module,
        part: Batch,
        weight: float,
        judge: Judge | None,
    ) -> None:
        """Add the gradient of some images, by their weight in the joined minibatch."""
        images, labels = part.to(self.device, self.memory_format)
        with self._autocast():
            loss = training_loss(self.config, network(images), labels, self._taught(images))
        self._loss_sum += loss.detach() * len(labels)
        if weight != 1:
            loss = loss * weight
        if judge is not None:
            judge.before_backward(loss)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def check(self) -> float:
        """Return the sum of the losses of all processes since the last report.

        Raises:
            TrainingError: it is NaN or infinite.
        """
        loss = self.world.sum(self._loss_sum).item()
        if not math.isfinite(loss):
            epoch = (self.step_index - 1) // self.steps_per_epoch + 1
            lr = self.optimizer.param_groups[0]["lr"]
            raise TrainingError(
                f"the loss became {loss} in epoch {epoch} at step "
                f"{self.step_index} with learning rate {lr:g}: lower lr or raise warmup_epochs"
            )
        return loss

    def mean_loss(self) -> float:
        """Return the mean loss per image of all processes since the last call."""
        mean = self.check() / max(1, self.world.total(self._images))
        self._loss_sum.zero_()
        self._images = 0
        return mean

    @property
    def all_skipped(self) -> int:
        """Unreadable images that all processes left out."""
        return self.world.total(self.skipped)

    def reshaped(self) -> None:
        """Be told that parameters were exchanged: what joins processes holds on to the old ones."""
        self.model.to(memory_format=self.memory_format)
        if self._joined is not None:
            self._joined = None
            gc.collect()  # its hooks on the old parameters go with it
            if self.compute.compiled:
                torch.compiler.reset()

    def quantize(self, network: QuantizedNetwork, *, epochs: int, lr: float) -> None:
        """Go on with a network that rounds to 8 bits, and train the scales of its activations too.

        Args:
            network: has the trainer's network in it. Such a one is not compiled.
            epochs: behind the end of the schedule.
            lr: learning rate of the first of their steps; it falls to zero by a cosine.
        """
        assert self.total is not None
        self._rounds_from = self.total, lr
        self.total += epochs * self.steps_per_epoch
        if self.averaged is not None:
            averaged = QuantizedNetwork(self.averaged, network.plan, network.ranges)
            self.averaged = averaged.requires_grad_(False)
        self.model = network.train()
        self.optimizer.add_param_group({"params": [network.scales], "weight_decay": 0.0})
        self.reshaped()

    def _parallel(self) -> nn.Module:
        """Return what is run forward so that the gradients of all processes are joined."""
        if self._joined is None:
            run = self.model
            if not self.world.alone:
                index = self.device.index
                run = DistributedDataParallel(run, None if index is None else [index])
            if self.compute.compiled and not isinstance(self.model, QuantizedNetwork):
                run = torch.compile(run)  # type: ignore[assignment]
            self._joined = run
        return self._joined

    def start_averaging(self) -> None:
        """Begin the exponential moving average, if the settings ask for one."""
        if self.config.ema is not None and self.averaged is None:
            self.averaged = copy.deepcopy(self.model).requires_grad_(False)

    @property
    def result(self) -> nn.Module:
        """The network that training yields: the average where there is one."""
        return self.averaged if self.averaged is not None else self.model

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the next steps depend on, by name; all processes must call it.

        Raises:
            TrainingError: the loss is NaN or infinite, so nothing may go on from here.
        """
        self.check()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        if self.averaged is not None:
            tensors |= {f"averaged.{name}": t for name, t in self.averaged.state_dict().items()}
        images = torch.as_tensor(float(self._images), device=self.device)
        tensors["loss"] = self.world.sum(torch.stack([self._loss_sum, images]))
        tensors["skipped"] = torch.tensor(self.all_skipped)
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["scale"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]])
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from the tensors of ``state``; the model must have their shapes already.

        Raises:
            CheckpointError: it has not: the state is of another network.
        """
        weights = dict(tensors_under("model.", tensors))
        if _shapes(weights) != _shapes(self.model.state_dict()):
            raise CheckpointError(OTHER_NETWORK)
        self.model.load_state_dict(weights)
        momenta = dict(tensors_under("momentum.", tensors))
        for name, parameter in self.model.named_parameters():
            if name in momenta:
                buffer = torch.empty_like(parameter).copy_(momenta[name])  # laid out alike
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        averaged = dict(tensors_under("averaged.", tensors))
        if averaged:
            self.start_averaging()
            self.result.load_state_dict(averaged)
        if self.world.main:  # what was counted in all processes goes on in one
            self._loss_sum.copy_(tensors["loss"][0])
            self._images = int(tensors["loss"][1])
            self.skipped = int(tensors["skipped"])
        if "scale" in tensors:
            scale, grown = tensors["scale"].tolist()
            self.scaler.load_state_dict(
                {**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(grown)}
            )

    @torch.no_grad()
    def _taught(self, images: torch.Tensor) -> torch.Tensor | None:
        return None if self.teacher is None else self.teacher(images)

    @torch.no_grad()
    def _average(self) -> None:
        assert self.averaged is not None
        assert self.config.ema is not None
        # Few steps in, the average must not be dominated by where it started.
        decay = min(self.config.ema, (1 + self.scheduled) / (10 + self.scheduled))
        own = self.model.state_dict()
        for name, average in self.averaged.state_dict().items():
            if average.is_floating_point():
                average.lerp_(own[name], 1 - decay)
            else:
                average.copy_(own[name])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)


def _apart(network: nn.Module) -> AbstractContextManager[object]:
    """Add gradients up in this process; the last part of the minibatch joins them."""
    inner = getattr(network, "_orig_mod", network)  # of a compiled network
    if isinstance(inner, DistributedDataParallel):
        return inner.no_sync()
    return nullcontext()


def _mix(seed: int, step: int) -> int:
    """Return a seed for one step, far from those of its neighbours."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA6B + 1) % 2**63


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def tensors_under(
    prefix: str, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors whose names begin with a prefix, without it."""
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            yield name[len(prefix) :], tensor
