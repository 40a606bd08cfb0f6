"""A client's side: one copy of the frozen base for all clients of a process, and errors that become failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.adaptation import folding, lora
from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import write_shard
from fedsplit.durable import NotWritten
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.client_service import ClientService
from fedsplit.federation.introductions import read_introduction
from fedsplit.federation.messages import TRUNK_LOST, Briefing, Evaluate, Failure, Introduce, Train
from fedsplit.lowrank import LowRank
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build
from fedsplit.state.client_store import LostState
from fedsplit.state.fold_log import FoldLog
from fedsplit.trunk.actor import TrunkLost
from fedsplit.updates import Traits


def three_clients(model: Path, corpus: Path, **settings: Any) -> Config:
    values = {"model": str(model), "dataset": str(corpus), "partition": "natural", "clients": 3, "cut": "1:2"}
    return build(values | {"train.max_length": 16, "lora.rank": 2} | settings)


def briefing_of(config: Config, store: Path, **facts: Any) -> Briefing:
    run = json.dumps(as_document(config))
    return replace(Briefing(run, trunk="t", incarnation="first", threads=1, store=str(store)), **facts)


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    return three_clients(tiny_models["gpt2"], corpus_file)


def service_at(config: Config, store: Path) -> ClientService:
    """Returns a service that has the data of client 0, and a trunk that nobody asks."""
    write_shard(store, 0, shards_of(config)[0])
    return ClientService(lambda name, config: None)  # type: ignore[arg-type,return-value]


def test_virtual_clients_share_the_base_and_hold_no_trunk(model_path: Path, corpus_file: Path, tmp_path: Path) -> None:
    config = three_clients(model_path, corpus_file)
    briefing = briefing_of(config, tmp_path)
    write_shard(tmp_path, 0, shards_of(config)[0])
    write_shard(tmp_path, 2, shards_of(config)[2])
    corpus_file.unlink()  # and of the other client there is nothing: each needs its own data alone
    service = ClientService(lambda name, config: None)  # type: ignore[arg-type,return-value]
    clients = []
    for number in (2, 0):
        introduced = read_introduction(service.serve(Introduce(briefing, number)))
        assert (introduced.client, introduced.name) == (number, {0: "ann", 2: "cid"}[number])
        assert set(introduced.start) == ({"bottom", "top"} if number == 0 else set())
        clients.append(service.visit(Introduce(briefing, number)).client)
    assert clients[0].bottom is clients[1].bottom
    assert clients[0].top is clients[1].top
    assert clients[0].shard is not clients[1].shard
    held = {part.unsplit_name(n) for part in (clients[0].bottom, clients[0].top) for n, _ in part.named_parameters()}
    assert held
    assert not any(".1." in name.partition("attn")[0].partition("mlp")[0] for name in held)


def test_server_and_client_build_the_same_rule(tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path) -> None:
    """Each from what it has: the server from the first introduction, the client from its parts."""
    for share, personal in ((("bottom", "trunk", "top"), ""), (("bottom", "trunk"), "B"), (("trunk", "top"), "AB")):
        config = replace(three_clients(tiny_models["llama"], corpus_file), share=share)
        store = tmp_path / f"{'-'.join(share)}{personal}"
        briefing = briefing_of(config, store, personal=personal)
        service = service_at(config, store)
        start = read_introduction(service.serve(Introduce(briefing, 0))).start
        parts = {**start, "trunk": start["top"].with_tensors({})}
        ledger = AdapterLedger(config, Traits(personal=frozenset(personal)), parts, store, store / "folds")
        rule = service.visit(Introduce(briefing, 0)).site.rule
        assert rule == ledger.rule
        assert rule.crossing or personal == "AB"
        assert rule.personal or not personal


def test_an_error_becomes_a_failure_with_its_kind(config: Config, tmp_path: Path) -> None:
    """Our own errors speak for themselves; of others the class is named."""

    def lost(name: str, config: Config) -> Any:
        raise TrunkLost(f"there is no trunk\nnamed {name}")

    def broken(name: str, config: Config) -> Any:
        raise KeyError("x")

    def ends(name: str, config: Config) -> Any:
        raise SystemExit(3)

    write_shard(tmp_path, 0, shards_of(config)[0])
    request = Introduce(briefing_of(config, tmp_path), 0)
    assert ClientService(lost).answer(request) == Failure(0, TRUNK_LOST, "there is no trunk named t")
    assert ClientService(broken).answer(request) == Failure(0, "KeyError", "KeyError: 'x'")
    assert ClientService(ends).answer(request) == Failure(0, "SystemExit", "SystemExit: 3")
    nobody = ClientService(broken).answer(replace(request, client=2))
    assert isinstance(nobody, Failure) and nobody.client == 2


def test_changes_of_base_weights_are_made_once_and_in_order(config: Config, tmp_path: Path) -> None:
    """A process that has missed rounds catches up; after a discarded attempt the weights are loaded anew."""
    briefing, service = briefing_of(config, tmp_path), service_at(config, tmp_path)
    site = service.visit(Introduce(briefing, 0)).site
    (layer, *_) = lora.read(site.bottom).layers
    before = folding.base_weights(site.bottom, [layer])[layer]
    # GPT-2 stores a layer's weights as (in, out); one column and one row are a change of rank 1.
    change = LowRank(torch.ones(before.shape[1], 1), torch.ones(1, before.shape[0]))
    first = Evaluate(briefing, 0, round=1, folded=1, changes={layer: change})
    for _ in range(2):
        service.visit(first)
    assert torch.equal(folding.base_weights(site.bottom, [layer])[layer], before + 1)

    other = ClientService(lambda name, config: None)  # type: ignore[arg-type,return-value]
    late = other.visit(Train(briefing, 0, round=2, folded=1)).site
    assert torch.equal(folding.base_weights(late.bottom, [layer])[layer], before + 1)

    (tmp_path / "folds" / "round-0001.safetensors").unlink()
    anew = service.visit(Train(briefing, 0, round=1, attempt=1, discarded=1)).site
    assert anew is not site
    assert torch.equal(folding.base_weights(anew.bottom, [layer])[layer], before)
    assert service.visit(Train(briefing, 0, round=1, attempt=1, discarded=1)).site is anew


def test_changes_of_base_weights_that_cannot_be_written_down_are_made_and_never_missed_in_silence(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that was sent them makes them; another one fails until they are in the log."""
    briefing, service = briefing_of(config, tmp_path), service_at(config, tmp_path)
    site = service.visit(Introduce(briefing, 0)).site
    (layer, *_) = lora.read(site.bottom).layers
    before = folding.base_weights(site.bottom, [layer])[layer]
    change = LowRank(torch.ones(before.shape[1], 1), torch.ones(1, before.shape[0]))
    other = ClientService(lambda name, config: None)  # type: ignore[arg-type,return-value]
    train = Train(briefing, 0, round=2, folded=1, folds=1)

    def full_disk(*_: object) -> None:
        raise NotWritten("no room")

    with monkeypatch.context() as patch:
        patch.setattr(FoldLog, "append", full_disk)
        service.visit(Evaluate(briefing, 0, round=1, folded=1, folds=1, changes={layer: change}))
        assert torch.equal(folding.base_weights(site.bottom, [layer])[layer], before + 1)
        with pytest.raises(LostState, match=r"folds has only 0 of 1 rounds that changed base weights until round 1"):
            other.visit(train)
    service.visit(train)
    assert torch.equal(folding.base_weights(site.bottom, [layer])[layer], before + 1)
    late = other.visit(train).site
    assert torch.equal(folding.base_weights(late.bottom, [layer])[layer], before + 1)
