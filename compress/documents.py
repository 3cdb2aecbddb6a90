"""TOML documents and settings become validated sections, every mistake named.

A document is a named file under ``configs/`` or a path, with ``section.key=value`` settings on top.
Unknown keys are errors that offer the nearest known key.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from compress.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    import tomli as tomllib

SectionT = TypeVar("SectionT", bound="Section")


class Section(BaseModel):
    """Base of every part of the configuration: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("true and false belong to switches, and this is none")
        return value


def named_files(folder: str) -> dict[str, str]:
    """Return the text of every TOML resource in ``configs/<folder>`` ('' for runs), by name."""
    directory = resources.files("configs")
    if folder:
        directory = directory / folder
    return {
        entry.name[: -len(".toml")]: entry.read_text(encoding="utf-8")
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def read_toml(name: str, folder: str = "") -> dict[str, Any]:
    """Read a TOML document: a bare word names a resource, anything else is a path.

    A document may begin with ``extends = "NAME"``: it is then laid over that named resource.

    Raises:
        ConfigError: no such name or file, or text that is not TOML.
    """
    if "/" not in name and not name.endswith(".toml"):
        files = named_files(folder)
        if name not in files:
            kind = folder.rstrip("s") or "config"
            raise ConfigError(f"no {kind} is named {name!r}: {nearest(name, files)}")
        text = files[name]
    else:
        text = read_text(name)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    return _extended(document, name, folder)


def read_text(path: str) -> str:
    """Return the text of a file that the user named.

    Raises:
        ConfigError: it cannot be read or is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read {path}: {reason}") from error


def _extended(document: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """Lay a document over the named one that it extends."""
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str) or base not in named_files(folder) or base == name:
        raise ConfigError(f"{name}: extends = {base!r} must be the name of another configuration")
    return _merged(read_toml(base, folder), document)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document in which keys of ``above`` win, table by table."""
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[key] = _merged(under, value) if both else value  # type: ignore[arg-type]
    return merged


def validated(model: type[SectionT], document: Mapping[str, Any], source: str) -> SectionT:
    """Validate a document against a Section, translating every mistake into one ConfigError."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        details = error.errors()
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise ConfigError(f"{source}: {_explain(model, details[0])}{more}") from error


def apply_setting(document: dict[str, Any], setting: str) -> None:
    """Lay one ``section.key=value`` over a document; the value is read as TOML or JSON would.

    Raises:
        ConfigError: the setting is not of that form.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    *sections, last = key.strip().split(".")
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section")
    table[last] = _value(text)


def _value(text: str) -> Any:
    """Read a setting's value as TOML or JSON would; what is neither is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _explain(model: type[BaseModel], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(location[-1], _fields_at(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"the key {key!r} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key} = {detail['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(model: type[BaseModel], path: list[str]) -> Iterable[str]:
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return model.model_fields
