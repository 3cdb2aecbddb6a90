"""One run, whole: TOML in, frozen models out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field

from compress.config.deployment import BenchConfig, ExportConfig
from compress.config.images import DataConfig, ModelConfig
from compress.config.pruning import SEED2019_PRUNE, PruneConfig
from compress.config.targets import load_target
from compress.config.training import ComputeConfig, FinetuneConfig, SaveConfig, TrainConfig
from compress.errors import ConfigError
from compress.files.atomic import write_atomically
from compress.files.documents import (
    Section,
    apply_setting,
    read_text,
    read_toml,
    section_of,
    validated,
)

DEFAULT_CONFIG = "digits-resnet20"

Reader = Callable[[str, str, str | None], dict[str, Any]]
"""(text, name of the file, network that is asked for) -> the document of a run."""
_READERS: dict[str, Reader] = {}


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
    finetune: FinetuneConfig = FinetuneConfig()
    compute: ComputeConfig = ComputeConfig()
    save: SaveConfig = SaveConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()
    limits: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What the gate judges by, on top of the file that ``bench.limits`` names: its sections."""


def register_reader(suffix: str, reader: Reader) -> None:
    """Have files that end in ``suffix`` read by somebody who knows the format; the rest is TOML."""
    _READERS[suffix] = reader


def load_config(name: str = DEFAULT_CONFIG, settings: Iterable[str] = ()) -> RunConfig:
    """Read a run configuration and lay ``section.key=value`` settings over it.

    A bare word names a file under ``configs/``. A path is TOML, or of a format that a reader was
    registered for.

    Raises:
        ConfigError: naming the key, what it holds and what it may hold.
    """
    settings = list(settings)
    reader = _READERS.get(Path(name).suffix)
    document = (
        reader(read_text(name), name, section_of(settings, "model").get("name"))
        if reader
        else read_toml(name)
    )
    alone = copy.deepcopy(document)
    for setting in settings:
        _lay_over(document, setting)
    try:
        return _rounded(validated(RunConfig, document, source="settings" if settings else name))
    except ConfigError:
        validated(RunConfig, alone, source=name)  # where the mistake is the file's own, say so
        raise


def _lay_over(document: dict[str, Any], setting: str) -> None:
    """Lay a setting over a document; it wins over an earlier name of its key, and over a preset.

    A preset that is asked for by hand wins over the keys of the file.
    """
    path, separator, text = setting.partition("=")
    section, _, key = (part.strip() for part in path.partition("."))
    field, table = RunConfig.model_fields.get(section), document.get(section)
    kind = field.annotation if field else None
    if key and isinstance(kind, type) and issubclass(kind, Section) and isinstance(table, dict):
        key = kind.renamed.get(key, key)
        earlier = [old for old, new in kind.renamed.items() if new == key]
        overruled = [name for preset in kind.presets.values() for name in preset]
        for name in earlier + (overruled if key == "preset" else []):
            table.pop(name, None)
        path = f"{section}.{key}"
    apply_setting(document, f"{path}{separator}{text}")


def _rounded(config: RunConfig) -> RunConfig:
    """Prune for the target and precision of the export, unless the configuration says how."""
    target, given = load_target(config.export.target), config.prune.model_fields_set
    wanted: dict[str, Any] = {
        "channel_multiple": target.rounding(config.export.precision),
        "latency_precision": config.export.precision,
    }
    if "channel_multiple" not in given:
        wanted["relax_multiple"] = True
    missing = {key: value for key, value in wanted.items() if key not in given}
    prune = config.prune.model_copy(update=missing)
    return config.model_copy(update={"prune": prune})


def save_config(config: Section, path: Path) -> None:
    """Write a configuration as TOML; keys that hold None are left out."""
    document = _without_none(config.model_dump(mode="json"))
    if "prune" in document:
        if not document["prune"].keys() >= SEED2019_PRUNE.keys():
            document["prune"]["preset"] = "default"  # it would fill in a key that holds None
        document["prune"]["budget"] = str(config.prune.budget)  # type: ignore[attr-defined]
    write_atomically(path, tomli_w.dumps(document))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
