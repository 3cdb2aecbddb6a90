"""A stand-in for TensorRT that has exactly the API of one recorded release.

    trt = fake_tensorrt("10.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)

Every class, member, enum member and signature is checked against export/tensorrt_api, which
benchmarks/record_tensorrt_api.py recorded from the real bindings: whatever that release lacks is an
AttributeError, and arguments that pybind11 would refuse are a TypeError. What happens behind the
API is in tensorrt_stand_in.py: it parses ONNX, 'builds' bytes that hold the ONNX file, and runs
them in ONNX Runtime on the addresses that it is given.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorrt_stand_in as stand_in

RECORDED = Path(__file__).parent / "export" / "tensorrt_api"
VERSIONS = ("8.5.3.1", "8.6.1", "10.4.0", "10.16.1.11", "11.4.0.106", "rtx-1.7.1.116")
"""The recorded releases, oldest first; the last is TensorRT-RTX."""
_BUFFERS = ("buffer", "Buffer")
_NUMBERS = {"int": int, "SupportsInt": int, "float": (int, float), "SupportsFloat": (int, float)}


@dataclass
class Behaviour:
    """What the stand-in does where the real library would depend on the machine or the network."""

    driver: bool = True
    """Without a driver a builder or a runtime cannot be made."""
    parse_errors: tuple[str, ...] = ()
    """What the parser says about any file, instead of parsing it."""
    build_error: str | None = None
    """Why every build fails."""
    deserialize_error: str | None = None
    """Why no engine can be loaded."""
    refuses_profiles: bool = False
    """Whether no optimization profile is valid."""
    foreign_timings: bool = False
    """Whether timings that are read are of another GPU."""
    phases: tuple[tuple[str, int], ...] = (("Building engine", 4),)
    """What a progress monitor hears: names and numbers of steps, each within the one before."""
    inspection: str | None = None
    """The inspector's answer, instead of a short one in the format of the release."""
    execute: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Arrays of the inputs by name -> arrays of the outputs, instead of ONNX Runtime."""


@dataclass
class Call:
    """One call, or one assignment to a property, whose name then ends in ``=``."""

    name: str
    arguments: tuple[Any, ...] = ()
    """Everything but self, by position, as the stand-in saw it."""


@dataclass
class State:
    """What belongs to one stand-in: its recorded API, its behaviour and what was called."""

    api: dict[str, Any]
    behaviour: Behaviour
    module: Any = None
    calls: list[Call] = field(default_factory=list)

    @property
    def version(self) -> tuple[int, ...]:
        """The version in numbers; TensorRT-RTX has the API of TensorRT 11."""
        if self.api["module"] == "tensorrt_rtx":
            return (11,)
        return tuple(int(part) for part in self.api["version"].split("."))

    def has(self, kind: str, member: str | None = None) -> bool:
        """Whether the release has a name, an enum member or a member of a class."""
        if member is None:
            return kind in self.api["names"]
        return member in {**self.api["classes"], **self.api["enums"]}.get(kind, {})

    def wrap(self, kind: str, target: Any) -> Any:
        """Put the recorded API in front of an object of the stand-in."""
        return _Guard(self, kind, target)


def fake_tensorrt(version: str, **behaviour: Any) -> Any:
    """Return a stand-in module for a recorded release; see ``Behaviour`` for the arguments."""
    state = State(recorded_api(version), Behaviour(**behaviour))
    state.module = _Module(state)
    return state.module


@cache
def recorded_api(version: str) -> dict[str, Any]:
    """Return what was recorded of a release."""
    return json.loads((RECORDED / f"{version}.json").read_text())


def calls_of(module: Any, name: str) -> list[tuple[Any, ...]]:
    """Return the arguments of every call of ``Class.method``, or what ``Class.property=`` got."""
    return [call.arguments for call in state_of(module).calls if call.name == name]


def state_of(module: Any) -> State:
    """Return the state behind a stand-in module."""
    return vars(module)["_state"]


class _Module(ModuleType):
    """The module: enums, classes and functions of the release, and nothing else."""

    def __init__(self, state: State) -> None:
        super().__init__(state.api["module"])
        self._state = state
        self.__version__ = state.api["version"]
        enums = {
            name: enum.IntEnum(name.split(".")[-1], members)
            for name, members in state.api["enums"].items()
        }
        severity = enums.pop("ILogger.Severity")
        vars(self).update(enums)
        for alias, member in stand_in.DTYPE_ALIASES.items():
            if state.has(alias):
                vars(self)[alias] = enums["DataType"][member]
        for kind in ("ILogger", "IProgressMonitor", "IProfiler", "IOutputAllocator"):
            if state.has(kind):
                vars(self)[kind] = _interface(state, kind)
        vars(self)["ILogger"].Severity = severity
        for name, member in severity.__members__.items():
            setattr(vars(self)["ILogger"], name, member)
        self.Logger = _logger(vars(self)["ILogger"])
        for kind in ("Builder", "Runtime", "OnnxParser"):
            vars(self)[kind] = partial(_construct, state, kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._state.api["names"]:
            raise AttributeError(f"TensorRT {self.__version__} has no {name}")
        return _Missing(name)


class _Missing:
    """Something that the release has and the stand-in does not do."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"tests/tensorrt_stand_in.py has no {self._name} yet")


