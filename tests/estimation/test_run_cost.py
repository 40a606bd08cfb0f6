"""All figures of a run together."""

from __future__ import annotations

import json

import pytest
from small_estimates import estimated

from fedsplit.estimation.party_memory import ALLOCATOR


def test_the_document_is_json_and_agrees_with_itself() -> None:
    found = estimated(rounds=2, clients=3)
    document = json.loads(json.dumps(found.document()))
    assert document["bytes"]["run"]["activation_up"] == 2 * 3 * 10 * document["bytes"]["step"]["activation_up"]
    memory = document["memory"]
    more = memory["trunk_with_all_pending"]["peak"] - memory["trunk"]["peak"]
    assert more == pytest.approx(2 * ALLOCATOR * memory["trunk"]["activations"], abs=2)
    assert document["seconds"]["limit"] == document["limit"] == "wire"


def test_what_limits_a_round() -> None:
    assert estimated(network="home").seconds.limit == "wire"
    fast = estimated(network="lan", client_tflops=0.01, rounds=1)
    assert fast.seconds.limit == "client"
    many = estimated(network="lan", clients=200, rounds=1)
    assert many.seconds.limit == "trunk_wire"  # one line of a gigabit for all
    assert many.seconds.training > 5 * 10 * many.seconds.step
    slow = estimated(network="lan", clients=20, rounds=1, trunk_tflops=0.01)
    assert slow.seconds.limit == "trunk"


def test_accumulation_repeats_a_batch() -> None:
    one, three = estimated(rounds=1), estimated(rounds=1, train__accumulation=3)
    assert three.flops["trunk"].forward == 3 * one.flops["trunk"].forward
    assert three.seconds.step == pytest.approx(3 * one.seconds.step, rel=0.01)  # each message draws its own jitter
    assert three.memory["trunk"].activations == one.memory["trunk"].activations
