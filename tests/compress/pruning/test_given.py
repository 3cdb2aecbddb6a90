"""Importance and masks that are given in a file."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import NETWORKS
from runs import DATA, assert_sound, config_of, graph_of, history, kept_in, pruned_run, start

import compress
from compress.config import PruneConfig, load_config, save_config
from compress.errors import ConfigError, InterruptedRunError
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.given import read_importance
from compress.pruning.masking import candidates
from compress.runs.prune import check_budget, prune
from compress.runs.session import Session

NAME = "PreActivation"
pytestmark = pytest.mark.usefixtures("unpainted")


@lru_cache
def graph_of_all() -> ChannelGraph:
    torch.manual_seed(0)
    return analyse(NETWORKS[NAME](), (3, 12, 12))


def drawn(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in graph_of_all().prunable}


def written(path: Path, values: dict[str, Any]) -> Path:
    plain = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in values.items()}
    path.write_text(json.dumps(plain))
    return path


def expected(values: dict[str, np.ndarray], removed: int) -> Mask:
    """Remove the least important units of all groups together; each keeps its most important."""
    graph = graph_of_all()
    removable = sorted(
        (score, unit)
        for group in graph.prunable
        for score, unit in sorted(zip(values[group.name], group.units, strict=True))[:-1]
    )
    kept = graph.everything()
    kept[[unit for _, unit in removable[:removed]]] = False
    return kept


@pytest.mark.parametrize("kind", ["json", "safetensors", "weights"])
def test_channels_go_in_the_order_of_the_file(tmp_path: Path, kind: str) -> None:
    values = drawn()
    path = tmp_path / f"importance.{'json' if kind == 'json' else 'safetensors'}"
    if kind == "json":
        written(path, values)
    else:
        writers = {group.name: group.writers[-1] for group in graph_of_all().prunable}
        names = {n: n if kind == "safetensors" else f"{writers[n]}.weight" for n in values}
        safetensors.torch.save_file(
            {names[n]: torch.from_numpy(v) for n, v in values.items()}, path
        )
    config = config_of(f"networks:{NAME}", importance_from=path, budget="removed=9", step_size=4)
    run = pruned_run(tmp_path / "run", config)
    assert_sound(run, config)
    assert np.array_equal(kept_in(run, graph_of(run, config)), expected(values, 9))
    assert [line["step"] for line in history(run, "prune_step")] == [2, 4, 6]


def test_a_mask_of_kept_indices_is_what_is_kept(tmp_path: Path) -> None:
    graph = graph_of_all()
    masks = {group.name: {"kept": list(range(1, group.size, 2))} for group in graph.prunable}
    removed = sum(group.size - group.size // 2 for group in graph.prunable)
    path = written(tmp_path / "mask.json", masks)
    config = config_of(f"networks:{NAME}", importance_from=path, budget=f"removed={removed}")
    run = pruned_run(tmp_path / "run", config)
    kept = kept_in(run, graph_of(run, config))
    for group in graph.prunable:
        assert np.flatnonzero(kept[group.units]).tolist() == masks[group.name]["kept"]


def test_a_pruner_of_ones_own_loop_needs_no_scores(tmp_path: Path) -> None:
    values = drawn(1)
    path = written(tmp_path / "importance.json", values)
    torch.manual_seed(0)
    model = NETWORKS[NAME]()
    example = torch.randn(2, 3, 12, 12)
    pruner = compress.Pruner(
        model, example, optimizer=None, importance_from=path, budget="removed=5", step_size=5,
        interval=1, min_channels=1, min_share=0.0, criterion="obd",
    )  # fmt: skip
    assert pruner.step()
    assert np.array_equal(pruner.at.kept, expected(values, 5))


@pytest.mark.slow
def test_a_resumed_run_goes_on_by_what_was_read_first(tmp_path: Path) -> None:
    path = written(tmp_path / "importance.json", drawn(2))
    config = config_of(f"networks:{NAME}", importance_from=path, budget="removed=9", step_size=1)
    whole = pruned_run(tmp_path / "whole", config)
    run = start(tmp_path / "stopped", config)
    session = Session(run)
    session.stop.set()
    with pytest.raises(InterruptedRunError):
        prune(config, DATA, session)
    written(path, drawn(3))
    while not run.pruned.is_file():
        session = Session(run)
        session.stop.set()
        with suppress(InterruptedRunError):
            prune(config, DATA, session)
    assert history(run) == history(whole)
    assert np.array_equal(*(kept_in(r, graph_of_all()) for r in (run, whole)))


def test_a_relative_path_is_one_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    config = load_config(settings=["prune.importance_from=mine.json"])
    assert config.prune.importance_from == tmp_path / "mine.json"
    save_config(config, tmp_path / "config.toml")
    monkeypatch.chdir("/")
    assert load_config(str(tmp_path / "config.toml")) == config


# Mistakes

GROUP = graph_of_all().prunable[0]
SIZE = GROUP.size


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sten": [1.0]}, "no group is named 'sten': "),
        ({GROUP.name: ...}, f"says nothing of 1 groups that may be pruned, such as {GROUP.name}"),
        ({GROUP.name: [1.0] * (SIZE + 1)}, rf"holds values of shape \[{SIZE + 1}\] and the group"),
        ({GROUP.name: [[1.0]] * SIZE}, "holds something else than numbers"),
        ({GROUP.name: 7}, "holds no list of numbers"),
        ({GROUP.name: [float("nan")] * SIZE}, "holds values that are not finite"),
        ({f"{GROUP.writers[0]}.weight": [1.0] * SIZE}, f"names the group {GROUP.name} twice"),
        ({GROUP.name: {"kept": [SIZE]}}, f"keeps unit {SIZE} and the group has the units 0 to"),
        ({GROUP.name: {"kept": [-1]}}, "keeps unit -1 and the group has the units 0 to"),
        ({GROUP.name: {"kept": [True]}}, "must be a list of numbers, or"),
        ({GROUP.name: {"keep": [1]}}, "must be a list of numbers, or"),
    ],
)
def test_a_mistake_names_the_group(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    values = {n: v for n, v in {**drawn(), **changes}.items() if v is not ...}
    path = written(tmp_path / "importance.json", values)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_importance(path, graph_of_all(), candidates(graph_of_all(), PruneConfig()))
    assert str(path) in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "criteria_22_final.pickle"
    path.write_bytes(pickle.dumps([np.ones(4)]))
    with pytest.raises(ConfigError, match="a pickle is never loaded: write its numbers as JSON"):
        read_importance(path, graph_of_all(), ())
    with pytest.raises(ConfigError, match="No such file"):
        read_importance(tmp_path / "none.json", graph_of_all(), ())
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds no JSON object with numbers"):
        read_importance(tmp_path / "list.json", graph_of_all(), ())


def test_a_file_that_does_not_fit_is_refused_before_any_training(tmp_path: Path) -> None:
    path = written(tmp_path / "importance.json", {})
    with pytest.raises(ConfigError, match="says nothing of"):
        check_budget(config_of(f"networks:{NAME}", importance_from=path), DATA)
