"""A command's options are the fields of its request: each is declared once, where it is read.

A field says by an ``Option`` or an ``Argument`` in its annotation how people give it. What is
another name of a setting names that setting, and nothing else has to know the option.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError

from compress.errors import CompressError, ConfigError
from compress.files.documents import reason, shown
from compress.terminal.console import say

SWITCH = ""
"""What ``--help`` shows for the value of an option that takes none."""
_METAVARS: dict[Any, str] = {bool: SWITCH, list[str]: "<str>"}


@dataclass(frozen=True)
class Option:
    """How an option is given."""

    flag: str
    help: str
    setting: str | None = None
    """Key of the configuration that it is another name of."""
    key: str | None = None
    """What messages call it, where it is no other name of a setting."""
    earlier: str | None = None
    """Its name in the version before this one."""


@dataclass(frozen=True)
class Argument:
    """How an argument is given."""

    metavar: str
    help: str


def options_of(kind: type[Any]) -> dict[str, Option]:
    """Return the options of a request by the names of their fields."""
    return {name: mark for name, (_, mark) in _marks(kind).items() if isinstance(mark, Option)}


def settings_of(request: Any) -> list[str]:
    """Return the settings that the options of a request stand for, as ``section.key=value``."""
    return [
        f"{option.setting}={value}"
        for name, option in options_of(type(request)).items()
        if option.setting is not None and (value := getattr(request, name)) is not None
    ]


def as_typed(message: str, request: Any) -> str:
    """Return a message about settings in the words of a command line: by its flags.

    Messages name a setting as ``key = value``, and ``settings`` where several make a document.
    """
    for name, option in options_of(type(request)).items():
        key = option.setting or option.key
        if key is not None and getattr(request, name) not in (None, ()):
            said = rf"(^[a-z ]+: )?(?<![\w.]){re.escape(key)}(\.\w+)* = "
            message = re.sub(said, f"{option.flag} ", message)
    return re.sub("^settings: ", "--set: ", message)


def say_plainly(error: typer.BadParameter) -> None:
    """Let the refusal of an option that is no number say so in the words of settings."""
    if isinstance(cause := error.__cause__, ValidationError):
        detail, *_ = cause.errors()
        error.message = f"{shown(detail['input'])}: {reason(detail)}."


def takes_request(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command whose first parameter is a request have the options of the request instead."""
    hints = get_type_hints(command, include_extras=True)
    first, *others = inspect.signature(command).parameters.values()
    kind = hints[first.name]
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    parameters, renamed = _parameters(kind)
    own = [_keyword(each.name, each.default, hints[each.name]) for each in others]

    @functools.wraps(command)
    def take(**values: Any) -> Any:
        for name, (flag, earlier) in renamed.items():
            old = values.pop(_hidden(name))
            if old is None:
                continue
            if values[name] != defaults[name]:
                raise ConfigError(f"{earlier} is an earlier name of {flag}: give one of them")
            say(f"warning: {earlier} is now {flag}")
            values[name] = old
        given = {name: values.pop(name) for name in defaults}
        told = {name: value for name, value in given.items() if value is not None}
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        request = kind(**told | lists)
        try:
            return command(request, **values)
        except CompressError as error:
            error.args = (as_typed(str(error), request),)
            raise

    signature = inspect.Signature([*parameters, *own])
    setattr(take, "__signature__", signature)  # noqa: B010 (mypy knows no such attribute)
    take.__annotations__ = {each.name: each.annotation for each in (*parameters, *own)}
    return take


def _parameters(kind: type[Any]) -> tuple[list[inspect.Parameter], dict[str, tuple[str, str]]]:
    """Return the parameters that typer shall see, and flag and earlier flag of renamed fields."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    found, renamed = [], {}
    for name, (base, mark) in _marks(kind).items():
        default = defaults[name]
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        elif default == ():
            default = None
        if isinstance(mark, Argument):
            shown: Any = typer.Argument(metavar=mark.metavar, help=mark.help)
        else:
            shown = typer.Option(mark.flag, help=mark.help, metavar=_METAVARS.get(base))
            if mark.earlier is not None:
                renamed[name] = (mark.flag, mark.earlier)
                hidden = typer.Option(mark.earlier, hidden=True)
                found.append(_keyword(_hidden(name), None, Annotated[base, hidden]))
        found.append(_keyword(name, default, Annotated[base, shown]))
    return found, renamed


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _hidden(name: str) -> str:
    return f"earlier_{name}"


def _marks(kind: type[Any]) -> dict[str, tuple[Any, Option | Argument]]:
    """Return type and mark of each field: first what is a class's own, then what it inherits."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for part in kind.__mro__:
        for name in inspect.get_annotations(part):
            base, mark, *_ = get_args(hints[name])
            several = get_origin(base) is tuple  # which typer takes for so many values and no more
            found[name] = (list[get_args(base)[0]] if several else base, mark)  # type: ignore[misc]
    return found
