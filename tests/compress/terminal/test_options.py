"""A request's fields are a command's options, with their types, defaults and earlier names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from compress.errors import ConfigError
from compress.terminal.options import Argument, Option, options_of, settings_of, takes_request


@dataclass(frozen=True, kw_only=True)
class Base:
    count: Annotated[int, Option("--count", "How many.", setting="a.count")] = 3
    words: Annotated[tuple[str, ...], Option("--word", "Repeatable.")] = ()
    output: Annotated[Path | None, Option("--output", "Where to.")] = None


@dataclass(frozen=True, kw_only=True)
class Asked(Base):
    place: Annotated[Path, Argument("PLACE", "Where from.")]
    output: Annotated[Path, Option("--output", "Where to.")] = field()
    sizes: Annotated[
        str | None,
        Option("--sizes", "1,8.", setting="b.sizes", earlier="--batches"),
    ] = None
    limits: Annotated[str, Option("--limits", "By which.", earlier="--budgets")] = "default"


def call(*words: str) -> tuple[Asked, bool, str]:
    """Give words to a command; return what it was called with, and what it printed."""
    app, got = typer.Typer(pretty_exceptions_enable=False), []

    @app.command()
    @takes_request
    def command(request: Asked, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Do something."""
        got.append((request, loud))

    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    if not got:
        raise LookupError(result.output)
    return *got[0], result.output


def test_fields_are_options_and_arguments() -> None:
    request, loud, said = call("here", "--output", "there")
    assert request == Asked(place=Path("here"), output=Path("there"))
    assert (request.count, request.words, loud, said) == (3, (), False, "")
    words = ("--count", "5", "--word", "a", "--word", "b", "--sizes", "1,8", "--loud")
    request, loud, _ = call("here", "--output", "there", *words)
    assert request.words == ("a", "b")
    assert loud
    assert settings_of(request) == ["b.sizes=1,8", "a.count=5"]


def test_what_must_be_given() -> None:
    with pytest.raises(LookupError, match=r"Missing option.*--output"):
        call("here")
    with pytest.raises(LookupError, match=r"Missing argument.*PLACE"):
        call("--output", "there")


def test_an_earlier_name_works_hidden_and_says_the_new_one() -> None:
    usual = ("here", "--output", "there")
    request, _, said = call(*usual, "--budgets", "mine.toml", "--batches", "4")
    assert (request.limits, request.sizes) == ("mine.toml", "4")
    assert "warning: --budgets is now --limits" in said
    with pytest.raises(ConfigError, match="--budgets is an earlier name of --limits"):
        call(*usual, "--budgets", "mine.toml", "--limits", "other.toml")
    with pytest.raises(LookupError) as shown:
        call("--help")
    assert "--limits" in str(shown.value)
    assert "--budgets" not in str(shown.value)


def test_a_class_s_own_options_come_before_those_that_it_inherits() -> None:
    assert list(options_of(Asked)) == ["output", "sizes", "limits", "count", "words"]
