"""Torch's global switches while a network is trained: TF32, determinism, the choice of kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compress.config import ComputeConfig
from compress.errors import EnvironmentUnfitError


@contextmanager
def computing(config: ComputeConfig) -> Iterator[None]:
    """Set the switches for the body, and put back what was there.

    Raises:
        EnvironmentUnfitError: an operation of the network cannot repeat bit for bit on this GPU.
    """
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    switches = cudnn.allow_tf32, cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    cudnn.allow_tf32 = config.tf32
    # Trying every kernel pays off, since sizes seldom change; which is fastest may change.
    cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:  # read when cuBLAS is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise EnvironmentUnfitError(
            f"compute.deterministic = true cannot be kept: {str(error).split('.')[0]}; "
            "set it to false, or train on another device"
        ) from error
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32, cudnn.benchmark = switches
        torch.use_deterministic_algorithms(deterministic)
