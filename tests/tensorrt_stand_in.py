"""What the stand-in for TensorRT does behind its API; tensorrt_contract.py checks the API itself.

It keeps the rules of the real library that a caller can break: explicit batch in TensorRT 8, no
precision flags on a strongly typed network, FP16 only with its flag on a weakly typed one, shapes
within a profile, addresses set before execution. Its engine is the ONNX file in an envelope.
"""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

DTYPE_ALIASES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "bool": "BOOL",
}
_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_ONNX = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.BOOL: "BOOL",
}
_MAGIC = b"stand-in engine "
_CACHE = b"stand-in timing cache "
_IMPLICIT = (
    "In node -1 (importModel): INVALID_VALUE: Assertion failed: "
    "!_importer_ctx.network()->hasImplicitBatchDimension()"
)


def _say(state: Any, logger: Any, severity: str, text: str) -> None:
    logger.log(getattr(state.module.ILogger, severity), text)


class HostMemory(bytes):
    """Bytes that show nothing but what IHostMemory shows, and the buffer protocol."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        if name == "nbytes":
            return len(self)
        raise AttributeError(f"IHostMemory has no {name}")


class _Start:
    """What both Builder and Runtime need: a logger and a driver."""

    def __init__(self, state: Any, logger: Any) -> None:
        self._state, self.logger = state, logger
        if not state.behaviour.driver:
            _say(state, logger, "WARNING", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")


class Builder(_Start):
    """Makes networks, configurations and profiles, and builds."""

    def create_network(self, flags: int = 0) -> Any:
        return self._state.wrap("INetworkDefinition", Network(self._state, flags))

    def create_builder_config(self) -> Any:
        return self._state.wrap("IBuilderConfig", Config(self._state, self.logger))

    def create_optimization_profile(self) -> Any:
        return self._state.wrap("IOptimizationProfile", Profile())

    def build_serialized_network(self, network: Any, config: Any) -> HostMemory | None:
        from tensorrt_contract import target_of

        network, config = target_of(network), target_of(config)
        fault = self._state.behaviour.build_error or network.fault(config)
        if fault is None and not config.watched(self._state.behaviour.phases):
            fault = "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled (by user)"
        if fault is not None:
            _say(self._state, self.logger, "ERROR", fault)
            _say(self._state, self.logger, "ERROR", "[builder.cpp::build::1] Error Code 2: (no)")
            return None
        if self._state.has("BuilderFlag", "REQUIRE_USER_ALLOCATION"):
            fixed = config.has("REQUIRE_USER_ALLOCATION")
        else:
            fixed = None
        if config.cache is not None:
            config.cache.data = _CACHE + self._state.api["version"].encode() + b" timings"
        head = {
            "version": self._state.api["version"],
            "profiles": [profile.shapes for profile in config.profiles],
            "allocates": fixed is False,
        }
        return HostMemory(_MAGIC + json.dumps(head).encode() + b"\n" + network.data)


class Config:
    """IBuilderConfig."""

    def __init__(self, state: Any, logger: Any) -> None:
        self._state, self._logger = state, logger
        self.flags = 0
        self.cache: TimingCache | None = None
        self.profiles: list[Profile] = []
        self.profiling_verbosity = state.module.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None
        self.limits: dict[Any, int] = {}
        self.num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        return index < self.num_compute_capabilities

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << int(flag)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        from tensorrt_contract import target_of

        if self._state.behaviour.refuses_profiles:
            return -1
        self.profiles.append(target_of(profile))
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        data = bytes(serialized_timing_cache)
        if data and not data.startswith(_CACHE + self._state.api["version"].encode()):
            _say(self._state, self._logger, "ERROR", "Failed to deserialize timing cache.")
            return None if self._state.version < (10,) else self._cache(b"")
        return self._cache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        from tensorrt_contract import target_of

        foreign = self._state.behaviour.foreign_timings and target_of(cache).data
        if foreign and not ignore_mismatch:
            return False
        self.cache = target_of(cache)
        return True

    def get_timing_cache(self) -> Any:
        return None if self.cache is None else self._state.wrap("ITimingCache", self.cache)

    def _cache(self, data: bytes) -> Any:
        return self._state.wrap("ITimingCache", TimingCache(data))

    def has(self, name: str) -> bool:
        """Whether a builder flag exists and is set."""
        return self._state.has("BuilderFlag", name) and self.get_flag(
            self._state.module.BuilderFlag[name]
        )

    def watched(self, phases: tuple[tuple[str, int], ...]) -> bool:
        """Tell the monitor of every step; False when it cancels."""
        if self.progress_monitor is None or not phases:
            return True
        monitor, (name, steps) = self.progress_monitor, phases[0]
        monitor.phase_start(name, None, steps)
        going = self.watched(phases[1:])  # within the first step
        going = going and all(monitor.step_complete(name, step) for step in range(steps))
        monitor.phase_finish(name)
        return going


class TimingCache:
    """ITimingCache."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> HostMemory:
        return HostMemory(self.data)


