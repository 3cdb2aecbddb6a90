"""BatchNorm over the images of all processes: on GPUs torch's, on CPUs, where it has none, this."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.distributed.world import current


class JoinedBatchNorm(_BatchNorm):
    """BatchNorm by the statistics of the joined minibatch (Ioffe and Szegedy 2015, algorithm 1).

    It serves CPUs, so that what many GPUs compute can be proved without one.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) -> the same shape; N may differ between processes."""
        if not (self.training or self.running_mean is None):
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        shape = (1, -1, *(1,) * (input.dim() - 2))
        counts = _Sum.apply(input.new_tensor([input.numel() / input.shape[1]]))
        mean = _Sum.apply(input.sum(axes)) / counts
        centred = input - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / counts
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * counts / (counts - 1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is None:
            return normal
        return normal * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without momentum, a cumulative average.
        weight = self.momentum or 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return current().sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _Sum.apply(gradients[0])


def join_batchnorms(model: nn.Module) -> None:
    """Let every BatchNorm of a network take its statistics over all processes, in place.

    Parameters, buffers and their names stay the same.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm) or isinstance(module, JoinedBatchNorm):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _joined(module))


def _joined(norm: _BatchNorm) -> nn.Module:
    device = next(norm.parameters(), torch.empty(0)).device
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
    joined = JoinedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    for tensors in ("_parameters", "_buffers"):
        setattr(joined, tensors, getattr(norm, tensors))
    return joined.train(norm.training)