def _interface(state: State, kind: str) -> type:
    """Return a class to derive from, whose methods do nothing."""

    def initialise(self: Any) -> None:
        self._initialised = True  # pybind11 refuses objects whose base was not initialised

    methods = {
        name: (lambda self, *arguments: None)
        for name, member in state.api["classes"][kind].items()
        if isinstance(member, list) and not name.startswith("__")
    }
    return type(kind, (), {**methods, "__init__": initialise})


def _logger(interface: Any) -> type:
    class Logger(interface):
        def __init__(self, min_severity: Any = interface.WARNING) -> None:
            super().__init__()
            self.min_severity = min_severity

        def log(self, severity: Any, msg: str) -> None:
            if severity <= self.min_severity:
                print(f"[TRT] {severity.name}: {msg}")

    return Logger


def _construct(state: State, kind: str, *arguments: Any, **named: Any) -> Any:
    given = _bind(state, kind, "__init__", arguments, named)
    state.calls.append(Call(kind, given))
    return state.wrap(kind, getattr(stand_in, kind)(state, *given))


class _Guard:
    """An object that shows what the release shows of its class, and records what is done to it."""

    def __init__(self, state: State, kind: str, target: Any) -> None:
        object.__setattr__(self, "_guarded", (state, kind, target))

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        state, kind, target = object.__getattribute__(self, "_guarded")
        member = _member(state, kind, name)
        if not hasattr(target, name):
            return _Missing(f"{kind}.{name}")
        return getattr(target, name) if isinstance(member, str) else partial(_call, self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        state, kind, target = object.__getattribute__(self, "_guarded")
        if _member(state, kind, name) != "rw":
            raise AttributeError(f"{kind}.{name} of {state.api['version']} cannot be set")
        state.calls.append(Call(f"{kind}.{name}=", (value,)))
        setattr(target, name, value)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(object.__getattribute__(self, "_guarded")[2])


def _member(state: State, kind: str, name: str) -> str | list[str]:
    members = state.api["classes"][kind]
    if name not in members:
        raise AttributeError(f"{kind} of TensorRT {state.api['version']} has no {name}")
    return members[name]


def _call(guard: _Guard, name: str, *arguments: Any, **named: Any) -> Any:
    state, kind, target = object.__getattribute__(guard, "_guarded")
    given = _bind(state, kind, name, arguments, named)
    state.calls.append(Call(f"{kind}.{name}", given))
    return getattr(target, name)(*given)


def target_of(guarded: Any) -> Any:
    """Return the stand-in's own object behind the recorded API."""
    return object.__getattribute__(guarded, "_guarded")[2]


def _bind(
    state: State, kind: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments by position, as the first signature that takes them orders them."""
    signatures = state.api["classes"][kind][name]
    for signature in signatures:
        given = _fit(_parameters(signature), arguments, named)
        if given is not None:
            return given
    shown = ", ".join(
        [*map(repr, arguments), *(f"{key}={value!r}" for key, value in named.items())]
    )
    raise TypeError(
        f"{name}(): incompatible function arguments. The following argument types are supported: "
        f"{'; '.join(signatures)}. Invoked with: {shown}"
    )


def _fit(
    parameters: list[tuple[str, str, bool]], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...] | None:
    names = [name for name, _, _ in parameters]
    given = dict(zip(names, arguments, strict=False))
    if len(arguments) > len(names) or set(named) - set(names) or set(named) & set(given):
        return None
    given |= named
    for name, annotation, optional in parameters:
        if name not in given and not optional:
            return None
        if name in given and not _accepts(annotation, given[name]):
            return None
    return tuple(given[name] for name in names if name in given)


def _accepts(annotation: str, value: Any) -> bool:
    """Whether pybind11 converts a value to a C++ type; types that it does not know pass."""
    kind = re.split(r"[.:]", annotation)[-1]
    if kind == "str":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) or hasattr(value, "__index__")
    if kind in _BUFFERS:
        return isinstance(value, (bytes, bytearray, memoryview))
    if kind in {"Dims", "tuple", "list"}:
        return isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value)
    if isinstance(value, _Guard):
        return kind.removeprefix("I") == object.__getattribute__(value, "_guarded")[1].removeprefix(
            "I"
        )
    if isinstance(value, enum.IntEnum):
        return kind == type(value).__name__
    if kind in {"ILogger", "IProgressMonitor", "IProfiler", "IOutputAllocator"}:
        return getattr(value, "_initialised", False)
    return not isinstance(value, (str, bytes, int, float, Path))


@cache
def _parameters(signature: str) -> list[tuple[str, str, bool]]:
    """Return name, annotation and whether there is a default, of every parameter but self."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(inside):
        depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:index])
            start = index + 1
    parts.append(inside[start:])
    found = []
    for part in parts:
        name, _, rest = part.strip().partition(": ")
        annotation, _, default = rest.partition(" = ")
        if name and name != "self":
            found.append((name, annotation.strip(), bool(default)))
    return found
