"""Any two networks compared: what ``compress.compare`` and ``compress bench`` call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bench.judging.baseline import change_against, require_same_model
from bench.limits import AnyLimits, Limits, limits_of, require_baseline, require_judgeable
from bench.measuring.discovery import any_subjects, missing_facts, subjects
from bench.measuring.inputs import RANDOM_INPUTS, Inputs
from bench.measuring.precisions import measure_precisions
from bench.measuring.prediction import predict
from bench.measuring.session import Plan, Source, measure
from bench.measuring.sources import GivenData, dataset_inputs, given_specs
from bench.measuring.wiring import Wiring
from bench.reports.report import build_report, load_report
from bench.reports.schema import PrecisionRatio
from compress.checkpoints.permission import BUILT_IN, Permission
from compress.config import BenchConfig, DataConfig
from compress.errors import ConfigError
from compress.files.documents import Section, apply_setting, validated

if TYPE_CHECKING:
    from torch import nn

    from bench.measuring.subject import Pair
    from bench.reports.schema import Against, Report
    from compress.config import ModelConfig, Precision, RunConfig, Runtime
    from compress.data.batches import ImageData
    from compress.runs.rundirectory import RunDirectory
    from compress.terminal.progress import Progress

DENSE = "dense"


def compare(
    reference: str | Path | nn.Module,
    candidate: str | Path | nn.Module,
    data: Any = None,
    *,
    labels: Any = None,
    output: str | None = None,
    runtime: Runtime | None = None,
    precision: Precision | None = None,
    batch_sizes: Sequence[int] | None = None,
    seed: int = 0,
    random_count: int = RANDOM_INPUTS,
    images: Mapping[str, Any] | None = None,
    limits: AnyLimits | None = None,
    baseline: str | Path | Report | None = None,
    model: ModelConfig | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Measure a candidate against a reference: latency, agreement, and accuracy with labels.

        report = compare("dense.onnx", "pruned.onnx", "photos/", max_seconds=5)
        print(report)

    Args:
        reference: an ONNX file, an engine, a checkpoint of this tool, a run directory (its pruned
            network), or a network in memory, which torch runs.
        candidate: likewise; the two may be of different kinds.
        data: what both are fed. A folder of images, in ``train/`` and ``val/``, in class folders,
            or without labels; an ``.npz`` or ``.npy``; an array or tensor (N, ...); a mapping of
            arrays by the names of the inputs; a list or loader of batches, (inputs, labels) or
            inputs alone. None draws random inputs.
        labels: (N,) class indices of arrays.
        output: from which classes are read; default the first of shape (N, classes).
        runtime: what runs the files that it reads; default each in the usual runtime of its kind.
        precision: of the exports of a run directory, and in which torch computes.
        batch_sizes: for latency; default the fixed one of the files, else that of ``[bench]``.
        seed: of the order of measuring, and of random inputs.
        random_count: how many random inputs are drawn.
        images: how a folder of images is prepared, by the keys of ``[data]``: ``image_size``,
            ``mean``, ``std``; default as a sidecar says, else as ImageNet's.
        limits: what the report will be judged by, as ``judge`` takes it; limits that could not be
            shown to hold are refused before anything is measured.
        baseline: a stored report of the same reference to compare with besides.
        model: the network that a checkpoint may be built as, where it is not built in.
        progress: told about every step.
        **settings: the other keys of ``[bench]``: ``threads``, ``max_seconds``, ``confidence``, ...

    Raises:
        CheckpointError: a file is missing or damaged, or its sidecar is another file's.
        ConfigError: settings, limits or batch sizes that cannot be.
        DataError: inputs that cannot be read, or networks that do not read or return the same.
        EnvironmentUnfitError: a runtime cannot work here.
        ModelError: a network cannot be computed, or answers with NaN.
    """
    asked = {"runtime": runtime, "batch_sizes": batch_sizes}
    known = settings | {key: value for key, value in asked.items() if value is not None}
    config = validated(BenchConfig, known, source="the settings of a comparison")
    prepared = validated(DataConfig, images or {}, source="the settings of images")
    stored = load_report(Path(baseline)) if isinstance(baseline, str | Path) else baseline
    judged_by = None if limits is None else limits_of(limits)
    if judged_by is not None:
        require_baseline(judged_by, present=stored is not None)
    pair = any_subjects(
        *(Path(one) if isinstance(one, str) else one for one in (reference, candidate)),
        config=config,
        runtime=runtime,
        precision=precision,
        permission=Permission(model),
    )
    comparison = _Comparison(
        pair=pair,
        source=GivenData(data, labels, pair, prepared, seed, random_count),
        plan=Plan(
            config=config,
            batch_sizes=batch_sizes,
            output=output,
            seed=seed,
            given=given_specs(data),
        ),
        against="file",
        limits=judged_by,
        stored=stored,
        notes=missing_facts(pair),
    )
    return comparison.report(progress)


