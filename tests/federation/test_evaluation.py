"""The evaluation of a round: all clients' losses, and what the round made them lose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_parties import gather

from fedsplit.federation import evaluation
from fedsplit.federation.attempts import Attempt
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.messages import Answer, Evaluate, Failure, Request, measured, serialised_bytes
from fedsplit.lowrank import LowRank
from fedsplit.scores import Score
from fedsplit.settings.documents import build


def answer(request: Request, **metrics: Any) -> Answer:
    """Returns a measurement of ten tokens, whose loss is one more than the client's number."""
    nats = 10.0 * (1 + request.client)
    reply = measured(request.client, Score(nats, 10, 5), Score(4.0, 2), peak_memory=20 + request.client)
    return replace(reply, metrics={**reply.metrics, **metrics})


def test_the_loss_is_that_of_all_tokens(tmp_path: Path) -> None:
    parties, state = gather(answer, tmp_path)
    found = evaluation.evaluate(parties, state, 2, {}, Attempt(1))
    assert found.total == Score(60.0, 30, 15) and state.after == 2.0
    assert {client: score.loss for client, score in found.scores.items()} == {0: 1.0, 1: 2.0, 2: 3.0}
    assert state.totals.client_memory == 22 and state.accuracy == {}
    asked = parties.clients.asked  # type: ignore[attr-defined]
    assert [(one.client, one.round, one.attempt) for one in asked] == [
        (0, 2, 3),
        (1, 2, 3),
        (2, 2, 3),
    ]  # of three tries each in the attempt before


def test_adapters_and_changes_are_sent_to_all_and_counted_apart(tmp_path: Path) -> None:
    parties, state = gather(answer, tmp_path)
    change = LowRank(torch.ones(4, 1), torch.ones(1, 3))
    state.ledger.fold(2, {"b": change, "t": change})
    evaluation.evaluate(parties, state, 2, {}, Attempt())
    for asked in parties.clients.asked:  # type: ignore[attr-defined]
        assert isinstance(asked, Evaluate)
        assert (set(asked.tensors), set(asked.changes), asked.folded) == (set(state.adapters.tensors), {"b"}, 2)
    traffic = state.totals.traffic
    assert traffic["evaluation_adapter_down"] == 3 * serialised_bytes(state.adapters.tensors)
    assert traffic["adapter_down"] == 3 * serialised_bytes({"up": torch.ones(4, 1), "down": torch.ones(1, 3)})


def test_who_measured_what_cannot_be_is_left_out(tmp_path: Path) -> None:
    def play(request: Request) -> Answer:
        return answer(request, nats=-1.0) if request.client == 2 else answer(request)

    parties, state = gather(play, tmp_path)
    found = evaluation.evaluate(parties, state, 1, {}, Attempt())
    assert set(found.scores) == {0, 1} and state.after == 1.5
    assert parties.emit.lines == [  # type: ignore[attr-defined]
        "client 2 (cid) sent -1.0 as its nats, not a number from 0 to 1e+10; it is left out"
    ]


def test_without_any_measurement_the_run_ends(tmp_path: Path) -> None:
    parties, state = gather(lambda request: answer(request, right=11), tmp_path)
    with pytest.raises(FederationFailed, match="no client measured anything that can be used: client 2"):
        evaluation.evaluate(parties, state, 1, {}, Attempt())


def test_what_a_round_made_clients_lose_is_of_those_that_measured_twice(tmp_path: Path) -> None:
    """Now, less what it was right after the client's own steps."""

    def play(request: Request) -> Answer:
        return Failure(1, "ValueError", "no luck") if request.client == 1 else answer(request)

    parties, state = gather(play, tmp_path)
    own = {0: Score(1.0, 2), 1: Score(1.0, 2), 2: Score()}
    found = evaluation.evaluate(parties, state, 1, own, Attempt())
    assert found.forgotten == state.forgotten == {"ann": pytest.approx(1.5)}


def test_the_accuracy_of_a_classifier_keeps_its_first_value(tmp_path: Path) -> None:
    parties, state = gather(answer, tmp_path, data__format="classification")
    evaluation.evaluate(parties, state, 0, {}, Attempt())
    assert state.accuracy == {"before": 0.5, "after": 0.5}
    parties, _ = gather(lambda request: answer(request, right=10), tmp_path, data__format="classification")
    found = evaluation.evaluate(parties, state, 1, {}, Attempt())
    assert state.accuracy == {"before": 0.5, "after": 1.0}
    event = evaluation.event_of(parties, state, 1, found).to_document()
    assert event["accuracy"] == 1.0 and "perplexity" not in event
    assert event["clients"] == {"ann": 1.0, "bob": 2.0, "cid": 3.0}


def test_a_share_of_the_clients_measures_the_same_in_every_round(tmp_path: Path) -> None:
    parties, state = gather(answer, tmp_path)
    config = replace(parties.config, eval=replace(parties.config.eval, fraction=0.7))
    parties = replace(parties, config=config)
    asked = parties.clients.asked  # type: ignore[attr-defined]
    for round in (1, 2, 3):
        evaluation.evaluate(parties, state, round, {}, Attempt())
    measuring = evaluation.clients_that_measure(config)
    assert len(measuring) == 2 and [one.client for one in asked] == measuring * 3
    traffic = state.totals.traffic
    assert traffic["evaluation_adapter_down"] == 6 * serialised_bytes(state.adapters.tensors)
    assert state.measured == 3


def test_the_seed_draws_who_measures() -> None:
    drawn = {
        tuple(evaluation.clients_that_measure(build({"clients": 100, "eval.fraction": 0.05, "seed": seed})))
        for seed in range(5)
    }
    assert len(drawn) == 5 and {len(clients) for clients in drawn} == {5}
    assert evaluation.clients_that_measure(build({"clients": 3, "eval.fraction": 0.01})) != []
