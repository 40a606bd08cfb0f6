"""The experiment with all strategies: its configuration, a tiny run, and what the report makes of a result."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.strategies import aggregate_speed, report, run
from fedsplit.corpora import partition
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


def record(side: str, seed: int, perplexity: float, **other: Any) -> dict[str, Any]:
    values = {"federation": "presidents", "side": side, "ranks": "equal", "seed": seed, "perplexity": perplexity}
    values |= {"worst": 30.0, "before": 25.0, "error_mean": 0.5, "error_last": 0.25, "up": 1e6, "down": 2e6}
    values |= {"aggregation_seconds": 0.01, "residual_rank": None, "personal": False, "commit": "c"}
    return {**values, **other}


def test_sides_are_compared_seed_by_seed_and_what_is_missing_is_named() -> None:
    records = [record("fedavg", 0, 20.0), record("fedavg", 1, 22.0), record("fedex", 1, 21.0)]
    records += [record("krum", 0, 19.0, failed="why"), record("fedsa", 0, 24.0, personal=True, error_mean=None)]
    plan = {**PLAN, "seeds": [0, 1], "sides": {name: {} for name in ("fedavg", "fedex", "fedsa")}}
    plan |= {"queue": {"equal": ["presidents"], "mixed": [], "last": [], "first": []}}
    text = report.result_text({"machine": MACHINE, "plan": plan, "records": records})
    fedex, fedavg, fedsa = (line for line in text.splitlines() if line.startswith("| fed"))
    assert "| 21.000 (20.000 to 22.000) | +0.000 (+0.000 to +0.000) | 30.00 | 0.5 | 0.25 | 1.00 | 2.00 |" in fedavg
    assert "| fedex | 21.000 | -1.000 |" in fedex and "its own B) | 24.000 | +4.000 | 30.00 |  |" in fedsa
    assert (
        "2 of 6 runs are missing: presidents, equal ranks, seed 0: fedex; presidents, equal ranks, seed 1: fedsa"
        in text
    )
    assert "krum" not in text


@pytest.mark.parametrize("name", report.TEXTS)
def test_the_readme_shows_the_committed_results(name: str, tmp_path: Path) -> None:
    shutil.copy(EXPERIMENT / "README.md", tmp_path)
    report.write_between(tmp_path / "README.md", f"{name}.json", report.text_of(EXPERIMENT, name))
    assert (tmp_path / "README.md").read_text() == (EXPERIMENT / "README.md").read_text()


def test_the_picture_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = {"plan": PLAN, "records": [record("fedavg", 0, 20.0), record("fedex", 0, 21.0)]}
    for name in ("one", "two"):
        report.draw(result, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


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


def test_a_process_of_the_pool_partitions_a_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "prepare", lambda: None)
    monkeypatch.setattr(partition, "make_partition", partition.make_partition)  # put back afterwards
    run._begin()
    cache_info = vars(partition)["make_partition"].cache_info()
    assert cache_info.maxsize == 2
