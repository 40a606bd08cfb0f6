"""What holds for every strategy. A new one joins with one line in `CASES`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rounds import Round, applied, error, start
from safetensors.torch import load_file, save_file

import strategies
from fedsplit.federation.strategy import load_strategy, traits_of
from fedsplit.updates import ClientUpdate


@dataclass(frozen=True)
class Case:
    """How a strategy is tested.

    Attributes:
        options: Its keyword arguments.
        identity: A single client's change is what is applied, and so is one on which all agree.
        fewest: Clients it needs at least.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    identity: bool = True
    fewest: int = 1


CASES = {
    "fedavg": Case(),
    "ffa": Case(),
    "rolora": Case(),
    "fedsa": Case(identity=False),  # each client's B stays with it: nothing is applied to all
    "flora": Case(),
    "fedex": Case(),
    "hetlora": Case(),
    "flexlora": Case(),
    "lora_fair": Case(),
    "fedsvd": Case(),
    "fedrot": Case(),
    "fedprox": Case(),
    "scaffold": Case(),
    "fedavgm": Case({"server_momentum": 0.9}, identity=False),
    "fedadagrad": Case(identity=False),
    "fedadam": Case(identity=False),
    "fedyogi": Case(identity=False),
    "krum": Case(fewest=3),
    "multikrum": Case(fewest=3),
    "median": Case(),
    "trimmed_mean": Case({"trim": 0.3}),
    "geometric_median": Case(),
    "normclip": Case({"norm": 1.0}, identity=False),
    "fedbuff": Case({"delays": "1,2"}, identity=False),
}


def make(name: str) -> Any:
    return load_strategy(name, CASES[name].options, {})


def begun(name: str, rounds: int = 0) -> Round:
    """A strategy after some rounds of five clients."""
    run = Round.begin(make(name), start())
    for number in range(rounds):
        run.aggregate(run.train([2] * 5, seed=number))
    return run


