"""The training of a round: usable updates in the clients' order, with their weights; the rest is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_parties import WORK, gather

from fedsplit.federation import training
from fedsplit.federation.attempts import Attempt, RoundLost
from fedsplit.federation.clients import ClientNode, FederationFailed
from fedsplit.federation.messages import Answer, Failure, Request, Train, trained
from fedsplit.scores import Score
from fedsplit.updates import Adapters, Assignment, ClientUpdate

FAILURE = Failure(1, "ValueError", "ValueError: no luck")


def answer(request: Request, start: Adapters, **metrics: Any) -> Answer:
    """Returns what an honest client with eight examples would send, with other metrics."""
    changed = start.with_tensors({name: tensor + 1 for name, tensor in start.tensors.items()})
    update = ClientUpdate(request.client, changed, examples=8, tokens=100 + request.client, loss=2.0 + request.client)
    reply = trained(update, start.tensors, Score(1.5, 3), peak_memory=10 + request.client)
    return replace(reply, metrics={**reply.metrics, **metrics})


def play(spoilt: dict[int, Any], folder: Path, clients: tuple[int, ...] = (0, 1, 2), **settings: Any) -> Any:
    """Plays the training of round 1; a client is spoilt by a failure, or by other metrics."""

    def answers(request: Request) -> Answer:
        how = spoilt.get(request.client, {})
        return (
            replace(how, client=request.client)
            if isinstance(how, Failure)
            else answer(request, state.ledger.start, **how)
        )

    parties, state = gather(answers, folder, **settings)
    assigned = {client: Assignment(state.ledger.start) for client in clients}
    return training.train(parties, state, 1, assigned, Attempt()), parties, state


def test_updates_come_in_the_order_of_the_clients(tmp_path: Path) -> None:
    found, parties, state = play({}, tmp_path)
    assert [update.client for update in found.updates] == [0, 1, 2]
    assert sorted(request.client for request in parties.clients.asked) == [0, 1, 2]
    assert found.loss == pytest.approx(3.0) and found.tokens == 303
    assert found.scores == dict.fromkeys(range(3), Score(1.5, 3))
    assert parties.trunk.finished == [0, 1, 2] and state.ledger.accepted == {0: 1, 1: 1, 2: 1}
    totals = state.totals
    assert (totals.tokens, totals.asked, totals.failed, totals.client_memory) == (303, 3, 0, 12)
    assert totals.traffic["adapter_up"] == sum(reply.nbytes for reply in found.replies) > 0
    assert totals.traffic["adapter_down"] == 0  # the start follows from the seed
    assert all(not reply.tensors for reply in found.replies)


def test_who_fails_or_sends_what_cannot_be_used_does_not_count(tmp_path: Path) -> None:
    found, parties, state = play({1: FAILURE, 2: {"loss": math.nan}}, tmp_path)
    assert [update.client for update in found.updates] == [0] == parties.trunk.finished
    assert state.ledger.accepted == {0: 1}
    assert (state.totals.asked, state.totals.failed) == (3, 2)
    assert sorted(parties.trunk.left) == [1, 2]
    assert "bob failed and is left out: ValueError: no luck" in parties.emit.lines
    refused = "client 2 (cid) sent nan as its loss, not a number from 0 to 1e+09; it is left out"
    assert refused in parties.emit.lines


def test_a_round_without_any_update_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FederationFailed, match=r"^no client answered: ValueError: no luck$"):
        play(dict.fromkeys(range(3), FAILURE), tmp_path)
    with pytest.raises(FederationFailed, match=r"^no client sent anything that can be used$"):
        play({client: {"tokens": 0} for client in range(3)}, tmp_path)


def test_a_round_without_any_update_has_no_quorum_either(tmp_path: Path) -> None:
    """It is played again, as one with too few."""
    with pytest.raises(RoundLost, match=r"^0 of 3 clients have sent an update that can be used, 1 are needed$"):
        play(dict.fromkeys(range(3), FAILURE), tmp_path, quorum=0.3)


def test_a_group_in_which_nobody_answers_does_not_end_the_round(tmp_path: Path) -> None:
    found, parties, _ = play({0: FAILURE}, tmp_path, deterministic=True, trunk__order="cyclic")
    assert parties.trunk.groups == [[0], [1], [2]]
    assert [update.client for update in found.updates] == [1, 2]


def test_the_trunk_waits_for_no_client_that_is_absent(tmp_path: Path) -> None:
    parties, state = gather(lambda request: answer(request, state.ledger.start), tmp_path, deterministic=True)
    parties.clients.nodes[1] = ClientNode(2, "bob", absent="ValueError: no luck")  # type: ignore[index]
    assigned = {client: Assignment(state.ledger.start) for client in range(3)}
    found = training.train(parties, state, 1, assigned, Attempt())
    assert [update.client for update in found.updates] == [0, 2]
    assert parties.trunk.groups == [[0], [2]]  # type: ignore[attr-defined]
    assert (state.totals.asked, state.totals.failed) == (3, 1)


def test_where_all_clients_rest_nobody_is_asked(tmp_path: Path) -> None:
    found, parties, _ = play({}, tmp_path, clients=())
    assert found.updates == [] and found.loss is None and parties.clients.asked == []


@pytest.mark.parametrize(("by", "weights"), [("examples", [8, 8]), ("tokens", [101, 102]), ("equal", [1, 1])])
def test_weights_are_what_the_setting_says(by: str, weights: list[float], tmp_path: Path) -> None:
    found, _, _ = play({}, tmp_path, clients=(1, 2), weights=by)
    assert [update.weight for update in found.updates] == weights


def test_a_request_says_all_that_a_client_must_know(tmp_path: Path) -> None:
    parties, state = gather(lambda request: answer(request, state.ledger.start), tmp_path)
    state.ledger.accepted[2] = 3
    moved = state.ledger.start.with_tensors({n: t + 1 for n, t in state.ledger.start.tensors.items()})
    training.train(parties, state, 4, {1: Assignment(moved, drawn=None), 2: Assignment(moved, drawn=9)}, Attempt(2))
    for asked in parties.clients.asked:  # type: ignore[attr-defined]
        assert isinstance(asked, Train)
        assert (asked.round, asked.attempt, asked.rank) == (4, Attempt(2).of(asked.client), 2)
        assert (asked.accepted, asked.drawn) == ((0, None) if asked.client == 1 else (3, 9))
        assert set(asked.tensors) == (set(moved.tensors) if asked.client == 1 else set())


def test_the_event_names_clients_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripted_parties.WORK", replace(WORK, routers=True))
    found, parties, state = play({client: {"router-loss": 0.5} for client in range(3)}, tmp_path)
    event = training.event_of(parties, state, 1, found).to_document()
    assert {name: event[name] for name in ("event", "round", "loss", "clients", "router_aux_loss", "tokens")} == {
        "event": "train",
        "round": 1,
        "loss": 3.0,
        "clients": {"ann": 2.0, "bob": 3.0, "cid": 4.0},
        "router_aux_loss": 0.5,
        "tokens": 303,
    }
    assert event["trunk"] == {"steps": 4, "resident_memory": 5, "over_socket": 0}
    assert event["seconds"] > 0
