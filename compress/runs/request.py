"""What the commands of a run are asked for. No torch here: ``--help`` must not wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from compress.errors import ConfigError
from compress.files.documents import section_of
from compress.terminal.options import Argument, Option, settings_of

if TYPE_CHECKING:
    from compress.checkpoints.permission import Permission

Settings = Annotated[
    tuple[str, ...],
    Option("--set", "section.key=value on top of the configuration; repeatable."),
]
Model = Annotated[
    str | None,
    Option(
        "--model",
        "A built-in network, timm:NAME, torchvision:NAME, or package.module:callable.",
        key="model.name",
    ),
]
Data = Annotated[
    Path | None,
    Option(
        "--data", "Folder of the data set (image folder: train/, val/), or URL.", key="data.root"
    ),
]
WeightsKey = Annotated[
    str | None,
    Option("--weights", "Which weights, where a file holds several sets: model_ema, ..."),
]
Output = Annotated[Path | None, Option("--output", "Directory to write to.")]
Directory = Annotated[Path, Option("--output", "Directory to write to.")]
Target = Annotated[
    str | None,
    Option("--target", "Deployment profile: its name, or a TOML file.", setting="export.target"),
]
Precision = Annotated[
    str | None,
    Option(
        "--precision", "fp32, fp16 or int8 in the deployed network.", setting="export.precision"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every command that reads or starts a run is asked for."""

    settings: Settings = ()
    model: Model = None
    data: Data = None
    output: Output = None

    @property
    def asked(self) -> list[str]:
        """The settings, with what the options stand for on top."""
        return [*self.settings, *settings_of(self)]

    @property
    def permission(self) -> Permission:
        """Which networks of others may be built: the one that --model or --set names.

        Raises:
            ConfigError: settings that cannot be understood.
        """
        from compress.checkpoints.permission import Permission

        return Permission.of(self.model, self.settings)


@dataclass(frozen=True, kw_only=True)
class RunRequest(Request):
    """What every command that starts a run is asked for.

    Raises:
        ConfigError: ``resume`` and ``overwrite`` exclude each other.
    """

    config: Annotated[
        str | None, Option("--config", "Named configuration, or a TOML or JSON file.")
    ] = None
    resume: Annotated[bool, Option("--resume", "Go on with the run in --output.")] = False
    overwrite: Annotated[
        bool, Option("--overwrite", "Remove the files of an earlier run in --output.")
    ] = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")


@dataclass(frozen=True, kw_only=True)
class PruningRequest(RunRequest):
    """And what every one that prunes is."""

    criterion: Annotated[
        str | None,
        Option(
            "--criterion",
            "Importance formula, by name or the original's number.",
            setting="prune.criterion",
        ),
    ] = None
    target: Target = None
    precision: Precision = None

    @property
    def asked(self) -> list[str]:
        """Also asks for finetuning in 8 bits where the precision does, unless a setting says no."""
        given = super().asked
        if self.precision != "int8" or "quantize" in section_of(given, "finetune"):
            return given
        return [*given, "finetune.quantize=true"]


RUNTIME, BATCH, TABLE = (f"prune.latency_{key}" for key in ("runtime", "batch", "table"))


@dataclass(frozen=True, kw_only=True)
class BudgetRequest(PruningRequest):
    """And what every one that takes budgets is, which may be times."""

    runtime: Annotated[
        str | None,
        Option("--runtime", "What serves a network whose time is the budget.", RUNTIME),
    ] = None
    batch: Annotated[
        int | None, Option("--batch", "Images of a call, for a budget of time.", BATCH)
    ] = None
    latency_table: Annotated[
        Path | None,
        Option("--latency-table", "For a budget of time: a file, or v100; else measured.", TABLE),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PruneRequest(BudgetRequest):
    """What ``compress prune`` is asked for."""

    checkpoint: Annotated[
        Path | None, Option("--checkpoint", "Dense weights: .pth or .safetensors.")
    ] = None
    weights: WeightsKey = None
    budget: Annotated[
        str | None,
        Option("--budget", "latency=0.5, macs=0.5, params=0.4, ...", "prune.budget"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SweepRequest(BudgetRequest):
    """What ``compress sweep`` is asked for."""

    output: Directory = field()
    checkpoint: Annotated[
        Path | None, Option("--checkpoint", "Dense weights; without them they are trained.")
    ] = None
    weights: WeightsKey = None
    budgets: Annotated[
        tuple[str, ...],
        Option("--budget", "A grid: macs=0.7,0.5,latency=0.4; repeatable.", key="budgets"),
    ] = ()
    max_drop: Annotated[
        float | None,
        Option(
            "--max-drop",
            "Search the smallest network within this top-1 drop, in pp.",
            key="search.max_drop",
        ),
    ] = None
    kind: Annotated[
        str | None,
        Option("--kind", "Of the search: macs, params, channels, latency.", key="search.kind"),
    ] = None
    lowest: Annotated[
        float | None,
        Option("--lowest", "Of the search: least share; default 0.1.", key="search.lowest"),
    ] = None
    tolerance: Annotated[
        float | None,
        Option("--tolerance", "Of the search: how closely; default 0.02.", key="search.tolerance"),
    ] = None
    points: Annotated[
        int | None, Option("--points", "Of the search: most networks.", key="search.points")
    ] = None
    devices: Annotated[str | None, Option("--devices", "auto, cpu, or GPUs: cuda:0,cuda:1.")] = None
    jobs: Annotated[int | None, Option("--jobs", "Networks at a time; default one per device.")] = (
        None
    )

    @property
    def search_options(self) -> dict[str, Any]:
        """The options of the search that were given."""
        names = ("max_drop", "kind", "lowest", "tolerance", "points")
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OracleRequest(RunRequest):
    """What ``compress oracle`` is asked for."""

    output: Directory = field()
    checkpoint: Annotated[Path, Option("--checkpoint", "dense.safetensors, or a run directory.")]
    images: Annotated[int, Option("--images", "Labelled images to measure on.")] = 1024
    split: Annotated[str, Option("--split", "train or val.")] = "train"
    batch_size: Annotated[
        int | None, Option("--batch-size", "Images of a criterion's minibatch.")
    ] = None
    criteria: Annotated[
        str | None, Option("--criteria", "Names, with commas; default all that can.")
    ] = None
    pairs: Annotated[str | None, Option("--pairs", "Also try all pairs of a group, or of all.")] = (
        None
    )
    seed: Annotated[int | None, Option("--seed", "Of the choice of images.")] = None


@dataclass(frozen=True, kw_only=True)
class ImportRequest(Request):
    """What ``compress import`` is asked for."""

    checkpoint: Annotated[Path, Argument("CHECKPOINT", "A state dict: .pth or .safetensors.")]
    output: Annotated[Path, Option("--output", "File to write: NAME.safetensors.")] = field()
    weights: WeightsKey = None
    classes: Annotated[int | None, Option("--classes", "Classes that there must be.")] = None
    overwrite: Annotated[bool, Option("--overwrite", "Replace --output.")] = False
