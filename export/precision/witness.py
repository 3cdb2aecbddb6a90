"""Whether the ONNX Runtime installed here can be believed about FP16 beside INT8."""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def rounds_half_precision() -> bool:
    """Return whether ONNX Runtime rounds float16 to int8 on the CPU.

    Up to 1.29 it cuts the fraction off: 0.75 becomes 0, and not 1 as the specification of
    QuantizeLinear says. Such a runtime cannot prove a network that quantises float16.

    Raises:
        EnvironmentUnfitError: it is not installed.
    """
    import onnx
    from onnx import helper, numpy_helper

    from export.runners.onnx_runner import import_onnxruntime

    half, small = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "rounding",
        [helper.make_tensor_value_info("x", half, [1])],
        [helper.make_tensor_value_info("y", small, [1])],
        [
            numpy_helper.from_array(np.array(1, np.float16), "scale"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ],
    )
    opsets = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
    (rounded,) = session.run(None, {"x": np.array([0.75], np.float16)})
    return bool(rounded[0] == 1)
