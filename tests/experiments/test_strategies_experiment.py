"""The experiment with all strategies: its study files, and what the report makes of a comparison."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch

from experiments.strategies import aggregate_speed, report
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import check_strategy, load_strategy, traits_of
from fedsplit.settings.config import Config
from fedsplit.studies.run_measures import ERROR, LOSS, MB_DOWN, MB_UP, WORST
from fedsplit.studies.study import read_study
from strategies import STRATEGIES

EXPERIMENT = Path("experiments/strategies")


def configs_of(name: str) -> dict[str, Config]:
    """The settings of a study's runs with the first seed, by side."""
    study = read_study(EXPERIMENT / f"{name}.toml", {})
    first = study.runs[0].seed
    return {run.label: run.draft.checked() for run in study.runs if run.seed == first}


SIDES = configs_of("presidents")
STEP_SIZES = configs_of("step-sizes")


def test_every_strategy_is_compared() -> None:
    assert {config.strategy for config in SIDES.values()} == STRATEGIES.keys()


def test_sides_that_allow_it_have_mixed_ranks_too() -> None:
    equal = {side: config for side, config in SIDES.items() if not side.endswith(report.MIXED)}
    traits = {side: traits_of(load_strategy(each.strategy, each.strategy_options, {})) for side, each in equal.items()}
    assert {side + report.MIXED for side in equal if traits[side].mixed_ranks} == SIDES.keys() - equal.keys()
    for side in equal.keys() & {mixed.removesuffix(report.MIXED) for mixed in SIDES.keys() - equal.keys()}:
        mixed = SIDES[side + report.MIXED]
        assert (mixed.strategy, mixed.strategy_options) == (equal[side].strategy, equal[side].strategy_options)


@pytest.mark.parametrize("config", [*SIDES.values(), *STEP_SIZES.values()], ids=[*SIDES, *STEP_SIZES])
def test_every_run_can_be_begun(config: Config) -> None:
    """Options are taken, and ranks differ only where the strategy allows it."""
    check_strategy(load_strategy(config.strategy, config.strategy_options, strategy_defaults(config)), config)


def test_step_sizes_are_chosen_on_a_seed_of_their_own() -> None:
    assert not {config.seed for config in STEP_SIZES.values()} & {config.seed for config in SIDES.values()}
    tried = [(config.strategy, config.strategy_options) for config in STEP_SIZES.values()]
    for side in ("fedavgm", "fedadagrad", "fedadam", "fedyogi", "hetlora, decay 0.1"):
        assert (SIDES[side].strategy, SIDES[side].strategy_options) in tried


def comparison_of(losses: dict[str, dict[int, float]]) -> report.Comparison:
    """A comparison with two rounds, whose costs and errors are the same for all sides but `fedsa`."""
    measures = {LOSS: losses, WORST: {side: {0: 3.0} for side in losses}}
    for measure, value in ((ERROR, 0.5), (MB_UP, 2.0), (MB_DOWN, 4.0)):
        measures[measure] = {side: {0: value} for side in losses if (side, measure) != ("fedsa", ERROR)}
    runs = [{"label": side, "seed": seed, "git": GIT} for side, values in losses.items() for seed in values]
    study = {"seeds": [0, 1], "settings": {"rounds": 2}, "variants": [{"name": side} for side in losses]}
    document = {"study": study, "versions": {"torch": "2"}, "host": {"cores": 2}, "runs": runs, "note": "Not played."}
    return report.Comparison(document, measures)


GIT = {"commit": "0123456789", "dirty": True}
LOSSES = {
    "fedavg": {0: 3.0, 1: 3.0},
    "fedsa": {0: 3.125},
    "fedex": {1: 2.75},
    "fedex, mixed ranks": {0: 3.0, 1: 3.25},
}


def test_sides_are_compared_seed_by_seed_and_what_is_missing_is_named() -> None:
    """exp(3) is 20.086, exp(3.125) is 22.760, exp(2.75) is 15.643 and exp(3.25) is 25.790."""
    text = report.federation_text(comparison_of(LOSSES))
    fedex, fedavg, fedsa, mixed = (line for line in text.splitlines() if line.startswith("| fed"))
    assert fedavg.startswith(
        "| fedavg | 20.086 (20.086 to 20.086) | +0.000 (+0.000 to +0.000) | 20.09 | 0.5 | 1.00 | 2.00 |"
    )
    assert fedex.startswith("| fedex | 15.643 | -4.443 | 20.09 |")
    assert fedsa.startswith("| fedsa | 22.760 | +2.674 | 20.09 |  | 1.00 |")
    assert mixed.startswith("| fedex | 22.938 (20.086 to 25.790) | +2.852 (+0.000 to +5.705) |")
    assert "2 of 8 runs are missing: fedex, seed 0; fedsa, seed 1." in text
    assert "2 cores; torch 2; fedsplit 0123456-dirty. Not played." in text


@pytest.mark.parametrize("name", report.NAMES)
def test_the_readme_shows_the_committed_results(name: str, tmp_path: Path) -> None:
    shutil.copy(EXPERIMENT / "README.md", tmp_path)
    report.write_between(tmp_path / "README.md", f"{name}.json", report.text_of(EXPERIMENT, name))
    assert (tmp_path / "README.md").read_text() == (EXPERIMENT / "README.md").read_text()


def test_the_picture_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        report.draw({"presidents": comparison_of(LOSSES)}, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_options_of_a_strategy_are_those_of_its_side() -> None:
    assert aggregate_speed.options_of("fedbuff") == {"delays": "1,1,2,4"}


@pytest.mark.parametrize("name", ["fedavg", "fedsa", "flora", "scaffold", "fedbuff", "rolora"])
def test_random_factors_are_what_the_strategy_would_be_sent(name: str) -> None:
    strategy = load_strategy(name, {}, {})
    start = aggregate_speed.start_of(aggregate_speed.layers_of("all", scale=128, blocks=1), 2, 4.0)
    state = strategy.init(start)
    updates = list(aggregate_speed.updates_of(strategy, state, start, 3, 2))
    _, result = strategy.aggregate(state, start, updates)
    moved = {n for u in updates for n, t in u.adapters.tensors.items() if not torch.equal(t, u.given.tensors[n])}
    factors = {"fedsa": "A", "rolora": "B"}.get(name, "AB")
    assert moved == {n for n in start.tensors if any(f".lora_{factor}." in n for factor in factors)}
    assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())


@pytest.mark.parametrize("name", ["fedavg", "fedsa", "fedex"])
def test_aggregation_is_measured(name: str) -> None:
    args = argparse.Namespace(size="attention", scale=128, blocks=1, clients=3, rank=2, alpha=4.0, threads=1)
    found = aggregate_speed.measure(name, args)
    assert found["layers"] == 4 and found["aggregate"]["seconds"] > 0
    assert (found["error"] is None) == (name == "fedsa")
