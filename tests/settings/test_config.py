"""Settings: one list, three sources, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedsplit.errors import InputErrors, SettingError
from fedsplit.settings.config import SECTIONS, SETTINGS, Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.settings.sections import LoraSettings, TrainSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0),
        ("clients", "3"),
        ("clients", True),
        ("clients", 3.0),
        ("fraction", float("nan")),
        ("share", ("bottom", "middle")),
        ("share", [1]),
        ("train.batch_size", 10**30),
        ("train.lr", -1.0),
        ("lora.rank", (0,)),
        ("lora.rank", ("8",)),
        ("lora.rank", (True,)),
        ("lora.rank", 8),
        ("timeout", 1e300),
        ("trunk.schedule", "sharde"),
        ("deterministic", 1),
        ("model", "half a character \udc80"),
        ("lora.targets", ("c_attn", "\ud800")),
    ],
)
def test_whoever_makes_a_configuration_its_values_are_checked(name: str, value: object) -> None:
    section, _, leaf = name.rpartition(".")
    with pytest.raises(SettingError) as caught:
        Config(**({section: SECTIONS[section](**{leaf: value})} if section else {leaf: value}))
    assert caught.value.setting == name
    assert caught.value.allowed == SETTINGS[name].words


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS.values() if setting.python_type is int])
def test_no_whole_number_is_without_a_limit(name: str) -> None:
    """Thirty digits would be tried for ever, or break a library."""
    with pytest.raises(SettingError, match=f"{name}: 9+ is not possible"):
        build({name: "9" * 30})


def test_numbers_of_other_libraries_paths_and_lists_become_pythons_own() -> None:
    settings = {"rounds": np.int64(3), "fraction": np.float32(0.5), "model": Path("a/b"), "share": ["bottom", "trunk"]}
    config = Config(**settings, lora=LoraSettings(rank=[np.int64(2), 4]), train=TrainSettings(lr=np.float64(0.1)))
    assert config == Config(
        rounds=3,
        fraction=0.5,
        model="a/b",
        share=("bottom", "trunk"),
        lora=LoraSettings(rank=(2, 4)),
        train=TrainSettings(lr=0.1),
    )
    assert from_document(json.loads(json.dumps(as_document(config)))) == config


def test_a_section_of_another_kind_is_refused() -> None:
    with pytest.raises(SettingError, match=r"lora: .* is not possible; allowed: a LoraSettings"):
        Config(lora={"rank": (8,)})


def test_all_wrong_values_are_reported_together() -> None:
    with pytest.raises(InputErrors) as refused:
        Config(clients=0, cut="3:3", train=TrainSettings(lr=-1.0))
    assert [str(error).partition(":")[0] for error in refused.value.errors] == ["clients", "cut", "train.lr"]
