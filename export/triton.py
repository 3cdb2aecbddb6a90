"""A model repository for Triton Inference Server, from ONNX files or engines.

    FOLDER/NAME/config.pbtxt   how the network is served (triton-inference-server/common,
                               protobuf/model_config.proto, in protobuf's text format)
    FOLDER/NAME/labels.txt     one class a line
    FOLDER/NAME/1/             model.onnx or model.plan, and the sidecar that it was made from

A version folder appears whole, under the next free number; what was written earlier is never
changed, but for the configuration, which all versions share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, ConfigError, OutputError, writing
from compress.files.atomic import staged, write_flushed
from export.onnx.check import INPUT, OUTPUT

if TYPE_CHECKING:
    from compress.config.targets import Target

SIDECAR = "sidecar.json"
"""The sidecar's name in a version folder; it also marks the folder as one of ours."""
LABELS = "labels.txt"
CONFIG = "config.pbtxt"
QUEUE_DELAY_US = 100
"""Longest that a request waits for others to share a batch with, in microseconds."""

_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
_CONTRACT = ("input_size", "num_classes", "classes")
_PARAMETERS = ("architecture", "target", "precision", "input_size", "mean", "std", "weights_sha256")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonModel:
    """One network to be served."""

    path: Path
    """An ONNX file, ``*.onnx``, or an engine."""
    sidecar: Mapping[str, Any] = field(repr=False)
    """What was written beside it, from ``read_sidecar`` or ``read_engine_sidecar``."""
    target: Target
    """What it was exported for; it says whether an ONNX file is served on a GPU."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Batch sizes that an ONNX file is served at, the largest being the limit; an engine has its
    own."""

    @property
    def backend(self) -> str:
        """Triton's name for the runtime."""
        return "onnxruntime" if self.path.suffix == ".onnx" else "tensorrt"

    @property
    def sha256(self) -> str:
        """Digest that the file must have."""
        return str(self.sidecar["onnx" if self.backend == "onnxruntime" else "engine"]["sha256"])


def model_name(architecture: str, network: str, precision: str) -> str:
    """Return the usual name of a network in a repository: ``resnet20_pruned_fp16``."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", f"{architecture}_{network}_{precision}").strip("_")


def write_model_repository(
    folder: Path,
    *,
    networks: Mapping[str, TritonModel],
    queue_delay_us: int = QUEUE_DELAY_US,
) -> dict[str, Path]:
    """Write networks into a model repository, each as the next version of its name.

    Args:
        folder: the repository; other models in it are left alone.
        networks: what is served, by the name that clients ask for.
        queue_delay_us: longest wait for requests to share a batch with, in microseconds.

    Returns:
        The folder of the version that was written, by name.

    Raises:
        ConfigError: a name that Triton or a file system would not take, an engine that Triton
            cannot load, or a name whose earlier versions read or answer something else.
        CheckpointError: a file is missing or is not the one that its sidecar describes.
        OutputError: the repository cannot be written, or a folder in it is not of this tool.
    """
    latest = {name: _check(folder, name, model) for name, model in networks.items()}
    written = {}
    for name, model in networks.items():
        version = latest[name] + 1
        text = config_text(name, model, queue_delay_us=queue_delay_us)
        written[name] = _write(folder / name, version, model, text)
    return written


def config_text(name: str, model: TritonModel, *, queue_delay_us: int = QUEUE_DELAY_US) -> str:
    """Return the configuration of one network in protobuf's text format."""
    sidecar = model.sidecar
    profiles = _profiles(model)
    largest = max(profile["max"] for profile in profiles)
    output = [*_pair("name", OUTPUT), "data_type: TYPE_FP32", f"dims: {_list([_classes(sidecar)])}"]
    if sidecar["classes"]:
        output += _pair("label_filename", LABELS)
    lines = [
        *_pair("name", name),
        *_pair("backend", model.backend),
        *_pair("default_model_filename", _FILES[model.backend]),
        f"max_batch_size: {largest}",
        *_block(
            "input",
            [
                *_pair("name", INPUT),
                "data_type: TYPE_FP32",
                f"dims: {_list(sidecar['input_size'])}",
            ],
        ),
        *_block("output", output),
        # The configuration is that of the newest version, so no other is served with it.
        *_block("version_policy", _block("latest", ["num_versions: 1"])),
        *_block("instance_group", _instances(model, len(profiles))),
        *_batching(profiles, largest, queue_delay_us),
    ]
    for key, value in {**_parameters(sidecar), "model_sha256": model.sha256}.items():
        value_lines = _block("value", _pair("string_value", value))
        lines += _block("parameters", [*_pair("key", f"compress.{key}"), *value_lines])
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return a string as protobuf's text format writes it, in ASCII but for letters of others."""
    named = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return '"' + "".join(named.get(letter) or _printed(letter) for letter in text) + '"'