def remembered(strategy: Any) -> dict[str, Any]:
    """What is on a strategy, and on one that it works around."""
    return {n: remembered(v) if hasattr(v, "aggregate") else repr(v) for n, v in vars(strategy).items()}


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal to the bit."""
    return all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        for a, b in (
            (one.tensors, other.tensors),
            ({n: m.up for n, m in one.folded.items()}, {n: m.up for n, m in other.folded.items()}),
            ({n: m.down for n, m in one.folded.items()}, {n: m.down for n, m in other.folded.items()}),
        )
    )


def test_every_strategy_keeps_the_contract() -> None:
    assert CASES.keys() == strategies.STRATEGIES.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("clients", [1, 2, 5])
def test_names_and_shapes_are_kept_and_values_finite(name: str, clients: int) -> None:
    run = Round.begin(make(name), start())
    for _ in range(3):
        before = run.adapters
        result = run.aggregate(run.train([2] * max(clients, CASES[name].fewest)))
        before.check_fits(result.tensors, name)
        result.check_folded(name)
        assert result.layers == before.layers
        assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float32}
        assert all(tensor.is_contiguous() for tensor in result.tensors.values())
        assert bool(result.folded) <= traits_of(run.strategy).folds


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.identity])
def test_a_single_client_and_clients_that_agree_are_the_identity(name: str) -> None:
    """In every one of three rounds what is applied is what the client (or each of four) made."""
    for clients in (1, 4):
        run = Round.begin(make(name), start())
        for _ in range(3):
            (update,) = run.train([2])
            updates = [replace(update, client=client, examples=client + 2) for client in range(clients)]
            if clients >= CASES[name].fewest:
                assert error(run.aggregate(updates), updates) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_clients_changes_no_bit(name: str) -> None:
    run = begun(name, 2)
    updates = run.train([2] * 4)
    results = [copy.deepcopy(run).aggregate(list(order)) for order in itertools.permutations(updates)]
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("name", CASES)
def test_weights_have_no_scale(name: str) -> None:
    one, other = (begun(name, 2) for _ in range(2))
    results = []
    for run, factor in ((one, 1.0), (other, 7.0)):
        results.append(applied(run.aggregate(run.train([2] * 4, [factor * weight for weight in (1, 2, 3, 4)]))))
    assert all(torch.allclose(results[0][layer], results[1][layer], rtol=1e-5, atol=1e-7) for layer in results[0])


@pytest.mark.parametrize("name", CASES)
def test_state_survives_being_saved(name: str, tmp_path: Path) -> None:
    straight, stopped = begun(name, 2), begun(name, 2)
    stopped.strategy = make(name)
    save_file({n: t.contiguous() for n, t in stopped.state.items()}, tmp_path / "state.safetensors")
    stopped.state = load_file(tmp_path / "state.safetensors")
    for _ in range(2):
        results = [run.aggregate(run.train([2] * 4)) for run in (straight, stopped)]
        assert same(*results)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_remembered_on_the_strategy_or_changed_in_what_it_is_given(name: str) -> None:
    run = begun(name, 2)
    strategy, state, updates = run.strategy, run.state, run.train([2] * 4)
    kept = copy.deepcopy((remembered(strategy), dict(state), run.adapters, updates))
    strategy.aggregate(state, run.adapters, updates)
    assert kept[0] == remembered(strategy)
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept[1].items()) and kept[1].keys() == state.keys()
    assert same(kept[2], run.adapters)
    assert all(same(one.adapters, other.adapters) for one, other in zip(kept[3], updates, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_client_without_examples_counts_for_nothing(name: str) -> None:
    one, other = begun(name, 2), begun(name, 2)
    updates = one.train([2] * 5)
    idle = replace(updates[0], examples=0)
    assert same(one.aggregate([idle, *updates[1:]]), other.aggregate(updates[1:]))
    with pytest.raises(ValueError, match="no client trained"):
        begun(name, 2).aggregate([idle])


@pytest.mark.parametrize("name", CASES)
def test_clients_that_failed_or_were_not_sampled_are_not_needed(name: str) -> None:
    """Rounds of other clients each, and one that comes back after two."""
    run = begun(name)
    for present in ((0, 1, 2, 3), (1, 2, 4), (0, 3, 4)):
        updates = [update for update in run.train([2] * 5) if update.client in present]
        result = run.aggregate(updates)
        assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())


@pytest.mark.parametrize("name", [name for name in CASES if traits_of(make(name)).mixed_ranks])
def test_mixed_ranks_keep_everybodys_shape(name: str) -> None:
    ranks = [2, 4, 3, 4]
    run = Round.begin(make(name), start(rank=4))
    for number in range(3):
        updates: list[ClientUpdate] = run.train(ranks, seed=number)
        for update, rank in zip(updates, ranks, strict=True):
            assert update.given is not None
            assert {update.given.rank(layer) for layer in update.given.layers} <= set(range(1, rank + 1))
        result = run.aggregate(updates)
        run.adapters.check_fits(result.tensors, name)
        assert error(result, updates) < 0.9


@pytest.mark.parametrize("name", CASES)
def test_what_the_run_knows_may_be_passed_to_every_strategy(name: str) -> None:
    made = load_strategy(name, CASES[name].options, {"seed": 3, "clients": 5})
    assert isinstance(made.init(start()), Mapping)


@pytest.mark.parametrize("name", [name for name in CASES if traits_of(make(name)).factors])
def test_what_is_no_factor_is_averaged_plainly_beside_factors(name: str) -> None:
    """Such as a head that trains whole; for three rounds, with other draws in between."""
    head = torch.arange(12.0).reshape(4, 3)
    run = Round.begin(make(name), replace(start(), tensors={**start().tensors, "lm_head.weight": head}))
    for number in range(3):
        updates = run.train([2] * 3, seed=number)
        weights = [update.examples / sum(u.examples for u in updates) for update in updates]
        heads = [update.adapters.tensors["lm_head.weight"].double() for update in updates]
        mean = sum(weight * tensor for weight, tensor in zip(weights, heads, strict=True))
        found = run.aggregate(updates).tensors["lm_head.weight"]
        assert torch.allclose(found.double(), mean, rtol=1e-6) and not torch.equal(found, head)


def test_a_strategy_made_by_name_takes_its_own_options_only() -> None:
    assert strategies.make("fedprox", {"clients": 3, "mu": 0.5}).mu == 0.5
    assert strategies.make("fedprox", {"mu": 0.5}, mu=0.1).mu == 0.1
    with pytest.raises(ValueError, match="there is no strategy 'nothing'; there are"):
        strategies.make("nothing")
    with pytest.raises(ValueError, match="fedprox does not take the option 'clients', but mu"):
        strategies.make("fedprox", clients=3)
