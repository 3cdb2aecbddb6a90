from __future__ import annotations

import ast
import errno
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import export_classifier
from torch import nn

from compress.config.targets import load_target
from compress.errors import CheckpointError, ConfigError, OutputError
from export import triton
from export.engines.network import Shapes
from export.runners import OnnxRunner
from export.triton import (
    TritonModel,
    config_text,
    label_lines,
    model_name,
    quoted,
    write_model_repository,
)

NETWORK: dict[str, Any] = {
    "architecture": "resnet20",
    "target": "v100",
    "precision": "fp16",
    "num_classes": 3,
    "classes": ["cat", 'a "dog"', "line\nbreak \\ \u00e9"],
    "input_size": [3, 32, 48],
    "mean": [0.5, 0.25, 0.125],
    "std": [1.0, 2.0, 4.0],
    "weights_sha256": "ab" * 32,
}
ONE = [{"min": 1, "opt": 8, "max": 32}]


def triton_messages() -> Any:
    """Return the class ModelConfig of NVIDIA's client, from its published schema.

    The schema is read out of the generated module instead of importing it, which would load grpc
    and refuse other releases of protobuf.
    """
    path = metadata.distribution("tritonclient").locate_file(
        "tritonclient/grpc/model_config_pb2.py"
    )
    tree = ast.parse(Path(str(path)).read_text())
    (schema,) = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "AddSerializedFile"
        and isinstance(node.args[0], ast.Constant)
    ]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString(schema))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


ModelConfig = triton_messages()


def parsed(text: str) -> Any:
    return text_format.Parse(text, ModelConfig())


def read_config(folder: Path) -> Any:
    return parsed((folder / "config.pbtxt").read_text(encoding="utf-8"))


def kind(group: Any) -> str:
    return str(group.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[group.kind].name)


def onnx_model(folder: Path, data: bytes = b"an ONNX file", **changes: Any) -> TritonModel:
    path = folder / "pruned.fp16.onnx"
    path.write_bytes(data)
    facts = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
    target = load_target(changes.pop("serve_on", "v100"))
    sizes = changes.pop("batch_sizes", (1, 8))
    return TritonModel(path, {**NETWORK, "onnx": facts, **changes}, target, sizes)


def engine_model(folder: Path, profiles: list[dict[str, int]], **changes: Any) -> TritonModel:
    path = folder / "pruned.engine"
    path.write_bytes(b"an engine")
    facts = {"file": path.name, "sha256": hashlib.sha256(b"an engine").hexdigest()}
    shapes = [Shapes(**{k: (n, 3, 32, 48) for k, n in profile.items()}) for profile in profiles]
    sidecar = {
        **NETWORK,
        "engine": facts,
        "provider": "tensorrt",
        "profiles": [shape.to_dict() for shape in shapes],
        **changes,
    }
    return TritonModel(path, sidecar, load_target("v100"))


