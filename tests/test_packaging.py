"""What is installed, what imports what, and that asking for help is quick and needs no torch."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer.main

import cli
import compress
from compress.files.documents import tomllib

ROOT = Path(cli.__file__).parent
PACKAGES = ("bench", "compress", "configs", "export")
LAYERS = ("cli", "bench", "export", "compress")
"""A module imports from its own layer and from those to the right of it."""
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "tensorrt", "numpy", "sklearn", "scipy")
COMMANDS = {
    "run": (
        "config set output model data resume overwrite json checkpoint budget criterion target "
        "precision runtime batch latency-table weights"
    ),
    "train": "config set output model data resume overwrite json",
    "prune": (
        "config set output model data resume overwrite json checkpoint budget criterion target "
        "precision runtime batch latency-table weights"
    ),
    "export": "target precision batch engine triton set output model data json",
    "profile": (
        "config runtime precision batch threads channel-multiple output overwrite model data set "
        "json"
    ),
    "bench": "runtime precision batch against limits baseline data model set output json",
    "gate": "limits baseline set output json",
    "report": "output json",
    "baseline": "output overwrite json",
    "doctor": "target json",
    "inspect": "model set weights json",
    "import": "output model data set weights classes overwrite json",
    "oracle": (
        "checkpoint output config data model images split batch-size criteria pairs seed set "
        "resume overwrite json"
    ),
    "sweep": (
        "config checkpoint data model budget max-drop kind lowest tolerance points devices jobs "
        "criterion target precision runtime batch latency-table set output resume overwrite json "
        "weights"
    ),
}

needs_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="the wheel is tested, not a checkout"
)


def modules() -> Iterator[tuple[str, Path]]:
    yield "cli", ROOT / "cli.py"
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@needs_checkout
def test_the_wheel_takes_every_package_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["only-include"]) == {"cli.py", *PACKAGES}
    assert all((ROOT / name).exists() for name in wheel["only-include"])
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(PACKAGES), "a package that is not installed, or a folder that is none"


def hides(pattern: str, path: Path) -> bool:
    """Whether a pattern of .gitignore matches a path; one that begins with / does at the root."""
    parts = path.parts[:1] if pattern.startswith("/") else path.parts
    return any(fnmatch(part, pattern.strip("/")) for part in parts)


@needs_checkout
def test_no_ignored_pattern_hides_a_file_from_the_wheel() -> None:
    """Hatchling leaves out what .gitignore names, without a word."""
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    inside = [
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".toml", ".j2", ".css", ".json", ".safetensors")
    ]
    assert inside
    for path in inside:
        hidden = [p for p in patterns if hides(p, path)]
        assert not hidden, f"{path} is hidden by {hidden}"


@needs_checkout
def test_the_sdist_takes_what_there_is_and_nothing_that_is_made() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    taken = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"])
    assert all((ROOT / name).exists() for name in taken)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is no repository of git")
    held = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    by_itself = {"pyproject.toml", "LICENSE", ".gitignore"}  # hatchling takes these anyway
    assert held == taken | by_itself


@needs_checkout
def test_the_changelog_begins_with_the_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changes, re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == compress.__version__


@needs_checkout
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_an_image_is_pinned_runs_as_nobody_special_and_installs_what_there_is(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", base) for base in bases)
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["compress"]
    assert 'ENTRYPOINT ["compress"]' in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(re.findall(r"EXTRA=(\w+)", text))
    assert extras <= set(project["project"]["optional-dependencies"])
    assert all((ROOT / path).is_file() for path in re.findall(r"CONSTRAINTS=([\w/.]+)", text))


@needs_checkout
def test_folders_of_tests_are_no_packages() -> None:
    """tests/compress/__init__.py would stand in the way of the compress that is tested."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_module_imports() -> None:
    for name, _ in modules():
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public in getattr(module, "__all__", ()):
            assert getattr(module, public) is not None, f"{name}.{public}"


def test_the_public_names_are_there_and_sorted() -> None:
    import compress

    assert sorted(compress.__all__) == compress.__all__
    assert callable(compress.load_model)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compress.nothing


def test_imports_go_one_way() -> None:
    for name, path in modules():
        own = name.partition(".")[0]
        if name == "compress":  # the front door: names of all layers, loaded when asked for
            continue
        allowed = LAYERS[LAYERS.index(own) :] if own in LAYERS else ()
        for imported in imported_names(path):
            top = imported.partition(".")[0]
            assert top not in (*LAYERS, "configs", "tests") or top in allowed, f"{name}: {imported}"


def test_help_needs_no_torch() -> None:
    asked = ("--help", "--version", "prune --help", "gate --help")
    program = (
        "import sys, cli\n"
        f"for words in {asked}:\n"
        "    sys.argv = ['compress', *words.split()]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        f"    print(words, *sorted(set(sys.modules) & set({HEAVY})), sep=';', file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.count("Usage:") == 3
    assert done.stderr.splitlines() == list(asked)


def test_every_command_has_the_documented_options() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert set(group.commands) == set(COMMANDS)
    for name, command in group.commands.items():
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        options = {o for p in shown for o in p.opts if o.startswith("--")}
        assert options == {f"--{option}" for option in COMMANDS[name].split()}, name
        assert command.help, name
        assert all(getattr(p, "help", None) for p in shown), name
