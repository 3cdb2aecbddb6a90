"""Every mistake in a configuration is one sentence that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.config import (
    DEFAULT_CONFIG,
    SEED2019,
    Budget,
    FinetuneConfig,
    RunConfig,
    TrainConfig,
    load_config,
    save_config,
)
from compress.errors import ConfigError
from compress.files.documents import Section, apply_setting, named_files, read_toml, validated


def mistake(*settings: str, name: str = DEFAULT_CONFIG) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sections(model: type[Section], prefix: str = "") -> list[tuple[str, type[Section]]]:
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found += sections(annotation, f"{prefix}{name}.")
    return found


# Mistakes


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        # unknown keys
        ("epochz=1", "unknown key 'epochz': "),
        ("trian.epochs=1", "unknown key 'trian': did you mean 'train'?"),
        ("train.epoch=1", "unknown key 'train.epoch': did you mean 'epochs'?"),
        ("prune.budgets=1", "unknown key 'prune.budgets': did you mean 'budget'?"),
        ("bench.zzz=1", "unknown key 'bench.zzz': known: batch_sizes, block_ms, channels_last"),
        # wrong types
        ("train.epochs=many", "train.epochs = 'many': a whole number belongs here"),
        ("train.epochs=2.5", "train.epochs = 2.5: a whole number belongs here"),
        ("train.epochs=true", "train.epochs = True: true and false belong to switches"),
        ("train.lr=fast", "train.lr = 'fast': a number belongs here"),
        ("train.lr=false", "train.lr = False: true and false belong to switches"),
        ("train.nesterov=perhaps", "train.nesterov = 'perhaps': true or false belongs here"),
        ("model.name=3", "model.name = 3: text belongs here"),
        ("model=resnet20", "model is a section: give one of its keys, as model.name="),
        ("train=[]", "train is a section: give one of its keys, as train."),
        ("export.parity_batches=3,a", "export.parity_batches.1 = 'a': a whole number belongs here"),
        ("prune.keep_dense=1.10", "prune.keep_dense = 1.1: a list belongs here"),
        ("prune.keep_dense=true", "prune.keep_dense = True: true and false belong to switches"),
        ("prune.keep_dense=", "prune.keep_dense = '': a list belongs here"),
        ("export.dynamic_batch=1,8", "the key 'export.dynamic_batch.2' is missing"),
        ("data.root=3", "data.root = 3: input is not a valid path"),
        # out of range
        ("train.epochs=-1", "train.epochs = -1: input should be greater than or equal to 0"),
        ("prune.budget=params=9,macs=1", "prune.budget = 'params=9,macs=1': a budget is one"),
        ("train.lr=0", "train.lr = 0: input should be greater than 0"),
        ("train.lr=nan", "train.lr = nan: input should be a finite number"),
        ("train.lr=inf", "train.lr = inf: input should be a finite number"),
        ("train.momentum=1", "train.momentum = 1: input should be less than 1"),
        ("data.batch_size=1", "data.batch_size = 1: input should be greater than or equal to 2"),
        ("data.image_size=7", "data.image_size = 7: input should be greater than or equal to 8"),
        ("prune.channel_multiple=0", "prune.channel_multiple = 0: input should be greater"),
        ("prune.min_share=1.5", "prune.min_share = 1.5: input should be less than or equal to 1"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("seed=4294967296", "seed = 4294967296: input should be less than 2147483648"),
        ("bench.batch_sizes=[]", "bench.batch_sizes = []: at least one value belongs here"),
        ("bench.batch_sizes=[1,0]", "bench.batch_sizes.1 = 0: input should be greater than or"),
        ("export.parity_batches=[-1]", "export.parity_batches.0 = -1: input should be greater"),
        # not one of the words
        ("data.dataset=cifar", "data.dataset = 'cifar': input should be 'digits', 'mnist'"),
        ("train.schedule=linear", "train.schedule = 'linear': input should be 'cosine', 'step'"),
        ("train.preset=seed2018", "train.preset = 'seed2018': input should be 'default' or"),
        ("prune.residual_gate=add", "prune.residual_gate = 'add': input should be 'read' or"),
        # budgets
        ("prune.budget=half", "prune.budget = 'half': a budget is written KIND=VALUE, for example"),
        ("prune.budget=macs", "prune.budget = 'macs': a budget is written KIND=VALUE"),
        ("prune.budget=flops=0.5", "prune.budget.kind = 'flops': input should be 'macs', 'params'"),
        ("prune.budget=macs=half", "prune.budget = 'macs=half': the value of a budget is a number"),
        ("prune.budget=macs=0", "prune.budget.value = '0': input should be greater than 0"),
        ("prune.budget=macs=inf", "prune.budget.value = 'inf': input should be a finite number"),
        ("prune.budget=removed=inf", "prune.budget.value = 'inf': input should be a finite"),
        ("prune.budget=removed=2.5", "prune.budget = 'removed=2.5': removed counts channels and"),
        ("prune.budget=5", "prune.budget = 5: a budget is written KIND=VALUE"),
        ("prune.budget={kind='macs'}", "the key 'prune.budget.value' is missing"),
    ],
)
def test_a_mistake_names_the_key(setting: str, sentence: str) -> None:
    message = mistake(setting)
    assert message.startswith(f"settings: {sentence}"), message


def test_further_mistakes_are_counted() -> None:
    message = mistake("train.epochs=x", "train.lr=0", "seed=-1")
    assert message.endswith("(and 2 more)")


@pytest.mark.parametrize("setting", ["noise", "", "=3", " = 3", "train.epochs"])
def test_a_setting_has_a_key_and_a_value(setting: str) -> None:
    assert mistake(setting) == f"--set {setting!r} is not of the form section.key=value"


@pytest.mark.parametrize(
    ("setting", "part"), [("model.name.x=1", "name"), ("prune.budget.kind=macs", "budget")]
)
def test_a_value_has_no_keys(setting: str, part: str) -> None:
    assert mistake(setting) == f"--set {setting!r}: {part!r} is a value, not a section"


def test_a_name_that_does_not_exist_offers_the_nearest() -> None:
    assert mistake(name="digits-resnet2") == (
        "no config is named 'digits-resnet2': did you mean 'digits-resnet20'?"
    )
    message = mistake(name="xyz")
    assert all(name in message for name in named_files(""))
    with pytest.raises(ConfigError, match="no target is named 'v10': did you mean 'v100'"):
        read_toml("v10", "targets")
    with pytest.raises(ConfigError, match="no limit is named 'strict': known: default"):
        read_toml("strict", "limits")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert mistake(name=str(path)) == f"cannot read {path}: No such file or directory"
    path.mkdir()
    assert mistake(name=str(path)) == f"cannot read {path}: Is a directory"
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert mistake(name=str(path)) == f"cannot read {path}: not a text file"
    path.write_text("[train\nepochs = 3\n")
    assert mistake(name=str(path)).startswith(f"{path} is not valid TOML: ")
    path.write_text("[train]\nepochs = 3\nepochs = 4\n")
    assert mistake(name=str(path)).startswith(f"{path} is not valid TOML: ")
    path.write_text("[train]\nepoch = 3\n")
    assert mistake(name=str(path)) == (f"{path}: unknown key 'train.epoch': did you mean 'epochs'?")


# Settings


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=7", 7),
        ("train.epochs = 7", 7),
        ("train.epochs=7 # as TOML", 7),
        ("train.nesterov=false", False),
        ("train.lr=1e-3", 1e-3),
        ("train.schedule=step", "step"),
        ('train.schedule="step"', "step"),
        ("prune.keep_dense=['a', 'layer1.*']", ("a", "layer1.*")),
        ("prune.keep_dense=[]", ()),
        ("prune.keep_dense=fc", ("fc",)),
        ("prune.keep_dense=a, layer1.*", ("a", "layer1.*")),
        ("prune.keep_dense=a b", ("a b",)),
        ("export.parity_batches=3,8", (3, 8)),
        ("export.parity_batches=3", (3,)),
        ("export.batch=1,8", (1, 8)),
        ("export.batch=dynamic", "dynamic"),
        ("data.mean=0.5,0.4,0.3", (0.5, 0.4, 0.3)),
        ("bench.batch_sizes=[1, 32]", (1, 32)),
        ("data.root=/some where/else", Path("/some where/else")),
        ("data.image_size=null", None),
        ("prune.budget=params=0.25", Budget(kind="params", value=0.25)),
        ("prune.budget=removed=3200", Budget(kind="removed", value=3200)),
        ("prune.budget={kind='macs', value=1e9}", Budget(kind="macs", value=1e9)),
        ("model.name=package.module:build", "package.module:build"),
    ],
)
def test_settings_are_read_as_toml_json_or_text(setting: str, expected: object) -> None:
    config = load_config(settings=[setting])
    section, _, key = setting.partition("=")[0].strip().partition(".")
    assert getattr(getattr(config, section), key) == expected


def test_a_mistake_in_a_setting_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nepochs = 3\n")
    with pytest.raises(ConfigError, match=r"^settings: train\.lr = 0: input should be greater"):
        load_config(str(file), ["seed=1", "train.lr=0"])
    file.write_text("[train]\nepochs = -3\n")
    with pytest.raises(ConfigError, match=r"^.*mine\.toml: train\.epochs = -3: input should be"):
        load_config(str(file), ["train.lr=1"])
    file.write_text("[prune]\nmax_steps = 1\nstart_after = 5\n")
    with pytest.raises(ConfigError, match=r"^.*mine\.toml: prune = "):
        load_config(str(file), ["prune.min_channels=4"])


def test_the_last_setting_wins() -> None:
    config = load_config(settings=["train.epochs=3", "seed=5", "train.epochs=4"])
    assert (config.train.epochs, config.seed) == (4, 5)


def test_sections_are_made_where_there_are_none() -> None:
    document: dict[str, Any] = {}
    apply_setting(document, "a.b.c=1")
    apply_setting(document, "a.b.d=[true]")
    assert document == {"a": {"b": {"c": 1, "d": [True]}}}


# seed2019


def test_seed2019_is_the_published_preset() -> None:
    """The command of the research code's README: 25 epochs at 0.001, decayed every 10 epochs."""
    config = TrainConfig.model_validate({"preset": "seed2019"})
    assert (config.epochs, config.lr, config.schedule) == (25, 0.001, "step")
    assert (config.step_epochs, config.step_gamma, config.warmup_epochs) == (10, 0.1, 0)
    assert (config.momentum, config.nesterov) == (0.9, False)
    assert (config.weight_decay, config.group_lasso) == (0, 1e-8)
    assert config.clip_gradients == 0  # it says --no_grad_clip=True
    assert (config.label_smoothing, config.distill, config.ema) == (0, 0, None)
    untouched = set(TrainConfig.model_fields) - set(SEED2019) - {"preset"}
    for name in untouched:
        assert getattr(config, name) == getattr(TrainConfig(), name)


