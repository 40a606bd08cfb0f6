"""Study files: what runs they stand for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import InputError
from fedsplit.studies.study import read_study


def study(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_a_grid_with_variants_is_every_combination_seed_by_seed(tmp_path: Path) -> None:
    text = """
        seeds = [3, 1]
        baseline = { variant = "plain" }
        [settings]
        rounds = 2
        train.lr = 0.5
        [grid]
        lora.rank = [4, [2, 4]]
        [[variants]]
        name = "plain"
        [[variants]]
        name = "proximal"
        strategy = "fedprox"
        strategy_options = { mu = 0.25 }
        rounds = 7
    """
    found = read_study(study(tmp_path, text), {"engine": "local", "rounds": 9})
    assert found.axes == ("variant", "lora.rank")
    assert found.columns == ("lora.rank", "strategy", "rounds", "strategy_options.mu")
    assert found.baseline == {"variant": "plain"} and found.errors == ()
    configs = [run.draft.checked() for run in found.runs]
    assert [run.name for run in found.runs[:2]] == ["plain, lora.rank 4, seed 3", "plain, lora.rank 2,4, seed 3"]
    assert [config.seed for config in configs] == [3] * 4 + [1] * 4
    assert [config.lora.rank for config in configs[:4]] == [(4,), (2, 4)] * 2
    assert [config.rounds for config in configs[:4]] == [2, 2, 7, 7]
    assert configs[2].strategy_options == {"mu": 0.25} and configs[2].train.lr == 0.5
    assert {config.engine for config in configs} == {"local"}


WRONG = {
    "seeds = []": "seeds: an empty list is not possible",
    "seeds = [0, 0]": "seeds: 0 is not possible; allowed: values that are all different",
    "seeds = 3": "seeds: 3 is not possible; allowed: a list of whole numbers",
    "clients = 3": "there is no key clients; settings belong in the table [settings]",
    "sead = [1]": "there is no key sead; did you mean seeds?",
    "[settings]\nout = 'x'": "settings.out: x is not possible; allowed: no folder here",
    "[grid]\nseed = [1]": "allowed: no seed here: seeds = [0, 1, 2] at the top",
    "[grid]\nclients = []": "grid.clients: [] is not possible; allowed: a list with at least one value",
    "[grid]\nclients = [2, 2]": "grid.clients: 2 is not possible; allowed: values that are all different",
    "[settings]\nclients = 2\n[grid]\nclients = [3]": "a setting of [settings] or of [grid], not of both",
    "[[variants]]\nclients = 2": "variants: number 1 without a name is not possible",
    "[grid]\nclients = [3]\n[[variants]]\nname = 'a'\nclients = 2": "a setting of [grid] or of [[variants]]",
    "baseline = 'fedavg'": "values of the study (none, since the study has no grid)",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    try:
        errors = read_study(study(tmp_path, text), {}).errors
    except InputError as error:
        errors = error.errors
    assert [WRONG[text] in str(error) for error in errors] == [True], errors


def test_a_baseline_with_two_meanings_asks_for_the_axis(tmp_path: Path) -> None:
    (error,) = read_study(study(tmp_path, "baseline = 4\n[grid]\nlora.rank = [4]\nclients = [4]"), {}).errors
    assert 'a table, such as { "lora.rank" = 4 }' in str(error)
