"""The state between two rounds: a copy is apart, and a checkpoint brings everything back."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import RunTotals
from fedsplit.lowrank import LowRank
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, Assignment, Layer, Traits


def part(layer: str) -> Adapters:
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 3), f"{layer}.lora_B.weight": torch.zeros(4, 2)}
    return Adapters(tensors, {layer: Layer(4.0, False)})


PARTS = {"bottom": part("b"), "trunk": part("t"), "top": part("p")}


def begun(folder: Path) -> RunState:
    config = Config(lora=LoraSettings(rank=(2,)))
    ledger = AdapterLedger(config, Traits(), PARTS, folder / "clients", folder / "folds")
    return RunState(ledger.start, PARTS["trunk"], {}, ledger, RunTotals(0.0), EarlyStopping(patience=3))


def play_on(state: RunState) -> None:
    """Changes everything that a round changes."""
    state.round += 1
    state.ledger.accept(1, state.round, Assignment(state.ledger.start))
    state.ledger.fold(state.round, {"b": LowRank(torch.ones(4, 1), torch.ones(1, 3))})
    state.totals.tokens += 64
    state.totals.failed += 1
    state.totals.traffic["adapter_up"] += 100
    state.totals.bytes_since("cost", {})
    state.stopping.note(state.round, 2.5)
    state.before, state.after, state.error = 4.0, 2.5, 0.25
    state.forgotten["ann"] = 0.5
    state.accuracy["after"] = 0.75


def as_values(state: RunState) -> str:
    facts = state.facts({"activation_up": 7})
    facts["tally"].pop("earlier_seconds")
    ledger = state.ledger
    return json.dumps(
        [facts, state.round, ledger.snapshot()[0], sorted(ledger.folded), sorted(ledger.news), ledger.last_fold]
    )


def test_a_copy_changes_without_the_state_that_it_was_made_of(tmp_path: Path) -> None:
    state = begun(tmp_path)
    play_on(state)
    before = as_values(state)
    state.totals.bytes_since("cost", {})
    twin = state.copy()
    assert as_values(twin) == before
    play_on(twin)
    assert as_values(twin) != before
    assert as_values(state) == before
    assert not any(state.totals.bytes_since("cost", {}).values())  # the twin's bytes are not counted here


def test_a_checkpoint_brings_the_plain_values_back(tmp_path: Path) -> None:
    state = begun(tmp_path)
    play_on(state)
    facts = json.loads(json.dumps(state.facts({"activation_up": 7})))
    again = begun(tmp_path)
    again.restore(1, facts)
    assert (again.round, again.before, again.after, again.error) == (1, 4.0, 2.5, 0.25)
    assert (again.forgotten, again.accuracy) == ({"ann": 0.5}, {"after": 0.75})
    assert (again.totals.tokens, again.totals.failed) == (64, 1)
    assert again.totals.traffic == {"adapter_up": 100, "activation_up": 7}
    assert again.stopping == state.stopping
    facts.pop("accuracy")  # as in a checkpoint of a run that predicts tokens, from before there were classes
    again.restore(1, facts)
    assert again.accuracy == {}
