"""How the machine computes: device, memory format, mixed precision, and torch's global switches."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from compress.config import ComputeConfig
from compress.distributed.world import device_name
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


def pick_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means in this process.

    Raises:
        EnvironmentUnfitError: the device is not there.
        ConfigError: one GPU is named for several processes.
    """
    name = device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentUnfitError(f"device {name!r} cannot be used here") from error
    return device


def memory_format_for(
    model: nn.Module, input_size: Sequence[int], wish: Literal["auto", "on", "off"] = "auto"
) -> torch.memory_format:
    """Return channels_last, which convolutions prefer, unless the network cannot compute in it.

    ``x.view(len(x), -1)`` of feature maps, for one, needs them contiguous. A copy is asked, unless
    the wish is a plain ``on`` or ``off``.
    """
    if wish != "auto":
        return torch.channels_last if wish == "on" else torch.contiguous_format
    device = next(model.parameters()).device
    probe = copy.deepcopy(model).to(memory_format=torch.channels_last).eval()
    images = torch.zeros(2, *input_size, device=device).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            probe(images)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def amp_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """Return the type of mixed precision that ``train.amp`` means on a device; None for float32."""
    if device.type != "cuda" or setting == "off":
        return None
    if setting == "auto":
        # Volta computes bf16 in software only; its tensor cores take fp16.
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if setting == "bf16" else torch.float16