class Profile:
    """IOptimizationProfile."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> list[Any]:
        return [tuple(shape) for shape in self.shapes[input]]


class Network:
    """INetworkDefinition, filled by the parser."""

    def __init__(self, state: Any, flags: int) -> None:
        self._state, self.flags = state, flags
        self.data = b""
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.num_layers = 0

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def created_with(self, name: str) -> bool:
        """Whether a creation flag exists and was given."""
        enum = self._state.module.NetworkDefinitionCreationFlag
        return name in enum.__members__ and bool(self.flags >> int(enum[name]) & 1)

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return self._state.version < (10,) and not self.created_with("EXPLICIT_BATCH")

    @property
    def typed(self) -> bool:
        """Since 11.0, and in RTX, no network is anything else."""
        return self.created_with("STRONGLY_TYPED") or not self._state.has("BuilderFlag", "FP16")

    def fill(self, data: bytes) -> None:
        self.data = data
        model = onnx.load_model_from_string(data)
        self.num_layers = len(model.graph.node)
        self.inputs = [self._tensor(value) for value in model.graph.input]
        self.outputs = [self._tensor(value) for value in model.graph.output]

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def fault(self, config: Config) -> str | None:
        """Return why a configuration does not fit this network."""
        model = onnx.load_model_from_string(self.data)
        held = {tensor.data_type for tensor in model.graph.initializer}
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        if self.typed and (config.has("FP16") or config.has("INT8")):
            return "Error Code 3: API Usage Error (precision flags on a strongly typed network)"
        if not self.typed and onnx.TensorProto.FLOAT16 in held and not config.has("FP16"):
            return "Error Code 9: (FP16 tensors without the FP16 builder flag)"
        if not self.typed and quantized and not config.has("INT8"):
            return "Error Code 4: (explicit quantization requires the INT8 builder flag)"
        for tensor in self.inputs:
            if -1 in tuple(tensor.shape) and not config.profiles:
                return f"Error Code 4: Internal Error (Network has dynamic input {tensor.name})"
            for profile in config.profiles:
                low, usual, high = profile.shapes[tensor.name]
                if not all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
                    return f"Error Code 4: Internal Error (bad profile for {tensor.name})"
        return None

    def _tensor(self, value: Any) -> Any:
        tensor = value.type.tensor_type
        dtype = self._state.module.DataType[_ONNX[tensor.elem_type]]
        shape = tuple(size.dim_value or -1 for size in tensor.shape.dim)
        return self._state.wrap(
            "ITensor", SimpleNamespace(name=value.name, shape=shape, dtype=dtype)
        )


class OnnxParser:
    """OnnxParser."""

    def __init__(self, state: Any, network: Any, logger: Any) -> None:
        from tensorrt_contract import target_of

        self._state, self._network, self._logger = state, target_of(network), logger
        self._errors: list[str] = []

    num_errors = property(lambda self: len(self._errors))

    def parse_from_file(self, model: str) -> bool:
        from pathlib import Path

        try:
            data = Path(model).read_bytes()
            onnx.load_model_from_string(data)
            self._errors = list(self._state.behaviour.parse_errors)
        except Exception as error:
            self._errors = [f"Failed to parse the ONNX model: {error}"]
        if self._network.has_implicit_batch_dimension:
            self._errors = [_IMPLICIT]
        if self._errors:
            for text in self._errors:
                _say(self._state, self._logger, "ERROR", text)
            return False
        self._network.fill(data)
        return True

    def get_error(self, index: int) -> Any:
        return self._state.wrap("ParserError", ParserError(self._errors[index]))


class ParserError:
    """ParserError."""

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def __str__(self) -> str:
        return f"In node 0 (importModel): {self._text}"


class Runtime(_Start):
    """Loads engines that a stand-in of the same release built."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        head, _, model = bytes(serialized_engine).removeprefix(_MAGIC).partition(b"\n")
        fault = self._state.behaviour.deserialize_error
        if fault is None and not bytes(serialized_engine).startswith(_MAGIC):
            fault = "IRuntime::deserializeCudaEngine: Error Code 1: (Magic tag does not match)"
        if fault is None and json.loads(head)["version"] != self._state.api["version"]:
            fault = "IRuntime::deserializeCudaEngine: Error Code 6: (Version tag does not match)"
        if fault is not None:
            _say(self._state, self.logger, "ERROR", fault)
            return None
        engine = Engine(self._state, self.logger, json.loads(head), model)
        return self._state.wrap("ICudaEngine", engine)