def test_explicit_keys_of_a_file_win_over_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[finetune]\npreset = "seed2019"\nlr = 0.5\nnesterov = true\n')
    config = load_config(str(path))
    assert (config.finetune.lr, config.finetune.nesterov) == (0.5, True)
    assert (config.finetune.epochs, config.finetune.schedule) == (25, "step")
    assert config.train == TrainConfig()


def test_a_preset_that_is_set_by_hand_starts_its_section_anew() -> None:
    assert load_config().finetune.epochs == 8
    assert load_config().finetune.lr == 0.05
    config = load_config(settings=["finetune.preset=seed2019"])
    assert config.finetune == FinetuneConfig.model_validate({"preset": "seed2019"})
    assert config.train == load_config().train
    later = load_config(settings=["finetune.preset=seed2019", "finetune.epochs=2"])
    assert (later.finetune.epochs, later.finetune.lr) == (2, 0.001)
    back = load_config(settings=["finetune.preset=default"])
    assert back.finetune == FinetuneConfig()


# Round trips


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["finetune.preset=seed2019"],
        ["finetune.preset=seed2019", "finetune.lr=0.25"],
        ["finetune.preset=seed2019", "finetune.clip_gradients=1", "finetune.evaluation_mode=true"],
        ["prune.preset=seed2019", "prune.first_interval_extra=0", "prune.hessian_samples=3"],
        ["finetune.zero_lr_epochs=0.5", "data.limit_batches=7", "prune.first_interval_extra=2"],
        ["prune.budget=macs=20300123", "data.root=some/where", "data.image_size=64"],
        ["prune.budget=params=0.123456789012", "train.ema=0.999", "prune.step_size=100"],
        ["prune.budget=removed=1234567", "prune.keep_dense=['conv1', 'layer[12].*']"],
        ['model.name=quo"te:d', "bench.batch_sizes=[1, 2, 3]"],
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, settings: list[str]) -> None:
    config = load_config(settings=settings)
    save_config(config, tmp_path / "config.toml")
    again = load_config(str(tmp_path / "config.toml"))
    assert again == config
    save_config(again, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "config.toml").read_bytes()


