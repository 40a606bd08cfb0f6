"""The contract of strategies: those of fedsplit keep it, and every rule is broken by one that it names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedsplit.contracts.strategies import check_strategy
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, weighted

COUNT = itertools.count()


class Mean:
    """The weighted mean, which keeps every rule."""

    def init(self, adapters: Adapters) -> State:
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        updates, weights = weighted(updates)
        return state, average_adapters(adapters, updates, weights)


class Changed(Mean):
    """The mean, changed by a method."""

    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        state, mean = super().aggregate(state, adapters, updates)
        return state, mean.with_tensors({name: self.change(tensor) for name, tensor in mean.tensors.items()})


class NotFinite(Changed):
    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 0


class Counts(Changed):
    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + next(COUNT))


class Remembers(Changed):
    rounds = 1.0

    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        self.rounds += 0.1
        return tensor * self.rounds


class InPlace(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        for tensor in updates[0].adapters.tensors.values():
            tensor.mul_(2)
        return super().aggregate(state, adapters, updates)


class First(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        return state, updates[0].adapters


class Unweighted(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        return state, average_adapters(adapters, updates, [1 / len(updates)] * len(updates))


class Added(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        return state, average_adapters(adapters, updates, [1.0 if update.examples else 0.0 for update in updates])


class Equally(Mean):
    """Weighs clients equally, which is a choice and no fault."""

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        trained = [update for update in updates if update.examples]
        return state, average_adapters(adapters, trained, [1 / len(trained)] * len(trained))


class Draws(Changed):
    def change(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.randn_like(tensor) / 1000


class Forgets(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        return state, adapters


class Seeds(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        torch.manual_seed(0)
        return super().aggregate(state, adapters, updates)


class Several(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        if len(updates) < 2:
            raise ValueError("one is not enough")
        return super().aggregate(state, adapters, updates)


class All(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        if updates[0].client != 0:
            raise ValueError("where is client 0?")
        return super().aggregate(state, adapters, updates)


class FactorsAlone(Mean):
    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        state, mean = super().aggregate(state, adapters, updates)
        return state, mean.with_tensors({name: tensor for name, tensor in mean.tensors.items() if "lora_" in name})


class SaysMixed(Mean):
    traits = Traits(mixed_ranks=True)


BROKEN = {
    NotFinite: "rounds",
    Counts: "same result",
    Remembers: "saved state",
    InPlace: "inputs",
    First: "order",
    Unweighted: "no examples",
    Added: "same adapter",
    Forgets: "learning",
    Seeds: "side effects",
    Several: "one client",
    All: "absent clients",
    FactorsAlone: "head",
    SaysMixed: "mixed ranks",
}


def broken(make: Any, name: str = "fedavg") -> list[str]:
    return [check.name for check in check_strategy(make, Config(strategy=name)) if check.fault]


@pytest.mark.parametrize("cls", BROKEN)
def test_every_rule_finds_what_breaks_it(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsplit.contracts import strategies

    monkeypatch.setattr(strategies, "rehearse", lambda make, config: None)  # which loads PEFT, and is tested elsewhere
    assert BROKEN[cls] in broken(cls)
    assert broken(Mean) == broken(Equally) == []


def test_draws_without_a_seed_are_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsplit.contracts import strategies

    monkeypatch.setattr(strategies, "rehearse", lambda make, config: None)
    faults = {check.name: check.fault for check in check_strategy(Draws, Config()) if check.fault}
    assert sorted(faults) == ["same result", "saved state", "side effects"]
    assert "it uses torch's random state, not a generator with a seed of its own" in faults["same result"]
    assert "it uses torch's random state" in faults["saved state"]


@pytest.mark.parametrize("name", ["fedavg", "flora", "fedsa", "scaffold", "hetlora", "fedbuff", "krum", "fedadagrad"])
def test_strategies_of_fedsplit_keep_the_contract(name: str) -> None:
    assert broken(lambda: load_strategy(name, {}, {"clients": 8, "seed": 0}), name) == []


def test_the_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    broken(Mean)
    assert torch.equal(torch.get_rng_state(), before)
