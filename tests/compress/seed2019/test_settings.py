"""The JSON settings of the research code are read as they are, or refused by name."""

from __future__ import annotations

import json
import logging
import pickle
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import some_slow

import compress.runs.launch  # noqa: F401  (which lets JSON be read)
from compress.config import CRITERION_NUMBERS, RunConfig, load_config, save_config
from compress.errors import ConfigError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.pruning.decision import prunable
from compress.pruning.given import read_importance
from compress.pruning.goal import goal_for
from compress.pruning.masking import candidates, prune_to
from compress.seed2019.settings import OriginalSettings, gate_group

SHIPPED: dict[str, Any] = {
    "method": 22,
    "frequency": 30,
    "prune_per_iteration": 100,
    "starting_neuron": 0,
    "fixed_layer": -1,
    "l2_normalization_per_layer": False,
    "rank_neurons_equally": False,
    "use_momentum": True,
    "pruning_silent": False,
    "pruning_threshold": 100.0,
    "start_pruning_after_n_iterations": 0,
    "push_group_down": False,
    "do_iterative_pruning": True,
    "fixed_criteria": False,
    "seed": 0,
    "pruning_momentum": 0.9,
}
"""What all settings files of the research code have in common."""
REMOVED = {
    "imagenet_resnet50_prune91": 1000,
    "imagenet_resnet50_prune81": 2200,
    "imagenet_resnet50_prune72": 3200,
    "imagenet_resnet50_prune56": 5500,
    "imagenet_resnet101_prune75": 5000,
    "imagenet_resnet101_prune55": 9000,
    "imagenet_resnet101_prune50": 10000,
    "imagenet_resnet101_prune40": 12000,
}
DENSE = {
    "resnet50": (11_392, 4_089_184_256, 25_557_032),
    "resnet101": (20_096, 7_801_405_440, 44_549_160),
}
"""Gates of the research code; MACs and parameters that torchvision's pages give: 4.09 and 7.80 G,
25,557,032 and 44,549,160."""


def written(folder: Path, name: str = "imagenet_resnet50_prune72", **changes: Any) -> str:
    document = {**SHIPPED, "prune_neurons_max": 3200, "maximum_pruning_iterations": 32, **changes}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not ...}))
    return str(path)


def loaded(folder: Path, *settings: str, **changes: Any) -> RunConfig:
    return load_config(written(folder, **changes), settings)


