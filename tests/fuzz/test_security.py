"""The promises of docs/security.md, as far as no test of a single module holds them."""

from __future__ import annotations

import ast
import getpass
import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from commands import invoke, small
from mutations import refused_in_a_sentence
from onnx import TensorProto, helper
from PIL import Image
from typer.testing import Result

import compress
from bench.measuring.environment import fingerprint
from compress.checkpoints.description import METADATA_KEY, Description
from compress.config import RunConfig, save_config
from compress.data.decoding import DECODE_ERRORS, decode_rgb
from compress.errors import CheckpointError, ConfigError
from compress.files.documents import read_toml
from export.onnx.check import weight_files
from export.runners import OnnxRunner
from export.triton import model_name

ROOT = Path(compress.__file__).parents[1]
PACKAGES = ("compress", "export", "bench")
SOURCES = [ROOT / "cli.py", *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]
EVIL = "evil_network:build"


def names_called(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call of a module by the name that its source writes."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


# Code


def test_nothing_that_executes_files_is_called() -> None:
    forbidden = re.compile(
        r"(eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)|runpy\.\w+"
        r"|(pickle|dill|marshal|shelve|joblib|yaml)\.\w+|onnx\.load_model|ctypes\.\w+)"
    )
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name, _ in names_called(path)
        if forbidden.fullmatch(name)
    ]
    assert found == []


def test_every_reader_of_pickles_reads_weights_alone() -> None:
    options = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    readers = 0
    for path in SOURCES:
        for name, call in names_called(path):
            if name in options:
                option, wanted = options[name]
                given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg == option}
                assert given == {option: wanted}, path
                readers += 1
    assert readers >= 1


