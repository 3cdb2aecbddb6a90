"""How the machine computes: parts of a minibatch, compilation, torch's global switches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import joined_work
import pytest
import torch
from torch import nn

from compress.config import ComputeConfig, TrainConfig
from compress.errors import EnvironmentUnfitError
from compress.networks.analysis import analyse
from compress.networks.shrink import shrink_
from compress.training.compute import computing, memory_format_for
from compress.training.trainer import Trainer


@pytest.mark.parametrize("parts", [2, 3, 6, 100])
@pytest.mark.parametrize("criterion", ["taylor-gate", "taylor-gate-fg", "taylor-gate-so", "obd"])
def test_parts_of_a_minibatch_give_the_importance_and_the_weights_of_the_whole(
    criterion: str, parts: int
) -> None:
    """Without BatchNorm, which takes its statistics over a part, this is exact."""
    whole = joined_work.train_and_score("Smooth", criterion)
    divided = joined_work.train_and_score("Smooth", criterion, accumulate=parts)
    scale = whole["scores"].abs().max()
    assert scale > 0
    torch.testing.assert_close(
        divided["scores"] / scale, whole["scores"] / scale, rtol=1e-3, atol=1e-5
    )
    for name, tensor in whole["weights"].items():
        torch.testing.assert_close(divided["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    assert divided["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize(("parts", "expected"), [(5, [3, 3, 2, 2, 2]), (100, [2] * 6)])
def test_parts_hold_fewer_images_at_once(parts: int, expected: list[int]) -> None:
    model, seen = joined_work.network("PreActivation"), []
    trainer = trainer_of(model, accumulate=parts)
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    trainer.step(joined_work.share_of(joined_work.ALONE, 0))
    assert seen == expected  # of 12, and BatchNorm needs two in each


def trainer_of(model: nn.Module, **compute: Any) -> Trainer:
    return Trainer(
        model,
        TrainConfig.model_validate(joined_work.PLAIN),
        steps_per_epoch=10,
        epochs=10,
        memory_format=memory_format_for(model, (3, 12, 12)),
        compute=ComputeConfig(**compute),
    )


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """torch.compile without a compiler: the graphs that it would compile, run as they are."""
    captured: list[torch.fx.GraphModule] = []
    usual = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network: usual(network, backend=backend))
    yield captured
    torch.compiler.reset()


def test_a_compiled_network_trains_as_it_would_and_is_compiled_anew_after_a_shrink(
    graphs: list[torch.fx.GraphModule],
) -> None:
    weights = []
    for compiled in (False, True):
        model = joined_work.network("PreActivation")
        graph = analyse(model, (3, 12, 12))
        trainer = trainer_of(model, compiled=compiled)
        trainer.step(joined_work.share_of(joined_work.ALONE, 0))
        assert bool(graphs) == compiled
        graphs.clear()
        kept = graph.everything()
        for group in graph.prunable:
            kept[group.units[::2]] = False
        shrink_(model, graph, kept, [trainer.optimizer])
        trainer.reshaped()
        trainer.step(joined_work.share_of(joined_work.ALONE, 1))
        trainer.step(joined_work.share_of(joined_work.ALONE, 2))
        assert bool(graphs) == compiled
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()  # no name of the compiler's is left
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wish", "expected"), [("on", torch.channels_last), ("off", torch.contiguous_format)]
)
def test_channels_last_is_as_wished(wish: Any, expected: torch.memory_format) -> None:
    for name in ("Plain", "PreActivation"):  # the first cannot compute in it by itself
        assert memory_format_for(joined_work.network(name), (3, 12, 12), wish) is expected


def switches() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, deterministic


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_switches_are_set_for_the_training_and_put_back(tf32: bool, deterministic: bool) -> None:
    before = switches()
    with computing(ComputeConfig(tf32=tf32, deterministic=deterministic)):
        expected = ("high" if tf32 else "highest", tf32, not deterministic, deterministic)
        assert switches() == expected
    assert switches() == before
    with pytest.raises(KeyError), computing(ComputeConfig(deterministic=True)):
        raise KeyError
    assert switches() == before


def test_an_operation_that_cannot_repeat_is_named() -> None:
    unfit = pytest.raises(EnvironmentUnfitError, match="avg_backward does not have a determinis")
    with unfit, computing(ComputeConfig(deterministic=True)):
        raise RuntimeError("avg_backward does not have a deterministic implementation, but")
    with pytest.raises(RuntimeError, match="another"), computing(ComputeConfig()):
        raise RuntimeError("another")