@settings(deadline=None)
@given(
    kind=st.sampled_from(["macs", "params", "channels"]),
    value=st.floats(min_value=1e-9, max_value=1e15) | st.integers(1, 10**15).map(float),
)
def test_a_budget_is_what_it_prints(kind: str, value: float) -> None:
    budget = Budget(kind=kind, value=value)  # type: ignore[arg-type]
    assert Budget.model_validate(str(budget)) == budget


@pytest.mark.parametrize("text", ["macs=0.5", "params=0.25", "channels=0.72", "removed=3200"])
def test_a_budget_prints_what_was_written(text: str) -> None:
    assert str(Budget.model_validate(text)) == text


# The shape of the configuration


@pytest.mark.parametrize(("prefix", "section"), sections(RunConfig))
def test_every_key_has_a_sentence_and_nothing_changes_later(
    prefix: str, section: type[Section]
) -> None:
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            assert field.description, f"{prefix}{name}"
    values = {"kind": "macs", "value": 0.5} if section is Budget else {}
    config = validated(section, values, source="test")
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, next(iter(section.model_fields)), 1)


def test_a_preset_does_not_bring_back_a_key_that_was_taken_out(tmp_path: Path) -> None:
    config = load_config("digits-resnet20", ["prune.preset=seed2019", "prune.step_size=null"])
    assert (config.prune.step_size, config.prune.interval) == (None, 30)
    save_config(config, tmp_path / "config.toml")
    again = load_config(str(tmp_path / "config.toml"))
    assert again.prune.model_copy(update={"preset": "seed2019"}) == config.prune


