"""The profile of a TensorRT engine, its layers traced back to the nodes of the ONNX file.

TensorRT reports each layer of an execution context to an ``IProfiler``, which all releases from 8.5
to 11 and TensorRT-RTX have, and waits for each of them meanwhile. Which ONNX nodes a layer holds is
in the metadata of the engine's inspector since 8.6, else in the layer's name, which joins them by
plus signs. This code has run against the recorded API of these releases and on no device yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.profiling import WARMUPS, Profile, profile_from_calls
from export.runners.engine_runner import EngineRunner
from export.runners.protocol import entered

if TYPE_CHECKING:
    import numpy as np

    from export.runners.cuda import Cuda, Launch, Tensors

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_POINTWISE = re.compile(r"PWN\(|\)$")  # wraps the names of elementwise layers
_COPY = "Reformatting CopyNode"  # begins the name of a copy, which goes on with its neighbour's
_UNKNOWN = "unknown"


def profile_engine(
    path: Path, images: np.ndarray, *, calls: int, device: str = "cuda"
) -> Profile | None:
    """Return the profile of an engine; see ``profile_network``.

    None if TensorRT reported no layer.

    Raises:
        CheckpointError: the engine or its sidecar is missing or damaged, or is no classifier.
        EnvironmentUnfitError: TensorRT or the GPU is not there or not the one it was built for.
        DataError: the images are not of the shape or type that the engine reads.
        ModelError: TensorRT cannot run it on them.
    """
    taken: list[list[tuple[str, float]]] = []
    runner = _ProfiledRunner(path, device=device)
    runner.listen = lambda name, ms: taken[-1].append((name, ms))
    with runner:
        for _ in range(WARMUPS + calls):
            taken.append([])
            runner.infer(images)
        described = layers_by_name(runner.inspect())
    counted = taken[WARMUPS:]
    if not counted[0]:
        return None
    return profile_from_calls(
        [(name, *described.get(name, (_UNKNOWN, _nodes_in_name(name)))) for name, _ in counted[0]],
        [[ms for _, ms in call] for call in counted],
    )


def layers_by_name(inspection: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return type and ONNX nodes of an engine's layers, from the inspector's JSON.

    Layers that are only a name, in an engine without details, are of an unknown type.
    """
    try:
        document = json.loads(inspection)
    except ValueError:
        return {}
    layers = document.get("Layers") if isinstance(document, dict) else None
    found = {}
    for layer in layers if isinstance(layers, list) else []:
        facts = layer if isinstance(layer, dict) else {"Name": layer}
        name, kind = str(facts.get("Name")), str(facts.get("LayerType", _UNKNOWN))
        nodes = tuple(dict.fromkeys(_ONNX_LAYER.findall(str(facts.get("Metadata", "")))))
        found[name] = kind, () if kind == "Reformat" else nodes or _nodes_in_name(name)
    return found


def _nodes_in_name(name: str) -> tuple[str, ...]:
    """Return the nodes that a layer's name joins; among them may be names of weights."""
    if name.startswith(_COPY):
        return ()
    parts = re.split(r" \+ |, ", name)
    return tuple(_POINTWISE.sub("", part).strip("() ") for part in parts)


class _ProfiledRunner(EngineRunner):
    """An engine that tells the time of each layer in every run."""

    listen: Callable[[str, float], None] | None = None
    _profiler: Any = None

    def inspect(self) -> str:
        """Return what TensorRT's inspector says of the engine, as JSON."""
        loaded = entered(self._engine, self.name)
        form = loaded.tensorrt.module.LayerInformationFormat.JSON
        return str(loaded.engine.create_engine_inspector().get_engine_information(form))

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._profiler = None  # after the contexts that report to it

    def _prepare(self, cuda: Cuda, tensors: Tensors) -> Launch:
        launch = super()._prepare(cuda, tensors)
        loaded = entered(self._engine, self.name)
        if self._profiler is None:
            self._profiler = _profiler(loaded.tensorrt.module, self._tell)
        loaded.contexts[loaded.profile_for(tensors)].profiler = self._profiler
        return launch

    def _tell(self, name: str, milliseconds: float) -> None:
        if self.listen is not None:
            self.listen(name, milliseconds)


def _profiler(module: Any, tell: Callable[[str, float], None]) -> Any:
    """Return an ``IProfiler`` of a TensorRT module."""

    class Profiler(module.IProfiler):
        def __init__(self) -> None:
            module.IProfiler.__init__(self)  # pybind11 wants it called by name

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            tell(layer_name, ms)

    return Profiler()
