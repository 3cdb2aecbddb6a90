from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.config.targets import Target, load_target
from compress.errors import CheckpointError, ModelError
from export.onnx.check import inspect_onnx

OWN = Target(
    name="own",
    description="reads what is newer",
    opset=21,
    ir_version=10,
    onnxruntime=("CPUExecutionProvider",),
    channel_multiple={"fp32": 1},
    precisions=("fp32",),
)


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def build(
    nodes: list[onnx.NodeProto],
    *,
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    source: onnx.ValueInfoProto | None = None,
    result: onnx.ValueInfoProto | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "network",
        [source or value("input", "batch", 3, 8, 8)],
        [result or value("logits", "batch", 3)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def mean_by_attribute() -> onnx.NodeProto:
    return helper.make_node("ReduceMean", ["input"], ["logits"], "mean", axes=[2, 3], keepdims=0)


def mean_by_input() -> onnx.ModelProto:
    node = helper.make_node("ReduceMean", ["input", "axes"], ["logits"], "pool", keepdims=0)
    return build([node], weights={"axes": np.array([2, 3])}, opset=18)


def with_norm(*, shared: bool) -> onnx.ModelProto:
    ones = np.ones(3, np.float32)
    norm = helper.make_node("BatchNormalization", ["conv", *"gbmv"], ["normed"], "bn1")
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["conv"], "conv1"),
        norm,
        helper.make_node("Add", ["normed", "conv" if shared else "normed"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    weights = {"w": np.ones((3, 3, 1, 1), np.float32), **dict.fromkeys("gbmv", ones)}
    return build(nodes, weights=weights)


def second_file() -> onnx.ModelProto:
    model = build([helper.make_node("Conv", ["input", "w"], ["logits"], "conv1")])
    tensor = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, "model.onnx.data")
    tensor.ClearField("raw_data")
    model.graph.initializer.append(tensor)
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_facts_are_those_of_the_file(tmp_path: Path) -> None:
    path = saved(build([mean_by_attribute()]), tmp_path)
    facts = inspect_onnx(path, target=load_target("v100"))
    assert (facts.opset, facts.ir_version, facts.nodes) == (17, 8, {"ReduceMean": 1})
    assert facts.bytes == path.stat().st_size
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_two_input_mean_passes_only_where_it_is_understood(tmp_path: Path) -> None:
    path = saved(mean_by_input(), tmp_path)
    assert inspect_onnx(path, target=OWN).opset == 18
    strict = OWN.model_copy(update={"two_input_reduce_mean": False})
    with pytest.raises(ModelError, match=r"target own: node pool \(ReduceMean\) reads its axes"):
        inspect_onnx(path, target=strict)


def test_a_two_input_mean_in_a_branch_is_found(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["input", "axes"], ["inner"], "pool", keepdims=0)
    branch = helper.make_graph([mean], "branch", [], [value("inner", "batch", 3)])
    choice = helper.make_node("If", ["yes"], ["logits"], then_branch=branch, else_branch=branch)
    weights = {"axes": np.array([2, 3]), "yes": np.array(True)}
    path = saved(build([choice], weights=weights, opset=18), tmp_path)
    strict = OWN.model_copy(update={"two_input_reduce_mean": False})
    with pytest.raises(ModelError, match="pool"):
        inspect_onnx(path, target=strict)


def test_a_norm_that_cannot_be_folded_may_stay(tmp_path: Path) -> None:
    path = saved(with_norm(shared=True), tmp_path)
    facts = inspect_onnx(path, target=load_target("v100"))
    assert facts.nodes["BatchNormalization"] == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mean_by_input, "it needs opset 18 and the target reads up to 17"),
        (lambda: build([mean_by_attribute()], ir_version=10), "it has IR 10 .* up to 8"),
        (lambda: with_norm(shared=False), r"node bn1 \(BatchNormalization\) was not folded"),
        (second_file, "weight 'w' is kept in a second file"),
        (lambda: build([helper.make_node("Relu", ["lost"], ["logits"])]), "the onnx checker says"),
        (
            lambda: build([helper.make_node("Swish", ["input"], ["logits"], "s", domain="mine")]),
            r"node s \(Swish\) is not a standard operator but of 'mine'",
        ),
        (
            lambda: build([mean_by_attribute()], source=value("input", 2, 3, 8, 8)),
            "the batch dimension of input 'input' is fixed",
        ),
        (
            lambda: build(
                [helper.make_node("Relu", ["input"], ["logits"])],
                result=value("logits", "batch", 3, 8, 8),
            ),
            "output 'logits' has 4 dimensions instead of 2",
        ),
        (
            lambda: build(
                [
                    mean_by_attribute(),
                    helper.make_node("Relu", ["logits"], ["more"]),
                ],
                result=value("more", "batch", 3),
            ),
            "the one output 'logits' and has more",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], words: str
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        inspect_onnx(saved(make(), tmp_path), target=load_target("v100"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no protobuf at all"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.onnx"):
        inspect_onnx(path, target=load_target("cpu"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        inspect_onnx(tmp_path / "model.onnx", target=load_target("cpu"))
