"""Files of networks that only their users' code builds, for training loops that are not ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.parameter import is_lazy

from compress.checkpoints.checkpoint import cut_, load_checkpoint, tool_versions
from compress.checkpoints.description import (
    MOST_HEADER_BYTES,
    Description,
    Saved,
    read_header,
)
from compress.checkpoints.permission import BUILT_IN
from compress.checkpoints.recipe import (
    cuts_of_result,
    programs_in,
    recipe_from,
    version_of,
)
from compress.checkpoints.tensors import read_tensors
from compress.checkpoints.weights import assign, encoded, with_tied
from compress.checkpoints.wrapped import without_prefixes
from compress.errors import CheckpointError, ConfigError, ModelError
from compress.files.atomic import write_atomically
from compress.networks.wrappers import unwrapped

HOW_TO_BUILD = "give build, a callable without arguments that returns the dense network"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a network as one safetensors file that ``load`` reads; all of it, or nothing.

    Of the network's code nothing is kept: whoever loads the file gives the function that builds
    the dense network. Wrappers (``torch.compile``, ``DistributedDataParallel``) are taken off.

    Args:
        model: dense, or pruned; its tensors may lie anywhere.
        path: the file, ``*.safetensors``.
        recipe: what made ``model`` from the dense network, as ``Pruner.recipe`` and
            ``shrink`` return them; None for a dense network.
        metadata: whatever is to be kept with it, as JSON can hold it.
        input_size: of one example, such as (C, H, W).
        mean: per channel, which the network's inputs are normalised with.
        std: per channel, likewise.
        classes: names of the classes, in the order of the outputs.

    Raises:
        CheckpointError: the recipe is not that of this network.
        ModelError: the network holds what is no plain tensor.
        ConfigError: the path does not end in ``.safetensors``, or a fact is no plain JSON.
        OutputError: the file cannot be written; an earlier one is kept.
    """
    path, network = Path(path), unwrapped(model)
    if path.suffix != ".safetensors":
        raise ConfigError(f"a file of weights is named *.safetensors, not {path.name!r}")
    for name, value in (("recipe", recipe), ("metadata", metadata)):
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"{name} is a dictionary, not {type(value).__name__}")
    own = _inner(recipe or {}) if network is not model else recipe or {}
    written = recipe_from(cuts_of_result(network, own), programs_in(own))
    state, tied = _tensors(network)
    facts = {"input_size": input_size, "mean": mean, "std": std, "classes": classes}
    held = {"recipe": written, "tied": tied, "metadata": dict(metadata or {})}
    data = encoded(state, _header(held | facts | {"format_version": version_of(written)}))
    if int.from_bytes(data[:8], "little") > MOST_HEADER_BYTES:
        raise ConfigError(
            f"the header of {path} would be longer than {MOST_HEADER_BYTES} bytes: keep large "
            "metadata in a file of its own"
        )
    write_atomically(path, data)


def load(path: str | os.PathLike[str], build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild a network from a file of weights, in evaluation mode.

    Nothing is captured and nothing global is changed, so threads may load side by side. What the
    file says never makes code run: ``build`` is called, its result is cut as the recipe says, and
    every tensor of the file must then fit.

    Args:
        path: a file of ``save``, or one that a command of this tool wrote.
        build: returns the dense network, new for every call, as it was before it was pruned; a
            class, a function or a ``functools.partial``. Networks that are built in need none.

    Raises:
        CheckpointError: the file is missing, damaged or of another network, or needs ``build``.
        ModelError: ``build`` fails or returns no network.
        ConfigError: ``build`` cannot be called.
    """
    path = Path(path)
    header = read_header(path)
    if build is None:
        return _named(path, header)
    network = _built(build)
    inner = unwrapped(network)
    if header is not None:
        try:
            cut_(inner, header)
        except (CheckpointError, ModelError) as error:
            raise CheckpointError(f"{path}: {error}; build must return that network") from error
    assign(inner, with_tied(read_tensors(path), header), path)
    return network.eval()


def _named(path: Path, header: Description | Saved | None) -> nn.Module:
    """Load a network that the file names, and that may be built because it does."""
    if not isinstance(header, Description):
        raise CheckpointError(f"{path} does not say which network it holds: {HOW_TO_BUILD}")
    if not BUILT_IN.allows(header.model, path):
        raise CheckpointError(
            f"{path} holds a network of {header.architecture}, which no file may ask for by "
            f"itself: {HOW_TO_BUILD}"
        )
    return load_checkpoint(path).model


def _inner(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the recipe of a wrapped network for the network itself."""
    named = {k: v for k, v in recipe.items() if k != "kept" and isinstance(v, Mapping)}
    return {**recipe, **{key: without_prefixes(names) for key, names in named.items()}}


def _header(facts: Mapping[str, Any]) -> Saved:
    """Return the header of a file, if JSON holds all of it and gives the same back."""
    for key, value in facts["metadata"].items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ConfigError(
                f"metadata[{key!r}] is {type(value).__name__}, and a file keeps names with finite "
                "numbers, texts, truth values, None, and lists and dictionaries of these"
            )
    try:
        return Saved.model_validate({**facts, "tools": tool_versions()})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]} cannot be kept: {first['msg']}") from error


def _is_plain(value: Any) -> bool:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return bool(json.loads(text) == _listed(value))


def _listed(value: Any) -> Any:
    """Return a tree with lists in place of tuples, which JSON does not tell from them."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _tensors(network: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return every tensor of a network once, and the other names of those that have several."""
    state: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, value in without_prefixes(network.state_dict(keep_vars=True)).items():
        _require_plain(network, name, value)
        if id(value) in names:
            tied[name] = names[id(value)]
        else:
            names[id(value)], state[name] = name, value
    return state, tied


def _require_plain(network: nn.Module, name: str, value: Any) -> None:
    """Refuse what no file of weights can hold."""
    plain = isinstance(value, torch.Tensor) and not is_lazy(value)
    if not plain or value.is_meta or value.is_quantized or value.layout != torch.strided:
        kind = f"{type(network).__name__} holds {name!r}"
        raise ModelError(f"{kind}, which is no plain tensor with values of its own")
    if value.is_complex():
        raise ModelError(f"{name!r} holds complex numbers, which no file of weights keeps")


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(build, nn.Module):
        name = type(build).__name__
        raise ConfigError(
            f"build is a network ({name}) and not what makes one: give its class, or a function "
            "that returns a new one, because what it returns is cut"
        )
    if not callable(build):
        raise ConfigError(f"build is {type(build).__name__}: {HOW_TO_BUILD}")
    try:
        network = build()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"build failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"build returned {type(network).__name__}, not a torch.nn.Module")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"build returned a network with a lazy module, so {name} has no shape yet: give "
                "its channels"
            )
    return network
