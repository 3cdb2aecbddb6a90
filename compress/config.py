"""The typed configuration of a run: TOML in, frozen models out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import ConfigDict, Field, field_validator, model_validator

from compress.documents import Section, apply_setting, read_text, read_toml, validated
from compress.files import write_atomically

DEFAULT_CONFIG = "digits-resnet20"

Precision = Literal["fp32", "fp16", "int8"]
"""The number format of weights and activations in the deployed network."""
BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet20"
    """A built-in architecture, or ``package.module:callable`` for the user's own."""


class DataConfig(Section):
    """Which images, and how they are read."""

    dataset: Literal["digits", "mnist", "cifar10", "cifar100", "imagefolder"] = "digits"
    """``digits`` is embedded; the others are read from ``root``."""
    root: Path | None = None
    """Folder of the data set; for ``imagefolder`` it holds ``train/`` and ``val/``."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width in pixels that the network sees; default 224 for imagefolder, else 32."""
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"
    """Training augmentation; ``auto`` is what is usual for the data set."""
    batch_size: int = Field(default=128, ge=2)
    """Images per training step; BatchNorm needs two."""
    eval_batch_size: int = Field(default=256, ge=1)
    """Images per evaluation step."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the main process."""
    download: bool = False
    """Let torchvision download MNIST or CIFAR when they are not under ``root``."""


class TrainConfig(Section):
    """How weights are trained; the same keys serve dense training and finetuning."""

    model_config = ConfigDict(allow_inf_nan=False)

    recipe: Literal["default", "seed2019"] = "default"
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
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision on a GPU; ``auto`` picks what the GPU supports; a CPU computes in float32."""

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("recipe") == "seed2019":
            return {**SEED2019, **values}
        return values


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


class Budget(Section):
    """What the pruned network may cost."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: Literal["macs", "params", "channels", "removed"]
    """MACs, parameters, channels kept, or channels removed."""
    value: float = Field(gt=0)
    """A share of the dense network up to 1, or an absolute number above 1."""

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            kind, separator, number = value.partition("=")
            if not separator:
                raise ValueError("a budget is written KIND=VALUE, for example macs=0.5")
            return {"kind": kind.strip(), "value": number.strip()}
        return value

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.kind == "removed" and self.value != int(self.value):
            raise ValueError("removed counts channels and must be a whole number")
        return self

    def __str__(self) -> str:
        whole = self.value.is_integer()
        return f"{self.kind}={int(self.value) if whole else self.value}"


CRITERION_NUMBERS = {
    0: "taylor-weight",
    1: "random",
    2: "weight-norm",
    3: "weight-abs",
    6: "taylor-output",
    10: "obd",
    11: "taylor-gate-so",
    22: "taylor-gate",
    23: "taylor-gate-fg",
    30: "bn-scale",
    31: "bn-taylor",
}
"""The criteria by the numbers that the research code of Molchanov et al. 2019 gives them."""


