"""Settings: one list, three sources, clear refusals."""

from __future__ import annotations

import pytest

from fedsplit.allowed import SettingError
from fedsplit.config import LEAVES, SECTIONS, Config, words_of
from fedsplit.documents import build
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec


def test_the_lists_of_names_are_those_of_the_code() -> None:
    from fedsplit.allowed import CODECS
    from fedsplit.allowed import SCHEDULES as NAMES

    assert tuple(SCHEDULES) == NAMES
    assert [make_codec(name).name for name in CODECS] == list(CODECS)


def test_no_budget_is_none_and_another_is_bytes() -> None:
    assert build({"trunk.memory": ""}).trunk.memory_bytes is None
    assert build({"trunk.memory": "2GiB"}).trunk.memory_bytes == 2**31


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
    assert caught.value.allowed == words_of(*LEAVES[name])


@pytest.mark.parametrize("name", [name for name, (_, kind) in LEAVES.items() if kind is int])
def test_no_whole_number_is_without_a_limit(name: str) -> None:
    """Thirty digits would be tried for ever, or break a library."""
    with pytest.raises(SettingError, match=f"{name}: 9+ is not possible"):
        build({name: "9" * 30})
