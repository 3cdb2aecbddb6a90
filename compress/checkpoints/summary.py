"""What a file of weights holds, for ``compress inspect``: one document, and a table of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from compress.checkpoints.checkpoint import (
    Checkpoint,
    identify,
    load_checkpoint,
    load_weights,
    require_claims,
    structure_of,
)
from compress.checkpoints.description import Saved, Structure, read_header
from compress.checkpoints.permission import BUILT_IN, Permission
from compress.checkpoints.recipe import cuts_in
from compress.checkpoints.tensors import read_state_dict, read_tensors
from compress.checkpoints.wrapped import without_prefixes
from compress.config import ModelConfig
from compress.errors import CheckpointError, one_line
from compress.files.atomic import sha256_of
from compress.networks.models import SMALL_IMAGE_MODELS, build_network, ends_in
from compress.networks.registries import usual_images
from compress.networks.trial import tried_graph
from compress.terminal.sheet import short_count
from compress.terminal.table import TextTable


def inspect_checkpoint(
    path: Path, permission: Permission = BUILT_IN, key: str | None = None
) -> dict[str, Any]:
    """Describe a file of weights.

    Args:
        path: a file of this tool, or a dense ``.pth`` or safetensors state dict.
        permission: names the network, where the file does not say which it is and it cannot be
            recognised, or where it is not built in. What a library's user saved is described by its
            tensors alone.
        key: which weights, where the file holds several sets; None for the usual ones.

    Raises:
        CheckpointError: the file is missing, damaged or of no known architecture.
    """
    header = read_header(path) if path.suffix == ".safetensors" else None
    if isinstance(header, Saved):
        return _weights(path, header)
    if header is not None:
        checkpoint = load_checkpoint(path, permission)
        about = header.model_dump(exclude={"recipe", "classes", "structure"})
        document = {**about, "num_classes": header.num_classes, "sha256": checkpoint.sha256}
        return document | (checkpoint.structure or _structure(checkpoint)).model_dump()
    typed = permission.typed
    state = read_state_dict(path, key, lambda state: typed is not None or bool(identify(state)))
    name = identify(state) if typed is None else typed.name
    if name is None:
        raise CheckpointError(
            f"{path} holds {len(state)} tensors of no architecture that is built in: "
            "say which with --model"
        )
    model = typed or ModelConfig(name=name)
    classes, channels = _ends(model, state)
    require_claims(path, model, state, classes, channels)
    network = build_network(model, num_classes=classes, in_channels=channels)
    load_weights(path, network, key=key)
    usual = 32 if name in SMALL_IMAGE_MODELS else 224
    size = usual_images(name).get("image_size", usual)
    graph = tried_graph(network, (channels, size, size))
    return {
        "architecture": name,
        "num_classes": classes,
        "input_size": (channels, size, size),
        "sha256": sha256_of(path),
    } | structure_of(graph, graph.everything()).model_dump()


def render_summary(document: dict[str, Any]) -> RenderableType:
    """Return what ``compress inspect`` prints."""
    named = "groups" in document
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")  # a digest that is cut short is of no use
    rows = _network_rows(document) if named else _weights_rows(document)
    rows["sha256"] = document["sha256"]
    if document.get("parent_sha256"):
        rows["pruned from"] = document["parent_sha256"]
    for stage, figures in document.get("metrics", {}).items():
        if isinstance(figures, dict) and _is_share(top1 := figures.get("top1")):
            rows[stage] = f"top-1 {top1:.2f} % of {figures.get('images', '?')} images"
    if document.get("tools"):
        rows["written by"] = ", ".join(f"{k} {v}" for k, v in document["tools"].items())
    for name, text in rows.items():
        facts.add_row(Text(name, style="bold"), Text(text))
    parts = [facts, _groups_table(document) if named else _tensors_table(document)]
    if document.get("unknown_operations"):
        names = ", ".join(document["unknown_operations"])
        parts.append(Text(f"operations that are not known and keep channels dense: {names}"))
    return Stack(*parts)


def _is_share(value: Any) -> TypeGuard[float]:
    """Whether a figure that a file passes on is one in percent."""
    return isinstance(value, int | float) and 0 <= value <= 100


def _network_rows(document: dict[str, Any]) -> dict[str, str]:
    dense, now = document["dense"], document["now"]
    classes = f"{document['num_classes']} classes"
    shape = _by_x(document["input_size"])
    return {
        "architecture": f"{document['architecture']}, {classes}, input {shape}",
        "MACs": _change(dense["macs"], now["macs"]),
        "parameters": _change(dense["params"], now["params"]),
        "channels": _change(dense["channels"], now["channels"], "{:,}".format),
    }


def _weights_rows(document: dict[str, Any]) -> dict[str, str]:
    dense, now = (
        sum(math.prod(tensor[when]) for tensor in document["tensors"]) for when in ("dense", "now")
    )
    rows = {
        "network": "of its user's own code, as compress.load builds it",
        "tensors": str(len(document["tensors"])),
        "numbers in them": _change(dense, now),
    }
    if document["input_size"]:
        rows["input"] = _by_x(document["input_size"])
    if document["num_classes"]:
        rows["classes"] = str(document["num_classes"])
    for key, value in document["metadata"].items():
        rows[f"metadata, {one_line(key, 40)}"] = one_line(json.dumps(value), 200)
    return rows


def _groups_table(document: dict[str, Any]) -> RenderableType:
    groups = TextTable("group", "dense", "kept", "readers", "note")
    for group in document["groups"]:
        note = group["frozen"] or ("residual stream" if group["residual"] else "")
        cells = (group["dense"], group["kept"], group["readers"])
        groups.add(group["name"], *map(str, cells), note)
    for branch in document.get("branches", ()):
        note = branch["frozen"] or "residual branch"
        groups.add(branch["name"], "1", "1" if branch["kept"] else "gone", "", note)
    return groups


def _tensors_table(document: dict[str, Any]) -> RenderableType:
    table = TextTable("tensor", "dense", "now")
    for tensor in document["tensors"]:
        if tensor["dense"] != tensor["now"]:
            table.add(tensor["name"], _by_x(tensor["dense"]), _by_x(tensor["now"]))
    return table if table.row_count else Text("no tensor is pruned")


def _weights(path: Path, header: Saved) -> dict[str, Any]:
    """Describe a file whose network only its user's code builds."""
    shapes = {name: list(tensor.shape) for name, tensor in read_tensors(path).items()}
    dense = {name: list(shape) for name, shape in shapes.items()}
    try:
        cuts = cuts_in(header.recipe)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    inner = without_prefixes({cut.tensor: cut.tensor for cut in cuts})
    short = {full: name for name, full in inner.items()}
    for cut in cuts:
        name = cut.tensor if cut.tensor in dense else short[cut.tensor]
        name = header.tied.get(name, name)
        if cut.dim < len(dense.get(name, ())):
            dense[name][cut.dim] = cut.size
    about = header.model_dump(exclude={"recipe", "classes"})
    return {
        **about,
        "num_classes": len(header.classes) if header.classes else None,
        "sha256": sha256_of(path),
        "tensors": [
            {"name": name, "dense": dense[name], "now": shape} for name, shape in shapes.items()
        ],
    }


def _structure(checkpoint: Checkpoint) -> Structure:
    """Return what an analysis finds of a network whose file does not tell."""
    graph = tried_graph(checkpoint.model, checkpoint.input_size)
    return structure_of(graph, graph.everything())


def _ends(model: ModelConfig, state: dict[str, Any]) -> tuple[int, int]:
    """Guess the number of classes and of image channels from the last and first weights."""
    weights = [tensor for tensor in state.values() if tensor.dim() >= 2]
    if not weights:
        raise CheckpointError("the file holds no weights")
    # Safetensors are read in alphabetical order, so position is the last resort.
    first, last = (f"{end}.weight" for end in ends_in(model))
    return len(state.get(last, weights[-1])), state.get(first, weights[0]).shape[1]


def _change(dense: int, now: int, write: Callable[[float], str] = short_count) -> str:
    before, after = write(dense), write(now)
    return before if dense == now else f"{after}, {100 * now / dense:.1f} % of {before}"


def _by_x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
