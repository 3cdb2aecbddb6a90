"""TOML documents and settings become validated sections, every mistake named.

A document is a named file under ``configs/`` or a path, with ``section.key=value`` settings on top.
Unknown keys are errors that offer the nearest known key. Documents may come from anybody: one that
is too large or too deep is refused before it costs time or memory.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compress.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    import tomli as tomllib

SectionT = TypeVar("SectionT", bound="Section")

MOST_BYTES = 2**18
"""Largest configuration; those that come with the tool have a hundredth of it."""
MOST_DOTS = 32
"""Of a dotted key: the parser takes time that grows with the square of their number."""
MOST_MISTAKES = 1000
"""That are described; each takes a thousand times the memory of the letter that it is about."""


class Section(BaseModel):
    """Base of every part of the configuration: immutable, no unknown keys."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Today's names of keys by those of earlier versions, which files still have."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of several keys by the name that the key ``preset`` gives them; explicit keys win."""
    added_to_presets: ClassVar[Mapping[str, Any]] = {}
    """Values, before they became part of a preset, of keys that a file with its earlier name (that
    of the key ``preset``) must keep: a run of an earlier version goes on as it began."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def of_today(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by the names that their keys have today.

        Raises:
            ValueError: one is there under both of its names.
        """
        for old, new in cls.renamed.items():
            if old in values and new in values:
                raise ValueError(f"{old} is an earlier name of {new}: give one of them")
        return {cls.renamed.get(key, key): value for key, value in values.items()}

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        """Rename the keys of earlier versions, and fill in those of a preset."""
        if not isinstance(values, Mapping):
            return values
        found = cls.of_today(values)
        if "preset" in found and "preset" not in values:
            found = {**cls.added_to_presets, **found}
        preset = found.get("preset") if cls.presets else None
        return {**cls.presets.get(preset, {}), **found} if isinstance(preset, str) else found

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false belong to switches, and this is none")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _list_of_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Take ``3,8`` for a list where a list belongs, as a command line writes it."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        element = _element(annotation)
        if element is None or isinstance(value, bool) or value in _words(annotation):
            return value
        if isinstance(value, str):
            words = [word.strip() for word in value.split(",")]
            return words if all(words) else value
        # A number has lost how it was written, and 1.10 may be a name.
        return [value] if isinstance(value, int | float) and element is not str else value


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
        document = parsed_toml(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    return _extended(document, name, folder)


def read_text(path: str) -> str:
    """Return the text of a configuration that the user named.

    Raises:
        ConfigError: it cannot be read, is not text or is larger than any configuration.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"cannot read {path}: no configuration is larger than 256 KiB")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parsed_toml(text: str) -> dict[str, Any]:
    """Return the document of a TOML text.

    Raises:
        ValueError: it is not TOML, or nested too deeply.
    """
    if any(part.count(".") > MOST_DOTS for part in re.split(r"[\n,=#\[\]{}]", text)):
        raise ValueError(f"a key has more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parsed_json(text: str | bytes) -> Any:
    """Return the value of a JSON text in which no key is there twice.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _extended(document: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """Lay a document over the named one that it extends."""
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str) or base not in named_files(folder) or base == name:
        raise ConfigError(f"{name}: extends = {base!r} must be the name of another configuration")
    return merged(read_toml(base, folder), document)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document in which keys of ``above`` win, table by table."""
    found = dict(below)
    for key, value in above.items():
        under = below.get(key)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        found[key] = merged(under, value) if both else value  # type: ignore[arg-type]
    return found


def validated(
    model: type[SectionT], document: Mapping[str, Any], source: str, section: str = ""
) -> SectionT:
    """Validate a document against a Section, translating every mistake into one ConfigError.

    Args:
        model: what the document must be.
        document: keys and values.
        source: where it is from, for messages.
        section: which section of that it is, for messages.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        if error.error_count() > MOST_MISTAKES:
            raise ConfigError(f"{source} has {error.error_count()} mistakes") from None
        details = error.errors()
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise ConfigError(f"{source}: {_explain(model, details[0], section)}{more}") from error


def apply_setting(document: dict[str, Any], setting: str) -> None:
    """Lay one ``section.key=value`` over a document; the value is read as TOML or JSON would.

    Raises:
        ConfigError: the setting is not of that form.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    *sections, last = (part.strip() for part in key.split("."))
    if not all((*sections, last)):
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section")
    table[last] = _value(text)


def section_of(settings: Iterable[str], name: str) -> dict[str, Any]:
    """Return what ``section.key=value`` settings say of one section.

    Raises:
        ConfigError: a setting is not of that form.
    """
    document: dict[str, Any] = {}
    for setting in settings:
        apply_setting(document, setting)
    found = document.get(name, {})
    return found if isinstance(found, dict) else {}


def _element(annotation: Any) -> Any:
    """Return what a list of a field holds; None where the field holds no list, or text instead."""
    parts = get_args(annotation)
    if get_origin(annotation) is tuple:
        return parts[0]
    found = [element for part in parts if (element := _element(part)) is not None]
    return found[0] if found and parts[0] is not str else None


def _words(annotation: Any) -> tuple[Any, ...]:
    """Return the words that a field may hold."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts
    return tuple(word for part in parts for word in _words(part))


def _value(text: str) -> Any:
    """Read a setting's value as TOML or JSON would; what is neither is a string."""
    for read in (_toml_value, parsed_json):
        with suppress(ValueError):
            return read(text)
    return text


def _toml_value(text: str) -> Any:
    return parsed_toml(f"value = {text}")["value"]


def shown(value: object) -> str:
    """Return a value as Python writes it, shortened before it becomes long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write thousands of digits
        return f"a number of {int(value).bit_length()} bits"  # type: ignore[call-overload]


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def _explain(model: type[BaseModel], detail: Mapping[str, Any], section: str) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join([section, *location] if section else location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(location[-1], _fields_at(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"the key {key!r} is missing"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is a section: give one of its keys, as {key}.{_a_key(model, location)}=..."
    return f"{key} = {shown(detail['input'])}: {reason(detail)}"


def reason(detail: Mapping[str, Any]) -> str:
    """Return in words what is wrong, of one mistake that pydantic describes."""
    message = _WANTED.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


_WHOLE, _NUMBER, _SWITCH = "a whole number belongs here", "a number belongs here", "true or false"
_LIST = "a list belongs here, as 1,2"
_WANTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), _WHOLE),
    **dict.fromkeys(("float_parsing", "float_type"), _NUMBER),
    **dict.fromkeys(("bool_parsing", "bool_type"), f"{_SWITCH} belongs here"),
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
    "string_type": "text belongs here",
    "too_short": "at least one value belongs here",
    "dict_type": "keys with values belong here",
}
"""What belongs where something else is, by pydantic's name of the mistake."""


def _a_key(model: type[BaseModel], path: list[str]) -> str:
    """Return the name of some key of a section, for an example."""
    return next(iter(_fields_at(model, path)), "KEY")


def _fields_at(model: type[BaseModel], path: list[str]) -> Iterable[str]:
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return model.model_fields
