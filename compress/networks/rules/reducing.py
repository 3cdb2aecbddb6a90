"""Operators that take many numbers together: sums, norms, pools, resizing, softmax."""

from __future__ import annotations

from collections.abc import Sequence

from compress.networks.rules.registry import rule
from compress.networks.walk import NOWHERE, Call, Result, Value

REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "logsumexp", "norm"),
    *("linalg_vector_norm", "argmax", "argmin", "any", "all", "median", "mode", "nansum"),
    *("nanmean", "std_mean", "var_mean", "aminmax", "count_nonzero", "linalg_norm"),
)
SCANS = (
    *("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"),
    *("sort", "topk", "softmin", "renorm", "cummax", "cummin"),
)
POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "lp_pool1d", "lp_pool2d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "fractional_max_pool2d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "interpolate"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", "_upsample_nearest_exact3d", "max_unpool2d"),
    *("replication_pad1d", "replication_pad3d", "reflection_pad3d", "grid_sampler"),
    *("grid_sampler_2d", "grid_sampler_3d"),
)


@rule(*REDUCTIONS)
def reduction(call: Call) -> Result | None:
    """Numbers along some dimensions become one."""
    values = call.values
    if len(values) == 2:  # max(a, b)
        from compress.networks.rules.pointwise import pointwise

        return pointwise(call)
    x = values[0]
    dims = call.get("dim")
    if dims is None or dims == []:
        over = set(range(x.rank))
    else:
        over = {int(d) % x.rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    what = "statistics of a weight are taken over it" if x.fixed else f"{call.name} over channels"
    for dim in over:
        call.walk.freeze(x.dims[dim], what)
    kept = len(call.shape) == x.rank
    result = (
        Value(
            call.shape,
            tuple(None if d in over else x.dims[d] for d in range(x.rank)),
            tuple(NOWHERE if d in over else x.origins[d] for d in range(x.rank)),
            x.fixed,
        )
        if kept
        else x.take([d for d in range(x.rank) if d not in over])
    )
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


@rule(*SCANS)
def scan(call: Call) -> Value | list[Value]:
    """Every number depends on all along one dimension."""
    x = call.values[0]
    dim = int(call.get("dim", -1)) % max(1, x.rank)
    call.walk.freeze(x.dims[dim], f"{call.name} over channels")
    result = x.same()
    if call.shape != x.shape:
        result = x.with_dim(dim, None, call.shape[dim])
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


@rule("glu")
def glu(call: Call) -> Value:
    """The first half of a dimension times the sigmoid of the second."""
    x = call["self"]
    dim = int(call.get("dim", -1)) % x.rank
    atoms = x.dims[dim]
    if atoms is None:
        return x.with_dim(dim, None, call.shape[dim])
    half = len(atoms) // 2
    call.walk.ties.append((atoms[:half], atoms[half:]))
    return x.with_dim(dim, atoms[:half], half)


@rule(*POOLS)
def pool(call: Call) -> Value | list[Value]:
    """(N, C, ...) to (N, C, ...): space alone is taken together."""
    x = call.values[0]
    space = _space_of(call.name, x)
    for dim in space:
        call.walk.freeze(x.dims[dim], f"{call.name} along it")
    results = [
        Value(shape, tuple(None if d in space else x.dims[d] for d in range(x.rank)))
        for shape in call.shapes
    ]
    return results[0] if len(results) == 1 else results


def _space_of(name: str, x: Value) -> Sequence[int]:
    count = next((int(c) for c in name if c in "123"), x.rank - 2)
    return range(max(0, x.rank - count), x.rank)


@rule("_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size", "_assert_scalar")
def nothing(call: Call) -> list[Value]:
    """Checks that return nothing."""
    return []
