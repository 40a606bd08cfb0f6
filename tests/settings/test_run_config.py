"""Flower's run configuration as words of the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict

import fedsplit
from fedsplit.errors import InputError, SettingError
from fedsplit.settings.config import SETTINGS, Config
from fedsplit.settings.flags import parse, read_draft
from fedsplit.settings.run_config import FLAGS, FLOWERS_NAMES, words_of

APP = tomllib.loads(Path("pyproject.toml").read_text())
RUN_CONFIG: dict[str, Any] = flatten_dict(APP["tool"]["flwr"]["app"]["config"])


def test_flowers_names_stand_for_settings_that_are_there() -> None:
    assert {*FLOWERS_NAMES.values()} <= SETTINGS.keys()


def test_the_run_configuration_of_the_app_is_the_default_one() -> None:
    """Flower overrides only keys of pyproject.toml, whose values must not differ from fedsplit's own."""
    assert parse(words_of(RUN_CONFIG, nodes=8)) == Config(engine="flower", clients=8)
    assert RUN_CONFIG.keys() >= FLOWERS_NAMES.keys() | {"clients", FLAGS}


def test_the_app_has_the_version_of_the_package() -> None:
    assert APP["project"]["version"] == fedsplit.__version__


def test_every_value_of_the_run_configuration_reaches_its_setting() -> None:
    changed = {
        "num-server-rounds": 3,
        "fraction-train": 0.5,
        "fraction-evaluate": 0.25,
        "local-steps": 7,
        "local-epochs": 2,
        "batch-size": 6,
        "learning-rate": 3e-4,
        "deterministic": True,
        "lora.rank": "4,8",
        "train.max-length": 64,
        "strategy": "fedprox",
        "strategy.mu": 0.5,
        "mods": "message_size_mod,LocalDpMod",
        "mods.LocalDpMod.epsilon": 2.0,
        "out": "/a folder/-x",
    }
    config = parse(words_of({**RUN_CONFIG, **changed}, nodes=4))
    assert (config.rounds, config.fraction, config.eval.fraction, config.clients) == (3, 0.5, 0.25, 4)
    assert (config.train.steps, config.train.epochs, config.train.batch_size, config.train.lr) == (7, 2, 6, 3e-4)
    assert (config.deterministic, config.lora.rank, config.train.max_length) == (True, (4, 8), 64)
    assert (config.strategy, config.strategy_options) == ("fedprox", {"mu": 0.5})
    assert (config.mods, config.mod_options) == (("message_size_mod", "LocalDpMod"), {"LocalDpMod.epsilon": 2.0})
    assert config.out == "/a folder/-x"


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"clients"}))
def test_every_setting_has_a_key_of_its_own_name(name: str) -> None:
    """The default under its own name changes nothing, with and without kebab case."""
    default = SETTINGS[name].default
    value = ",".join(map(str, default)) if isinstance(default, tuple) else default
    keys = {name, name.replace("_", "-")}
    assert [words_of({key: value}, nodes=2) for key in keys] == [["--engine=flower", "--clients=2"]] * len(keys)


def test_flags_win_and_a_file_is_not_hidden_by_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a file.toml"
    file.write_text("clients = 3\nseed = 5\n[train]\nlr = 0.5\n")
    flags = f"--config '{file}' --train.lr 0.25"
    config = parse(words_of({**RUN_CONFIG, "learning-rate": 0.125, FLAGS: flags}, nodes=3))
    assert (config.clients, config.seed, config.train.lr) == (3, 5, 0.25)


def test_the_clients_are_the_supernodes_unless_set() -> None:
    assert parse(words_of({"clients": 0}, nodes=3)).clients == 3
    assert parse(words_of({}, nodes=3)).clients == 3
    assert parse(words_of({"clients": 5}, nodes=3)).clients == 5
    assert parse(words_of({FLAGS: "--clients 6"}, nodes=3)).clients == 6


def test_two_keys_of_one_setting_are_refused() -> None:
    with pytest.raises(InputError, match="num-server-rounds and rounds are one setting"):
        words_of({"num-server-rounds": 1, "rounds": 2}, nodes=2)


@pytest.mark.parametrize("flags", ["--out 'open", 3, True])
def test_flags_that_are_no_text_are_refused(flags: Any) -> None:
    with pytest.raises(SettingError, match=r"flags: .* allowed: flags of fedsplit simulate as one text"):
        words_of({FLAGS: flags}, nodes=2)


def test_wrong_values_get_the_messages_of_the_command_line() -> None:
    wrong = {"num-server-rounds": 0, "lora.rank": "x", "lora.rang": 4, FLAGS: "--nonsense 1"}
    errors = [str(error) for error in read_draft(words_of(wrong, nodes=2)).errors]
    by_hand = ["--engine=flower", "--clients=2", "--rounds=0", "--lora.rank=x", "--lora.rang=4", "--nonsense", "1"]
    assert errors == [str(error) for error in read_draft(by_hand).errors] and len(errors) == 4
