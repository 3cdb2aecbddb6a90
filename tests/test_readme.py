"""The commands of the README are accepted, and those that need no ImageNet are run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from loops import Block, batch_of
from typer.testing import CliRunner

import cli
import compress
from bench.limits import Limits
from compress.config import ComputeConfig, PruneConfig, RunConfig, load_config
from compress.files.documents import Section, named_files, tomllib, validated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "compress run --output digits --set prune.budget=macs=0.4"
FAST = (
    *("data.image_size=8", "data.batch_size=256", "train.epochs=1", "finetune.epochs=1"),
    *("prune.steps=2", "prune.interval=1", "prune.bn_batches=1"),
    *("bench.batch_sizes=[1]", "bench.block_ms=1", "bench.min_blocks=4", "bench.max_seconds=0.3"),
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Yield every call of the tool in a shell block or in backticks of its own."""
    for line in "\n".join(blocks("sh")).splitlines():
        yield from (part for part in line.split(" && ") if part.startswith("compress "))
    yield from re.findall(r"`(compress \w+ --[^`]*)`", README)


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    table = page.split(heading)[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_first_screen_holds_the_two_commands() -> None:
    install, test = blocks("sh")[:2]
    assert install.strip() == "pip install . && compress run"
    assert test.strip() == "pip install '.[test]' && pytest -n 2 --dist worksteal"
    assert README.index(test) < README.index("\n## ")


@pytest.mark.parametrize("command", list(dict.fromkeys(commands())))
def test_command_is_accepted(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    context = group.commands[name].make_context(name, arguments)
    if name in ("run", "train", "prune"):
        load_config(context.params["config"] or "digits-resnet20", context.params["settings"] or ())


@pytest.mark.slow
def test_the_example_on_digits_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks("sh") if RUN in block)
    for line in block.splitlines():
        faster = [f"--set={setting}" for setting in FAST] if line == RUN else []
        result = CliRunner().invoke(
            cli.app, [*shlex.split(line)[1:], *faster], catch_exceptions=False
        )
        assert result.exit_code in (0, 3, 4, 5), (line, result.stderr)  # 5: a busy machine
        assert result.stdout, line
    held = {path.name for path in Path("digits").iterdir()}
    named = re.findall(
        r"`([\w/]+\.?\w*)`", " ".join(row[0] for row in rows(README, "## A run dir"))
    )
    assert held - {"v100"} <= {name.partition("/")[0] for name in named}
    assert all(Path("digits", name).exists() for name in named if not name.endswith("/"))

    _, program = blocks("python")
    space: dict[str, Any] = {}
    exec(program, space)
    assert space["model"](torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert compress.__name__ in program


def test_the_training_loop_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, _ = blocks("python")
    model = Block()
    space: dict[str, Any] = {
        "model": model,
        "images": batch_of(4)[0],
        "loader": [batch_of(16, number) for number in range(400)],
        "my_loss": torch.nn.functional.cross_entropy,
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    exec(program, space)
    assert space["pruner"].done
    images, _ = batch_of(4)
    again = compress.load("pruned.safetensors", build=Block)
    assert torch.equal(again(images), model.eval()(images))


def test_budget_file_is_valid() -> None:
    (text,) = blocks("toml")
    assert validated(Limits, tomllib.loads(text), source="README").latency.max_ratio


def expanded(pattern: str) -> list[str]:
    """Return the names that ``a{b,c}`` stands for, as a shell would."""
    before, brace, rest = pattern.partition("{")
    inside, _, after = rest.partition("}")
    return [before + part + after for part in inside.split(",")] if brace else [pattern]


def test_every_named_configuration_is_listed() -> None:
    cells = [
        name for row in rows(README, "## Configuration") for name in re.findall("`(.+?)`", row[0])
    ]
    assert sorted(name for cell in cells for name in expanded(cell)) == sorted(named_files(""))
    sections = [
        n for n, f in RunConfig.model_fields.items() if n not in ("seed", "device", "tensorboard")
    ]
    assert all(f"`{section}`" in README for section in sections)


def test_exit_codes_are_those_of_the_help() -> None:
    codes = {int(row[0]) for row in rows(README, "## Exit codes")}
    assert codes == {int(code) for code in re.findall(r"\b\d+\b", cli.EXIT_CODES)}


@pytest.mark.parametrize(
    ("page", "heading", "section"),
    [
        ("pruning.md", "## Settings", PruneConfig),
        ("distributed.md", "## How the machine computes", ComputeConfig),
    ],
)
def test_settings_are_those_of_the_code(page: str, heading: str, section: type[Section]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    documented = {row[0].strip("`"): row[1].strip("`") for row in rows(text, heading)}
    defaults = {name: field.default for name, field in section.model_fields.items()}
    written = {
        name: "none" if value is None else "[]" if value == () else str(value).lower()
        for name, value in defaults.items()
    }
    assert documented == written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
