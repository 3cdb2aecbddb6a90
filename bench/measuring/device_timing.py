"""Time of a call's steps on a GPU, by the definitions of trtexec.

    name       clock   what it covers
    h2d        device  copy of the images to the device
    compute    device  the network, or the replay of its CUDA graph
    d2h        device  copy of the logits to the host
    enqueue    host    the call that queues the network
    latency    device  h2d + compute + d2h, a sum: waiting between the steps is not in it
    host       host    from the start of the upload until the logits are in host memory

A device step is what lies between two CUDA events, recorded on the stream just before and just
after the step is queued. So a network whose kernels are queued more slowly than they run has the
waiting in ``compute``, as in trtexec.

Other than trtexec, which keeps two calls in flight so that copies run beside the network of another
call, this loop has one call in flight on one stream, as a client has that waits for its answer.
Throughput is therefore one call per ``host``, which is ``latency`` and the waiting between steps,
the recording of events and the synchronisation. From release 11 on trtexec leaves the copies out
unless told otherwise; they are always timed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from export.runners import Stages

STAGES = ("h2d", "compute", "d2h", "enqueue")
"""The steps of a call that are timed; the last on the host, the others on the GPU."""
ON_DEVICE = STAGES[:3]
"""Those whose times make up the latency."""

_ENQUEUE_BOUND = 0.8  # of the compute time; trtexec warns from there on


@dataclass(frozen=True, kw_only=True)
class DeviceCalls:
    """What timed calls took, in milliseconds; entry i of every list belongs to call i."""

    latency_ms: list[float]
    """H2D + compute + D2H, as trtexec defines Latency."""
    host_ms: list[float]
    """Wall clock of the host, from the start of the upload until the logits are there."""
    stages_ms: dict[str, list[float]]
    """Each of ``STAGES``."""


def time_on_device(
    stages: Stages,
    iterations: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceCalls:
    """Time calls one by one, each when the one before is done.

    The images must be staged and the network must be warm: what ``stage`` does on the host is in no
    figure, and the first ``enqueue`` after a change of the batch size may be slower.

    Args:
        stages: the steps of an entered runner.
        iterations: how many calls to time.
        clock: tells seconds on the host.
    """
    # They are recorded anew by every call, once the call before was read.
    marks = {stage: (stages.event(), stages.event()) for stage in ON_DEVICE}
    stages_ms: dict[str, list[float]] = {stage: [] for stage in STAGES}
    host_ms, record = [], stages.record
    stages.synchronize()  # what was queued before belongs to nobody's call
    with stages.on_stream():  # else every step would switch to it, between its two events
        for _ in range(iterations):
            began = clock()
            _between(record, marks["h2d"], stages.upload)
            start, end = marks["compute"]
            record(start)
            queued = clock()
            stages.enqueue()
            enqueued = clock()
            record(end)
            _between(record, marks["d2h"], stages.download)
            stages.synchronize()
            host_ms.append(1000 * (clock() - began))
            stages_ms["enqueue"].append(1000 * (enqueued - queued))
            for stage, (start, end) in marks.items():
                stages_ms[stage].append(start.elapsed_time(end))
    on_device = zip(*(stages_ms[stage] for stage in ON_DEVICE), strict=True)
    return DeviceCalls(
        latency_ms=[sum(call) for call in on_device], host_ms=host_ms, stages_ms=stages_ms
    )


def advice(medians_ms: Mapping[str, float], *, cuda_graph: bool) -> tuple[str, ...]:
    """Return what keeps the GPU waiting, as trtexec would say it, one sentence each.

    Args:
        medians_ms: median of each of ``STAGES``, in milliseconds.
        cuda_graph: whether the network was replayed as a CUDA graph.
    """
    compute = medians_ms["compute"]
    found = []
    if medians_ms["enqueue"] > _ENQUEUE_BOUND * compute:
        mend = "larger batches use more of the GPU" if cuda_graph else "set bench.cuda_graph = true"
        found.append(
            f"Queueing the network takes the host {medians_ms['enqueue']:.3g} ms and computing it "
            f"the GPU {compute:.3g} ms, so the host may set the pace; {mend}."
        )
    for stage, copied in (("h2d", "images to the GPU"), ("d2h", "logits to the host")):
        if medians_ms[stage] >= compute:
            found.append(
                f"Copying {copied} takes {medians_ms[stage]:.3g} ms, no less than the network's "
                f"{compute:.3g} ms; a faster network hardly shortens the call."
            )
    return tuple(found)


def _between(
    record: Callable[[torch.cuda.Event], None],
    marks: tuple[torch.cuda.Event, torch.cuda.Event],
    step: Callable[[], None],
) -> None:
    start, end = marks
    record(start)
    step()
    record(end)