class PruneConfig(Section):
    """How channels are chosen and removed."""

    recipe: Literal["default", "seed2019"] = "default"
    """``seed2019`` sets what the research code of Molchanov et al. 2019 does; explicit keys win."""
    criterion: str = "taylor-gate"
    """Name of the importance formula, or the original's number of it; see docs/criteria.md."""
    budget: Budget = Budget(kind="macs", value=0.5)
    """``macs=0.5``, ``params=0.4``, ``channels=0.72`` (shares kept) or ``removed=3200``."""
    steps: int = Field(default=30, ge=1)
    """Pruning steps; the cost falls linearly from dense to the budget over them."""
    step_size: int | None = Field(default=None, ge=1)
    """Channels removed by each step instead, until the budget is reached."""
    max_steps: int | None = Field(default=None, ge=1)
    """Pruning ends after so many pruning steps, even if the budget is not reached."""
    start_after: int = Field(default=0, ge=0)
    """Pruning steps at the start that measure importance and remove nothing."""
    max_loss: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Nothing is removed while the mean training loss since the last pruning step is above."""
    interval: int = Field(default=10, ge=1)
    """Minibatches between two pruning steps, over which importance is averaged."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Exponential average of importance over pruning steps; 0 uses the last interval alone."""
    fixed_criteria: bool = False
    """Score once: the importance of the first interval decides every pruning step."""
    normalize: Literal["none", "l2"] = "none"
    """``l2`` divides the importance of a group by its L2 norm before groups are compared."""
    rank: Literal["importance", "importance-per-mac"] = "importance"
    """What is compared: the importance, or its ratio to the MACs that the removal saves."""
    flops_regularization: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Importance taken off for every MAC that the removal of a channel saves."""
    hessian_samples: int = Field(default=4, ge=0)
    """Random vectors per minibatch that estimate a Hessian's diagonal; 0 computes it exactly."""
    channel_multiple: int = Field(default=1, ge=1)
    """Widths stay multiples of this number; in a configuration that says nothing, the target's."""
    min_channels: int = Field(default=4, ge=1)
    """No group is pruned below this many channels."""
    min_share: float = Field(default=0.1, ge=0, le=1)
    """No group is pruned below this share of its dense width."""
    residual_gate: Literal["read", "block"] = "read"
    """Where the gate of a residual stream sits: at its readers, or after add+ReLU of each block."""
    as_published: bool = False
    """Repeat the slips of the original's criteria, for comparison; see docs/criteria.md."""
    keep_dense: tuple[str, ...] = ()
    """Groups that are never pruned, by name as ``compress inspect`` prints it; ``*`` matches."""
    only: tuple[str, ...] = ()
    """If not empty, the only groups that are pruned."""
    shrink_at: float = Field(default=0.3, gt=0, le=1)
    """Shrink during pruning whenever this share of the current MACs is masked away."""
    bn_batches: int = Field(default=50, ge=0)
    """Training batches from which BatchNorm statistics are re-estimated after the last shrink."""
    proof_images: int = Field(default=1, ge=1)
    """Real images on which masked and shrunk are compared in float64."""

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("recipe") == "seed2019":
            return {**SEED2019_PRUNE, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.max_steps is not None and self.max_steps <= self.start_after:
            raise ValueError(
                f"max_steps = {self.max_steps} ends pruning before start_after = "
                f"{self.start_after} lets it begin"
            )
        if self.flops_regularization and self.rank == "importance-per-mac":
            raise ValueError(
                "flops_regularization and rank = 'importance-per-mac' exclude each other"
            )
        return self

    @field_validator("criterion", mode="before")
    @classmethod
    def _name_of_number(cls, value: Any) -> Any:
        number = str(value).strip()
        if not number.lstrip("-").isdigit():
            return value
        if int(number) not in CRITERION_NUMBERS:
            known = ", ".join(f"{n} {name}" for n, name in CRITERION_NUMBERS.items())
            raise ValueError(f"no criterion has this number: choose one of {known}")
        return CRITERION_NUMBERS[int(number)]


SEED2019_PRUNE: dict[str, Any] = {
    "step_size": 100,
    "interval": 30,
    "momentum": 0.9,
    "channel_multiple": 1,
    "residual_gate": "block",
    "as_published": True,
    "min_channels": 1,
    "min_share": 0.0,
}
"""Pruning settings of Molchanov et al., CVPR 2019, and the rules of their research code."""


class ParityLimits(Section):
    """How far logits may lie from torch's float32 ones; docs/export.md defines the figures."""

    relative_error: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=-1.0, ge=-1, le=1)
    """Least cosine similarity of all logits."""
    top1_agreement: float = Field(default=0.0, ge=0, le=1)
    """Least share of images with the same top-1 class."""


class Fp16Limits(ParityLimits):
    """For eleven significant bits."""

    relative_error: float = Field(default=2e-2, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=0.999, ge=-1, le=1)
    """Least cosine similarity of all logits."""


class Int8Limits(ParityLimits):
    """For 255 levels a tensor."""

    relative_error: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=0.97, ge=-1, le=1)
    """Least cosine similarity of all logits."""
    top1_agreement: float = Field(default=0.9, ge=0, le=1)
    """Least share of images with the same top-1 class."""


class PrecisionLimits(Section):
    """The limits of parity, by precision."""

    fp32: ParityLimits = ParityLimits()
    """Of two runtimes that round differently."""
    fp16: Fp16Limits = Fp16Limits()
    """Of weights and activations in half precision."""
    int8: Int8Limits = Int8Limits()
    """Of weights and activations in 8 bits."""


