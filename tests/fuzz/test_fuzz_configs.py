"""Configurations, settings, targets and limits: whatever they say, a sentence or a result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import (
    NOT_FINITE,
    PIECES,
    SCALARS,
    TEXTS,
    damaged,
    fuzzed,
    mutated,
    refused_in_a_sentence,
)

from bench.limits import load_limits
from compress.config import DEFAULT_CONFIG, RunConfig, load_config, save_config
from compress.config.targets import load_target
from compress.errors import ConfigError
from compress.files.documents import MOST_BYTES, Section, named_files, read_toml

RUN = {
    **RunConfig().model_dump(mode="json", exclude_none=True),
    "prune": {**RunConfig().prune.model_dump(mode="json", exclude_none=True), "budget": "macs=0.5"},
}
TARGET = read_toml("v100", "targets")
LIMITS: dict[str, Any] = {
    "accuracy": {"max_drop_pp": 1.0, "allow_skipped": True},
    "latency": {"max_ratio": 0.9, "p99_ms": 3.0, "batch_sizes": [1, 8]},
    "macs": {"max_ratio": 0.6},
    "parity": {"max_relative_error": {"fp32": 1e-4, "fp16": 2e-2}},
}
KEYS = [
    f"{name}.{key}" if isinstance(section, dict) else name
    for name, section in RUN.items()
    for key in (section if isinstance(section, dict) else [""])
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "run.toml"


def toml(document: Any) -> bytes:
    """Write what a mutation made of a document, as far as TOML can say it."""
    return tomli_w.dumps(sayable(document)).encode("utf-8", "surrogatepass")


def sayable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sayable(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [sayable(item) for item in value if item is not None]
    return value


@fuzzed
@given(document=mutated(RUN))
def test_a_run_of_any_structure(path: Path, document: Any) -> None:
    path.write_bytes(toml(document))
    if not refused_in_a_sentence(lambda: load_config(str(path))):
        assert_finite(load_config(str(path)))


@fuzzed
@given(data=damaged(toml(RUN)))
def test_a_run_of_any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused_in_a_sentence(lambda: load_config(str(path)))


@fuzzed
@given(key=st.one_of(st.sampled_from(KEYS), TEXTS), value=st.one_of(SCALARS.map(str), TEXTS))
@example(key="a." * 5000, value="1")
@example(key="seed", value="[" * 100_000)
@example(key="seed", value="9" * 5000)
@example(key="prune.criterion", value="0x" + "f" * 5000)
@example(key="bench.limits", value='"/\\u0000"')
@example(key="export.target", value='"/\\u0000"')
def test_any_setting(key: str, value: str) -> None:
    refused_in_a_sentence(lambda: load_config(DEFAULT_CONFIG, [f"{key}={value}"]))


@fuzzed
@given(document=mutated(TARGET))
def test_a_target_of_any_structure(path: Path, document: Any) -> None:
    path.write_bytes(toml(document))
    refused_in_a_sentence(lambda: load_target(str(path)))


@fuzzed
@given(document=mutated(LIMITS), settings=st.lists(PIECES, max_size=1))
def test_limits_of_any_structure(path: Path, document: Any, settings: list[bytes]) -> None:
    path.write_bytes(toml(document))
    words = [f"latency.max_ratio={piece.decode('latin-1')}" for piece in settings]
    if not refused_in_a_sentence(lambda: load_limits(str(path), words)):
        assert_finite(load_limits(str(path), words))


@fuzzed
@given(data=damaged(toml(LIMITS)))
def test_limits_of_any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused_in_a_sentence(lambda: load_limits(str(path)))


def assert_finite(section: Section) -> None:
    for _, value in section:
        if isinstance(value, Section):
            assert_finite(value)
        assert not isinstance(value, float) or math.isfinite(value)


@given(value=NOT_FINITE, key=st.sampled_from([key for key in KEYS if key.startswith("bench.")]))
def test_no_figure_of_a_measurement_is_infinite(value: float, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_config(DEFAULT_CONFIG, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "{b = " * 5000, "nested too deeply"),
        ("seed = " + "9" * 5000, "is not valid TOML"),
        (".".join("a" * 20_000) + " = 1", "more than 32 dots"),
        (".".join(['"a"'] * 20_000) + " = 1", "more than 32 dots"),
        ("[" + ".".join("a" * 20_000) + "]", "more than 32 dots"),
        ("prune.criterion = 0x" + "f" * 50_000, "prune.criterion"),
        ("#" * (MOST_BYTES + 1), "no configuration is larger"),
        ("seed = " + '"' + "x" * 200_000 + '"', "seed = 'xxx"),
        ("bench.batch_sizes = [" + "-1," * 50_000 + "]", "50001 mistakes"),
        ("x" * 200_000 + " = 1", "unknown key"),
        ("[a]\n" * 2, "is not valid TOML"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bomb_of_toml(text: str, says: str, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.toml"
    bomb.write_text(text)
    assert refused_in_a_sentence(lambda: load_config(str(bomb)))
    with pytest.raises(ConfigError, match=says):
        load_config(str(bomb))


def test_a_device_that_never_ends_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="no configuration is larger"):
        load_config("/dev/zero")


def test_every_configuration_of_ours_is_far_from_the_limits() -> None:
    for folder in ("", "targets", "limits"):
        assert all(100 * len(text) < MOST_BYTES * 20 for text in named_files(folder).values())


def test_a_whole_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_config(RunConfig(), tmp_path / "run.toml")
    (tmp_path / "again.toml").write_bytes(toml(RUN))
    assert load_config(str(tmp_path / "run.toml")) == load_config(str(tmp_path / "again.toml"))