def test_modules_are_imported_by_name_in_five_places() -> None:
    """A sixth place needs a reason why no file decides what it imports."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for name, _ in names_called(path)
        if name.endswith("import_module")
    }
    assert found == {
        "compress/__init__.py",  # a table of constants
        "compress/networks/models.py",  # what --model names
        "export/engines/api.py",  # one of two names
        "export/nvml.py",  # a constant
        "export/probes.py",  # constants
    }


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code that leaves a mark when it is imported, and a run that names it."""
    code = "from pathlib import Path\nPath('imported').touch()\ndef build(num_classes): ...\n"
    (tmp_path / "evil_network.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "evil_network", raising=False)
    write_run(tmp_path / "run", EVIL)
    return tmp_path


def write_run(path: Path, name: str) -> None:
    """Write a run directory that names a network, as somebody else may hand it over."""
    config = RunConfig.model_validate({"model": {"name": name}})
    (path / "export").mkdir(parents=True, exist_ok=True)
    save_config(config, path / "config.toml")
    digits = Description(
        architecture=name,
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=(0.3,),
        std=(0.4,),
    )
    metadata = {METADATA_KEY: digits.model_dump_json()}
    for file in ("dense", "pruned"):
        tensors = {"fc.weight": torch.zeros(10, 4)}
        safetensors.torch.save_file(tensors, path / f"{file}.safetensors", metadata)


COMMANDS = (
    "train --config run/config.toml --output new",
    "run --config run/config.toml --output new",
    "prune --config run/config.toml --checkpoint run/dense.safetensors --output new",
    "sweep --config run/config.toml --budget macs=0.5 --output new",
    "train --resume --output run",
    "run --resume --output run",
    "prune --resume --output run",
    "export run",
    "bench run",
    "oracle --checkpoint run --output new",
    "oracle --checkpoint run/dense.safetensors --output new",
    "inspect run/dense.safetensors",
    "import run/dense.safetensors --output new.safetensors",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_file_names_code_to_import(evil: Path, command: str) -> None:
    result = invoke(*command.split())
    assert result.exit_code in (1, 2), result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (evil / "imported").exists()
    assert not (evil / "new").exists()


def test_code_is_imported_when_the_user_names_it(evil: Path) -> None:
    for options in (["--model", EVIL], ["--set", f"model.name={EVIL}"]):
        (evil / "imported").unlink(missing_ok=True)
        sys.modules.pop("evil_network", None)
        assert "not a torch.nn.Module" in invoke("train", *options, "--output", "new").stderr
        assert (evil / "imported").exists()


def test_no_file_makes_another_package_build_a_network(
    evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported() -> None:
        raise AssertionError("timm was imported")

    monkeypatch.setattr("compress.networks.registries._timm", imported)
    write_run(evil / "run", "timm:test_resnet")
    for command in COMMANDS:
        result = invoke(*command.split())
        assert result.exit_code in (1, 2), result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert not (evil / "new").exists()


OWN = """from torch import nn
def build(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dense file of a run of the user's own, in the folder where it was made."""
    for folder in ("home", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_of_the_user", raising=False)
    Path("own_of_the_user.py").write_text(OWN)
    options = ("--model", "own_of_the_user:build", *small(train_epochs="0"))
    result = invoke("train", *options, "--output", "run")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "work" / "run" / "dense.safetensors"


def is_refused(file: Path) -> bool:
    result = invoke("inspect", file)
    says = "pass --model own_of_the_user:build"
    assert (result.exit_code == 1 and says in result.stderr) or result.exit_code == 0
    return result.exit_code == 1


def changed(file: Path, **description: Any) -> Path:
    """Return a copy of a file that says something else of itself."""
    text = read_metadata(file)
    document = {**json.loads(text), **description}
    other = file.with_name("changed.safetensors")
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors, other, {METADATA_KEY: json.dumps(document)})
    return other


def read_metadata(file: Path) -> str:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"][METADATA_KEY])


def test_the_user_s_own_files_are_known_wherever_they_are_moved(own: Path) -> None:
    assert not is_refused(own)
    Path("elsewhere").mkdir()
    assert not is_refused(own.rename("elsewhere/other.safetensors"))


def test_a_changed_file_is_none_of_the_user_s(own: Path) -> None:
    """So a run that takes the place of the user's own, or a file added to it, brings nothing."""
    assert is_refused(changed(own, metrics={"x": 1}))
    assert is_refused(changed(own, options={"width": 8}))
    config = own.with_name("config.toml")
    config.write_text(config.read_text() + "# another\n")
    result = invoke("train", "--resume", "--output", "run")
    assert "pass --model own_of_the_user:build to allow it" in result.stderr
    assert result.exit_code == 2


def test_what_was_allowed_in_one_folder_is_not_allowed_in_another(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the same name may lie there, and it would be imported from there."""
    (tmp_path / "download").mkdir()
    monkeypatch.chdir(tmp_path / "download")
    assert is_refused(own)


def test_what_one_user_allowed_nobody_else_has_allowed(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert is_refused(own)


@pytest.mark.parametrize("variable", ["HOME", "XDG_STATE_HOME"])
def test_an_archive_brings_no_permission_with_it(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Nothing is noted or believed where the notes would lie below the working folder."""
    notes = tmp_path / "home" / ".local" / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(notes))
    assert not is_refused(own)
    below = {"HOME": ".local/state", "XDG_STATE_HOME": "."}[variable]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv(variable, str(Path.cwd()))
    shutil.copytree(notes, Path.cwd() / below, dirs_exist_ok=True)
    assert is_refused(own)
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert is_refused(own)


def test_a_home_that_cannot_be_written_remembers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_of_a_guest.py").write_text(OWN)
    options = ("--model", "own_of_a_guest:build", *small(train_epochs="0"))
    result = invoke("train", *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert invoke("inspect", tmp_path / "run" / "dense.safetensors").exit_code == 1


def test_a_run_goes_on_with_the_network_it_has(evil: Path) -> None:
    result = invoke("train", "--resume", "--output", "run", "--model", "resnet20")
    assert "--model asks for resnet20" in result.stderr
    assert result.exit_code == 2


# Claims

HOSTILE = """
import io, json, os, resource, sys, zipfile
import torch
from compress.checkpoints.description import METADATA_KEY
from compress.checkpoints.permission import Permission
from compress.errors import CompressError
from compress.seed2019.importing import import_checkpoint
from compress.config import ModelConfig
from compress.networks.models import build_model
from compress.checkpoints.summary import inspect_checkpoint
from pathlib import Path

RESNET18 = ModelConfig(name="resnet18")

def saved(state, name):
    torch.save(state, name)
    return Path(name)

def of(name, **changes):
    state = build_model(name, num_classes=2).state_dict()
    return {**state, **changes}

def header(text, size=None):
    data = json.dumps(text).encode() if not isinstance(text, bytes) else text
    path = Path(f"h{len(list(Path().iterdir()))}.safetensors")
    path.write_bytes((size or len(data)).to_bytes(8, "little") + data)
    return path

def described(**changes):
    document = {
        "format_version": 1, "architecture": "lenet", "classes": ["a"], "input_size": [1, 8, 8],
        "mean": [0.5], "std": [0.5], "recipe": {}, **changes,
    }
    return header({"__metadata__": {METADATA_KEY: json.dumps(document)}})

def bomb():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * 2**26)
    Path("bomb.pth").write_bytes(stream.getvalue())
    return Path("bomb.pth")

wide = torch.zeros(1).expand(10**12, 512)
flat, planes = torch.zeros(10**9, 0), torch.zeros(6, 10**9, 5, 0)
deep = {"size": 10**12, "kept": [0]}
vast = {"t": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}
long = {"t": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
files = {
    "a trillion classes of one number": saved(of("resnet18", **{"fc.weight": wide}), "wide.pth"),
    "a billion classes of no number": saved(of("resnet18", **{"fc.weight": flat}), "flat.pth"),
    "a billion channels": saved(of("lenet", **{"conv1.weight": planes}), "planes.pth"),
    "an archive that unpacks to a thousand times its size": bomb(),
    "a header of 2 GiB": header(b"{}", 2**31),
    "a header of 2^63": header(b"{}", 2**63),
    "a recipe of a trillion": described(recipe={"conv1": deep}),
    "ten thousand groups of a trillion": described(recipe={f"g{n}": deep for n in range(10**4)}),
    "an image of 10^7": described(input_size=[1, 10**7, 10**7]),
    "images of 2^16": described(input_size=[1, 2**16, 2**16]),
    "many channels": described(input_size=[2**16, 8, 8], mean=[0.5] * 2**16, std=[0.5] * 2**16),
    "many classes": described(classes=["a"] * 10**5),
    "many layers": described(architecture="preact_resnet152", input_size=[3, 2**16, 2**16],
                             mean=[0.5] * 3, std=[0.5] * 3, classes=["a"] * 10**4),
    "a shape that overflows": header({**vast, "__metadata__": {}}),
    "a tensor of 4 TB": header({**long, "__metadata__": {}}),
}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))

def tried(what, read):
    try:
        read()
        print(what, "READ")
    except CompressError as error:
        print(what, "refused", len(str(error)) < 1000)
    except BaseException as error:
        print(what, type(error).__name__, str(error)[:200])

for what, path in files.items():
    tried(what, lambda: inspect_checkpoint(path, Permission(RESNET18)))
    if path.suffix == ".pth":
        tried(what, lambda: inspect_checkpoint(path))
    tried(what, lambda: import_checkpoint(path, Path("out.safetensors"), model=RESNET18))
    tried(what, lambda: import_checkpoint(path, Path("out.safetensors")))
print("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_absurd_claims_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """A GiB on top of what Python and torch have taken is enough to refuse each in a sentence."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    *lines, last = done.stdout.splitlines()
    assert last.startswith("done"), done.stderr[-2000:]
    assert len(lines) == 15 * 3 + 4
    assert [line for line in lines if not line.endswith("refused True")] == []


def png(width: int, height: int) -> bytes:
    """Return a small PNG that claims to be of any size."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_an_image_that_claims_a_billion_pixels_is_refused() -> None:
    with pytest.raises(Image.DecompressionBombError):
        decode_rgb(png(40_000, 25_000))
    assert Image.DecompressionBombError in DECODE_ERRORS


def test_no_image_starts_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "EPS")
    assert Image.open(io.BytesIO(stream.getvalue())).format == "EPS"  # whatever it is called
    with pytest.raises(DECODE_ERRORS):
        decode_rgb(stream.getvalue())


# Paths


def onnx_with_weight(location: str, *, inside: bool) -> onnx.ModelProto:
    """Return a network whose weight lies in another file, as initializer or in an attribute."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if inside:
        constant = helper.make_node("Constant", [], ["w"])
        constant.attribute.append(onnx.AttributeProto(name="value", type=4, t=weight))
        nodes.insert(0, constant)
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [] if inside else [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "secret.bin", "/etc/passwd", "m.onnx/../secret.bin", "m.onnx.link"],
)
def test_an_onnx_file_reads_no_other_file(tmp_path: Path, location: str, inside: bool) -> None:
    path = tmp_path / "run" / "m.onnx"
    path.parent.mkdir()
    for folder in (tmp_path, path.parent):
        np.arange(4, dtype=np.float32).tofile(folder / "secret.bin")
    (path.parent / "m.onnx.link").symlink_to(tmp_path / "secret.bin")
    path.write_bytes(onnx_with_weight(location, inside=inside).SerializeToString())
    with pytest.raises(CheckpointError, match="keeps weight 'w' in"):
        weight_files(path)
    with pytest.raises(CheckpointError, match="only files beside it"), OnnxRunner(path):
        pass


def test_an_onnx_file_reads_its_own_weights_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_with_weight("m.onnx.data", inside=False).SerializeToString())
    with pytest.raises(CheckpointError, match=r"there is no .*m.onnx.data, in which m.onnx keeps"):
        weight_files(path)
    np.arange(4, dtype=np.float32).tofile(tmp_path / "m.onnx.data")
    assert weight_files(path) == (path, tmp_path / "m.onnx.data")
    with OnnxRunner(path) as runner:
        (found,) = runner.run({"x": np.ones(4, np.float32)}).values()
    assert found.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "..", "a/../../b", "\x00", "~root"])