class ExportConfig(Section):
    """What is exported, and for where."""

    target: str = "cpu"
    """A deployment profile under ``configs/targets``."""
    precision: Precision = "fp32"
    """Number format of weights and activations; inputs and outputs stay float32."""
    batch: BatchSizes | Literal["dynamic"] = "dynamic"
    """Batch sizes that an engine is optimised for, one profile each, or one profile for a range."""
    dynamic_batch: tuple[int, int, int] = (1, 8, 32)
    """Least, usual and largest batch of the profile of ``batch = "dynamic"``."""
    workspace_mib: int = Field(default=1024, ge=1)
    """Most scratch memory of a layer of an engine, in MiB."""
    timing_cache: Path | None = None
    """Folder of the timing caches of engine builds; default ``timing_cache`` beside the engine."""
    calibration_images: int = Field(default=512, ge=8)
    """Training images from which the ranges of INT8 are measured."""
    calibration: Literal["max", "mse"] = "mse"
    """Range of a tensor: its largest magnitude, or that with the least squared rounding error."""
    parity_batches: BatchSizes = (1, 3, 8)
    """Batch sizes at which ONNX Runtime must agree with torch."""
    parity_images: int = Field(default=64, ge=1)
    """Validation images on which they are compared, at each of these batch sizes."""
    limits: PrecisionLimits = PrecisionLimits()
    """What counts as agreement."""

    @field_validator("batch", mode="before")
    @classmethod
    def _read_sizes(cls, value: Any) -> Any:
        if value == "dynamic":
            return value
        sizes = str(value).split(",") if isinstance(value, str | int) else value
        try:
            found = tuple(int(str(size)) for size in sizes)
        except (TypeError, ValueError):
            found = ()
        if min(found, default=0) < 1:
            raise ValueError("batch sizes are whole numbers from 1 on, as 1,8,32, or dynamic")
        return tuple(dict.fromkeys(found))

    @field_validator("dynamic_batch")
    @classmethod
    def _check_range(cls, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ValueError("least, usual and largest batch must rise, from 1 on")
        return sizes


Runtime = Literal[
    "torch-cpu",
    "torch-cuda",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "tensorrt",
]
"""What computes a network, and on what."""


class BenchConfig(Section):
    """How latency and accuracy are measured."""

    runtime: Runtime = "onnxruntime-cpu"
    """What runs the networks; ``tensorrt`` runs the engines that ``compress export`` built."""
    cuda_graph: bool = False
    """On a GPU, record each batch size as a CUDA graph and replay that."""
    channels_last: bool = False
    """In torch, lay activations out as (N, H, W, C)."""
    compiled: bool = False
    """In torch, compile the networks with ``torch.compile``."""
    batch_sizes: BatchSizes = (1, 8)
    """Batch sizes at which latency is measured."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the runtime; default all physical cores that this process may use."""
    block_ms: float = Field(default=50.0, gt=0)
    """Least work in one timed block, in milliseconds."""
    min_blocks: int = Field(default=20, ge=4)
    """Fewest blocks per network and batch size."""
    max_seconds: float = Field(default=20.0, gt=0)
    """Most time per batch size, in seconds."""
    ratio_precision: float = Field(default=0.0075, gt=0)
    """Stop early when the half-width of the interval of the latency ratio is below this share."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    layer_calls: int = Field(default=20, ge=0)
    """Profiled calls per network and batch size, for the time of each layer; 0 for none."""
    budgets: str = "default"
    """A budget file under ``configs/budgets``, or a path."""

    @model_validator(mode="after")
    def _torch_alone(self) -> BenchConfig:
        for name in ("channels_last", "compiled"):
            if getattr(self, name) and not self.runtime.startswith("torch"):
                raise ValueError(f"{name} is for torch, and runtime is {self.runtime}")
        return self


class RunConfig(Section):
    """One run, whole."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds initial weights, order of images, augmentation and the random criterion."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    tensorboard: bool = True
    """Write curves for TensorBoard to ``tensorboard/`` of the run."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    prune: PruneConfig = PruneConfig()
    finetune: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()


def load_config(name: str = DEFAULT_CONFIG, settings: Iterable[str] = ()) -> RunConfig:
    """Read a run configuration and lay ``section.key=value`` settings over it.

    A path that ends in ``.json`` holds settings of the research code of Molchanov et al. 2019.

    Raises:
        ConfigError: naming the key, what it holds and what it may hold.
    """
    settings = list(settings)
    document = _read_original(name, settings) if name.endswith(".json") else read_toml(name)
    for setting in settings:
        _forget_recipe(document, setting)
        apply_setting(document, setting)
    return _rounded(validated(RunConfig, document, source=name))


def _forget_recipe(document: dict[str, Any], setting: str) -> None:
    """A recipe that is asked for by hand must not lose to the file's own keys."""
    section, _, last = setting.partition("=")[0].strip().rpartition(".")
    table = document.get(section)
    if last == "recipe" and isinstance(table, dict):
        for overruled in {**SEED2019, **SEED2019_PRUNE}:
            table.pop(overruled, None)


def _rounded(config: RunConfig) -> RunConfig:
    """Round widths as the target wants, unless the configuration says how."""
    from compress.targets import load_target  # it is built on this module

    target = load_target(config.export.target)
    if "channel_multiple" in config.prune.model_fields_set:
        return config
    multiple = target.rounding(config.export.precision)
    prune = config.prune.model_copy(update={"channel_multiple": multiple})
    return config.model_copy(update={"prune": prune})


def _read_original(path: str, settings: Iterable[str]) -> dict[str, Any]:
    from compress.original import run_document  # it is built on this module

    asked: dict[str, Any] = {}
    for setting in settings:
        apply_setting(asked, setting)
    model = asked.get("model")
    named = model.get("name") if isinstance(model, dict) else None
    return run_document(read_text(path), path, named)


def save_config(config: Section, path: Path) -> None:
    """Write a configuration as TOML; keys that hold None are left out."""
    document = _without_none(config.model_dump(mode="json"))
    if "prune" in document:
        if not document["prune"].keys() >= SEED2019_PRUNE.keys():
            document["prune"]["recipe"] = "default"  # it would fill in a key that holds None
        document["prune"]["budget"] = str(config.prune.budget)  # type: ignore[attr-defined]
    write_atomically(path, tomli_w.dumps(document))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