def test_an_onnx_file_is_served_as_its_sidecar_says(tmp_path: Path) -> None:
    model = onnx_model(tmp_path, batch_sizes=(1, 4, 16))
    written = write_model_repository(
        tmp_path / "repository", networks={"net": model}, queue_delay_us=250
    )
    folder = tmp_path / "repository" / "net"
    assert written == {"net": folder / "1"}
    config = read_config(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("net", "onnxruntime", 16)
    assert config.default_model_filename == "model.onnx"
    assert (folder / "1" / "model.onnx").read_bytes() == b"an ONNX file"
    assert json.loads((folder / "1" / "sidecar.json").read_text()) == model.sidecar
    (image,), (logits,) = config.input, config.output
    types = image.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert (image.name, list(image.dims)) == ("input", [3, 32, 48])
    assert (logits.name, list(logits.dims)) == ("logits", [3])
    assert image.data_type == logits.data_type == types["TYPE_FP32"].number
    assert logits.label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = config.instance_group
    assert (kind(group), group.count, list(group.profile)) == ("KIND_GPU", 1, [])
    assert config.version_policy.latest.num_versions == 1
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == {
        "compress.architecture": "resnet20",
        "compress.target": "v100",
        "compress.precision": "fp16",
        "compress.input_size": "[3, 32, 48]",
        "compress.mean": "[0.5, 0.25, 0.125]",
        "compress.std": "[1.0, 2.0, 4.0]",
        "compress.weights_sha256": "ab" * 32,
        "compress.model_sha256": hashlib.sha256(b"an ONNX file").hexdigest(),
    }


def test_every_class_has_its_line(tmp_path: Path) -> None:
    write_model_repository(tmp_path, networks={"net": onnx_model(tmp_path)})
    lines = (tmp_path / "net" / "labels.txt").read_text(encoding="utf-8").split("\n")
    assert lines == ["cat", 'a "dog"', "line break \\ \u00e9", ""]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_no_class_name_moves_the_next_one(classes: list[str]) -> None:
    text = label_lines(classes)
    assert text.count("\n") == len(classes)
    assert "\r" not in text


def test_a_cpu_target_is_served_on_the_cpu(tmp_path: Path) -> None:
    config = parsed(config_text("net", onnx_model(tmp_path, serve_on="cpu")))
    assert kind(config.instance_group[0]) == "KIND_CPU"


def test_classes_without_names_have_no_label_file(tmp_path: Path) -> None:
    config = parsed(config_text("net", onnx_model(tmp_path, classes=[])))
    assert config.output[0].label_filename == ""


def test_batches_of_one_are_not_joined(tmp_path: Path) -> None:
    config = parsed(config_text("net", onnx_model(tmp_path, batch_sizes=(1,))))
    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("profiles", "largest", "preferred", "names"),
    [
        (ONE, 32, [8], []),
        ([{"min": 1, "opt": 1, "max": 4}], 4, [], []),
        ([{"min": 1, "opt": 1, "max": 1}, {"min": 2, "opt": 8, "max": 8}], 8, [8], ["0", "1"]),
        # A gap: three requests of one image would form a batch that no profile computes.
        ([{"min": 1, "opt": 1, "max": 1}, {"min": 8, "opt": 8, "max": 8}], 8, None, ["0", "1"]),
        ([{"min": 4, "opt": 4, "max": 8}], 8, None, []),
        ([{"min": 1, "opt": 1, "max": 1}], 1, None, []),
    ],
)
def test_an_engine_is_served_by_its_profiles(
    tmp_path: Path,
    profiles: list[dict[str, int]],
    largest: int,
    preferred: list[int] | None,
    names: list[str],
) -> None:
    model = engine_model(tmp_path, profiles)
    write_model_repository(tmp_path / "repository", networks={"net": model})
    config = read_config(tmp_path / "repository" / "net")
    assert (config.backend, config.max_batch_size) == ("tensorrt", largest)
    assert config.default_model_filename == "model.plan"
    assert (tmp_path / "repository" / "net" / "1" / "model.plan").read_bytes() == b"an engine"
    assert kind(config.instance_group[0]) == "KIND_GPU"
    assert list(config.instance_group[0].profile) == names
    if preferred is None:
        assert not config.HasField("dynamic_batching")
    else:
        assert config.HasField("dynamic_batching")
        assert list(config.dynamic_batching.preferred_batch_size) == preferred


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_text_format(text: str) -> None:
    assert parsed(f"name: {quoted(text)}").name == text


def test_a_newer_export_is_the_next_version_and_the_older_stays(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for number, data in enumerate((b"first", b"second", b"third"), start=1):
        model = onnx_model(tmp_path, data, weights_sha256=str(number) * 64)
        written = write_model_repository(repository, networks={"net": model})
        assert written["net"].name == str(number)
    folder = repository / "net"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        *("1", "2", "3"),
        *("config.pbtxt", "labels.txt"),
    ]
    assert (folder / "1" / "model.onnx").read_bytes() == b"first"
    parameters = read_config(folder).parameters
    assert parameters["compress.weights_sha256"].string_value == "3" * 64
    (folder / "11").mkdir()
    (folder / "11" / "sidecar.json").write_text(json.dumps(NETWORK))
    written = write_model_repository(repository, networks={"net": onnx_model(tmp_path)})
    assert written["net"].name == "12"  # the largest number, not the last of the alphabet


def test_other_models_of_the_repository_are_left_alone(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "1" / "model.plan").write_bytes(b"theirs")
    model = onnx_model(tmp_path)
    written = write_model_repository(repository, networks={"a": model, "b": model})
    assert set(written) == {"a", "b"}
    assert sorted(entry.name for entry in repository.iterdir()) == ["a", "b", "other"]


