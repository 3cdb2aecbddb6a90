"""Where a dense network comes from: trained here, or read from somebody's checkpoint."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import torch
from torch import nn

from compress.checkpoints.checkpoint import load_weights, save_checkpoint
from compress.checkpoints.description import Description, read_description
from compress.config import RunConfig
from compress.data.batches import ImageData
from compress.distributed.torchrun import is_main
from compress.distributed.world import current
from compress.errors import CheckpointError, ModelError
from compress.files.atomic import sha256_of
from compress.networks.models import build_network, build_skeleton, head_of
from compress.networks.outputs import require_logits
from compress.runs.loop import Loop, accuracy_of, train_batches
from compress.runs.session import Session
from compress.runs.state import State
from compress.terminal.progress import bar
from compress.training.compute import computing, memory_format_for, pick_device
from compress.training.trainer import Trainer

log = logging.getLogger("compress")


def train_dense(config: RunConfig, data: ImageData, session: Session) -> Path:
    """Train the configured network from scratch and write ``dense.safetensors``.

    Raises:
        TrainingError: the loss became NaN or infinite.
        InterruptedRunError: the user stopped; the state is saved.
    """
    device, world = pick_device(config.device), current()
    torch.manual_seed(config.seed)
    model = _trainable(config, data).to(device)
    per_epoch = len(train_batches(data, config, device.type, world))
    trainer = Trainer(
        model,
        config.train,
        steps_per_epoch=per_epoch,
        epochs=config.train.epochs,
        seed=config.seed,
        memory_format=memory_format_for(model, data.input_size, config.compute.channels_last),
        compute=config.compute,
        world=world,
    )
    trainer.start_averaging()
    state = session.load("train")
    if state:
        with session.taking_up():
            trainer.load_state(state.tensors)
            trainer.step_index = state.facts["step"]

    def snapshot() -> State:
        return State("train", {"step": trainer.step_index}, trainer.state())

    with (
        computing(config.compute),
        bar(f"training {config.model.name}", config.train.epochs * per_epoch) as shown,
        session.interruptible(),
    ):
        loop = Loop(trainer, data, config, session, shown)
        loop.run(
            lambda batch: trainer.step(batch),
            snapshot=snapshot,
            finished=lambda: trainer.finished,
            each_epoch=lambda epoch: loop.record_epoch("train", epoch),
        )
        accuracy = loop.accuracy()
    description = Description.of(config.model, data, {"accuracy": accuracy.as_dict()})
    if world.main:
        save_checkpoint(session.run.dense, trainer.result, description=description)
        session.finish()
    world.wait()
    return session.run.dense


def import_dense(
    config: RunConfig, data: ImageData, checkpoint: Path, output: Path, key: str | None = None
) -> Path:
    """Read a dense checkpoint, measure it, and write it as a file that a run can begin with.

    Args:
        config: of the run.
        data: of the run.
        checkpoint: the file.
        output: the file to write.
        key: which weights, where the checkpoint holds several sets; None for the usual ones.

    Raises:
        CheckpointError: the file does not fit the architecture or the classes of the data.
    """
    device, world = pick_device(config.device), current()
    torch.manual_seed(config.seed)
    model = read_dense(config, data, checkpoint, key)
    if config.model.new_head:
        log.warning("the classifier begins anew, and learns while the network is pruned")
    accuracy = accuracy_of(model.to(device), data, config, world)
    if world.main:
        origin = {"name": checkpoint.name, "sha256": sha256_of(checkpoint), "weights": key}
        metrics = {"accuracy": accuracy.as_dict(), "imported": origin}
        save_checkpoint(output, model, description=Description.of(config.model, data, metrics))
    world.wait()
    return output


def note_import(session: Session) -> None:
    """Have the history say how accurate an imported network is, unless it does already.

    Raises:
        CheckpointError: the network or the history is damaged.
    """
    if not is_main():
        return
    own = read_description(session.run.dense)
    metrics = own.metrics if own else {}
    told = any(event["event"] == "dense" for event in session.run.events())
    if told or "imported" not in metrics or "accuracy" not in metrics:
        return
    session.forget("train")  # a line that was cut off
    session.record("dense", checkpoint=metrics["imported"]["name"], **metrics["accuracy"])


def is_import_of(file: Path, checkpoint: Path, key: str | None = None) -> bool:
    """Whether the dense network of a run is that of a checkpoint, by the bytes of the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"there is no checkpoint {checkpoint}")
    own = read_description(file)
    origin = own.metrics.get("imported") if own else None
    digest = sha256_of(checkpoint)
    if isinstance(origin, dict) and (origin.get("sha256"), origin.get("weights")) == (digest, key):
        return True
    return digest == sha256_of(file)


def read_dense(
    config: RunConfig, data: ImageData, checkpoint: Path, key: str | None = None
) -> nn.Module:
    """Return the configured network with the weights of a checkpoint.

    With ``model.new_head`` what follows the number of classes keeps its fresh weights.

    Raises:
        CheckpointError: the file does not fit the architecture or the classes of the data.
        ModelError: the network cannot be built, or nothing of it follows the number of classes.
    """
    own = read_description(checkpoint) if checkpoint.suffix == ".safetensors" else None
    if own:
        _check_origin(own, config, data, checkpoint)
    model = _trainable(config, data)
    load_weights(checkpoint, model, without=_new_head(config, data), key=key)
    return model


def skeleton(config: RunConfig, data: ImageData) -> nn.Module:
    """Return the configured network for its structure, see ``build_skeleton``."""
    return build_skeleton(
        config.model, num_classes=data.num_classes, in_channels=data.input_size[0]
    )


def check_logits(config: RunConfig, data: ImageData) -> None:
    """Find out whether the network returns logits for the data, before anything is written.

    Raises:
        ModelError: it cannot be built, does not accept the images, or returns something else.
    """
    require_logits(skeleton(config, data), data.input_size, data.num_classes)


def fresh_network(config: RunConfig, data: ImageData) -> nn.Module:
    """Return the configured network with fresh weights, see ``build_network``."""
    return build_network(config.model, num_classes=data.num_classes, in_channels=data.input_size[0])


def _trainable(config: RunConfig, data: ImageData) -> nn.Module:
    model = fresh_network(config, data)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"every parameter of {config.model.name} is frozen: nothing can be trained"
        )
    return model


def _new_head(config: RunConfig, data: ImageData) -> frozenset[str]:
    if not config.model.new_head:
        return frozenset()
    head = head_of(config.model, num_classes=data.num_classes, in_channels=data.input_size[0])
    if not head:
        raise ModelError(
            f"model.new_head: nothing in {config.model.name} follows the number of classes"
        )
    return head


def _check_origin(own: Description, config: RunConfig, data: ImageData, path: Path) -> None:
    if own.model.words != config.model.words:
        raise CheckpointError(
            f"{path} holds a {own.architecture} and the configuration asks for "
            f"{config.model.name}: add {shlex.join(own.model.words)}"
        )
    if own.classes != data.classes and not config.model.new_head:
        raise CheckpointError(
            f"{path} was trained on {own.num_classes} classes ({_preview(own.classes)}) and the "
            f"data has {data.num_classes} ({_preview(data.classes)}): give the data of its "
            "classes, or add --set model.new_head=true for a classifier that begins anew"
        )


def _preview(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
