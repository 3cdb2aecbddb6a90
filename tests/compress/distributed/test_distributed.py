"""Processes that train together compute what one process computes on the joined minibatch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import joined_loops
import joined_work
import pytest
import torch
from ranks import together
from runs import DATA, start
from torch.distributed import HashStore

from compress.data.batches import TrainBatches
from compress.distributed import meeting
from compress.distributed.world import device_name, launched
from compress.errors import (
    ConfigError,
    EnvironmentUnfitError,
    ModelError,
    RunError,
    TrainingError,
)

RANKS = int(os.environ.get("TEST_RANKS", "2"))
"""4 is proved by hand: four more starts of torch would cost every run of the tests."""

# Sums of float32 in another order: 6e-8 each, grown by three steps of training.
CLOSE = {"rtol": 2e-4, "atol": 2e-6}

Case = tuple[Any, ...]
CASES: list[Case] = [
    ("PreActivation", "taylor-gate"),
    ("PreActivation", "taylor-gate", "block"),
    ("Smooth", "obd"),
    # Without BatchNorm, the parts of a minibatch add up to it exactly.
    ("Smooth", "taylor-gate-fg", "read", 2),
]
MORE: list[Case] = [
    ("Dense", "taylor-gate", "block"),  # no residual stream: gates that close nothing
    ("PreActivation", "taylor-gate-fg"),
    ("PreActivation", "taylor-output"),
    ("PreActivation", "taylor-weight"),
    ("Separable", "taylor-gate"),
    ("PreActivation", "weight-norm"),
    ("Smooth", "taylor-gate-so"),
    ("PreActivation", "obd"),
    ("Smooth", "taylor-gate", "read", 2),
    ("Smooth", "taylor-gate", "block", 2),
    ("Smooth", "taylor-output", "read", 2),
    ("Smooth", "taylor-gate-so", "read", 2),
]


BLIND = ("PreActivation", "taylor-gate", "read", 1, torch.float64, 3, False)
EXACT: list[Case] = [
    ("Smooth", "taylor-gate", "read", 1, torch.float64, 10),
    ("PreActivation", "taylor-gate", "read", 1, torch.float64, 10),
    BLIND,
]


def work_of(folder: Path, cases: list[Case], name: str) -> list[tuple[Any, ...]]:
    """Return tasks: to score in several ways, and a whole run."""
    config = joined_work.config_for(name)
    start(folder / name, config)
    return [
        (joined_work.all_scores, cases),
        (joined_work.prune_together, folder / name, config),
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What every rank found, in one start of the ranks."""
    tasks = work_of(tmp_path_factory.mktemp("joined"), CASES, "PreActivation")
    tasks.append((joined_work.share_of_every_batch, 30))
    tasks.append((joined_work.disagree,))
    tasks.append((joined_work.not_a_number,))
    tasks.append((joined_work.unused_parameter,))
    tasks.append((joined_work.empty_share,))
    tasks.append((joined_loops.pruned,))
    tasks.append((joined_loops.never_wrapped,))
    tasks.append((joined_work.texts,))
    tasks += [(joined_work.train_and_score, *case) for case in EXACT]
    return together(RANKS, joined_work.several, tasks)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The same of what takes longer."""
    tasks = work_of(tmp_path_factory.mktemp("more"), MORE, "Separable")
    return together(RANKS, joined_work.several, tasks)


def test_every_rank_did_everything(done: list[list[Any]]) -> None:
    assert [len(found) for found in done] == [10 + len(EXACT)] * RANKS


def require_scores_of_the_joined_minibatch(scores: list[dict[str, Any]], case: Case) -> None:
    """Assert of what every rank found that one process finds it on the joined minibatch."""
    expected = joined_work.train_and_score(*case)
    assert (expected["scores"] != 0).any()
    for rank, actual in enumerate(scores):
        scale = expected["scores"].abs().max()
        torch.testing.assert_close(
            actual["scores"] / scale, expected["scores"] / scale, rtol=1e-3, atol=2e-5
        )
        # Every rank holds the same bits: the decision is one.
        assert torch.equal(actual["scores"], scores[0]["scores"]), rank
        for key, tensor in expected["weights"].items():
            torch.testing.assert_close(actual["weights"][key], tensor, **CLOSE)
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert actual["skipped"] == 3 * sum(range(RANKS))


def named(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_scores_and_weights_are_those_of_the_joined_minibatch(
    done: list[list[Any]], case: Case
) -> None:
    number = CASES.index(case)
    require_scores_of_the_joined_minibatch([found[0][number] for found in done], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=named)
def test_more_scores_and_weights_are_those_of_the_joined_minibatch(
    more: list[list[Any]], case: Case
) -> None:
    number = MORE.index(case)
    require_scores_of_the_joined_minibatch([found[0][number] for found in more], case)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [("done", "PreActivation"), pytest.param("more", "Separable", marks=pytest.mark.slow)],
)
def test_a_whole_run_removes_the_same_channels_and_ends_at_the_same_weights(
    ranks: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = joined_work.config_for(name)
    start(tmp_path / "alone", config)
    expected = joined_work.prune_together(tmp_path / "alone", config)
    for found in request.getfixturevalue(ranks):
        actual = found[1]
        assert not isinstance(actual, Exception), actual
        assert actual["recipe"] == expected["recipe"]
        for key, tensor in expected["weights"].items():
            assert actual["weights"][key].shape == tensor.shape
            torch.testing.assert_close(actual["weights"][key], tensor, rtol=1e-3, atol=1e-4)
        assert actual["metrics"]["finetuned"] == actual["accuracy"] | {
            key: actual["metrics"]["finetuned"][key] for key in ("macs", "params", "channels")
        }
        assert actual["accuracy"]["images"] == 64
        assert actual["accuracy"] == expected["accuracy"]


def test_the_ranks_read_every_image_of_the_joined_minibatch_once(done: list[list[Any]]) -> None:
    whole = [batch.labels.tolist() for batch in TrainBatches(DATA, batch_size=30, seed=1).epoch(0)]
    shares = [found[2] for found in done]
    for step, labels in enumerate(whole):
        assert sorted(label for share in shares for label in share[step]) == sorted(labels)


def test_ranks_that_decide_differently_stop_with_a_sentence(done: list[list[Any]]) -> None:
    for found in done:
        assert isinstance(found[3], RunError)
        others = ", ".join(map(str, range(1, RANKS)))
        assert str(found[3]).startswith(
            f"the mask of pruning step 3 of rank {others} is not that of rank 0"
        )


def test_a_loss_that_is_not_a_number_in_one_rank_stops_all(done: list[list[Any]]) -> None:
    for found in done:
        assert isinstance(found[4], TrainingError)
        assert "the loss became nan" in str(found[4])


def test_a_parameter_without_gradient_is_named(done: list[list[Any]]) -> None:
    for found in done:
        assert isinstance(found[5], ModelError)
        assert "the parameter idle takes no part" in str(found[5])


def test_a_rank_without_images_lets_all_pass_the_minibatch_over(done: list[list[Any]]) -> None:
    assert [found[6] for found in done] == [2] * RANKS


def test_every_rank_of_a_loop_of_ones_own_decides_alike(
    done: list[list[Any]],
) -> None:
    """test_joined_loops.py has other criteria."""
    expected = joined_loops.pruned()
    for found in done:
        assert not isinstance(found[7], Exception), found[7]
        assert found[7]["recipe"] == expected["recipe"]
        for key, weights in expected["weights"].items():
            torch.testing.assert_close(found[7]["weights"][key], weights, rtol=1e-6, atol=1e-9)
        assert isinstance(found[8], RunError)
        assert "wrap the network in DistributedDataParallel anew" in str(found[8])


def test_what_a_dead_process_left_in_the_store_is_not_taken_for_news() -> None:
    """torchrun keeps its store over restarts, with the addresses of the processes of the last."""
    store, names = HashStore(), list[str]()
    for key, value in (("asks 1", "old"), ("answer 1 old", "stale"), ("confirms 1 stale", "")):
        store.set(key, value)

    for _ in range(3):  # three starts
        with ThreadPoolExecutor(3) as pool:
            ranks = [pool.submit(meeting._answer, store, rank) for rank in (1, 2)]
            found = {meeting._invite(store, 3, timedelta(minutes=1))}
        found |= {rank.result() for rank in ranks}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
    assert "stale" not in names


def test_a_process_that_never_comes_is_named() -> None:
    with pytest.raises(EnvironmentUnfitError, match="rank 1, 2 of this run did not come in time"):
        meeting._invite(HashStore(), 3, timedelta(seconds=0))


# What the environment says


def test_an_environment_without_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (launched().rank, launched().size) == (0, 1)
    assert device_name("cuda:1") == "cuda:1"


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("0", "x"), ("", "4")])
def test_nonsense_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match="start with torchrun, or unset them"):
        launched()


def test_one_gpu_for_two_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="write cuda"):
        device_name("cuda:0")
    assert device_name("cpu") == "cpu"


def test_every_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_name("auto") == device_name("cuda") == "cuda:1"


@pytest.mark.parametrize("case", EXACT[:2], ids=named)
def test_in_double_precision_nothing_is_left_between_processes_and_one(
    done: list[list[Any]], case: Case
) -> None:
    """So what differs in float32 is the order of sums: not the images, gradients or averages."""
    expected = joined_work.train_and_score(*case)
    for found in done:
        actual = found[10 + EXACT.index(case)]
        for name in ("scores", "weights"):
            difference, size = distance(actual[name], expected[name])
            assert difference < 1e-12 * size, name


def test_without_joined_statistics_each_process_trains_another_network(
    done: list[list[Any]],
) -> None:
    """BatchNorm of a share is another function from the first step on, in any precision."""
    expected = joined_work.train_and_score(*BLIND)
    difference, size = distance(done[0][-1]["scores"][0], expected["scores"][0])
    assert difference > 0.01 * size


def distance(one: Any, other: Any) -> tuple[float, float]:
    """Return the largest difference of tensors, or of those of two states, and their size."""
    pairs = [(one[key], other[key]) for key in other] if isinstance(other, dict) else [(one, other)]
    differences = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    return max(differences), max(float(b.double().abs().max()) for _, b in pairs)


def test_a_text_of_the_first_process_is_everybodys(done: list[list[Any]]) -> None:
    assert [found[9] for found in done] == [["tables of 0 \N{MICRO SIGN}s", ""]] * RANKS
