"""Settings against the model; tests/commands/test_checks.py has the calls that are refused."""

from __future__ import annotations

import pytest

from fedsplit.commands import model_checks
from fedsplit.errors import SettingError
from fedsplit.model.facts import Facts
from fedsplit.model.families import Family
from fedsplit.settings.documents import build


@pytest.mark.parametrize(
    ("cut", "schedule", "parts"),
    [
        ("1:5", "shared", ["bottom", "trunk", "top"]),
        ("0:6", "shared", ["trunk"]),
        ("1:5", "frozen", ["bottom", "top"]),
        ("1:6", "frozen", ["bottom"]),
        ("0:6", "frozen", []),
        ("0:5", "forward-only", ["top"]),
        ("1:6", "forward-only", []),
    ],
)
def test_which_parts_can_learn(cut: str, schedule: str, parts: list[str]) -> None:
    assert model_checks.learning_parts(build({"cut": cut, "trunk.schedule": schedule}), 6) == parts


def test_a_head_with_a_bias_is_not_trained_whole() -> None:
    """The bias would stay as it is, and PEFT would not open the adapter without it."""
    facts = Facts(Family("model", "layers", "embed_tokens", biased_head=True), blocks=3, positions=32, end=0)
    with pytest.raises(SettingError, match=r"lm_head: full is not possible; allowed: frozen \| lora"):
        model_checks.check_adapters(build({"lm_head": "full"}), facts)


@pytest.mark.parametrize("cut", ["1:3", "4:6"])
def test_a_cut_that_parts_shared_keys_and_values_is_refused_with_the_cuts_that_work(cut: str) -> None:
    facts = Facts(Family("model", "layers", "embed_tokens"), 6, 32, end=0, closed=frozenset({3, 4, 5}))
    with pytest.raises(SettingError, match=rf"cut: {cut} is not possible; allowed: bounds among 0-2, 6: between"):
        model_checks.check_cut(build({"cut": cut}), facts)
    with pytest.raises(SettingError, match=r"trunk.stages: 1:4:6 is not possible; allowed: bounds among 0-2, 6"):
        model_checks.check_cut(build({"cut": "1:6", "trunk.stages": "1:4:6"}), facts)
    model_checks.check_cut(build({"cut": "1:6", "trunk.stages": "1:2:6"}), facts)


def test_weights_that_are_quantised_already_need_the_setting() -> None:
    facts = Facts(Family("model", "layers", "embed_tokens", targets=("q_proj",)), 3, 32, end=0, bits=4)
    for given in ("", "trunk:4", "bottom:8,trunk:8,top:8"):
        with pytest.raises(SettingError, match=r"allowed: bottom:4,trunk:4,top:4 for a model whose weights are in 4"):
            model_checks.check_adapters(build({"quantization": given}), facts)
    model_checks.check_adapters(build({"quantization": "bottom:4,trunk:4,top:4"}), facts)