def compare_run(
    run: RunDirectory,
    config: RunConfig,
    data: ImageData,
    *,
    against: str = DENSE,
    baseline: Path | None = None,
    limits: Limits | None = None,
    permission: Permission = BUILT_IN,
    progress: Progress | None = None,
) -> Report:
    """Measure the pruned network of a run, and put the limits into the report unjudged.

    Args:
        run: the run directory.
        config: its configuration.
        data: validation images.
        against: ``dense``, a run directory, or a stored report beside the dense network.
        baseline: a stored report.
        limits: what it will be judged by; those that so few images cannot decide are refused.
        permission: which networks that are not built in may be built.
        progress: told about every step.

    Raises:
        CompressError: as ``measure``, ``subjects``, ``change_against`` and ``require_judgeable``.
    """
    other, stored = _against_what(against, baseline)
    if limits is not None:
        require_judgeable(
            limits,
            images=data.val_images,
            confidence=config.bench.confidence,
            baseline=stored is not None,
        )
    pair = subjects(
        run.path,
        config=config.bench,
        precision=config.export.precision,
        against=other,
        permission=permission,
    )

    def source(wiring: Wiring) -> Inputs:
        return dataset_inputs(data, wiring, config.data)

    comparison = _Comparison(
        pair=pair,
        source=source,
        plan=Plan(config=config.bench, at_once=config.data.eval_batch_size, seed=config.seed),
        against="dense" if other is None else "run",
        limits=limits,
        stored=stored,
    )
    report = comparison.report(progress)
    gains, unknown = measure_precisions(pair, report.config, seed=config.seed, progress=progress)
    prediction, notes = predict(
        report.target,
        precision=config.export.precision,
        files=(
            run.path / "dense.safetensors" if other is None else other / "pruned.safetensors",
            run.path / "pruned.safetensors",
        ),
        batch_sizes=[found.batch_size for found in report.comparison.latency],
        permission=permission,
    )
    return report.model_copy(
        update={
            "precisions": tuple(PrecisionRatio(**asdict(gain)) for gain in gains),
            "prediction": prediction,
            "notes": (*report.notes, *unknown, *notes),
        }
    )


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Two networks, how they are measured, and by what the report will be judged."""

    pair: Pair
    source: Source
    """What they are fed."""
    plan: Plan
    against: Against = "dense"
    limits: Limits | None = None
    """What the report will be judged by; those that nothing could meet are refused at once."""
    stored: Report | None = None
    """What the report is compared with besides."""
    notes: tuple[str, ...] = ()
    """For the report, one sentence each."""

    def report(self, progress: Progress | None = None) -> Report:
        """Measure both, and put the limits into the report, unjudged.

        Raises:
            CheckpointError: the stored report is of another model, or as ``measure``.
            CompressError: as ``measure`` and ``require_judgeable``.
        """
        self._refuse_stored()
        plan = replace(self.plan, check=self._refuse_limits)
        measured = measure(self.pair, self.source, plan, progress=progress)
        measured = replace(measured, notes=(*self.notes, *measured.notes))
        report = build_report(self.pair.about, measured, against=self.against)
        change = change_against(report, self.stored) if self.stored else None
        return report.model_copy(update={"limits": self.limits, "change": change})

    def _refuse_stored(self) -> None:
        """Refuse a stored report of another model before any time is spent on measuring."""
        if self.stored is None:
            return
        about, pair = self.pair.about, self.pair
        require_same_model(
            self.stored,
            architecture=about.architecture,
            reference=pair.reference.digest,
            runtimes=(pair.reference.runtime, pair.pruned.runtime),
            precision=about.precision,
            target=about.target,
            against=self.against,
        )

    def _refuse_limits(self, inputs: Inputs) -> None:
        """Refuse limits that so many inputs cannot decide before any time is spent on them."""
        if self.limits is not None:
            count = inputs.count or 0
            require_judgeable(
                self.limits,
                images=count if inputs.kind == "labelled" else 0,
                inputs=count,
                confidence=self.plan.config.confidence,
                baseline=self.stored is not None,
            )


class _Sections(Section):
    """What ``section.key=value`` settings may say of a comparison of two networks."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    bench: dict[str, Any] = Field(default_factory=dict)
    export: dict[str, Any] = Field(default_factory=dict)


def read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the keywords of ``compare`` for ``section.key=value`` settings.

    Raises:
        ConfigError: settings that cannot be understood, or of a section that has no say here.
    """
    document: dict[str, Any] = {}
    for setting in settings:
        apply_setting(document, setting)
    sections = validated(_Sections, document, source="the settings of two networks")
    unused = sections.export.keys() - {"precision"}
    if unused:
        raise ConfigError(f"export.{min(unused)} has no say where two networks are compared")
    source = "the settings of two networks"
    images = validated(DataConfig, sections.data, source=source, section="data")
    bench = validated(BenchConfig, sections.bench, source=source, section="bench")
    return {
        # Limits are those of a run of everything; here they are an option.
        **bench.model_dump(exclude_unset=True, exclude={"limits"}),
        "seed": sections.seed,
        "images": images.model_dump(exclude_unset=True),
        "precision": sections.export.get("precision"),
        "output": sections.model.get("output"),
    }


def _against_what(word: str, baseline: Path | None) -> tuple[Path | None, Report | None]:
    """Return the run and the stored report that a run is compared with, if any.

    Raises:
        ConfigError: the word is neither, or two reports are named.
        CheckpointError: the report cannot be read.
    """
    stored = load_report(baseline) if baseline else None
    path = Path(word)
    if word == DENSE:
        return None, stored
    if path.is_dir():
        return path, stored
    if path.is_file() and baseline is not None:
        raise ConfigError(f"{word} and {baseline} are both stored reports: name one of them")
    if path.is_file():
        return None, load_report(path)
    raise ConfigError(f"{word} is neither {DENSE}, nor a run directory, nor a report.json")