def mistake(folder: Path, **changes: Any) -> str:
    path = written(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: "), message
    return message.removeprefix(f"{path}: ")


@lru_cache
def on_meta(name: str) -> tuple[torch.nn.Module, ChannelGraph]:
    with torch.device("meta"):
        model = build_model(name, num_classes=1000)
    return model, analyse(model, (3, 224, 224))


# The files that the research code ships


@pytest.mark.parametrize("name", REMOVED)
def test_a_shipped_file_and_the_named_configuration_are_the_same_run(
    name: str, tmp_path: Path
) -> None:
    removed = REMOVED[name]
    path = written(
        tmp_path, name, prune_neurons_max=removed, maximum_pruning_iterations=removed // 100
    )
    config = load_config(path)
    assert config == load_config(name)
    assert config.model.name == name.split("_")[1]
    assert (config.prune.residual_gate, config.prune.as_published) == ("block", True)
    assert (config.data.dataset, config.data.batch_size) == ("imagefolder", 256)
    assert (config.finetune.epochs, config.finetune.group_lasso) == (25, 1e-8)


def test_the_shipped_file_with_groups_and_its_named_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "imagenet_resnet101_prune50_group"
    changes = {"prune_neurons_max": 10000, "maximum_pruning_iterations": 100, "group_size": 32}
    path = written(tmp_path, name, pruning_silent=True, flops_regularization=1e-12, **changes)
    config, named = load_config(path), load_config(name)
    assert config.prune.flops_regularization == 1e-12
    assert named.prune == config.prune.model_copy(update={"flops_regularization": 0.0})
    assert "does nothing in the research code" in caplog.text
    pruned = 0
    for _ in range(100):  # a threshold at this group of the ranking, there
        pruned = min((pruned + 100) // 32, 10000 // 32) * 32
    prune = config.prune
    assert prune.step_size is not None
    assert prune.max_steps is not None
    assert (prune.step_size, prune.channel_multiple, prune.budget.value) == (96, 32, 9984)
    assert min(prune.step_size * prune.max_steps, prune.budget.value) == pruned == 9600


@pytest.mark.parametrize("name", some_slow(DENSE))
def test_the_dense_networks_have_the_gates_and_costs_of_the_paper(name: str) -> None:
    gates, macs, params = DENSE[name]
    model, graph = on_meta(name)
    config = load_config(f"imagenet_{name}_prune{56 if name == 'resnet50' else 50}").prune
    allowed = prunable(model, graph, config)
    assert sum(candidate.group.size for candidate in allowed) == gates
    assert "conv1" not in [candidate.group.name for candidate in allowed]
    everything = graph.everything()
    assert (cost.macs(graph, everything), cost.params(graph, everything)) == (macs, params)
    assert cost.channels(graph, everything) == gates + 64  # the stem


@pytest.mark.parametrize("name", some_slow(REMOVED, list(REMOVED)[1:]))
def test_a_named_configuration_leaves_the_channels_that_the_original_leaves(name: str) -> None:
    config = load_config(name)
    model, graph = on_meta(config.model.name)
    allowed = prunable(model, graph, config.prune)
    goal = goal_for(graph, config.prune.budget, allowed)
    scores = np.random.default_rng(0).random(graph.num_units)
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    left = sum(int(kept[candidate.group.units].sum()) for candidate in allowed)
    assert left == DENSE[config.model.name][0] - REMOVED[name]
    assert cost.channels(graph, kept) == left + 64


def test_56_percent_are_51_point_7() -> None:
    shares = {name: 1 - REMOVED[name] / DENSE[name.split("_")[1]][0] for name in REMOVED}
    assert [round(100 * share, 1) for share in shares.values()] == [
        *(91.2, 80.7, 71.9, 51.7),
        *(75.1, 55.2, 50.2, 40.3),
    ]


@pytest.mark.parametrize("share", [56, 72, 81, 91])
def test_the_corrected_configurations_keep_what_their_name_says(share: int) -> None:
    config = load_config(f"imagenet-resnet50-kept{share}")
    assert (config.prune.residual_gate, config.prune.as_published) == ("read", False)
    assert config.finetune == load_config("imagenet-resnet50").finetune
    model, graph = on_meta("resnet50")
    allowed = prunable(model, graph, config.prune)
    goal = goal_for(graph, config.prune.budget, allowed)
    scores = np.random.default_rng(0).random(graph.num_units)
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    assert cost.channels(graph, kept) == int(11_456 * share / 100)


# Settings one by one


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"frequency": 7}, "interval", 7),
        ({"prune_per_iteration": 50}, "step_size", 50),
        ({"maximum_pruning_iterations": 5}, "max_steps", 5),
        ({"pruning_threshold": 2.5}, "max_loss", 2.5),
        ({"pruning_threshold": 3}, "max_loss", 3.0),
        ({"start_pruning_after_n_iterations": 0}, "start_after", 0),
        ({"start_pruning_after_n_iterations": 1}, "start_after", 0),
        ({"start_pruning_after_n_iterations": 5}, "start_after", 4),
        ({"pruning_momentum": 0.5}, "momentum", 0.5),
        ({"pruning_momentum": 0, "use_momentum": False}, "momentum", 0.0),
        ({"fixed_criteria": True}, "fixed_criteria", True),
        ({"l2_normalization_per_layer": True}, "normalize", "l2"),
        ({"group_size": 8}, "channel_multiple", 8),
        ({"group_size": 8}, "step_size", 96),
        ({"flops_regularization": 1e-9}, "flops_regularization", 1e-9),
        ({"pruning_silent": True}, "criterion", "taylor-gate"),
        ({"fixed_layer": 2}, "only", ("layer3.0.conv3",)),
        ({"fixed_layer": 5}, "only", ("layer1.0.conv2",)),
    ],
)
def test_a_setting_has_its_counterpart(
    changes: dict[str, Any], key: str, expected: object, tmp_path: Path
) -> None:
    assert getattr(loaded(tmp_path, **changes).prune, key) == expected


def test_the_rest_of_the_settings(tmp_path: Path) -> None:
    assert loaded(tmp_path, seed=7).seed == 7
    assert loaded(tmp_path, group_wd_coeff=1e-6).finetune.group_lasso == 1e-6
    assert str(loaded(tmp_path, prune_neurons_max=123).prune.budget) == "removed=123"


