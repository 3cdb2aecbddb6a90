"""What TensorRT made of a network, from the JSON of its EngineInspector.

The shape of that JSON is described in NVIDIA's developer guide, "Engine Inspector". It differs
between releases: up to 10 the ends of the network are ``Bindings`` and a tensor has one
``Format/Datatype``; since 11 they are ``I/O Tensors``, ``Format`` and ``Datatype``. A layer is only
its name where the engine was built with less than detailed verbosity.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

_ONNX_LAYER = "[ONNX Layer:"
_UNKNOWN = "unknown"


def summarise_inspection(text: str) -> dict[str, Any] | None:
    """Summarise the inspector's JSON; None where it is not the JSON that is known.

    Returns:
        ``layers``: how many layers the engine has; ``types``: how many of each type; ``fused``: how
        many layers hold so many layers of the ONNX file (``{"1": 3, "2": 12}``); ``outputs``: how
        many outputs of layers have each memory format and data type, in TensorRT's words;
        ``io``: names of the network's inputs and outputs.
    """
    try:
        document = json.loads(text)
    except ValueError:
        return None
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        return None
    return {
        "layers": len(layers),
        "types": _sorted(Counter(map(_type, layers))),
        "fused": {
            str(held): number for held, number in sorted(Counter(map(_held, layers)).items())
        },
        "outputs": _sorted(Counter(word for layer in layers for word in _outputs(layer))),
        "io": [_name(end) for end in document.get("I/O Tensors", document.get("Bindings", []))],
    }


def _type(layer: Any) -> str:
    return str(layer.get("LayerType", _UNKNOWN)) if isinstance(layer, dict) else _UNKNOWN


def _held(layer: Any) -> int:
    """Count the ONNX layers in a layer: from its metadata (since 8.6), else from its name."""
    metadata = str(layer.get("Metadata", "")) if isinstance(layer, dict) else ""
    return metadata.count(_ONNX_LAYER) or len(_name(layer).split(" + "))


def _outputs(layer: Any) -> Iterator[str]:
    outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
    for output in outputs:
        if not isinstance(output, dict):
            yield _UNKNOWN
        elif "Format/Datatype" in output:
            yield str(output["Format/Datatype"])
        else:
            words = [str(output[key]) for key in ("Format", "Datatype") if key in output]
            yield " ".join(words) or _UNKNOWN


def _name(value: Any) -> str:
    return str(value.get("Name", _UNKNOWN)) if isinstance(value, dict) else str(value)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
