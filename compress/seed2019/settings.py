"""The JSON settings of the research code of Molchanov et al. 2019, as a run of this tool.

The table of keys, and what differs, is in docs/original.md.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from compress.config import CRITERION_NUMBERS
from compress.errors import ConfigError
from compress.files.documents import Section, parsed_json, read_toml, validated
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.models import BUILTIN_MODELS, build_model

log = logging.getLogger("compress")

ORIGINAL_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
TAYLOR_GATE = 22
WITHOUT_COUNTERPART: dict[str, tuple[object, str]] = {
    "starting_neuron": (0, "pruning starts with the dense network: set 0 or leave it out"),
    "combination_ID": (0, "combinations of units are not tried out: set 0 or leave it out"),
    "rank_neurons_equally": (False, "the research code never reads it: set false or leave it out"),
    "push_group_down": (False, "the research code never reads it: set false or leave it out"),
    "do_iterative_pruning": (True, "pruning always takes steps: set true or leave it out"),
}
"""The only value that a key may have, and what to do about another."""


class OriginalSettings(Section):
    """One settings file, with the defaults of the research code's own reader."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: int = 0
    """Number of the criterion."""
    frequency: int = Field(default=500, ge=1)
    """Minibatches between two pruning steps."""
    prune_per_iteration: int = Field(default=2, ge=0)
    """Channels removed by one pruning step."""
    maximum_pruning_iterations: int = Field(default=10000, ge=1)
    """Pruning steps."""
    prune_neurons_max: int = Field(default=1, ge=-1)
    """Channels removed in all; -1 sets no limit."""
    group_size: int = Field(default=1, ge=1)
    """Channels that are removed together."""
    pruning_threshold: float = Field(default=100.0, gt=0)
    """Mean training loss above which a pruning step is skipped."""
    start_pruning_after_n_iterations: int = Field(default=0, ge=0)
    """The pruning step that is the first to remove channels."""
    fixed_layer: int = Field(default=-1, ge=-1)
    """Index of the only gate that is pruned; -1 prunes all."""
    fixed_criteria: bool = False
    """Score once."""
    pruning_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the past in the average over pruning steps."""
    use_momentum: bool = True
    """Says again what ``pruning_momentum`` says."""
    l2_normalization_per_layer: bool = False
    """Divide the importance of a layer by its L2 norm."""
    flops_regularization: float = Field(default=0.0, ge=0)
    """Importance taken off per FLOP."""
    group_wd_coeff: float | None = Field(default=None, ge=0)
    """Group lasso; an argument of the command line there."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything that is drawn."""
    pruning_silent: bool = False
    """Write no debug files; none are written here."""
    starting_neuron: int = 0
    """For oracles; only 0."""
    combination_ID: int = 0
    """For oracles; only 0."""
    rank_neurons_equally: bool = False
    """Never read; only false."""
    push_group_down: bool = False
    """Never read; only false."""
    do_iterative_pruning: bool = True
    """Never read; only true."""

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_or_a_switch(cls, value: Any) -> Any:
        if not isinstance(value, int | float):
            raise ValueError("a number, true or false is needed")
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: int) -> int:
        if value not in CRITERION_NUMBERS:
            known = ", ".join(f"{number} {name}" for number, name in CRITERION_NUMBERS.items())
            raise ValueError(f"no criterion has this number: choose one of {known}")
        return value

    @field_validator("group_size")
    @classmethod
    def _fits_into_a_step(cls, value: int, info: ValidationInfo) -> int:
        for key in ("prune_per_iteration", "prune_neurons_max"):
            limit = info.data.get(key, -1)
            if 0 < limit < value:
                raise ValueError(f"a whole group is more than {key} = {limit}: raise that")
        return value

    @field_validator("start_pruning_after_n_iterations")
    @classmethod
    def _starts_before_the_end(cls, value: int, info: ValidationInfo) -> int:
        last = info.data.get("maximum_pruning_iterations", value)
        if value > last:
            raise ValueError(
                f"this prunes nothing in maximum_pruning_iterations = {last} steps: raise that"
            )
        return value

    @field_validator("use_momentum")
    @classmethod
    def _says_the_same(cls, value: bool, info: ValidationInfo) -> bool:
        momentum = info.data.get("pruning_momentum", 0)
        if momentum and not value:
            raise ValueError(
                f"pruning_momentum = {momentum} says the opposite, and is what the research code "
                "reads: set pruning_momentum to 0"
            )
        return value

    @field_validator(*WITHOUT_COUNTERPART)
    @classmethod
    def _has_a_counterpart(cls, value: object, info: ValidationInfo) -> object:
        only, advice = WITHOUT_COUNTERPART[info.field_name or ""]
        if value != only:
            raise ValueError(advice)
        return value


