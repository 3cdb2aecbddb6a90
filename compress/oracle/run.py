"""``compress oracle`` from its options to its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.checkpoints.checkpoint import Checkpoint, tool_versions
from compress.config import RunConfig
from compress.criteria.scoring import Context
from compress.data.datasets import load_data
from compress.errors import InterruptedRunError, ModelError
from compress.files.atomic import write_atomically, write_json
from compress.networks.groups import ChannelGraph
from compress.networks.trial import tried_graph
from compress.oracle.blocks import (
    block_changes,
    block_estimates,
    blocks_document,
    half_changes,
    scale_of,
)
from compress.oracle.changes import (
    ChangeLog,
    Job,
    Measured,
    images_at_once,
    measure,
    pair_groups,
    pair_jobs,
    single_jobs,
)
from compress.oracle.correlation import (
    COEFFICIENTS,
    Pairs,
    Pick,
    Span,
    Values,
    agreement,
    judge_pairs,
)
from compress.oracle.replay import Replay
from compress.oracle.report import plot_oracle, render_markdown, units_csv
from compress.oracle.request import (
    ImageSample,
    OracleFiles,
    check_data,
    check_options,
    loaded,
    opened,
    read_sample,
    seed_of,
)
from compress.oracle.scores import importance_of, row_names
from compress.pruning.decision import report_dense
from compress.runs.request import OracleRequest
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.terminal.progress import bar

SCHEMA_VERSION = 1
SAMPLE = 2
"""Images on which the network is looked at before anything is measured."""


@dataclass
class _Work:
    """What every step needs."""

    request: OracleRequest
    config: RunConfig
    dense: Checkpoint
    graph: ChannelGraph
    sample: ImageSample
    files: OracleFiles
    session: Session
    replay: Replay = field(init=False)

    @property
    def seed(self) -> int:
        return seed_of(self.request, self.config)

    @property
    def device(self) -> torch.device:
        return next(self.dense.model.parameters()).device

    @property
    def batch_size(self) -> int:
        return self.request.batch_size or self.config.data.batch_size

    @property
    def context(self) -> Context:
        pruning = self.config.prune
        return Context(
            self.dense.model,
            self.graph,
            seed=self.seed,
            as_published=pruning.as_published,
            hessian_samples=pruning.hessian_samples,
        )

    def check_stop(self) -> None:
        if self.session.stop.is_set():
            raise InterruptedRunError(
                f"stopped; what was measured is in {self.files.path}, go on with the same command "
                "and --resume"
            )


def run_oracle(request: OracleRequest) -> dict[str, Any]:
    """Measure the true importance of every unit and how well criteria predict it.

    Everything that can be refused is refused before a file is written.

    Returns:
        The document that is written as ``correlation.json``.

    Raises:
        ConfigError: options that cannot be understood, a criterion that is not known or cannot
            score the network, a file to resume that is of another measurement.
        CheckpointError: the checkpoint is missing, damaged, pruned or of other classes.
        DataError: there are no images.
        ModelError: there is nothing to prune, or the network cannot be run again in parts.
        InterruptedRunError: the user stopped; what was measured is on disk.
    """
    check_options(request)
    files = OracleFiles(request.output)
    files.check(resume=request.resume, overwrite=request.overwrite)
    path, config = opened(request)
    dense = loaded(path, request, config)
    data = load_data(config.data)
    check_data(dense, data, path)
    old = dense.description.format_version == 1
    graph = tried_graph(dense.model, dense.input_size, whole_groups=old)
    report_dense(graph)
    if not graph.prunable:
        raise ModelError(f"{path} has no channel group that may be pruned: nothing to measure")
    if request.pairs:
        pair_groups(graph, request.pairs)
    sample = read_sample(request, config, data)
    session = Session(RunDirectory(request.output))
    work = _Work(request, config, dense, graph, sample, files, session)
    rows = row_names(work.context, request.criteria)
    first = sample.images[:SAMPLE].to(work.device)
    work.replay = Replay(dense.model, graph, first.repeat(SAMPLE // len(first), 1, 1, 1))
    if request.overwrite:
        files.clear()
    with session.interruptible():
        return _measured(work, rows)


def _measured(work: _Work, rows: list[str]) -> dict[str, Any]:
    jobs = single_jobs(work.replay, work.graph)
    singles = _changes(work, jobs, work.files.changes, "removing units", {})
    changes = np.zeros(work.graph.num_units)
    changes[singles.removed[:, 0]] = singles.changes
    importances = _importances(work, rows)
    spans = [Span(g.name, g.units, g.residual) for g in work.graph.prunable]
    document = {
        "schema_version": SCHEMA_VERSION,
        **_provenance(work),
        "dense_loss": singles.dense_loss,
        "cost": {
            "units": len(singles.removed),
            "forward_passes": sum(job.macs for job in jobs) / work.replay.total_macs,
        },
        "groups": _groups(work.graph, changes),
        "criteria": {
            name: {c: asdict(agreement(values, changes, spans, c)) for c in COEFFICIENTS}
            for name, values in importances.items()
        },
        "blocks": _blocks(work, changes, importances),
        "pairs": _pairs(work, changes, importances),
    }
    _write(work, document, changes, importances)
    return document


def _changes(
    work: _Work, jobs: list[Job], path: Path, title: str, identity: dict[str, Any]
) -> Measured:
    limit = work.config.data.eval_batch_size
    batch_size = images_at_once(jobs, limit, work.device.type)
    about = {**_identity(work), "images of a batch": batch_size, **identity}
    changes = ChangeLog(path, about)
    removals = sum(len(job.removed) for job in jobs)
    with bar(title, removals) as shown:

        def after_piece(share: float) -> None:
            shown.at(share * removals)
            work.check_stop()

        return measure(
            work.replay,
            jobs,
            work.sample.images,
            work.sample.labels,
            log=changes,
            batch_size=batch_size,
            after_piece=after_piece,
        )


def _importances(work: _Work, rows: list[str]) -> dict[str, Values]:
    found = {}
    with bar("scoring", len(rows)) as shown:
        for index, name in enumerate(rows):
            shown.at(index, name)
            found[name] = importance_of(
                name,
                work.context,
                work.sample.images,
                work.sample.labels,
                batch_size=work.batch_size,
                check_stop=work.check_stop,
            )
    return found


def _blocks(work: _Work, changes: Values, importances: dict[str, Values]) -> dict[str, Any] | None:
    """Measure what blocks are worth, and what tells it."""
    graph, sample = work.graph, work.sample
    with bar("removing blocks", len(graph.removable)) as shown:

        def after_block(done: int) -> None:
            shown.at(done)
            work.check_stop()

        found = block_changes(
            work.context,
            sample.images,
            sample.labels,
            batch_size=work.config.data.eval_batch_size,
            after_block=after_block,
        )
    if not len(found):
        return None
    batch_size = min(work.batch_size, len(sample.images))
    estimates = block_estimates(work.context, sample.images, sample.labels, batch_size=batch_size)
    scales: dict[str, float | None] = {}
    units = np.concatenate([group.units for group in graph.prunable])
    for name in ("taylor-gate", "taylor-parts"):
        if name not in importances:
            continue
        sums, halves = half_changes(
            work.context,
            importances[name],
            sample.images,
            sample.labels,
            batch_size=work.config.data.eval_batch_size,
        )
        if name == "taylor-gate":
            scales["channels"] = scale_of(importances[name][units], changes[units])
            scales["halves"] = scale_of(sums, halves)
        else:
            scales["halves_of_parts"] = scale_of(sums**2, halves)
    return blocks_document(graph, found, estimates, scales)


def _pairs(work: _Work, singles: Values, importances: dict[str, Values]) -> dict[str, Any] | None:
    wanted = work.request.pairs
    if not wanted:
        return None
    jobs = pair_jobs(work.replay, work.graph, wanted)
    path = work.files.pair_changes
    found = _changes(work, jobs, path, "removing pairs", {"--pairs": wanted})
    pairs = judge_pairs(found.removed, found.changes, singles, importances)
    return _pairs_document(pairs, work.graph, wanted)


def _pairs_document(pairs: Pairs, graph: ChannelGraph, scope: str) -> dict[str, Any]:
    place = {
        unit: (group.name, index)
        for group in graph.prunable
        for index, unit in enumerate(group.units.tolist())
    }

    def described(pick: Pick) -> dict[str, Any]:
        return {
            "by": pick.by,
            "units": [place[unit] for unit in pick.units],
            "loss_change": pick.change,
            "regret": pick.regret,
            "rank": pick.rank,
        }

    return {
        "scope": scope,
        "count": len(pairs.units),
        "best": described(pairs.best),
        "picks": [described(pick) for pick in pairs.picks],
        "sum_pearson": pairs.sum_pearson,
        "sum_spearman": pairs.sum_spearman,
    }


def _identity(work: _Work) -> dict[str, Any]:
    """What two measurements must have in common to share a file, by names that a user knows."""
    return {
        "checkpoint": work.dense.sha256,
        "--split": work.request.split,
        "--images": len(work.sample.labels),
        "--seed": work.seed,
        "image data": work.sample.sha256,
        "device": work.device.type,
    }


def _provenance(work: _Work) -> dict[str, Any]:
    return {
        "architecture": work.dense.architecture,
        "checkpoint_sha256": work.dense.sha256,
        "images": {
            "count": len(work.sample.labels),
            "split": work.request.split,
            "seed": work.seed,
            "sha256": work.sample.sha256,
        },
        "minibatch": min(work.batch_size, len(work.sample.labels)),
        "hessian_samples": work.config.prune.hessian_samples,
        "as_published": work.config.prune.as_published,
        "device": work.device.type,
        "tools": tool_versions(),
    }


def _groups(graph: ChannelGraph, changes: Values) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "units": group.size,
            "residual": group.residual,
            "least_change": float(changes[group.units].min()),
            "median_change": float(np.median(changes[group.units])),
            "largest_change": float(changes[group.units].max()),
            "harmful": int(np.count_nonzero(changes[group.units] < 0)),
        }
        for group in graph.prunable
    ]


def _write(
    work: _Work, document: dict[str, Any], changes: Values, importances: dict[str, Values]
) -> None:
    files = work.files
    write_atomically(files.units, units_csv(work.graph, changes, importances))
    plot_oracle(files.plot, document["criteria"], work.graph, changes, importances)
    write_atomically(files.correlation.with_suffix(".md"), render_markdown(document))
    write_json(files.correlation, document)
