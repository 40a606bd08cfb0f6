"""A part's budget of ranks: PEFT's fields, each party's clock, and what is refused before a library is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig

from fedsplit.adaptation.rank_budget import FIELDS, RankBudget, budget_of, check_budget, for_file, trunk_steps
from fedsplit.errors import SettingError
from fedsplit.settings.documents import build


def settings(options: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    values: dict[str, object] = {"lora.method": "adalora", "lora.options": options or ""}
    return values | {name.replace("__", "."): value for name, value in more.items()}


def test_defaults_are_pefts() -> None:
    theirs = AdaLoraConfig(total_step=1)
    budget = RankBudget()
    assert {name: getattr(budget, name) for name in FIELDS} == {name: getattr(theirs, name) for name in FIELDS}


def test_what_is_given_reaches_every_part() -> None:
    options = {"init_r": 6, "target_r": 3, "deltaT": 5, "beta1": 0.5, "beta2": 0.25, "orth_reg_weight": 0.1}
    for kind in ("bottom", "trunk", "top"):
        budget = budget_of(build(settings(options)), kind, 24)
        assert budget is not None and budget.layers == 24
        assert {name: getattr(budget, name) for name in options} == options
        assert budget.fields["total_step"] == budget.total
    assert budget_of(build({}), "trunk", 24) is None


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, 8 * 10),
        ({"fraction": 0.5}, 4 * 10),
        ({"trunk__schedule": "batched"}, 10),
        ({"trunk__schedule": "copies"}, 10),
        ({"trunk__schedule": "accumulate"}, 1),
        ({"trunk__schedule": "accumulate", "trunk__every": 4}, 3),
        ({"trunk__schedule": "accumulate", "trunk__every": 10}, 1),
    ],
)
def test_the_trunk_makes_as_many_steps_as_its_schedule_has(values: dict[str, object], steps: int) -> None:
    """Eight clients and ten steps a round; five rounds, of which 20 steps come before and 20 after."""
    config = build(settings({"tinit": 20, "tfinal": 20}, **values))
    assert trunk_steps(config) == steps
    trunk, client = budget_of(config, "trunk", 1), budget_of(config, "bottom", 1)
    assert trunk is not None and client is not None
    assert (client.total, client.tinit, client.last) == (50, 20, 30)
    assert (trunk.total, trunk.tinit, trunk.last) == (5 * steps, 2 * steps, 3 * steps)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 99), st.data())
def test_a_course_that_is_stretched_still_leaves_room_for_the_budget_to_fall(
    rounds: int, steps: int, other: int, data: st.DataObject
) -> None:
    tinit = data.draw(st.integers(0, rounds * steps - 1))
    tfinal = data.draw(st.integers(0, rounds * steps - tinit - 1))
    budget = RankBudget(tinit=tinit, tfinal=tfinal, rounds=rounds, steps=steps).stretched(other)
    assert 0 <= budget.tinit < budget.last <= budget.total == rounds * other
    AdaLoraConfig(**budget.fields)  # PEFT takes it
    everything = [budget.position(round, step) for round in range(1, rounds + 1) for step in range(1, other + 1)]
    assert everything == list(range(1, budget.total + 1))
    assert budget.position(1, other + 3) == other


def test_the_file_tells_a_clients_steps() -> None:
    config = build(settings({"tinit": 2}, rounds=3))
    assert for_file(config).options == '{"tinit": 2, "total_step": 30}'
    assert for_file(build({})) == build({}).lora


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"target_r": 12}, {}, "lora.options: target_r 12 is not possible; allowed: 1 to 11, below init_r"),
        ({"init_r": 1, "target_r": 1}, {}, "lora.options: target_r 1 is not possible; allowed: none below init_r 1"),
        ({"init_r": 8}, {}, "lora.options: target_r 8 is not possible; allowed: 1 to 7"),
        ({"init_r": 0}, {}, "lora.options: init_r 0 is not possible; allowed: a whole number of at least 1"),
        ({"init_r": 6.5}, {}, "lora.options: init_r 6.5 is not possible"),
        ({"target_r": True}, {}, "lora.options: target_r true is not possible"),
        ({"deltaT": 0}, {}, "lora.options: deltaT 0 is not possible; allowed: a whole number of at least 1"),
        ({"beta1": 1}, {}, "lora.options: beta1 1 is not possible; allowed: a number above 0 and below 1"),
        ({"beta2": "x"}, {}, 'lora.options: beta2 "x" is not possible'),
        ({"orth_reg_weight": -1}, {}, "lora.options: orth_reg_weight -1 is not possible; allowed: a number of at"),
        ({"tinit": -1}, {}, "lora.options: tinit -1 is not possible; allowed: a whole number of at least 0"),
        (
            {"tinit": 25, "tfinal": 25},
            {},
            "lora.options: tinit 25 and tfinal 25 is not possible; allowed: less than 50",
        ),
        ({"tinit": 10}, {"rounds": 1}, "lora.options: tinit 10 and tfinal 0 is not possible; allowed: less than 10"),
        ({"r": 4}, {}, "lora.options: r is not possible; allowed: init_r | target_r | tinit"),
        ({"init_lora_weights": "gaussian"}, {}, 'lora.options: init_lora_weights "gaussian" is not possible'),
        ({}, {"train__epochs": 1}, "train.epochs: 1 is not possible; allowed: 0 with adalora"),
    ],
)
def test_what_cannot_be_dealt_out_is_said_in_one_line(
    options: dict[str, object], more: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingError) as caught:
        check_budget(build(settings(options, **more)))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_can_be_is_not_refused() -> None:
    check_budget(build(settings()))
    check_budget(build(settings({"tinit": 24, "tfinal": 25, "init_r": 2, "target_r": 1, "orth_reg_weight": 0})))
    check_budget(build({"lora.method": "ia3", "train.epochs": 1}))


def test_nothing_is_imported_to_refuse() -> None:
    code = (
        "import sys\nfrom fedsplit.settings.documents import build\n"
        "from fedsplit.adaptation.rank_budget import check_budget\n"
        "check_budget(build({'lora.method': 'adalora'}))\n"
        "assert not {'torch', 'peft', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