def test_names_in_files_become_no_paths(name: str, tmp_path: Path) -> None:
    assert "/" not in model_name(name, "pruned", "fp32")
    assert not model_name(name, "pruned", "fp32").startswith(".")
    document = tmp_path / "c.toml"
    document.write_text(f"extends = {json.dumps(name)}\n")
    with pytest.raises(ConfigError, match="must be the name of another configuration"):
        read_toml(str(document))


def test_a_sidecar_s_file_name_is_not_followed() -> None:
    """Names of files come from the run directory; what a sidecar calls them is for people."""
    readers = [
        path for path in SOURCES if re.search(r"\[\"file\"\]|\.get\(\"file\"", path.read_text())
    ]
    assert [path.relative_to(ROOT).as_posix() for path in readers] == ["export/summary.py"]


# Secrets


def secrets() -> set[str]:
    return {socket.gethostname(), str(Path.home()), str(Path.cwd()), platform.node()} - {""}


def test_a_report_says_nothing_of_who_measured_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PASSWORD"):
        monkeypatch.setenv(name, f"canary-of-{name}")
    text = fingerprint(threads=1).model_dump_json()
    assert "canary" not in text
    assert not [secret for secret in secrets() if len(secret) > 3 and secret in text]
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_a_run_writes_no_variable_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-in-a-coal-mine")
    result: Result = invoke("train", "--output", tmp_path / "run", *small(train_epochs="0"))
    assert result.exit_code == 0, result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if b"canary" in path.read_bytes()]
    assert "canary" not in result.stdout + result.stderr


# Pages


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('"\\u001b[2J\\u202e" = 1\n')
    result = invoke("train", "--config", path, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert "\u202e" not in result.stderr
    assert refused_in_a_sentence(lambda: read_toml("\x1b[2J"))


# The page


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every promise of the page with the tests that it names, as (file, function)."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    section = page.split("## Promises")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    return [
        (row.split("|")[1].strip(), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row))
        for row in rows[1:]
    ]


def test_every_promise_of_the_page_is_held_by_a_test() -> None:
    assert len(promises()) >= 10
    for promise, tests in promises():
        assert tests, promise
        for file, function in tests:
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (file, function)


def test_every_test_here_holds_a_promise() -> None:
    mine = Path(__file__).relative_to(ROOT).as_posix()
    named = {function for _, tests in promises() for file, function in tests if file == mine}
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), flags=re.MULTILINE))
    assert here - named == {
        "test_code_is_imported_when_the_user_names_it",
        "test_a_run_goes_on_with_the_network_it_has",
        "test_every_promise_of_the_page_is_held_by_a_test",
        "test_every_test_here_holds_a_promise",
    }
