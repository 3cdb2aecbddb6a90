"""Record what the Python API of one TensorRT release has, as JSON on stdout.

    python benchmarks/record_tensorrt_api.py WHEEL > tests/export/tensorrt_api/10.4.0.json
    python benchmarks/record_tensorrt_api.py tensorrt_rtx > tests/export/tensorrt_api/rtx-1.7.1.json
    python benchmarks/record_tensorrt_api.py --smoke

The argument is a wheel with the bindings for this Python, such as ``pip download --no-deps
tensorrt-cu12-bindings==10.4.0`` gets, or the name of an installed module. Bindings are extension
modules that need a handful of functions of TensorRT's libraries. For a wheel those libraries are
not needed: empty ones are compiled that export the same names, so that the API can be read on any
x86-64 Linux with gcc and binutils. Nothing in them is ever called. One process records one release.
``--smoke`` is for the installed ``tensorrt_rtx``.

tests/tensorrt_contract.py builds its stand-in for TensorRT from these files.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from smoke import parsed

CLASSES = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "ITimingCache"),
    *("OnnxParser", "ParserError", "IHostMemory", "IProgressMonitor", "ITensor"),
    *("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig"),
    *("EngineInspector", "IProfiler", "IOutputAllocator", "ILogger", "Logger"),
)
ENUMS = (
    *("BuilderFlag", "ComputeCapability", "NetworkDefinitionCreationFlag", "MemoryPoolType"),
    "ProfilingVerbosity",
    *("HardwareCompatibilityLevel", "LayerInformationFormat", "TensorIOMode", "TensorLocation"),
    *("TensorFormat", "DataType", "ExecutionContextAllocationStrategy", "OnnxParserFlag"),
    *("DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy"),
)
FUNCTIONS = ("nptype", "volume", "init_libnvinfer_plugins", "get_nv_onnx_parser_version")
PROTOCOL = ("__init__", "__len__", "__getitem__", "__enter__", "__exit__", "__bool__", "__str__")
"""The methods with two underscores that say something about what an object can do."""


def record(module: ModuleType) -> dict[str, Any]:
    """Return the version, every public name, and the members of the classes that are used."""
    return {
        "module": module.__name__.removesuffix("_bindings"),
        "version": module.__version__,
        "names": [name for name in sorted(dir(module)) if not name.startswith("_")],
        "classes": {
            name: _class(getattr(module, name)) for name in CLASSES if hasattr(module, name)
        },
        "enums": {
            **{name: _enum(getattr(module, name)) for name in ENUMS if hasattr(module, name)},
            "ILogger.Severity": _enum(module.ILogger.Severity),
        },
        "functions": {
            name: _signatures(getattr(module, name)) for name in FUNCTIONS if hasattr(module, name)
        },
    }


def _class(kind: type) -> dict[str, Any]:
    """Return the members of a class: signatures of a method, 'r' or 'rw' of a property."""
    return {
        name: _member(kind, name)
        for name in sorted(dir(kind))
        if not name.startswith("_")
        or (name in PROTOCOL and getattr(kind, name) is not getattr(object, name, None))
        if not isinstance(getattr(kind, name), type)
    } | {"__init__": _signatures(kind.__init__)}  # type: ignore[misc]


def _member(kind: type, name: str) -> list[str] | str:
    value = next(vars(base)[name] for base in kind.__mro__ if name in vars(base))
    if isinstance(value, property):
        return "r" if value.fset is None else "rw"
    return _signatures(getattr(kind, name)) if callable(getattr(kind, name)) else "r"


def _enum(kind: Any) -> dict[str, int]:
    return {name: int(member) for name, member in sorted(kind.__members__.items())}


def _signatures(function: Any) -> list[str]:
    """Return the signature lines of a docstring by pybind11; none where Python code wrote it."""
    lines = (getattr(function, "__doc__", None) or "").strip().splitlines()
    name = re.escape(function.__name__)
    found = [re.match(rf"(?:\d+\. )?({name}\(.*)", line) for line in lines]
    signatures = [_short(match[1]) for match in found if match]
    return [line for line in signatures if "*args, **kwargs" not in line]


def _short(signature: str) -> str:
    """Drop what differs between releases and Pythons: the module's path, the home of a type."""
    signature = re.sub(r"\b(tensorrt|tensorrt_rtx)(_bindings)?\.(\w+\.)*?(?=\w+)", "", signature)
    signature = signature.replace("collections.abc.Buffer", "typing_extensions.Buffer")
    return re.sub(r" at 0x[0-9a-f]+", "", signature)


def load_wheel(wheel: Path, folder: Path) -> ModuleType:
    """Import the bindings of a wheel against stand-ins for the libraries that they need."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = next(name for name in names if re.fullmatch(r"\w+/tensorrt(_rtx)?\.so", name))
        package = library.split("/")[0]
        for name in names:
            if name == library or re.fullmatch(rf"{package}/(plugin/)?\w+\.py", name):
                archive.extract(name, folder)
    _load_stand_ins(folder / library, folder)
    sys.path.insert(0, str(folder))
    return importlib.import_module(package)


def _load_stand_ins(library: Path, folder: Path) -> None:
    """Compile and load a library for each that is needed, exporting whatever is undefined."""
    symbols = [
        line.split()[1]
        for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines()
        if line.split()[0] == "U"
        and "@" not in line  # versioned: of the C and C++ libraries
        and not line.split()[1].startswith(("Py", "_Py"))
    ]
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in symbols))
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", _output("readelf", "-d", str(library)))
    for name in needed:
        if re.match(r"lib(nv|tensorrt)", name):
            _output("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source)
            ctypes.CDLL(str(folder / name))


def _output(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "a wheel with the bindings, or the name of an installed module"
    parser.add_argument("source", nargs="?", help=about)
    options = parsed(parser, arguments, source="tensorrt_rtx")
    if options.source is None:
        parser.error(f"give {about}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    source: str = parse(arguments).source
    with tempfile.TemporaryDirectory() as folder:
        if source.endswith(".whl"):
            module = load_wheel(Path(source), Path(folder))
        else:
            module = importlib.import_module(source)
        print(json.dumps(record(module), indent=1))


if __name__ == "__main__":
    main()
