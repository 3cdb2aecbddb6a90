from __future__ import annotations

import errno
import inspect
import re
from pathlib import Path

import pytest

from compress import errors
from compress.errors import CompressError, OutputError, nearest, writing


def test_the_tree_at_the_top_is_the_family() -> None:
    """Names, exit codes and parents of the module's docstring are those of the classes."""
    assert errors.__doc__
    drawn = {
        name: int(code)
        for name, code in re.findall(r"^\W*(\w+Error)\s+(\d+)", errors.__doc__, re.MULTILINE)
    }
    family = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, CompressError)
    }
    assert drawn == {name: value.exit_code for name, value in family.items()}
    (lower,) = (v for v in family.values() if CompressError not in (v, *v.__bases__))
    assert lower.__bases__ == (errors.ConfigError, errors.ModelError)
    assert all(value.__doc__ for value in family.values())


def test_exit_codes_tell_apart_what_a_script_must_tell_apart() -> None:
    """The table of the command line: 2 usage, 5 unfit, 6 parity, 130 as shells report Ctrl-C."""
    assert errors.ConfigError.exit_code == 2
    assert errors.EnvironmentUnfitError.exit_code == 5
    assert errors.ParityError.exit_code == 6
    assert errors.InterruptedRunError.exit_code == 130
    for ordinary in (errors.DataError, errors.ModelError, errors.BudgetError, OutputError):
        assert ordinary.exit_code == 1


@pytest.mark.parametrize(
    ("word", "known", "tail"),
    [
        ("epoch", ["lr", "epochs"], "did you mean 'epochs'?"),
        ("epoch", {"epochs": 1, "lr": 2}, "did you mean 'epochs'?"),
        ("zzz", ["lr", "epochs"], "known: epochs, lr"),
        ("", ["b", "a"], "known: a, b"),
        ("x", iter(["only"]), "known: only"),
    ],
)
def test_nearest(word: str, known: list[str], tail: str) -> None:
    assert nearest(word, known) == tail


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EISDIR, "Is a directory"),
    ],
)
def test_an_error_of_the_system_becomes_a_sentence(code: int, reason: str) -> None:
    import os

    cause = OSError(code, os.strerror(code))
    with pytest.raises(OutputError) as caught, writing(Path("run/config.toml")):
        raise cause
    assert str(caught.value) == (
        f"cannot write run/config.toml: {reason}; what was there before is kept"
    )
    assert caught.value.__cause__ is cause


def test_an_error_without_a_number_keeps_its_words() -> None:
    with pytest.raises(OutputError, match="cannot write a: no number"), writing(Path("a")):
        raise OSError("no number")


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), writing(Path("a")):
        raise KeyError("a bug keeps its traceback")
