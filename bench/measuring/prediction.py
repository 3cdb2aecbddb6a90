"""What a shipped latency table predicts of two networks for a device that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measuring.records import PredictedLatency, Prediction
from compress.checkpoints.permission import BUILT_IN, Permission
from compress.config import Precision
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.latency.fitted import FittedTable
    from compress.networks.groups import ChannelGraph


def predict(
    target: str | None,
    *,
    precision: Precision,
    files: tuple[Path, Path],
    batch_sizes: Sequence[int],
    permission: Permission = BUILT_IN,
) -> tuple[Prediction | None, tuple[str, ...]]:
    """Predict both networks of a run on its target, each from its own captured graph.

    Args:
        target: of the run; most come without a table, and then nothing is predicted.
        precision: of the exports.
        files: checkpoints of reference and pruned network.
        batch_sizes: those measured here.
        permission: which networks that are not built in may be built.

    Returns:
        The prediction, None where there is none, and why not as notes of a report.
    """
    from compress.latency.fitted import shipped_names, shipped_table
    from compress.latency.times import network_milliseconds

    if target not in shipped_names():
        return None, ()
    table, notes, found = shipped_table(target), [], []
    device = table.document.device
    try:
        graphs = [_graph(path, permission) for path in files]
    except CompressError as error:
        return None, (f"No latency is predicted on {device}: {error}.",)
    for batch_size in batch_sizes:
        try:
            times = table.times(precision, batch_size)
            reference, pruned = (
                network_milliseconds(graph, times, graph.everything()) for graph in graphs
            )
        except CompressError as error:
            notes.append(f"No latency at batch size {batch_size} is predicted: {error}.")
            continue
        found.append(
            PredictedLatency(
                batch_size=batch_size,
                reference_ms=reference,
                pruned_ms=pruned,
                ratio=pruned / reference,
            )
        )
    return (_prediction(table, precision, found) if found else None), tuple(notes)


def _graph(path: Path, permission: Permission) -> ChannelGraph:
    from compress.checkpoints.checkpoint import load_checkpoint
    from compress.networks.analysis import analyse

    found = load_checkpoint(path, permission)
    return analyse(found.model, found.input_size)


def _prediction(
    table: FittedTable, precision: Precision, found: Sequence[PredictedLatency]
) -> Prediction:
    """Return what was predicted, with what the table says of itself."""
    said = table.document
    errors = said.held_out[precision]
    return Prediction(
        device=said.device,
        runtime=said.runtime,
        precision=precision,
        source=said.source,
        layer_error_median=errors.median,
        layer_error_p90=errors.p90,
        network_error=table.network_error,
        latency=tuple(found),
    )
