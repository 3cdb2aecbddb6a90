"""Any two networks compared: what ``compress.compare`` and ``compress bench`` call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from bench.budgets import Budgets, Limits, budgets_of, require_baseline, require_judgeable
from bench.comparison import Plan, measure
from bench.inputs.images import dataset_inputs, folder_inputs
from bench.inputs.sources import (
    RANDOM_INPUTS,
    Inputs,
    array_inputs,
    as_array,
    as_arrays,
    batch_inputs,
    file_inputs,
    parts_of,
    random_inputs,
)
from bench.inputs.wiring import Wiring
from bench.networks import any_subjects, missing_facts, subjects
from bench.reports.report import load_report
from compress.config import BenchConfig, DataConfig
from compress.errors import ConfigError, DataError
from compress.files.documents import Section, apply_setting, validated
from export.runners import TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from bench.inputs.wiring import Specs
    from bench.reports.schema import Report
    from bench.subject import Pair
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
    limits: Limits | None = None,
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
        limits: budgets that the report will be judged by, as ``judge`` takes them; those that could
            not be shown to hold are refused before anything is measured.
        baseline: a stored report of the same reference to compare with besides.
        model: the network that a checkpoint may be built as, where it is not built in.
        progress: told about every step.
        **settings: the other keys of ``[bench]``: ``threads``, ``max_seconds``, ``confidence``, ...

    Raises:
        CheckpointError: a file is missing or damaged, or its sidecar is another file's.
        ConfigError: settings, budgets or batch sizes that cannot be.
        DataError: inputs that cannot be read, or networks that do not read or return the same.
        EnvironmentUnfitError: a runtime cannot work here.
        ModelError: a network cannot be computed, or answers with NaN.
    """
    asked = {"runtime": runtime, "batch_sizes": batch_sizes}
    known = settings | {key: value for key, value in asked.items() if value is not None}
    config = validated(BenchConfig, known, source="the settings of a comparison")
    prepared = validated(DataConfig, images or {}, source="the settings of images")
    stored = load_report(Path(baseline)) if isinstance(baseline, str | Path) else baseline
    budgets = None if limits is None else budgets_of(limits)
    if budgets is not None:
        require_baseline(budgets, present=stored is not None)
    pair = any_subjects(
        *(Path(one) if isinstance(one, str) else one for one in (reference, candidate)),
        config=config,
        runtime=runtime,
        precision=precision,
        typed=model,
    )
    source = _Data(data, labels, pair, prepared, seed, random_count)
    plan = Plan(
        config=config,
        against="file",
        batch_sizes=batch_sizes,
        output=output,
        budgets=budgets,
        stored=stored,
        seed=seed,
        notes=missing_facts(pair),
        given=given_specs(data),
    )
    return measure(pair, source, plan, progress=progress)


def compare_run(
    run: RunDirectory,
    config: RunConfig,
    data: ImageData,
    *,
    against: str = DENSE,
    baseline: Path | None = None,
    budgets: Budgets | None = None,
    typed: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the pruned network of a run, and put the budgets into the report unjudged.

    Args:
        run: the run directory.
        config: its configuration.
        data: validation images.
        against: ``dense``, a run directory, or a stored report beside the dense network.
        baseline: a stored report.
        budgets: what it will be judged by; those that so few images cannot decide are refused.
        typed: the network that the user asked for, where it is not built in.
        progress: told about every step.

    Raises:
        CompressError: as ``measure``, ``subjects``, ``change_against`` and ``require_judgeable``.
    """
    other, stored = _against_what(against, baseline)
    if budgets is not None:
        require_judgeable(
            budgets,
            images=data.val_images,
            confidence=config.bench.confidence,
            baseline=stored is not None,
        )
    pair = subjects(
        run.path,
        config=config.bench,
        precision=config.export.precision,
        against=other,
        typed=typed,
    )
    plan = Plan(
        config=config.bench,
        against="dense" if other is None else "run",
        at_once=config.data.eval_batch_size,
        budgets=budgets,
        stored=stored,
        seed=config.seed,
    )

    def source(wiring: Wiring) -> Inputs:
        return dataset_inputs(data, wiring, workers=config.data.workers)

    return measure(pair, source, plan, progress=progress)


def given_specs(data: Any) -> Specs | None:
    """Return what arrays say of the inputs that they are for; None of anything else."""
    if data is None or isinstance(data, str | Path):
        return None
    if not isinstance(data, Mapping) and not _is_array(data):
        data = parts_of(next(iter(data), None))[0]
    named = data if isinstance(data, Mapping) else {"input": data}
    arrays = {str(name): as_array(value) for name, value in named.items() if value is not None}
    return tuple(
        TensorSpec(name, _usual_type(array), (None, *array.shape[1:]))
        for name, array in arrays.items()
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
    images = validated(DataConfig, sections.data, source="the settings of two networks")
    return {
        **sections.bench,
        "seed": sections.seed,
        "images": images.model_dump(exclude_unset=True),
        "precision": sections.export.get("precision"),
        "output": sections.model.get("output"),
    }


@dataclass(frozen=True)
class _Data:
    """What a caller gives, as the source of a comparison."""

    data: Any
    labels: Any
    pair: Pair
    images: DataConfig
    seed: int
    random_count: int

    def __call__(self, wiring: Wiring) -> Inputs:
        data = Path(self.data) if isinstance(self.data, str) else self.data
        if isinstance(data, Path):
            return self._from_path(data, wiring)
        if data is None and "dataset" in self.images.model_fields_set:
            from compress.data.datasets import load_data

            found = load_data(self.images.prepared(self._known()))
            return dataset_inputs(found, wiring, workers=self.images.workers)
        if data is None:
            side = self.images.image_size
            return random_inputs(wiring, seed=self.seed, side=side, count=self.random_count)
        if isinstance(data, Mapping) or _is_array(data):
            return array_inputs(as_arrays(data, wiring), self.labels, wiring)
        if self.labels is not None:
            raise DataError("batches bring their own labels: leave labels away")
        return batch_inputs(data, wiring)

    def _from_path(self, path: Path, wiring: Wiring) -> Inputs:
        if path.is_dir():
            facts = [subject.facts for subject in self.pair]
            return folder_inputs(path, wiring, config=self.images, facts=facts)
        if path.suffix in (".npz", ".npy"):
            return file_inputs(path, wiring)
        raise DataError(
            f"{path} is neither a folder of images nor a file of arrays, *.npz or *.npy"
        )

    def _known(self) -> dict[str, Any]:
        facts = self.pair.reference.facts
        return {key: tuple(facts[key]) for key in ("mean", "std") if key in facts}


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


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray) or hasattr(data, "detach")


def _usual_type(array: np.ndarray) -> str:
    """Return the type in which an array is fed to a network in memory: floats in single."""
    return "float32" if array.dtype == np.float64 else array.dtype.name
