"""Sums go on where they were, and none is lost between the trunk and the server."""

from __future__ import annotations

import json
import time
from collections import Counter

from fedsplit.federation.run_totals import RunTotals


def test_bytes_of_a_round_are_those_since_the_last() -> None:
    totals = RunTotals(0.0)

    def crossed(trunk: dict[str, int]) -> dict[str, int]:
        return {kind: size for kind, size in totals.bytes_since("evaluate", trunk).items() if size}

    totals.traffic["adapter_up"] += 5
    assert crossed({"gradient_up": 3}) == {"adapter_up": 5, "gradient_up": 3}
    totals.traffic += Counter(adapter_up=2, adapter_down=7, evaluation_adapter_down=4)
    trunk = {"gradient_up": 4, "evaluation_activation_down": 6}
    assert crossed(trunk) == {"adapter_up": 2, "adapter_down": 7, "gradient_up": 1, "evaluation_down": 10}
    assert crossed(trunk) == {}
    totals.traffic.update({"client_files_down": 8, "client_files_up": 1})
    assert crossed(trunk) == {"client_files_down": 8, "client_files_up": 1}
    assert totals.summary(trunk)["bytes"]["client_files_down"] == 8


def test_the_summary_adds_up_what_both_have_counted() -> None:
    totals = RunTotals(time.perf_counter(), tokens=30, train_seconds=2.0)
    totals.traffic += Counter(adapter_up=4, evaluation_adapter_down=100)
    trunk = {"activation_up": 10, "evaluation_activation_up": 3, "evaluation_activation_down": 6, "repeated_up": 1}
    found = totals.summary(trunk)
    assert (found["tokens"], found["tokens_per_second"]) == (30, 15.0)
    expected = {"activation_up": 10, "adapter_up": 4, "repeated_up": 1, "evaluation_up": 3, "evaluation_down": 106}
    assert {name: size for name, size in found["bytes"].items() if size} == expected


def test_a_run_that_goes_on_adds_to_what_was_there() -> None:
    first = RunTotals(time.perf_counter() - 10, tokens=30, train_seconds=2.0, client_memory=9)
    first.traffic += Counter(adapter_up=4)
    document = json.loads(json.dumps(first.document({"activation_up": 8})))
    again = RunTotals(time.perf_counter()).go_on(document)
    assert 10 <= again.seconds < 60 and (again.tokens, again.client_memory) == (30, 9)
    assert set(again.bytes_since("cost", {}).values()) == {0}
    assert again.bytes_since("cost", {"activation_up": 2})["activation_up"] == 2
    again.traffic["adapter_up"] += 1
    assert again.summary({"activation_up": 1})["bytes"]["activation_up"] == 9
    assert again.summary({})["bytes"]["adapter_up"] == 5


def test_bytes_by_client_are_those_since_the_last_and_survive_a_new_trunk() -> None:
    totals = RunTotals(0.0)
    totals.count("adapter_up", client=1, nbytes=5)
    totals.count("evaluation_adapter_down", client=0, nbytes=2)
    trunk = {"activation_up": {0: 3, 1: 4}, "evaluation_activation_down": {0: 6}}
    expected = {"adapter_up": {1: 5}, "activation_up": {0: 3, 1: 4}, "evaluation_down": {0: 8}}
    assert totals.client_bytes(trunk) == expected
    assert totals.client_bytes(trunk) == {}
    before = totals.copy()
    assert totals.client_bytes({"activation_up": {0: 4, 1: 4}}) == {"activation_up": {0: 1}}
    before.begin_new_trunk({})
    assert before.client_bytes({"activation_up": {1: 2}}) == {"activation_up": {1: 2}}


def test_seconds_are_those_since_the_last_and_of_this_command_after_a_resumption() -> None:
    totals = RunTotals(0.0)
    assert [totals.seconds_since(elapsed) for elapsed in (2.0, 5.0)] == [2.0, 3.0]
    resumed = RunTotals(0.0, earlier_seconds=100.0)
    assert resumed.seconds_since(103.0) == 3.0
