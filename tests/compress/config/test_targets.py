from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compress.config import load_config
from compress.config.targets import load_target
from compress.errors import ConfigError
from compress.files.documents import named_files

ROOT = Path(__file__).parents[3]
A100 = """
description = "NVIDIA A100"
opset = 20
ir_version = 10
sm = "8.0"
builder = "tensorrt"
tensorrt = ">=10.0"
onnxruntime = ["CUDAExecutionProvider"]
channel_multiple = { fp32 = 4, fp16 = 8, int8 = 32 }
precisions = ["fp16"]
"""


@pytest.mark.parametrize("name", sorted(named_files("targets")))
def test_every_shipped_target_parses_and_bears_its_name(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.onnxruntime[-1] == "CPUExecutionProvider"
    assert target.channel_multiple["fp32"] == (8 if name == "cpu" else 1)


def test_v100_is_what_tensorrt_8_can_read() -> None:
    target = load_target("v100")
    assert (target.opset, target.ir_version, target.sm) == (17, 8, "7.0")
    assert target.tensorrt == ">=8.5,<10.5"
    assert not target.two_input_reduce_mean
    assert target.channel_multiple["fp16"] == 8


def test_a_file_of_the_users_own_is_a_target(tmp_path: Path) -> None:
    path = tmp_path / "a100.toml"
    path.write_text(A100)
    target = load_target(str(path))
    assert target.name == "a100"
    assert target.two_input_reduce_mean
    assert target.channel_multiple == {"fp32": 4, "fp16": 8, "int8": 32}


def test_the_table_of_the_documentation_is_that_of_the_files() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1:-1]
        for line in page.splitlines()
        if re.match(r"\| `\w+` \| (SM|no|any)", line)
    ]
    assert {row[0].strip(" `") for row in rows} == set(named_files("targets"))
    for name, gpu, engines, ceilings, pays, computes in ([c.strip() for c in row] for row in rows):
        target = load_target(name.strip("`"))
        assert f"{target.opset}, {target.ir_version}" == ceilings
        assert ", ".join(target.precisions) == pays
        rest = set(target.channel_multiple) - set(target.precisions)
        assert set(computes.split(", ")) == rest
        assert gpu == (f"SM {target.sm}" if target.sm else gpu)
        assert bool(engines) == (target.builder is not None)
        assert engines.startswith("TensorRT-RTX") == (target.builder == "tensorrt_rtx")


@pytest.mark.parametrize("name", ["v100", "t4", "a100", "h100", "rtx", "cpu"])
def test_widths_are_rounded_for_what_pays_and_what_is_asked(name: str) -> None:
    target = load_target(name)
    best = target.channel_multiple[target.precisions[0]]
    assert target.rounding("fp32") == best
    assert target.rounding("int8") == max(best, target.channel_multiple["int8"])
    prune = load_config("digits-resnet20", [f"export.target={name}"]).prune
    assert (prune.channel_multiple, prune.relax_multiple) == (target.rounding("fp32"), True)
    told = load_config("digits-resnet20", ["prune.channel_multiple=16"]).prune
    assert (told.channel_multiple, told.relax_multiple) == (16, False)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('sm = "8.0"', 'sms = "8.0"', "did you mean 'sm'"),
        ("opset = 20", "opset = 12", "opset"),
        ("opset = 20", "", "opset.*missing"),
        ('sm = "8.0"', 'sm = "80"', "sm"),
        (">=10.0", "ten or so", "tensorrt"),
        ("CUDAExecutionProvider", "CUDA", "end in ExecutionProvider"),
        ("int8 = 32", "int4 = 32", "channel_multiple"),
        ("int8 = 32", "int8 = 0", "channel_multiple"),
        ('builder = "tensorrt"', "", "both or neither"),
        ("fp16 = 8, ", "", "channel_multiple has no fp16"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(A100.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        load_target(str(path))


def test_a_misspelt_target_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'v100'"):
        load_target("v10")


IMPORTING = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    found = {"torch", "onnxruntime", "tensorrt", "tensorrt_rtx"} & set(sys.modules)
    if found:
        sys.exit(f"{module} loads {sorted(found)}")
print(len(sys.argv) - 1)
"""


NETWORKS = {"export.latency.alone", "export.precision.planning", "export.quantizing"}
"""Modules about networks of torch; others import them when they are needed."""


def test_importing_loads_no_framework() -> None:
    """One process imports every module of the package: what none of all loads, not one loads."""
    files = sorted((ROOT / "export").rglob("[a-z]*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    modules = [name for name in names if name not in NETWORKS]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(len(modules)), done.stderr
