"""Figures as people read them; the one place that decides how many digits a figure has."""

from __future__ import annotations

from collections.abc import Callable

from compress.terminal.sheet import short_count, short_size


def count(value: float) -> str:
    """Return a number of things as every table here does: 40.8 M, 271 k, 640."""
    return short_count(value)


def about(value: float) -> str:
    """Return a number of things rounded to two digits: 2300."""
    return f"{float(f'{value:.2g}'):.0f}"


def size(value: float) -> str:
    """Return bytes as every table here does: 1.08 MB, 640 B."""
    return short_size(value)


def milliseconds(value: float) -> str:
    """Return a latency with about four digits: 0.412 ms, 12.35 ms."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f} ms"


def ratio(value: float) -> str:
    """Return a ratio with three decimals: 0.648."""
    return f"{value:.3f}"


def speed_up(value: float) -> str:
    """Return a speed-up: 1.54x."""
    return f"{value:.2f}x"


def points(value: float) -> str:
    """Return percentage points: 0.56 pp."""
    return f"{value:.2f} pp"


def share(value: float) -> str:
    """Return a share as a percentage with two decimals: 98.06 %."""
    return f"{100 * value:.2f} %"


def level(value: float) -> str:
    """Return a confidence level: 95 %, 97.5 %."""
    return f"{100 * value:g} %"


def error(value: float) -> str:
    """Return a relative error: 3.1e-07."""
    return f"{value:.1e}"


def of_limit(key: str) -> Callable[[float], str]:
    """Return how figures of a limit are written, by the last part of its key."""
    return {
        "max_drop_pp": points,
        "max_top5_drop_pp": points,
        "max_regression_pp": points,
        "max_ratio": ratio,
        "predicted_max_ratio": ratio,
        "max_regression": ratio,
        "max_median_regression": ratio,
        "median_ms": milliseconds,
        "p99_ms": milliseconds,
        "max_relative_error": error,
        "min_same_top1": share,
    }[key.rpartition(".")[2]]


def times(value: float) -> str:
    """Return a ratio as a factor: x 0.648."""
    return f"x {ratio(value)}"


def interval(write: Callable[[float], str], low: float, high: float) -> str:
    """Return [low, high] without the unit, which the figure before it has."""
    bare = (write(value).split(" ")[0].rstrip("x") for value in (low, high))
    return f"[{', '.join(bare)}]"