def test_extends_lays_a_document_over_a_named_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "imagenet-resnet50-seed2019"\n[prune]\nbudget = "removed=7"\n')
    base, mine = load_config("imagenet-resnet50-seed2019"), load_config(str(path))
    assert str(mine.prune.budget) == "removed=7"
    assert mine.finetune == base.finetune
    assert mine.prune.model_copy(update={"budget": base.prune.budget}) == base.prune
    for wrong in ('"nothing"', "7", '"../digits-resnet20"'):
        path.write_text(f"extends = {wrong}\n")
        with pytest.raises(ConfigError, match="must be the name of another configuration"):
            load_config(str(path))


def test_keys_of_earlier_versions_are_read_by_their_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    sections = ("[finetune]", 'recipe = "seed2019"', "[prune]", 'recipe = "seed2019"')
    path.write_text("\n".join((*sections, "[bench]", 'budgets = "mine.toml"', "")))
    config = load_config(str(path))
    assert config.finetune == FinetuneConfig.model_validate({"preset": "seed2019"})
    # What became part of the preset later is not in a file that calls it a recipe.
    assert (config.prune.step_size, config.prune.first_interval_extra) == (100, 0)
    assert load_config(settings=["prune.preset=seed2019"]).prune.first_interval_extra == 1
    assert config.bench.limits == "mine.toml"
    assert load_config(str(path), ["bench.limits=b", "finetune.preset=default"]).bench.limits == "b"
    assert load_config(str(path), ["finetune.recipe=default"]).finetune == FinetuneConfig()
    assert load_config(settings=["prune.recipe=seed2019"]).prune.step_size == 100
    path.write_text('[bench]\nbudgets = "a"\nlimits = "b"\n')
    with pytest.raises(ConfigError, match="budgets is an earlier name of limits"):
        load_config(str(path))


@pytest.mark.parametrize("setting", ["prune..steps=3", "prune.=3", ".prune=3", "prune. .steps=3"])
def test_a_key_with_an_empty_part(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section\.key=value"):
        load_config(settings=[setting])
