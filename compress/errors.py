"""The errors a user can cause, as one family, each with the exit code of the command line.

    CompressError                 1  the command could not do its job
    |-- ConfigError               2  unknown key, bad value, missing named config, wrong usage
    |-- UsageError                1  a library call out of its order
    |-- OutputError               1  the output cannot be written: disk full, no permission
    |-- CheckpointError           1  weights missing, damaged, unsafe or of another network
    |-- DataError                 1  images missing, unreadable or of another class list
    |-- ModelError                1  the network cannot be built, traced or pruned
    |   `-- UnknownModelError     2  no network has the name that was given; a ConfigError as well
    |-- BudgetError               1  the requested size cannot be reached
    |-- TableError                1  a latency table of something else, or that covers less
    |-- TrainingError             1  the loss became NaN or infinite
    |-- RunError                  1  the processes of a run differ, or one of them ended
    |-- EnvironmentUnfitError     5  a runtime or a machine that cannot do what was asked
    |-- ParityError               6  two runtimes disagree about the same model
    `-- InterruptedRunError     130  Ctrl-C; the state was saved

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_LETTERS = 960
"""Longest message: what a file says must not fill a terminal or a log."""


class CompressError(Exception):
    """Base of every error that is the user's to mend; the message is one complete sentence.

    Messages quote files, so a message is kept to one line of printable letters and is shortened in
    its middle.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(CompressError):
    """A configuration or a command line that cannot be understood."""

    exit_code = 2


class UsageError(CompressError):
    """A call of the library that cannot work where it stands, such as a score before a backward."""


class OutputError(CompressError):
    """The output cannot be written."""


class CheckpointError(CompressError):
    """A file of weights that is missing, damaged, unsafe to load or of another network."""


class DataError(CompressError):
    """A data set that is missing, empty or unreadable."""


class ModelError(CompressError):
    """A network that cannot be built, traced or pruned."""


class UnknownModelError(ConfigError, ModelError):
    """A name that no network has, such as a misspelt one."""


class BudgetError(CompressError):
    """A size budget that the network cannot reach; the message names the closest that it can."""


class TableError(CompressError):
    """A latency table that is damaged, of something else, or does not cover what is asked."""


class TrainingError(CompressError):
    """Training that diverged."""


class RunError(CompressError):
    """Processes of one run that do not agree, or one that ended."""


class EnvironmentUnfitError(CompressError):
    """A runtime that is missing here, or a machine that cannot do what was asked."""

    exit_code = 5


class ParityError(CompressError):
    """Two runtimes that disagree about the same model."""

    exit_code = 6


class InterruptedRunError(CompressError):
    """The user stopped the run; its state is on disk."""

    exit_code = 130


def one_line(text: str, most: int = MOST_LETTERS) -> str:
    """Return a text as one line of at most so many letters, control characters spelt out."""
    if len(text) > most:  # first, so that megabytes cost nothing
        text = f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"
    line = " ".join(part.strip() for part in text.splitlines()) if "\n" in text else text
    if line.isprintable():
        return line
    spelt = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return spelt if len(spelt) <= most else one_line(spelt, most)


def first_line(error: BaseException) -> str:
    """Return what a foreign exception says, without its trailing pages, or its name."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of what an exception says, or its name."""
    return first_line(error).split(". ")[0].strip().rstrip(".")


def no_number(with_nan: int, not_finite: int) -> str:
    """Return what to call answers of which so many hold NaN, and so many NaN or infinity."""
    if not with_nan:
        return "infinity"
    return "NaN" if with_nan == not_finite else "NaN or infinity"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence tail for a misspelt word: the nearest known word, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file would be larger than files may be here",
    errno.EIO: "the disk does not answer as it should",
    errno.ELOOP: "links lead in a circle",
    errno.ENOTDIR: "part of the path is a file and no folder",
    errno.EMFILE: "this process has too many files open",
    errno.ENFILE: "this machine has too many files open",
}
"""What the machine says no to, in words; none of it is a defect of this tool."""


def reason_of(error: OSError) -> str:
    """Return in words why the operating system refused."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def refused_by_the_machine(error: OSError) -> CompressError | None:
    """Return the user's error that an error of the operating system is; None for a defect."""
    if error.errno not in _REASONS:
        return None
    name = f"{error.filename}: " if error.filename is not None else ""
    return OutputError(f"the machine refuses: {name}{reason_of(error)}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate the operating system's errors while ``path`` is written into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason_of(error)}; what was there before is kept"
        ) from error
