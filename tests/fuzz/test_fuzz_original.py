"""JSON settings of the research code: whatever they say, a sentence or a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mutations import damaged, fuzzed, mutated, refused_in_a_sentence

from compress.config import load_config
from compress.errors import ConfigError
from compress.seed2019.settings import OriginalSettings, run_document

SETTINGS = {
    name: field.default
    for name, field in OriginalSettings.model_fields.items()
    if field.default is not None
} | {"group_wd_coeff": 1e-8, "prune_neurons_max": 100, "method": 22}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("original") / "imagenet_resnet18.json"


@fuzzed
@given(document=mutated(SETTINGS))
def test_settings_of_any_structure(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document))
    refused_in_a_sentence(lambda: load_config(str(path)))


@fuzzed
@given(data=damaged(json.dumps(SETTINGS).encode()))
def test_settings_of_any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused_in_a_sentence(lambda: load_config(str(path)))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"seed":' * 50_000,
        '{"seed": ' + "9" * 5000 + "}",
        '{"seed": 1e999}',
        '{"seed": NaN}',
        '{"seed": 1, "seed": 1}',
        '{"pruning_threshold": Infinity}',
        '{"fixed_layer": 1000000000000}',
        '{"group_size": 1000000000000, "prune_neurons_max": 1000000000000}',
        '{"' + "x" * 200_000 + '": 1}',
        '{"\\ud800": "\\ud800"}',
        "{" + ", ".join(f'"k{n}": 1' for n in range(15_000)) + "}",
    ],
    ids=lambda text: text[:24],
)
def test_a_bomb_of_json(text: str, path: Path) -> None:
    path.write_text(text)
    assert refused_in_a_sentence(lambda: load_config(str(path)))


def test_the_settings_that_are_mutated_are_good() -> None:
    assert run_document(json.dumps(SETTINGS), "imagenet_resnet18.json")["prune"]["criterion"]
    with pytest.raises(ConfigError):
        run_document("{}", "no_network.json")
