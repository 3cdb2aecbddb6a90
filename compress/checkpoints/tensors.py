"""Tensors by name from files of weights, our own and other people's.

Nothing pickled is loaded with code execution, and what a file claims is compared with the file
itself before memory is taken for it.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

from compress.checkpoints.description import require_header
from compress.checkpoints.kinds import require_weights
from compress.checkpoints.sets import Fits, chosen
from compress.checkpoints.wrapped import without_prefixes
from compress.errors import CheckpointError


def read_state_dict(
    path: Path, key: str | None = None, fits: Fits = lambda _: True
) -> dict[str, torch.Tensor]:
    """Read tensors by name from ``.pth`` or safetensors, wrappers and prefixes taken off.

    Args:
        path: the file.
        key: which weights, where it holds several sets; None for the usual ones.
        fits: whether weights are of the network, by their names.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds no such weights.
    """
    require_weights(path)
    state = chosen(_content(path), path, key, fits)
    _require_plain(state, path)
    return state


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    _require_stored(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; the error says enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(_unpickling_message(path, error)) from error
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a safetensors file, prefixes taken off.

    Raises:
        CheckpointError: the file is absent or damaged, or a tensor claims more than it holds.
    """
    require_header(path)
    try:
        state = without_prefixes(safetensors.torch.load_file(path))
    except Exception as error:  # a damaged header can fail in any way
        raise CheckpointError(f"{path} is truncated or not a safetensors file") from error
    _require_plain(state, path)
    return state


def _require_stored(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is; PyTorch stores and never compresses."""
    try:
        if not zipfile.is_zipfile(path):  # as PyTorch wrote until 1.6
            return
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint") from error
    unpacked = sum(record.file_size for record in records)
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or unpacked > path.stat().st_size:
        raise CheckpointError(
            f"{path} unpacks to {unpacked} bytes and is smaller than that, as no file of PyTorch "
            "is: save it again with torch.save"
        )


def _require_plain(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors whose numbers are not all in the file, or are of no use as weights."""
    size = path.stat().st_size
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            _refuse_tensor(path, name, "is no plain tensor")
        if tensor.is_complex():
            _refuse_tensor(path, name, "holds complex numbers")
        # A stride of 0 makes any shape of one number.
        taken = tensor.numel() * tensor.element_size()
        if taken > tensor.untyped_storage().nbytes() or taken > size:
            _refuse_tensor(path, name, f"claims a shape of {taken} bytes, which it does not hold")


def _refuse_tensor(path: Path, name: str, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {name!r} {why}: save the state dict of a trained network")


def _unpickling_message(path: Path, error: Exception) -> str:
    if "GLOBAL" in str(error):  # torch's word for a function or class that a pickle names
        return (
            f"{path} is a pickle that needs code execution, which is refused: "
            "re-save it as torch.save(model.state_dict(), ...)"
        )
    return f"{path} is truncated or not a PyTorch checkpoint"