def label_lines(classes: Iterable[str]) -> str:
    """Return class names one a line; a name that has line breaks gets spaces instead."""
    return "".join(" ".join(name.splitlines()) + "\n" for name in classes)


def _printed(letter: str) -> str:
    return letter if letter.isprintable() else "".join(f"\\{byte:03o}" for byte in letter.encode())


def _pair(key: str, value: str) -> list[str]:
    return [f"{key}: {quoted(value)}"]


def _block(key: str, lines: Iterable[str]) -> list[str]:
    return [f"{key} {{", *(f"  {line}" for line in lines), "}"]


def _list(numbers: Iterable[int]) -> str:
    return f"[ {', '.join(str(int(number)) for number in numbers)} ]"


def _classes(sidecar: Mapping[str, Any]) -> int:
    return int(sidecar["num_classes"])


def _profiles(model: TritonModel) -> list[dict[str, int]]:
    """Return the batch sizes that the file computes: least, usual and largest of each profile."""
    if model.backend == "tensorrt":
        shapes = model.sidecar["profiles"]  # (N, C, H, W), each under min, opt and max
        return [{key: shape[0] for key, shape in profile.items()} for profile in shapes]
    return [{"min": 1, "opt": size, "max": size} for size in sorted(set(model.batch_sizes))]


def _instances(model: TritonModel, profiles: int) -> list[str]:
    on_gpu = model.backend == "tensorrt" or model.target.onnxruntime[0] != "CPUExecutionProvider"
    lines = ["count: 1", f"kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'}"]
    if model.backend == "tensorrt" and profiles > 1:  # otherwise only the first would be used
        lines += [f"profile: {quoted(str(index))}" for index in range(profiles)]
    return lines


def _batching(profiles: list[dict[str, int]], largest: int, delay_us: int) -> list[str]:
    """Let Triton join requests, unless it could form a batch that no profile computes.

    A batch of a preferred size is sent at once and the others when the delay is over, so each size
    up to the largest can come up.
    """
    computed = {size for p in profiles for size in range(p["min"], p["max"] + 1)}
    if largest == 1 or computed != set(range(1, largest + 1)):
        return []
    preferred = sorted({profile["opt"] for profile in profiles} - {1})
    lines = [f"preferred_batch_size: {_list(preferred)}"] if preferred else []
    return _block("dynamic_batching", [*lines, f"max_queue_delay_microseconds: {delay_us}"])


def _parameters(sidecar: Mapping[str, Any]) -> dict[str, str]:
    found = {key: sidecar[key] for key in _PARAMETERS if sidecar.get(key) is not None}
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in found.items()}


def _check(repository: Path, name: str, model: TritonModel) -> int:
    """Refuse what must not be written, and return the newest version that is there; 0 for none."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a model: use letters, digits, '_', '-' and '.'")
    if model.sidecar.get("provider") == "tensorrt_rtx":
        raise ConfigError(
            f"Triton has no backend for the TensorRT-RTX engine {model.path}; give it the ONNX file"
        )
    folder = repository / name
    if not folder.exists():
        return 0
    versions = _versions(folder)
    if not versions:
        raise OutputError(f"{folder} is not a model of this tool; choose another folder or name")
    try:
        before = json.loads((folder / str(versions[-1]) / SIDECAR).read_text(encoding="utf-8"))
        changed = [key for key in _CONTRACT if before[key] != model.sidecar[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"version {versions[-1]} in {folder} is not of this tool; choose another folder or name"
        ) from error
    if changed:
        raise ConfigError(
            f"{folder} serves a network of another {', '.join(changed)}, and its clients count on "
            "that; choose another name"
        )
    return versions[-1]


def _versions(folder: Path) -> list[int]:
    """Return the version numbers in a model's folder, as Triton reads them."""
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror or error}") from error
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9]\d*", name))


def _write(folder: Path, version: int, model: TritonModel, config: str) -> Path:
    data = _read(model)
    place = folder / str(version)
    with (
        _new_folder(folder),
        staged(folder / CONFIG) as settings,
        staged(folder / LABELS) as labels,
        writing(place),
        _staged_folder(place) as temporary,
    ):
        write_flushed(temporary / _FILES[model.backend], data)
        document = json.dumps(dict(model.sidecar), indent=2) + "\n"
        write_flushed(temporary / SIDECAR, document.encode())
        write_flushed(settings, config.encode())
        write_flushed(labels, label_lines(model.sidecar["classes"]).encode())
    return place


def _read(model: TritonModel) -> bytes:
    try:
        data = model.path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {model.path}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != model.sha256:
        raise CheckpointError(f"{model.path} is not the file that its sidecar describes")
    return data


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a model's folder; if the block fails and it was not there before, it goes again."""
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _staged_folder(place: Path) -> Iterator[Path]:
    """Yield a hidden folder, which Triton takes for no version; renamed if the block succeeds."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
