"""What a file is that is no file of weights, by its first bytes and its name, so that it is said.

Nothing of it is parsed but the list of what lies in a zip archive.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from compress.errors import CheckpointError

SAVE = "save its state dict with torch.save(model.state_dict(), ...)"
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes them: load it there, and {SAVE}"),
    (b"\x1f\x8b", "packed with gzip: unpack it"),
    (b"BZh", "packed with bzip2: unpack it"),
    (b"\xfd7zXZ\x00", "packed with xz: unpack it"),
    (b"(\xb5/\xfd", "packed with zstd: unpack it"),
    (b"\x93NUMPY", f"a NumPy array: load it into the network, and {SAVE}"),
    (b"GGUF", f"a GGUF file: load it where it belongs, and {SAVE}"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the file: fetch it with git lfs pull",
    ),
    (b"<!DOCTYPE", "a web page and not the file behind it: download it again"),
    (b"<!doctype", "a web page and not the file behind it: download it again"),
    (b"<html", "a web page and not the file behind it: download it again"),
)
_TFLITE = b"TFL3"  # bytes 4 to 8
_TF_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the last bytes of a TensorFlow checkpoint's index
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12|\x3a|\x42)")  # ir_version, then a name, graph or opset
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(safetensors|bin|pth|pt)$")
_TENSORFLOW = f"of TensorFlow: load it there, and {SAVE}"
_ZIPPED = (
    (re.compile(r"(^|/)model\.weights\.h5$"), f"a Keras archive: load it there, and {SAVE}"),
    (
        re.compile(r"(^|/)code/.*\.py$|(^|/)constants\.pkl$"),
        "a TorchScript archive, which holds a program: load it with torch.jit.load, and save its "
        "state_dict() with torch.save",
    ),
    (
        re.compile(r"(^|/)(serialized_exported_program\.json|archive_format)$"),
        "a program of torch.export: load it with torch.export.load, and save its state_dict with "
        "torch.save",
    ),
    (re.compile(r"^[^/]+\.npy$"), f"a NumPy archive: load it into the network, and {SAVE}"),
)


def require_weights(path: Path) -> None:
    """Refuse what is no file of weights by what it is.

    Raises:
        CheckpointError: it is absent, empty, a folder, or of another kind.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is {_folder(path)}")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        kind = _named(path) or _begins(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}")


def shards_of(path: Path) -> int | None:
    """Return of how many files one is a part, by its name; None for a whole one."""
    found = _SHARD.search(path.name)
    return int(found[1]) if found and int(found[1]) > 1 else None


def _folder(path: Path) -> str:
    if (path / "saved_model.pb").exists():
        return f"a SavedModel {_TENSORFLOW}"
    if (path / "config.toml").exists():
        return "a run directory: give the file of weights in it, such as dense.safetensors"
    return "a folder and not a file of weights"


def _named(path: Path) -> str | None:
    """Return what a file is by its name alone."""
    if path.name.endswith(".index.json"):
        return "the index of a checkpoint in several files: load it where it belongs, and save one"
    parts = shards_of(path)
    if parts:
        return (
            f"one of {parts} files that are a checkpoint together: load them where they belong, "
            "and save one file"
        )
    return None


def _begins(path: Path) -> str | None:
    """Return what a file is by its bytes; None for what may be weights."""
    with path.open("rb") as stream:
        head = stream.read(64)
        stream.seek(max(0, path.stat().st_size - 8))
        tail = stream.read(8)
    if not head:
        return "empty: copy or download it again"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[4:8] == _TFLITE:
        return f"a file of TensorFlow Lite {_TENSORFLOW}"
    if tail == _TF_TABLE or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        return f"part of a checkpoint {_TENSORFLOW}"
    if _ONNX.match(head):
        return "an ONNX file, which holds a graph: give the weights that it was exported from"
    if path.suffix == ".pb":
        return f"a graph {_TENSORFLOW}"
    if path.suffix == ".safetensors":
        zipped = head.startswith(b"PK\x03\x04")
        return "a zip archive, as torch.save writes them: name it *.pth" if zipped else None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "a safetensors file: name it *.safetensors"
    return _zipped(path) if head.startswith(b"PK\x03\x04") else None


def _zipped(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive can fail in any way, and is told so by its reader
        return None
    for pattern, kind in _ZIPPED:
        if any(map(pattern.search, names)):
            return kind
    return None
