"""A callback that prunes any LightningModule while its Trainer trains it.

    python examples/lightning_callback.py --output lightning [--epochs 4] [--resume]

Copy ``PruningCallback``. It works with automatic optimization, gradient accumulation, mixed
precision and DDP; a checkpoint of the Trainer holds its state, and ``fit`` goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compress

STATE = "pruner."
"""What the names of the pruner's tensors in a checkpoint begin with."""


class PruningCallback(lightning.Callback):
    """Prunes a module, or a part of it, while it is fitted; each module has a callback of its own.

    Args:
        example: inputs of the ``forward`` of what is pruned.
        part: name of the submodule that is pruned; by default the whole module.
        stop: end the fit when the budget holds.
        settings: those of ``[prune]``.
    """

    pruner: compress.Pruner

    def __init__(self, example: Any, part: str = "", stop: bool = False, **settings: Any) -> None:
        self.example, self.part, self.stop, self.settings = example, part, stop, settings
        self._updated = False

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Analyse the network, before weights are read and optimizers are made."""
        if "pruner" in vars(self):
            return
        self.pruner = compress.Pruner(
            pl_module.get_submodule(self.part),
            self.example,
            optimizer=None,  # they do not exist yet
            callback=lambda kind, facts: self.tell(trainer, kind, facts),
            **self.settings,
        )
        pl_module.register_load_state_dict_pre_hook(self.before_weights)

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Let the optimizers, which exist by now, follow the shrinks."""
        self.pruner.follow(trainer.optimizers)

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        """Let the criteria that need second derivatives take them."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.pruner.before_backward(loss if scaler is None else loss / scaler.get_scale())

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Score the gradients of an update, which are accumulated, joined and unscaled here."""
        self.pruner.score(getattr(trainer.precision_plugin, "scaler", None))
        self._updated = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hold removed channels at zero after an update; prune and shrink when due."""
        if not self._updated:
            return  # gradients are being accumulated
        self._updated = False
        done = self.pruner.step(outputs["loss"])
        if self.pruner.reshaped and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        trainer.should_stop |= done and self.stop

    def tell(self, trainer: lightning.Trainer, kind: str, facts: dict[str, Any]) -> None:
        """Send what is left to the loggers."""
        if kind == "prune_step":
            left = {f"pruning/{name}": facts[name] for name in ("macs", "params", "channels")}
            for logger in trainer.loggers:
                logger.log_metrics(left, trainer.global_step)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Put the pruner's state among the weights: it is needed before they are read.

        A callback's ``load_state_dict`` would come after them.
        """
        state = self.pruner.state_dict().items()
        checkpoint["state_dict"].update({STATE + name: tensor for name, tensor in state})

    def before_weights(self, module: nn.Module, weights: dict[str, Any], *rest: Any) -> None:
        """Take the state out again, and let a dense network take its shrunk form."""
        names = [name for name in weights if name.startswith(STATE)]
        state = {name.removeprefix(STATE): weights.pop(name) for name in names}
        if state and self.pruner.at.shrunk.all():
            self.pruner.load_state_dict(state)


class Classifier(lightning.LightningModule):
    """Some LightningModule; nothing in it knows of pruning."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 16, 16) to logits (N, 10)."""
        return self.network(images)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a minibatch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def minibatches(count: int) -> tuple[DataLoader[tuple[torch.Tensor, ...]], torch.Tensor]:
    """Return a loader of noisy copies of ten patterns with their numbers, and its images."""
    patterns, labels = torch.randn(10, 3, 16, 16), torch.randint(10, (count * 32,))
    images = patterns[labels] + torch.randn(len(labels), 3, 16, 16)
    return DataLoader(TensorDataset(images, labels), batch_size=32), images


def main(
    output: Path,
    epochs: int = 4,
    count: int = 20,
    interval: int = 5,
    resume: bool = False,
    **trainer: Any,
) -> Classifier:
    """Train and prune; return the pruned module."""
    lightning.seed_everything(0, verbose=False)
    loader, images = minibatches(count)
    module = Classifier()
    pruning = PruningCallback(images[:1], budget="macs=0.5", steps=8, interval=interval)
    saving = ModelCheckpoint(output, save_last=True, save_top_k=0)
    fitting = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[pruning, saving],
        default_root_dir=output,
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **trainer},
    )
    fitting.fit(module, loader, ckpt_path=output / "last.ckpt" if resume else None)
    fitting.print(pruning.pruner.summary())
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    main(options.output, options.epochs, resume=options.resume, devices=options.devices)
