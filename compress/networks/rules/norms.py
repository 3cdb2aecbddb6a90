"""Normalisations: what shares statistics goes together, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import ModelError
from compress.networks.rules.registry import rule
from compress.networks.walk import Call, Value


@rule("batch_norm", "cudnn_batch_norm")
def batch_norm(call: Call) -> Value:
    """Along dimension 1; the others are what statistics are taken over."""
    x = call["input"]
    if call.get("training") and not x.fixed and not call.walk.training:
        where = f" ({call.module})" if call.module else ""
        raise ModelError(
            f"a BatchNorm{where} normalises by the statistics of each batch in evaluation mode "
            "too, so that an image's outputs depend on the images beside it: train the network "
            "with track_running_stats=True"
        )
    if call.get("training") and x.fixed:
        for dim in (d for d in range(x.rank) if d != 1):
            call.walk.freeze(x.dims[dim], "statistics of a weight are taken over it")
    return _channelwise(call, x, ("weight", "bias", "running_mean", "running_var"))


@rule("instance_norm")
def instance_norm(call: Call) -> Value:
    """Each channel of each image by itself."""
    x = call["input"]
    call.freeze_others(x, {0, 1})
    return _channelwise(call, x, ("weight", "bias", "running_mean", "running_var"))


@rule("group_norm")
def group_norm(call: Call) -> Value:
    """Channels of one norm group share statistics, so they go together or not at all."""
    x, groups = call["input"], int(call["num_groups"])
    call.freeze_others(x, {0, 1})
    atoms = x.dims[1]
    if groups == 1:
        call.walk.freeze(atoms, "a norm group")
    elif atoms is not None:
        heads = call.walk.tie_rows(atoms, groups)
        held = [tensor for name in ("weight", "bias") if (tensor := call.get(name)) is not None]
        call.state(*held, num_groups=heads, num_channels=atoms)
    return _channelwise(call, x, ("weight", "bias"))


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Value:
    """Statistics are taken over the last dimensions together."""
    x, over = call["input"], len(call["normalized_shape"])
    weights = [w for n in ("weight", "bias") if (w := call.get(n)) is not None]
    for place in range(-over, 0):
        call.walk.freeze(x.dims[place], f"{call.name} over channels")
        for weight in weights:
            call.walk.tie(x.dims[place], weight.dims[place], f"{call.name} over channels")
    return x.same()


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Value | list[Value]:
    """A direction times a length; norms are taken over all dimensions but one."""
    direction, length, dim = call["v"], call["g"], int(call.get("dim", 0))
    for other in range(direction.rank):
        if other != dim:
            call.walk.freeze(direction.dims[other], "weight_norm takes norms over it")
    call.walk.tie(direction.dims[dim], length.dims[dim], "weight_norm of a fixed width")
    result = direction.same()
    return result if len(call.shapes) == 1 else [result, length.same()]


def _channelwise(call: Call, x: Value, names: Sequence[str]) -> Value:
    """Tensors of one number for each channel."""
    held = [tensor for name in names if (tensor := call.get(name)) is not None]
    for tensor in held:
        call.walk.tie(x.dims[1], tensor.dims[0], f"{call.name} of a fixed width")
    call.state(*held, num_features=x.dims[1])
    return x.same()
