"""Where the processes of a sweep compute: one device each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compress.errors import ConfigError, EnvironmentUnfitError


@dataclass(frozen=True)
class Slot:
    """A place for one process at a time."""

    device: str
    """``cpu`` or ``cuda:N``."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment of a process here: it sees its own device only, and takes it for ``auto``."""


def slots_for(devices: str | None, configured: str, jobs: int | None) -> tuple[Slot, ...]:
    """Return a place for each process that may run at a time.

    Args:
        devices: names with commas between them, ``auto`` for all GPUs; default ``configured``.
        configured: ``device`` of the configuration.
        jobs: processes at a time; default one for each device.

    Raises:
        ConfigError: a device's name cannot be understood, or there are no jobs.
        EnvironmentUnfitError: a GPU is not there.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give 1 or more")
    names = _names(configured if devices is None else devices)
    places = [names[index % len(names)] for index in range(jobs or len(names))]
    return tuple(Slot(name, _variables(name, places.count(name))) for name in places)


def _names(asked: str) -> Sequence[str]:
    gpus = _gpus()
    names: list[str] = []
    for name in asked.split(","):
        word = name.strip()
        if word == "auto":
            names += [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
        elif word == "cpu":
            names.append(word)
        elif match := re.fullmatch(r"cuda(?::(\d{1,4}))?", word):
            index = int(match[1] or 0)
            if index >= gpus:
                raise EnvironmentUnfitError(
                    f"device {word!r} cannot be used here: there are {gpus} GPUs, give --devices"
                )
            names.append(f"cuda:{index}")
        else:
            raise ConfigError(
                f"--devices {asked}: {word!r} is none of auto, cpu, cuda:0, cuda:1, ..."
            )
    return list(dict.fromkeys(names))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _variables(name: str, sharing: int) -> dict[str, str]:
    if name == "cpu":
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        if sharing == 1 or "OMP_NUM_THREADS" in os.environ:
            return hidden
        return {**hidden, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // sharing))}
    index = int(name.partition(":")[2])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}
