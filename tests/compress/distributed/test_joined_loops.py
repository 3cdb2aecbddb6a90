"""compress.Pruner under DistributedDataParallel: one decision, and none on gradients apart."""

from __future__ import annotations

from typing import Any

import joined_loops
import pytest
import torch
from ranks import together

from compress.errors import RunError

pytestmark = pytest.mark.slow  # test_distributed.py has one of these loops

CASES = [
    *(("taylor-gate", "read"), ("taylor-gate", "block"), ("taylor-gate-fg", "read")),
    *(("taylor-gate-so", "read"), ("taylor-output", "read"), ("weight-norm", "read")),
]


@pytest.fixture(scope="module")
def done() -> list[list[Any]]:
    tasks: list[tuple[Any, ...]] = [(joined_loops.pruned, *case) for case in CASES]
    tasks += [(joined_loops.never_wrapped,), (joined_loops.wrapped_once,)]
    return together(2, joined_loops.all_of, tasks)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_rank_decides_as_one_process_does(
    done: list[list[Any]], case: tuple[str, str]
) -> None:
    expected = joined_loops.pruned(*case)
    for results in done:
        found = results[CASES.index(case)]
        assert not isinstance(found, Exception), found
        assert found["recipe"] == expected["recipe"]
        for key, weights in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("number", [-2, -1], ids=["never wrapped", "not wrapped anew"])
def test_gradients_that_are_not_joined_are_refused(done: list[list[Any]], number: int) -> None:
    for results in done:
        assert isinstance(results[number], RunError), results[number]
        assert "wrap the network in DistributedDataParallel anew" in str(results[number])