def run_document(text: str, name: str, model: str | None = None) -> dict[str, Any]:
    """Return the document of a run from the text of a JSON settings file.

    Args:
        text: the file.
        name: its path, which may name the network, as ``imagenet_resnet50_prune72.json`` does.
        model: the network, if it was asked for.

    Raises:
        ConfigError: naming the key, what it holds and what it may hold.
    """
    document = _parsed(text, name)
    _require_removals(document, name)
    settings = validated(OriginalSettings, document, source=name)
    network = model or _named_in(Path(name).stem)
    if network is None:
        raise ConfigError(
            f"{name} does not say which network is pruned: add --model, one of "
            f"{', '.join(BUILTIN_MODELS)}, or package.module:callable"
        )
    _warn(settings, name)
    try:
        return _document(settings, network)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def gate_group(model: str, index: int, *, streams: bool = True) -> str:
    """Return the group that the gate of an index stands for, in the research code's order.

    Args:
        model: one of ORIGINAL_RESNETS.
        index: the gates of the four residual streams come first, if there are any, then both gates
            of every block.
        streams: whether residual streams have gates.

    Raises:
        ConfigError: there is no such gate, or its channels cannot go by themselves.
    """
    if model not in ORIGINAL_RESNETS:
        raise ConfigError(
            f"fixed_layer = {index} counts the gates of a ResNet, and {model} is none of "
            f"{', '.join(ORIGINAL_RESNETS)}: leave it out and give --set prune.only"
        )
    graph = _graph_of(model)
    blocks = [
        m[1] for axis in graph.writers if (m := re.fullmatch(r"(layer.*)\.conv1", axis.layer))
    ]
    last = {block.partition(".")[0]: block for block in blocks}.values()
    deepest = "conv3" if any(axis.layer.endswith("conv3") for axis in graph.writers) else "conv2"
    writers = [f"{block}.{deepest}" for block in last] if streams else []
    writers += [f"{block}.conv{number}" for block in blocks for number in (1, 2)]
    if index >= len(writers):
        raise ConfigError(f"fixed_layer = {index}: {model} has the gates 0 to {len(writers) - 1}")
    writer = writers[index]
    group = next(group for group in graph.groups if writer in group.writers)
    if group.residual and (group.name == "conv1" or index >= len(last) or not streams):
        raise ConfigError(
            f"fixed_layer = {index} is the gate behind {writer} of {model}, whose channels cannot "
            f"go without those of {', '.join(w for w in group.writers if w != writer)}: choose "
            "another gate"
        )
    return group.name


@cache
def _graph_of(model: str) -> ChannelGraph:
    with torch.device("meta"):
        return analyse(build_model(model, num_classes=1000), (3, 224, 224))


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        document = parsed_json(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name} holds no JSON object with settings")
    return document


def _require_removals(document: dict[str, Any], name: str) -> None:
    """Refuse settings that prune nothing, with every reason: some that were published have two."""
    keys = ("prune_per_iteration", "prune_neurons_max")
    zeros = [f"{key} = 0" for key in keys if type(document.get(key)) is int and not document[key]]
    if zeros:
        raise ConfigError(f"{name}: {' and '.join(zeros)}: this prunes nothing: use compress train")


def _named_in(stem: str) -> str | None:
    found = [name for name in BUILTIN_MODELS if name in stem]
    return max(found, key=len, default=None)


def _warn(settings: OriginalSettings, name: str) -> None:
    """Name the settings that do nothing in the research code and something here."""
    if settings.flops_regularization:
        log.warning(
            "%s: flops_regularization = %g does nothing in the research code; here it is taken off "
            "the importance for every MAC that a removal saves",
            name,
            settings.flops_regularization,
        )
    if settings.l2_normalization_per_layer:
        log.warning(
            "%s: the research code does not read l2_normalization_per_layer from its file; here "
            "the importance of every group is divided by its L2 norm",
            name,
        )


def _document(settings: OriginalSettings, model: str) -> dict[str, Any]:
    """Lay the settings over the named run that repeats the research code."""
    document = read_toml("imagenet-resnet50-seed2019")
    document["seed"] = settings.seed
    document["model"] = {"name": model}
    document["prune"] = _prune(settings) | _groups(settings, model)
    if settings.group_wd_coeff is not None:
        document["finetune"]["group_lasso"] = settings.group_wd_coeff
    return document


def _prune(settings: OriginalSettings) -> dict[str, Any]:
    size = settings.group_size
    step = settings.prune_per_iteration // size * size  # there, groups are counted, rounded down
    skipped = max(0, settings.start_pruning_after_n_iterations - 1)
    removed = settings.prune_neurons_max // size * size
    if settings.prune_neurons_max == -1:
        removed = step * (settings.maximum_pruning_iterations - skipped)
    return {
        "preset": "seed2019",
        "criterion": CRITERION_NUMBERS[settings.method],
        "budget": f"removed={removed}",
        "step_size": step,
        "max_steps": settings.maximum_pruning_iterations,
        "start_after": skipped,
        "max_loss": settings.pruning_threshold,
        "interval": settings.frequency,
        "momentum": settings.pruning_momentum,
        "fixed_criteria": settings.fixed_criteria,
        "normalize": "l2" if settings.l2_normalization_per_layer else "none",
        "channel_multiple": size,
        "flops_regularization": settings.flops_regularization,
    }


def _groups(settings: OriginalSettings, model: str) -> dict[str, list[str]]:
    """Return which groups the research code prunes: those with a gate."""
    streams = model != "resnet50" or settings.method == TAYLOR_GATE
    found: dict[str, list[str]] = {}
    if re.match(r"(wide_)?resnex?t(18|34|50|101|152)", model):
        # It has no gate on the stem, and gates the streams of ResNet-50 for this method alone.
        found["keep_dense"] = ["conv1"] if streams else ["conv1", "layer?.0.conv3"]
    if re.match(r"densenet\d", model):  # there, behind the first convolution of a layer only
        found["only"] = ["*.denselayer*.conv1"]
    if settings.fixed_layer >= 0:
        found["only"] = [gate_group(model, settings.fixed_layer, streams=streams)]
    return found
