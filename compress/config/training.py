"""How weights are trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from compress.files.documents import Section

SEED2019: dict[str, Any] = {
    "epochs": 25,
    "lr": 1e-3,
    "schedule": "step",
    "warmup_epochs": 0.0,
    "step_epochs": 10,
    "step_gamma": 0.1,
    "nesterov": False,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "group_lasso": 1e-8,
}
"""Finetuning settings of Molchanov et al., CVPR 2019, as their research code ships them."""


class TrainConfig(Section):
    """How weights are trained; the same keys serve dense training and finetuning."""

    model_config = ConfigDict(allow_inf_nan=False)

    renamed: ClassVar = {"recipe": "preset"}
    presets: ClassVar = {"seed2019": SEED2019}

    preset: Literal["default", "seed2019"] = "default"
    """``seed2019`` sets the published settings of Molchanov et al. 2019; explicit keys win."""
    epochs: int = Field(default=30, ge=0)
    """Passes over the training images."""
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs of linear warm-up from zero."""
    step_epochs: int = Field(default=10, ge=1)
    """Epochs between decays of the ``step`` schedule."""
    step_gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor of one decay of the ``step`` schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD momentum."""
    nesterov: bool = True
    """Nesterov momentum."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty on weights."""
    decay_norm_and_bias: bool = False
    """Also decay BatchNorm parameters and biases."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Mass that the target spreads over all classes; not used together with ``distill``."""
    distill: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that is distillation from the dense network (Hinton et al. 2015)."""
    temperature: float = Field(default=2.0, gt=0)
    """Softmax temperature of distillation."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; the average is the result."""
    group_lasso: float = Field(default=0.0, ge=0)
    """Coefficient of the sum over filters of their L2 norm."""
    clip_gradients: float = Field(default=0.0, ge=0)
    """Largest L2 norm of all gradients together; they are clipped before channels are scored. 0
    leaves them as they are."""
    evaluation_mode: bool = False
    """Train and score in evaluation mode: BatchNorm's statistics stay, dropout is off."""
    zero_lr_epochs: float = Field(default=0.0, ge=0)
    """Epochs at the start with a learning rate of zero."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision on a GPU; ``auto`` picks what the GPU supports; a CPU computes in float32."""


class FinetuneConfig(TrainConfig):
    """How a pruned network is trained on."""

    quantize: bool = False
    """Train on, behind the other epochs, with the rounding of an INT8 file, and learn its ranges
    (docs/quantization.md)."""
    quantize_epochs: int = Field(default=1, ge=1)
    """How many epochs round, where ``quantize`` is on; they come after ``epochs``."""
    quantize_lr: float = Field(default=0.1, gt=0, le=1)
    """Share of ``lr`` with which they begin; it falls to zero by a cosine."""


class ComputeConfig(Section):
    """How the machine computes; what is minimised stays the same."""

    accumulate: int = Field(default=1, ge=1)
    """Parts in which a process takes its share of a minibatch, one by one, to save memory."""
    sync_batchnorm: bool = False
    """BatchNorm takes its statistics over the images of all processes, as one process would."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Lay activations out as (N, H, W, C); ``auto`` does wherever the network computes in it."""
    compiled: bool = False
    """Train through ``torch.compile``; every shrink compiles anew."""
    tf32: bool = True
    """Let GPUs from Ampere on multiply float32 with ten bits of mantissa."""
    deterministic: bool = False
    """Use only algorithms that repeat bit for bit on a GPU; slower."""


class SaveConfig(Section):
    """When the state that an interrupted run goes on from is saved."""

    every_steps: int | None = Field(default=None, ge=1)
    """Training steps between two saves; default none but those of ``every_seconds``."""
    every_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Longest time between two saves, in seconds."""