@pytest.mark.parametrize("content", [None, "{}", "not JSON", "[]"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, content: str | None) -> None:
    theirs = tmp_path / "repository" / "net" / "1"
    theirs.mkdir(parents=True)
    if content is not None:
        (theirs / "sidecar.json").write_text(content)
    model = onnx_model(tmp_path)
    with pytest.raises(OutputError, match="not of this tool; choose another"):
        write_model_repository(tmp_path / "repository", networks={"new": model, "net": model})
    assert not (tmp_path / "repository" / "new").exists()  # all are checked before one is written
    assert not (tmp_path / "repository" / "net" / "config.pbtxt").exists()


def test_a_folder_without_versions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repository" / "net" / "01").mkdir(parents=True)  # Triton ignores such a name
    with pytest.raises(OutputError, match="not a model of this tool"):
        write_model_repository(tmp_path / "repository", networks={"net": onnx_model(tmp_path)})


@pytest.mark.parametrize(
    "change", [{"input_size": [1, 32, 48]}, {"classes": ["a", "b", "c"]}, {"num_classes": 4}]
)
def test_a_name_keeps_what_its_clients_count_on(tmp_path: Path, change: dict[str, Any]) -> None:
    repository = tmp_path / "repository"
    write_model_repository(repository, networks={"net": onnx_model(tmp_path)})
    before = (repository / "net" / "config.pbtxt").read_bytes()
    with pytest.raises(ConfigError, match=f"another {next(iter(change))}.*choose another name"):
        write_model_repository(repository, networks={"net": onnx_model(tmp_path, **change)})
    assert (repository / "net" / "config.pbtxt").read_bytes() == before
    assert not (repository / "net" / "2").exists()


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "n\u00e9"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a model"):
        write_model_repository(tmp_path / "r", networks={name: onnx_model(tmp_path)})


def test_names_are_made_from_what_is_served() -> None:
    assert model_name("resnet20", "pruned", "fp16") == "resnet20_pruned_fp16"
    assert model_name("mine.nets:Net-2", "dense", "fp32") == "mine_nets_Net_2_dense_fp32"


def test_a_file_that_its_sidecar_does_not_describe_is_refused(tmp_path: Path) -> None:
    model = onnx_model(tmp_path)
    model.path.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="not the file that its sidecar describes"):
        write_model_repository(tmp_path / "r", networks={"net": model})
    model.path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        write_model_repository(tmp_path / "r", networks={"net": model})
    assert not (tmp_path / "r").exists()


def test_an_engine_that_triton_cannot_load_is_refused(tmp_path: Path) -> None:
    model = engine_model(tmp_path, ONE, provider="tensorrt_rtx")
    with pytest.raises(ConfigError, match=r"no backend for the TensorRT-RTX engine.*ONNX file"):
        write_model_repository(tmp_path / "r", networks={"net": model})


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    repository = tmp_path / "repository"
    write_model_repository(repository, networks={"net": onnx_model(tmp_path, b"first")})
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    calls = []
    real = triton.write_flushed

    def write(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(triton, "write_flushed", write)
    with pytest.raises(OutputError, match="the disk is full"):
        write_model_repository(repository, networks={"net": onnx_model(tmp_path, b"second")})
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    assert not list(repository.rglob(".*"))
    calls.clear()
    with pytest.raises(OutputError, match="the disk is full"):
        write_model_repository(repository, networks={"new": onnx_model(tmp_path, b"second")})
    assert [entry.name for entry in repository.iterdir()] == ["net"]


def test_a_version_that_appeared_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    write_model_repository(repository, networks={"net": onnx_model(tmp_path)})
    (repository / "net" / "2").mkdir()
    (repository / "net" / "2" / "model.onnx").write_bytes(b"theirs")
    monkeypatch.setattr(triton, "_versions", lambda folder: [1])
    with pytest.raises(OutputError, match="cannot write"):
        write_model_repository(repository, networks={"net": onnx_model(tmp_path)})
    assert (repository / "net" / "2" / "model.onnx").read_bytes() == b"theirs"


def test_the_configuration_names_the_ends_and_shapes_of_a_real_export(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    path = tmp_path / "net.onnx"
    export_classifier(network, path, target=load_target("cpu"), input_size=(3, 32, 48), metadata={})
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    model = TritonModel(path, {**NETWORK, "onnx": facts}, load_target("cpu"), (1, 2))
    version = write_model_repository(tmp_path / "r", networks={"net": model})["net"]
    config = read_config(version.parent)
    graph = onnx.load(version / config.default_model_filename).graph
    assert [value.name for value in graph.input] == [value.name for value in config.input]
    assert [value.name for value in graph.output] == [value.name for value in config.output]
    shape = (config.max_batch_size, *config.input[0].dims)
    with OnnxRunner(version / config.default_model_filename) as runner:
        logits = runner.infer(np.zeros(shape, np.float32))
    assert logits.shape == (config.max_batch_size, *config.output[0].dims)