@pytest.mark.parametrize("number", CRITERION_NUMBERS)
def test_criteria_by_their_numbers(number: int, tmp_path: Path) -> None:
    config = loaded(tmp_path, method=number)
    assert config.prune.criterion == CRITERION_NUMBERS[number]
    # ResNet-50 has gates on its residual streams there for one criterion alone.
    streams = ("conv1",) if number == 22 else ("conv1", "layer?.0.conv3")
    assert config.prune.keep_dense == streams
    assert loaded(tmp_path, "model.name=resnet101", method=number).prune.keep_dense == ("conv1",)


def test_without_a_cap_the_steps_decide(tmp_path: Path) -> None:
    config = loaded(tmp_path, prune_neurons_max=-1)
    assert (str(config.prune.budget), config.prune.max_steps) == ("removed=3200", 32)
    late = loaded(tmp_path, prune_neurons_max=-1, start_pruning_after_n_iterations=3)
    assert str(late.prune.budget) == "removed=3000"  # skipped steps count


def test_steps_that_end_before_the_cap_end_there(tmp_path: Path) -> None:
    config = loaded(tmp_path, maximum_pruning_iterations=10)
    assert (str(config.prune.budget), config.prune.max_steps) == ("removed=3200", 10)


def test_missing_settings_have_the_defaults_of_the_original_reader(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.json"
    path.write_text("{}")
    config = load_config(str(path))
    prune = config.prune
    assert (prune.criterion, prune.interval, prune.step_size) == ("taylor-weight", 500, 2)
    assert (prune.max_steps, str(prune.budget), prune.max_loss) == (10_000, "removed=1", 100.0)
    assert (prune.start_after, prune.momentum, prune.channel_multiple) == (0, 0.9, 1)
    assert (prune.fixed_criteria, prune.flops_regularization, prune.only) == (False, 0.0, ())
    assert config.finetune == load_config("imagenet-resnet50-seed2019").finetune


@pytest.mark.parametrize("number", [10, 11])
def test_the_hessian_is_exact_and_the_first_interval_longer(number: int, tmp_path: Path) -> None:
    prune = loaded(tmp_path, method=number, frequency=7).prune
    assert (prune.hessian_samples, prune.interval, prune.first_interval_extra) == (0, 7, 1)


def test_what_does_nothing_there_and_something_here_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="compress"):
        loaded(tmp_path)
        assert not caplog.records
        loaded(tmp_path, flops_regularization=1e-12, l2_normalization_per_layer=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert "flops_regularization = 1e-12 does nothing in the research code; here" in first
    assert "the research code does not read l2_normalization_per_layer" in second


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    config = loaded(tmp_path, fixed_layer=4, group_size=4, method=31, pruning_threshold=9)
    save_config(config, tmp_path / "config.toml")
    assert load_config(str(tmp_path / "config.toml")) == config


# Which network


def test_the_network_is_asked_for_or_named_by_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "imagenet_wide_resnet50_2_half")
    assert load_config(path).model.name == "wide_resnet50_2"
    assert load_config(path, ["model.name=resnet101"]).model.name == "resnet101"
    assert load_config(path, ["seed=3"]).seed == 3
    unnamed = written(tmp_path, "settings")
    assert load_config(unnamed, ["model.name=resnet34"]).model.name == "resnet34"
    assert load_config(unnamed, ["model.name=resnet56"]).prune.keep_dense == ()
    layers = load_config(unnamed, ["model.name=densenet121"]).prune.only
    assert layers == ("*.denselayer*.conv1",)
    with pytest.raises(ConfigError, match="does not say which network is pruned: add --model"):
        load_config(unnamed)
    with pytest.raises(ConfigError, match="model is a section: give one of its keys"):
        load_config(path, ["model=resnet50"])


@pytest.mark.parametrize(
    ("model", "streams", "names"),
    [
        (
            "resnet50",
            True,
            ["layer1.0.conv3", "layer2.0.conv3", "layer3.0.conv3", "layer4.0.conv3"],
        ),
        ("resnet50", False, ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]),
    ],
)
def test_gates_are_counted_in_the_order_of_the_original(
    model: str, streams: bool, names: list[str]
) -> None:
    found = [gate_group(model, index, streams=streams) for index in range(len(names))]
    assert found == names
    assert gate_group(model, 35 if streams else 31, streams=streams) == "layer4.2.conv2"
    with pytest.raises(ConfigError, match=f"{model} has the gates 0 to"):
        gate_group(model, 36 if streams else 32, streams=streams)


