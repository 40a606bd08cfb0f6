"""Configurations in which settings are wrong: what cannot be read, and what is checked all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsplit.errors import InputError, InputErrors, SettingError, UnknownValue
from fedsplit.settings.config import Config
from fedsplit.settings.documents import draft, set_by_user
from fedsplit.settings.drafts import Draft, without

WRONG = SettingError("clients", "x", "a number")


def test_a_setting_without_a_value_cannot_be_read_in_any_way() -> None:
    config = without(Config(cut="0:3", rounds=3), ["cut", "train.lr"])
    assert (config.rounds, config.train.batch_size) == (3, 4)
    for read in (
        lambda: config.cut,
        lambda: config.bounds,
        lambda: config.train.lr,
        lambda: replace(config, rounds=4),
    ):
        with pytest.raises(UnknownValue):
            read()
    assert isinstance(config, Config) and set_by_user(config.train) == {}


def test_the_original_stays_readable() -> None:
    config = Config()
    without(config, ["cut", "train.lr"])
    assert config == Config()
    assert without(config, []) is config


def test_a_draft_without_an_error_is_not_checked_further() -> None:
    def too_early(config: Config) -> None:
        raise AssertionError("checked twice")

    assert Draft(Config()).checked(too_early) == Config()


def test_a_draft_with_errors_raises_those_of_further_checks_too() -> None:
    def finds(config: Config) -> None:
        raise InputError(f"{config.rounds} rounds")

    def needs(config: Config) -> None:
        raise InputError(f"{config.clients} clients")

    wrong = without(Config(rounds=3), ["clients"])
    for is_default, check, expected in (
        (False, finds, [str(WRONG), "3 rounds"]),
        (False, needs, [str(WRONG)]),
        (True, finds, [str(WRONG)]),
    ):
        with pytest.raises(InputError) as caught:
            Draft(wrong, (WRONG,), is_default).checked(check)
        assert [str(error) for error in caught.value.errors] == expected
        assert isinstance(caught.value, InputErrors) is (len(expected) > 1)


def test_what_an_unknown_name_may_have_meant_has_no_value() -> None:
    for values, name in (({"lora.rang": 3}, "lora.rank"), ({"train": 3}, "train.lr"), ({"clientz": 3}, "clients")):
        config = draft(values, {}).config
        section, _, field = name.rpartition(".")
        with pytest.raises(UnknownValue):
            getattr(getattr(config, section) if section else config, field)
    assert draft({"clientz": 3, "clients": 4}, {}).config.clients == 4  # given beside it: something else was meant
