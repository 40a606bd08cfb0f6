"""Who is sent what, what stays with whom, and what is remembered of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsplit.durable import NotWritten
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.lowrank import LowRank
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings, TrunkSettings
from fedsplit.state.client_store import ClientState, ClientStore
from fedsplit.state.fold_log import FoldLog
from fedsplit.trunk.copies import Copy
from fedsplit.updates import FACTORS, Adapters, Assignment, ClientUpdate, Layer, Task, Traits


def part(layer: str, rank: int = 2) -> Adapters:
    tensors = {f"{layer}.lora_A.weight": torch.randn(rank, 3), f"{layer}.lora_B.weight": torch.zeros(4, rank)}
    return Adapters(tensors, {layer: Layer(4.0, False)})


PARTS = {"bottom": part("b"), "trunk": part("t"), "top": part("p")}
ENDS = {"b.lora_A.weight", "b.lora_B.weight", "p.lora_A.weight", "p.lora_B.weight"}
TRUNK = {"t.lora_A.weight", "t.lora_B.weight"}
CONFIG = Config(lora=LoraSettings(rank=(2,)))
COPIES = replace(CONFIG, trunk=TrunkSettings(schedule="copies"))


def ledger(tmp_path: Path, config: Config = CONFIG, traits: Traits | None = None) -> AdapterLedger:
    return AdapterLedger(config, traits or Traits(), PARTS, tmp_path / "clients", tmp_path / "folds")


def moved(adapters: Adapters, factors: frozenset[str] = FACTORS) -> Adapters:
    tensors = {n: t + 1 if any(f".lora_{f}." in n for f in factors) else t for n, t in adapters.tensors.items()}
    return adapters.with_tensors(tensors)


def test_the_strategy_sees_the_trunk_only_where_each_client_has_a_copy(tmp_path: Path) -> None:
    assert set(ledger(tmp_path).start.tensors) == ENDS
    assert set(ledger(tmp_path, COPIES).start.tensors) == ENDS | TRUNK
    assert ledger(tmp_path, COPIES).rule.crossing == ENDS


def test_the_start_is_known_and_is_not_sent(tmp_path: Path) -> None:
    held = ledger(tmp_path)
    assert held.lacking(0, Assignment(held.start)) == {}
    assert held.lacking(0, Assignment(held.start.with_rank(1))) == {}
    assert set(held.lacking(0, Assignment(moved(held.start)))) == ENDS


def test_a_factor_that_was_given_and_not_trained_is_not_sent_again(tmp_path: Path) -> None:
    held = ledger(tmp_path)
    adapters = moved(held.start)
    trains_b = Assignment(adapters, Task(trains=frozenset("B")))
    held.accept(0, 1, trains_b)
    names = {name for name in ENDS if "lora_B" in name}
    assert set(held.lacking(0, Assignment(moved(adapters, frozenset("B"))))) == names
    assert set(held.lacking(0, Assignment(adapters))) == names  # trained, so no longer what it was given
    assert set(held.lacking(1, Assignment(adapters))) == ENDS
    assert held.accepted == {0: 1}


def test_what_a_client_draws_is_not_sent(tmp_path: Path) -> None:
    held = ledger(tmp_path)
    assert held.lacking(0, Assignment(moved(held.start), drawn=7)) == {}


def test_what_must_come_back_is_what_trains_and_is_shared(tmp_path: Path) -> None:
    held = ledger(tmp_path, traits=Traits(personal=frozenset("B")))
    given = held.given(Assignment(held.start)).tensors
    assert set(given) == held.rule.returned(given, Task()) == {name for name in ENDS if "lora_A" in name}
    held = ledger(tmp_path)
    task = Task(trains=frozenset("B"))
    given = held.given(Assignment(held.start, task)).tensors
    assert set(given) == ENDS
    assert held.rule.returned(given, task) == {name for name in ENDS if "lora_B" in name}


@pytest.mark.parametrize("alone", ["bottom", "top"])
def test_a_part_that_is_not_shared_never_meets_the_strategy(tmp_path: Path, alone: str) -> None:
    shared = tuple(name for name in PARTS if name != alone)
    held = ledger(tmp_path, replace(CONFIG, share=shared))
    assert set(held.start.tensors) == ENDS - set(PARTS[alone].tensors)
    whole = held.everything(held.start, PARTS["trunk"])
    assert set(whole.tensors) == ENDS | TRUNK


def test_copies_of_the_trunk_join_updates_and_personal_factors_stay(tmp_path: Path) -> None:
    traits = Traits(personal=frozenset("B"))
    held = ledger(tmp_path, COPIES, traits)
    update = ClientUpdate(1, held.start.with_tensors(held.rule.crosses(held.start.tensors)), 4)
    copy = Copy(moved(PARTS["trunk"]), {"t.lora_A.weight": torch.ones(2, 3)}, {"h": torch.ones(1)})
    (whole,) = held.with_copies([update], {1: copy}, {1: Assignment(held.start, Task(control={}))})
    assert set(whole.adapters.tensors) == {name for name in ENDS | TRUNK if "lora_A" in name}
    assert set(whole.control) == {"t.lora_A.weight"}
    assert whole.given is not None and whole.given.tensors.keys() == whole.adapters.tensors.keys()
    start = held.trunk_start(1, Assignment(held.start))
    assert torch.equal(start.tensors["t.lora_B.weight"], copy.adapters.tensors["t.lora_B.weight"])
    assert torch.equal(start.own["t.lora_A.weight"], torch.ones(2, 3))
    assert torch.equal(start.kept["h"], torch.ones(1)) and held.snapshot()[1]["stage-1"].keys() == {"h"}
    assert held.trunk_start(0, Assignment(held.start)).kept == {}
    assert torch.equal(held.trunk_start(0, Assignment(held.start)).tensors["t.lora_B.weight"], torch.zeros(4, 2))
    shared, own = held.trunk_end(moved(held.start))
    assert torch.equal(shared["t.lora_A.weight"], PARTS["trunk"].tensors["t.lora_A.weight"] + 1)
    assert set(own) == {1} and torch.equal(own[1]["t.lora_A.weight"], shared["t.lora_A.weight"])
    assert torch.equal(own[1]["t.lora_B.weight"], copy.adapters.tensors["t.lora_B.weight"])


def test_what_is_folded_adds_up_and_only_the_clients_layers_are_news(tmp_path: Path) -> None:
    held = ledger(tmp_path, COPIES)
    change = LowRank(torch.randn(4, 2), torch.randn(2, 3))
    for round in (1, 2, 3):
        held.fold(round, {"b": change, "t": change})
        assert set(held.news) == {"b"} and held.last_fold == round
    assert held.folded["t"].rank <= 3
    assert torch.allclose(held.folded["b"].up @ held.folded["b"].down, 3 * change.up @ change.down, atol=1e-5)
    held.fold(4, {})
    assert held.news == {} and held.last_fold == 3


def test_a_run_that_goes_on_knows_what_it_knew(tmp_path: Path) -> None:
    held = ledger(tmp_path, COPIES, Traits(personal=frozenset("B")))
    update = ClientUpdate(1, held.start, 4)
    copies = {1: Copy(moved(PARTS["trunk"]), {"t.lora_A.weight": torch.ones(2, 3)})}
    held.with_copies([update], copies, {1: Assignment(held.start)})
    change = LowRank(torch.randn(4, 1), torch.randn(1, 3))
    held.fold(1, {"t": change})
    held.write_folds()
    held.accept(1, 2, Assignment(held.start))
    own = ClientState(personal={"b.lora_B.weight": torch.ones(4, 2)})
    ClientStore(tmp_path / "clients", 1).save(2, own, accepted=0)
    again = ledger(tmp_path, COPIES, Traits(personal=frozenset("B")))
    again.restore(2, *held.snapshot())
    assert [list(changes) for changes in again.past_changes(2)] == [["t"], []] and again.last_fold == 1
    assert torch.equal(again.folded["t"].up, held.folded["t"].up) and again.accepted == {1: 2}
    for one, other in zip(
        (held.trunk_start(1, Assignment(held.start)),), (again.trunk_start(1, Assignment(again.start)),), strict=True
    ):
        assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
        assert all(torch.equal(t, other.own[n]) for n, t in one.own.items())
    assert set(again.personal_adapters()[1]) == {"b.lora_B.weight", "t.lora_B.weight"}
    # Nobody remembers what client 1 holds: it is sent everything, even what is as at the start.
    assert set(again.lacking(1, Assignment(again.start))) == {n for n in ENDS if "lora_A" in n}
    assert again.lacking(0, Assignment(again.start)) == {}


def test_changes_of_base_weights_wait_for_a_disk_that_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known all the same, and written with the next try; a discarded round's are never written."""
    held = ledger(tmp_path, COPIES)
    change = LowRank(torch.randn(4, 1), torch.randn(1, 3))
    held.fold(1, {"b": change})
    with monkeypatch.context() as patch:
        patch.setattr(FoldLog, "append", full_disk)
        with pytest.raises(NotWritten):
            held.write_folds()
    attempt = held.copy()
    attempt.fold(2, {"t": change})
    assert [list(changes) for changes in attempt.past_changes(2)] == [["b"], ["t"]]
    held.write_folds()
    assert [path.name for path in (tmp_path / "folds").iterdir()] == ["round-0001.safetensors"]
    assert [list(changes) for changes in held.past_changes(2)] == [["b"], []]


def full_disk(*_: object) -> None:
    raise NotWritten("no room")


def test_changes_that_clients_could_not_write_down_are_there_when_a_run_goes_on(tmp_path: Path) -> None:
    held = ledger(tmp_path, COPIES)
    change = LowRank(torch.randn(4, 1), torch.randn(1, 3))
    for round, layer in ((1, "b"), (2, "t"), (3, "b")):
        held.fold(round, {layer: change})
    held.write_folds()
    FoldLog(tmp_path / "clients" / "folds").append(1, {"b": change.times(2.0)})  # as they have it
    again = ledger(tmp_path, COPIES)
    again.restore(3, *held.snapshot())
    assert again.folds_at_clients == held.folds_at_clients == 2
    log = FoldLog(tmp_path / "clients" / "folds")
    assert torch.equal(log.read(1)["b"].up, change.times(2.0).up) and log.read(2) == {} and log.read(3).keys() == {"b"}