@pytest.mark.parametrize("index", [0, 5])
def test_gates_of_basic_blocks_that_cannot_close_alone(index: int) -> None:
    """The first stream of ResNet-34 has the stem's channels, and conv2 writes into a stream."""
    assert gate_group("resnet34", 1) == "layer2.0.conv2"
    assert gate_group("resnet34", 4) == "layer1.0.conv1"
    with pytest.raises(ConfigError, match="whose channels cannot go without those of conv1"):
        gate_group("resnet34", index)


def test_gates_of_other_networks_are_not_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "vgg", fixed_layer=1)
    with pytest.raises(ConfigError, match="counts the gates of a ResNet, and resnet56 is none of"):
        load_config(path, ["model.name=resnet56"])


# Mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"starting_neuron": 5}, "starting_neuron = 5: pruning starts with the dense network"),
        ({"combination_ID": 1}, "combination_ID = 1: combinations of units are not tried out"),
        ({"rank_neurons_equally": True}, "rank_neurons_equally = True: the research code never"),
        ({"push_group_down": True}, "push_group_down = True: the research code never reads it"),
        ({"do_iterative_pruning": False}, "do_iterative_pruning = False: pruning always takes"),
        ({"use_momentum": False}, "use_momentum = False: pruning_momentum = 0.9 says the opposite"),
        (
            {"method": 40},
            "method = 40: no criterion has this number: choose one of 0 taylor-weight",
        ),
        ({"method": "22"}, "method = '22': a number, true or false is needed"),
        ({"method": True}, "method = True: true and false belong to switches"),
        ({"frequency": 0}, "frequency = 0: input should be greater than or equal to 1"),
        ({"frequency": 1.5}, "frequency = 1.5: a whole number belongs here"),
        ({"frequency": None}, "frequency = None: a number, true or false is needed"),
        ({"frequency": [30]}, "frequency = [30]: a number, true or false is needed"),
        (
            {"prune_per_iteration": 0},
            "prune_per_iteration = 0: this prunes nothing: use compress tr",
        ),
        ({"prune_per_iteration": -1}, "prune_per_iteration = -1: input should be greater"),
        (
            {"prune_neurons_max": 0},
            "prune_neurons_max = 0: this prunes nothing: use compress train",
        ),
        (
            {"prune_per_iteration": 0, "prune_neurons_max": 0, "maximum_pruning_iterations": 1},
            "prune_per_iteration = 0 and prune_neurons_max = 0: this prunes nothing: use compress",
        ),
        ({"prune_per_iteration": False}, "prune_per_iteration = False: true and false belong"),
        ({"prune_neurons_max": -2}, "prune_neurons_max = -2: input should be greater"),
        ({"maximum_pruning_iterations": 0}, "maximum_pruning_iterations = 0: input should be"),
        ({"pruning_threshold": 0}, "pruning_threshold = 0: input should be greater than 0"),
        ({"pruning_threshold": float("nan")}, "pruning_threshold = nan: input should be a finite"),
        ({"frequency": float("nan")}, "frequency = nan: input should be a finite number"),
        ({"pruning_threshold": float("inf")}, "pruning_threshold = inf: input should be a finite"),
        (
            {"start_pruning_after_n_iterations": 33},
            "start_pruning_after_n_iterations = 33: this pru",
        ),
        ({"pruning_momentum": 1}, "pruning_momentum = 1: input should be less than 1"),
        ({"fixed_layer": -2}, "fixed_layer = -2: input should be greater than or equal to -1"),
        ({"fixed_layer": 36}, "fixed_layer = 36: resnet50 has the gates 0 to 35"),
        ({"fixed_criteria": 2}, "fixed_criteria = 2: true or false belongs here"),
        ({"fixed_criteria": "no"}, "fixed_criteria = 'no': a number, true or false is needed"),
        ({"group_size": 0}, "group_size = 0: input should be greater than or equal to 1"),
        ({"group_size": 101}, "group_size = 101: a whole group is more than prune_per_iteration"),
        (
            {"group_size": 4, "prune_neurons_max": 3},
            "group_size = 4: a whole group is more than pr",
        ),
        ({"flops_regularization": -1}, "flops_regularization = -1: input should be greater than"),
        ({"group_wd_coeff": -1}, "group_wd_coeff = -1: input should be greater than or equal to 0"),
        ({"seed": 2**31}, "seed = 2147483648: input should be less than 2147483648"),
        ({"pruning_silent": None}, "pruning_silent = None: a number, true or false is needed"),
        (
            {"prune_neuron_max": 5},
            "unknown key 'prune_neuron_max': did you mean 'prune_neurons_max'",
        ),
    ],
)
def test_a_mistake_names_the_key(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    message = mistake(tmp_path, **changes)
    assert message.startswith(sentence), message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": 1, "seed": 1}', " is not valid JSON: the key 'seed' is there twice"),
        ('{"seed": 1', " is not valid JSON: "),
        ("[" * 100_000, " is not valid JSON: "),
        ("[]", " holds no JSON object with settings"),
        ("", " is not valid JSON: "),
    ],
)
def test_a_file_that_is_no_settings_file(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "resnet50.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}{sentence}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read resnet50\.json: No such file"):
        load_config("resnet50.json")
    path = tmp_path / "resnet50.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(str(path))