class Engine:
    """ICudaEngine."""

    def __init__(self, state: Any, logger: Any, head: dict[str, Any], model: bytes) -> None:
        self._state, self.logger = state, logger
        self.profiles = head["profiles"]
        self.allocates = head["allocates"]
        """Whether a run may allocate memory, which no CUDA graph holds."""
        self.network = Network(state, 0)
        self.network.fill(model)
        self.num_layers = max(1, self.network.num_layers // 2)
        self.device_memory_size = self.device_memory_size_v2 = 1 << 20
        self._session: Any = None

    num_optimization_profiles = property(lambda self: len(self.profiles))
    num_io_tensors = property(lambda self: len(self.network.inputs) + len(self.network.outputs))

    def get_tensor_name(self, index: int) -> str:
        return [*self.network.inputs, *self.network.outputs][index].name

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in [tensor.name for tensor in self.network.inputs]
        return self._state.module.TensorIOMode["INPUT" if is_input else "OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensor(name).shape

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensor(name).dtype

    def get_tensor_location(self, name: str) -> Any:
        return self._state.module.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def create_runtime_config(self) -> Any:
        return self._state.wrap("IRuntimeConfig", RuntimeConfig(self._state))

    def create_execution_context(self, *how: Any) -> Any:
        from tensorrt_contract import target_of

        config = target_of(how[0]) if how else RuntimeConfig(self._state)
        return self._state.wrap("IExecutionContext", Context(self._state, self, config))

    def create_engine_inspector(self) -> Any:
        return self._state.wrap("EngineInspector", Inspector(self._state, self))

    def tensor(self, name: str) -> Any:
        """Return an input or output by name."""
        tensors = [*self.network.inputs, *self.network.outputs]
        return next(tensor for tensor in tensors if tensor.name == name)

    def compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the ONNX file, or whatever the test wants instead."""
        if self._state.behaviour.execute is not None:
            return self._state.behaviour.execute(inputs)
        import onnxruntime

        if self._session is None:
            self._session = onnxruntime.InferenceSession(
                self.network.data, providers=["CPUExecutionProvider"]
            )
        names = [tensor.name for tensor in self.network.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))


class Inspector:
    """EngineInspector."""

    def __init__(self, state: Any, engine: Engine) -> None:
        self._state, self._engine = state, engine

    def get_engine_information(self, format: Any) -> str:
        if self._state.behaviour.inspection is not None:
            return self._state.behaviour.inspection
        ends = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        layers = [f"layer{index}" for index in range(self._engine.num_layers)]
        key = "I/O Tensors" if self._state.version >= (11,) else "Bindings"
        return json.dumps({"Layers": layers, key: ends})


class RuntimeConfig:
    """IRuntimeConfig, as a context finds it when nobody has set anything."""

    def __init__(self, state: Any) -> None:
        def usual(kind: str, word: str) -> Any:
            return vars(state.module)[kind][word] if state.has(kind) else None

        self.dynamic_shapes_kernel_specialization_strategy = usual(
            "DynamicShapesKernelSpecializationStrategy", "LAZY"
        )
        self.cuda_graph_strategy = usual("CudaGraphStrategy", "DISABLED")
        self.allocation = usual("ExecutionContextAllocationStrategy", "STATIC")

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def says(self, name: str, word: str) -> bool:
        """Whether a strategy exists and is this one."""
        return getattr(getattr(self, name), "name", None) == word


class Context:
    """IExecutionContext: it computes at once, on memory that the CPU can read."""

    def __init__(self, state: Any, engine: Engine, config: RuntimeConfig) -> None:
        self._state, self._engine, self._config = state, engine, config
        self._scratch: tuple[int, int] | None = None
        self.active_optimization_profile = 0
        self.profiler: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    engine = property(lambda self: self._state.wrap("ICudaEngine", self._engine))

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {profile_index}")
        self.active_optimization_profile = profile_index
        self._shapes.clear()  # as the real one does
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine.profiles[self.active_optimization_profile][name]
        within = len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )
        if not within:
            return self._refuse(f"{name} {tuple(shape)} is outside of [{low}, {high}]")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._engine.get_tensor_shape(name))
        batch = next((given[0] for given in self._shapes.values()), -1)
        return self._shapes.get(name, tuple(batch if size == -1 else size for size in shape))

    def infer_shapes(self) -> list[str]:
        names = [tensor.name for tensor in self._engine.network.inputs]
        return [name for name in names if -1 in self.get_tensor_shape(name)]

    all_binding_shapes_specified = property(lambda self: not self.infer_shapes())

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        lazy = self._config.says("dynamic_shapes_kernel_specialization_strategy", "LAZY")
        return not lazy and not self._engine.allocates

    def execute_async_v3(self, stream_handle: int) -> bool:
        network = self._engine.network
        if self._config.says("allocation", "USER_MANAGED"):
            memory, size = self._scratch or (0, 0)
            if not memory or size < self._engine.device_memory_size_v2:
                return self._refuse("no device memory was set")
        if self.infer_shapes():
            return self._refuse("not all shapes are specified")
        tensors = [*network.inputs, *network.outputs]
        missing = [tensor.name for tensor in tensors if not self._addresses.get(tensor.name)]
        if missing:
            return self._refuse(f"Address is not set for {', '.join(missing)}")
        given = {tensor.name: self._array(tensor).copy() for tensor in network.inputs}
        for name, values in self._engine.compute(given).items():
            array = self._array(self._engine.tensor(name))
            array[...] = np.asarray(values).astype(array.dtype)
        if self.profiler is not None:
            for name, ms in self.layer_times():
                self.profiler.report_layer_time(name, ms)
        return True

    def layer_times(self) -> list[tuple[str, float]]:
        """Return what a profiler hears of one run; tests replace it."""
        return [(f"layer{index}", 0.5) for index in range(self._engine.num_layers)]

    def _array(self, tensor: Any) -> np.ndarray:
        """Look at the memory of a tensor as it was addressed."""
        shape, dtype = self.get_tensor_shape(tensor.name), np.dtype(_NUMPY[tensor.dtype.name])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[tensor.name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def _refuse(self, text: str) -> bool:
        _say(
            self._state, self._engine.logger, "ERROR", f"IExecutionContext: Error Code 3: ({text})"
        )
        return False
