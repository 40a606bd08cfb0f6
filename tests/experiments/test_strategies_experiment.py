"""The experiment with all strategies: its configuration, a tiny run, and what the report makes of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.strategies import run
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import check_strategy, load_strategy
from strategies import STRATEGIES

EXPERIMENT = Path("experiments/strategies")
PLAN = run.read_plan()
MACHINE = {"cpu": "a", "cores": 2, "memory": 2**30, "date": "today", "commit": "c", "versions": {"python": "3"}}


@pytest.fixture
def tiny(tiny_models: dict[str, Path], corpus_file: Path) -> dict[str, Any]:
    """The plan with little of everything."""
    small = {"rounds": 1, "train.steps": 2, "train.batch_size": 2, "train.max_length": 16, "cut": "1:2"}
    small |= {"model": str(tiny_models["gpt2"]), "dataset": str(corpus_file)}
    places = {name: {"clients": 3, "partition": "natural"} for name in PLAN["federations"]}
    return {**PLAN, "settings": {**PLAN["settings"], **small}, "federations": places}


def test_every_strategy_is_compared() -> None:
    assert {run.side_of(PLAN, side)[0] for side in PLAN["sides"]} == STRATEGIES.keys()
    wanted = list(run.cases(PLAN))
    assert len(wanted) == len({*wanted})
    assert {case.side for case in wanted[: len(PLAN["sides"])]} == PLAN["sides"].keys()


@pytest.mark.parametrize("side", PLAN["sides"])
def test_every_run_can_be_begun(side: str) -> None:
    """Settings parse, options are taken, and ranks differ only where the strategy allows it."""
    own = [case for case in run.cases(PLAN) if case.side == side and case.seed == PLAN["seeds"][0]]
    assert len(own) >= len(PLAN["federations"])
    for case in own:
        config = run.settings(PLAN, case)
        check_strategy(load_strategy(config.strategy, config.strategy_options, strategy_defaults(config)), config)


def test_every_point_of_the_grid_can_be_begun() -> None:
    plan, wanted = run.grid_of(PLAN)
    assert {case.seed for case in wanted}.isdisjoint(PLAN["seeds"])
    for case in wanted:
        config = run.settings(plan, case)
        load_strategy(config.strategy, config.strategy_options, {})
    for name in PLAN["grid"]["sides"].keys() - {"fedavg", "hetlora"}:
        assert PLAN["sides"][name] in PLAN["grid"]["sides"][name]


@pytest.mark.parametrize("side", ["fedavg", "fedsa", "fedex, rank 8"])
def test_a_run_tells_what_came_of_it(tiny: dict[str, Any], side: str) -> None:
    found = run.measure(run.settings(tiny, run.Case("presidents", side, "equal", 0)))
    assert found["worst"] >= found["perplexity"] > 1 and len(found["losses"]) == 2
    assert found["up"] > 0 and len(found["change_norms"]) == 1
    assert found["change_norms"][0] > 0
    assert found["personal"] == (side == "fedsa") == (found["error_mean"] is None)
    assert (found["residual_rank"] is not None) == (side == "fedex, rank 8")


@pytest.mark.slow
def test_the_queue_goes_on_after_a_run_that_failed(tiny: dict[str, Any]) -> None:
    """Mixed ranks under FedAvg fail in a process of the pool; the next run is begun all the same."""
    todo = [run.Case("presidents", "fedavg", ranks, 0) for ranks in ("mixed", "equal")]
    failed, ended = run.run_all(tiny, todo, 1)
    assert failed["failed"].startswith("SettingError: lora.rank: 2,4,8,16 is not possible")
    assert ended["perplexity"] > 1 and run.case_of(ended) == todo[1]
    assert not list(run.run_all(tiny, todo, 1, minutes=0))


def test_what_was_run_with_other_settings_is_run_again() -> None:
    case = next(run.cases(PLAN))
    record = {"federation": case.federation, "side": case.side, "ranks": case.ranks, "seed": case.seed}
    old = {"plan": PLAN, "records": [record]}
    other = {**PLAN, "settings": {**PLAN["settings"], "train.steps": 99}}
    assert run.still_good(old, PLAN, [case]) == [record]
    assert not run.still_good(old, other, [case]) and not run.still_good(old, PLAN, [])
    assert not run.still_good({**old, "records": [{**record, "failed": "why"}]}, PLAN, [case])