# The page

PAGE = Path(__file__).parents[3] / "docs" / "original.md"
ARGUMENTS = {
    *(
        "--batch-size",
        "--test-batch-size",
        "--world_size",
        "--epochs",
        "--lr",
        "--wd",
        "--momentum",
    ),
    *("--lr-decay-every", "--lr-decay-scalar", "--no-cuda", "--seed", "--log-interval", "--mgpu"),
    *("--run_test", "--limit_training_batches", "--no_grad_clip", "--get_flops", "--dataset"),
    *("--get_inference_time", "--data", "--model", "--tensorboard", "--save_models", "--name"),
    *("--pruning_config", "--group_wd_coeff", "--augment", "--load_model", "--pruning"),
    *("--pruning-threshold", "--pruning-momentum", "--pruning-step", "--prune_per_iteration"),
    *("--fixed_layer", "--start_pruning_after_n_iterations", "--maximum_pruning_iterations"),
    *("--starting_neuron", "--prune_neurons_max", "--pruning-method", "--pruning_fixed_criteria"),
    *("--fixed_network", "--zero_lr_for_epochs", "--dynamic_network", "--use_test_as_train"),
    *("--pruning_mask_from", "--compute_flops"),
}
"""What main.py of the research code takes."""


def table() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").split("## Settings")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert {len(row) for row in rows} == {4}
    return rows[1:]


def quoted(cells: list[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_page_has_one_row_for_every_argument_and_key() -> None:
    arguments, keys, *_ = map(list, zip(*table(), strict=True))
    assert sorted(quoted(keys)) == sorted(OriginalSettings.model_fields)
    assert sorted(quoted(arguments)) == sorted(ARGUMENTS)


def test_the_settings_that_the_page_names_exist() -> None:
    named = 0
    for cell in quoted([row[2] for row in table()]):
        path, _, value = cell.partition(" = ")
        if cell.startswith(("compress ", "torchrun", "--")):
            continue
        section, _, key = path.rpartition(".")
        owner: Any = RunConfig.model_fields[section].annotation if section else RunConfig
        assert key in owner.model_fields, cell
        if value and "N" not in value:
            load_config("imagenet-resnet50-seed2019", [f"{path}={value}"])
        named += 1
    assert named > 30


@pytest.mark.slow
def test_a_criteria_file_is_turned_into_importance_as_the_page_shows(tmp_path: Path) -> None:
    """A pickle of one array for each gate, in its order; what it says is read here as JSON."""
    graph = on_meta("resnet50")[1]
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    sizes = [256, 512, 1024, 2048]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        sizes += [64 * 2**stage] * 2 * blocks
    rng = np.random.default_rng(0)
    criteria = [rng.random(size) for size in sizes]
    (tmp_path / "criteria_22_final.pickle").write_bytes(pickle.dumps(criteria))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    config = load_config("imagenet_resnet50_prune72").prune
    found = read_importance(tmp_path / "criteria.json", graph, candidates(graph, config))
    units = {group.name: group.units for group in graph.groups}
    np.testing.assert_array_equal(found[units["layer3.0.conv3"]], criteria[2])
    np.testing.assert_array_equal(found[units["layer1.0.conv2"]], criteria[5])
    np.testing.assert_array_equal(found[units["layer4.2.conv2"]], criteria[-1])
