"""torchrun starts several processes of the command line; one is killed, one machine is taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import invoke, small
from ranks import free_port
from safetensors.torch import load_file

from compress.checkpoints.checkpoint import load_checkpoint
from compress.terminal.console import say, say_error

if not Path("/proc/self/task").is_dir():
    pytest.skip("the processes of torchrun are found in /proc", allow_module_level=True)

SETTINGS = (
    # Long enough after the first state that there is something left to kill.
    *small(data_batch_size="64", prune_steps="3", prune_interval="2", finetune_epochs="5"),
    *("--set", "compute.sync_batchnorm=true", "--set", "save.every_steps=4"),
    # On a machine with one GPU, two processes would ask for two.
    *("--set", "tensorboard=false", "--set", "device=cpu"),
)


def torchrun(*arguments: object, ranks: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    """Start the command line in several processes."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--no-python")
    place = ("--nproc-per-node", ranks, "--master-port", free_port(), "--max-restarts", restarts)
    command = (*launcher, *place, sys.executable, "-m", "cli", *arguments)
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for children in found for pid in children.read_text().split())


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    while not file.is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def done(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network that two processes trained."""
    output = tmp_path_factory.mktemp("torchrun") / "trained"
    out, err = done(torchrun("train", "--output", output, *SETTINGS, "--json"))
    assert json.loads(out)["architecture"] == "resnet20"
    assert err.count("training resnet20:") == 1  # one process speaks for both
    assert sorted(file.name for file in output.iterdir()) == [
        "config.toml",
        "dense.safetensors",
        "history.jsonl",
    ]
    return output / "dense.safetensors"


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    """The network that two processes pruned without any interruption."""
    output = dense.parent.parent / "pruned"
    done(torchrun("prune", "--checkpoint", dense, "--output", output, *SETTINGS))
    return output / "pruned.safetensors"


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_end_at_the_same_weights(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    process = torchrun("prune", "--checkpoint", dense, "--output", output, *SETTINGS, restarts=1)
    wait_for(output / "state" / "state.safetensors", process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    _, err = done(process)
    assert "started again: going on with the run" in err
    expected, actual = load_file(pruned), load_file(output / "pruned.safetensors")
    assert actual.keys() == expected.keys()
    assert [
        name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)
    ] == []
    assert not (output / "state").exists() or not any((output / "state").iterdir())


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "moved"
    process = torchrun("prune", "--checkpoint", dense, "--output", output, *SETTINGS)
    wait_for(output / "state" / "state.safetensors", process)
    process.terminate()  # the scheduler takes the machine
    process.communicate()
    assert process.returncode != 0
    assert not (output / "pruned.safetensors").exists()
    done(torchrun("prune", "--resume", "--output", output, ranks=1))
    # The weights differ as they would by another order of images: which channels go may differ.
    events = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    taken = [event["pruning_step"] for event in events if event["event"] == "prune_step"]
    assert taken == list(range(1, len(taken) + 1))
    assert len(taken) >= 3
    actual = load_checkpoint(output / "pruned.safetensors").description.metrics
    expected = load_checkpoint(pruned).description.metrics
    assert actual["finetuned"]["macs"] <= 0.5 * actual["dense"]["macs"]
    assert actual["finetuned"]["images"] == expected["finetuned"]["images"] == 599


@pytest.mark.slow
def test_a_command_for_one_process_refuses_several(tmp_path: Path) -> None:
    process = torchrun("gate", tmp_path / "report.json")
    _, err = process.communicate()
    assert process.returncode != 0
    assert "error: compress gate runs in one process and WORLD_SIZE says 2" in err


def test_an_error_names_the_process_that_met_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, whose in (("0", ""), ("3", "rank 3: ")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert invoke("gate", "report.json").exit_code == 2
        assert capsys.readouterr().err == ""
        say("progress")
        say_error("the disk\nis full")
        said = "" if whose else "progress\n"
        assert capsys.readouterr().err == f"{said}{whose}error: the disk is full\n"


@pytest.mark.slow
def test_several_processes_need_a_name_for_their_directory() -> None:
    process = torchrun("train", *SETTINGS)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "error: several processes need --output DIR" in err
