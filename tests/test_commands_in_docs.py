"""Every command that the docs and the benchmarks name has the options that they give it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
STARTS = r"python benchmarks/\w+\.py|compress|pytest"
BEFORE = r"^ *(?:- )?(?:\$ )?|`|&& |--no-python +|exec "
COMMAND = re.compile(rf"(?:{BEFORE})(?:\w+=\S+ )*((?:{STARTS})(?= [^.])[^`\n]*)", re.MULTILINE)
END = re.compile(r" && | \|\| | \| | > |;| +# | {3,}")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command in code blocks and in backticks."""
    text = re.sub(r"\\\n\s*", "", text)
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda found: found[0].replace("\n", " "), text)
    for command in COMMAND.findall(text):
        yield shlex.split(END.split(command)[0])


def usages(program: Path) -> Iterator[list[str]]:
    """Yield the commands of a docstring, with what is optional."""
    text = program.read_text(encoding="utf-8").split('"""')[1]
    text = re.sub(r"\n {8,}", " ", text)  # a long one goes on
    for words in commands(re.sub(r"[\[\]]", "", text)):
        yield ["1" if word == "X" else word for word in words]


def accept(words: list[str], config: pytest.Config) -> None:
    """Fail where a command has an option, or names a file, that does not exist."""
    if words[0] == "python":
        program = ROOT / words[1]
        assert program.is_file()
        import_module(program.stem).parse(words[2:])
    elif words[0] == "compress":
        group = typer.main.get_command(cli.app)
        assert isinstance(group, typer.core.TyperGroup)
        command = group if words[1].startswith("--") else group.commands[words[1]]
        known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known | {"--help"}
    else:
        for word in words[1:]:
            assert "/" not in word or (ROOT / word.partition("::")[0]).exists()
        known = {line.partition(":")[0] for line in config.getini("markers")}
        options = config._parser.parse_known_args(words[1:])  # pytest has no public way to ask
        named = re.findall(r"\w+", options.markexpr or "")
        assert set(named) <= known | {"and", "or", "not"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_options_that_exist(page: Path, pytestconfig: pytest.Config) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            accept(words, pytestconfig)
        except (AssertionError, KeyError, SystemExit) as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_benchmark_names_its_own_options(program: Path, pytestconfig: pytest.Config) -> None:
    found = list(usages(program))
    for words in found:
        accept(words, pytestconfig)
    own = [words[2:] for words in found if words[1] == f"benchmarks/{program.name}"]
    shared = ("killed", "pruners", "race", "small_networks", "smoke", "standings")
    is_program = program.stem not in shared
    assert (["--smoke"] in own and len(own) > 1) == is_program


def test_commands_are_found_wherever_they_stand() -> None:
    text = (
        "    compress export RUN --target v100   for a V100\n"
        "`TEST_RANKS=4 pytest tests/a.py` or `compress\nbench x --batch 1`, not the `compress` of\n"
        "```sh\npip install . && compress run\ntorchrun --no-python compress prune --config a \\\n"
        "  --output b > c\n```\n    python benchmarks/a.py --b  # c\n"
    )
    assert list(map(shlex.join, commands(text))) == [
        "compress export RUN --target v100",
        "pytest tests/a.py",
        "compress bench x --batch 1",
        "compress run",
        "compress prune --config a --output b",
        "python benchmarks/a.py --b",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "compress export run --fast",
        "compress expert run",
        "compress --install-completions",
        "python benchmarks/none.py",
        "python benchmarks/many_files.py --fiels 3",
        "pytest tests/none.py",
        "pytest -m no_such_mark",
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str, pytestconfig: pytest.Config) -> None:
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        accept(shlex.split(command), pytestconfig)
