"""The network inside what torch wraps around it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network of a ``torch.compile``, a ``DistributedDataParallel``, an average.

    A network that is none of these is returned as it is.
    """
    inner = getattr(model, "_orig_mod", None)  # torch.compile's; its class has no public name
    if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
        inner = model.module
    return unwrapped(inner) if isinstance(inner, nn.Module) else model
