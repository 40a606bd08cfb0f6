"""Virtual time in whole federations: the training does not notice it, unless a setting makes it act."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import same_numbers

from fedsplit.engines.in_process import federate
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import load_strategy
from fedsplit.federation.virtual_time import VirtualTime, VirtualTotals
from fedsplit.network.times import PLACES
from fedsplit.settings.documents import build

SLOW_FIRST: dict[str, Any] = {
    "default": {"profile": "lan"},
    "clients": [{"clients": [0], "profile": "home", "uplink_mbps": 0.05}],
}
"""A network on which client 0 needs seconds, and the others milliseconds."""

Play = Callable[..., Path]


@pytest.fixture
def play(tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path) -> Play:
    """Plays a small federation of three clients, and returns its folder."""

    def played(name: str, *steps: dict[str, Any], **values: Any) -> Path:
        for step in steps or ({},):
            settings = {**same_numbers.BASE, "model": str(tiny_models["gpt2"]), "dataset": str(corpus_file)}
            config = build({**settings, **{key.replace("__", "."): value for key, value in values.items()}, **step})
            federate(config, tmp_path / name, load_strategy(config.strategy, {}, strategy_defaults(config)))
        return tmp_path / name

    return played


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of a name, without the times of this machine."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{**event, "time": ""} for event in events if event["event"] == name]


def tensors_of(folder: Path) -> dict[str, str]:
    return same_numbers._digests(folder)


def test_the_clock_changes_no_number_and_reports_every_round(play: Play) -> None:
    plain = play("plain")
    watched = play("watched", network__profile="home")
    assert tensors_of(watched) == tensors_of(plain)
    assert events_of(plain, "network") == []
    rounds = events_of(watched, "network")
    assert [event["round"] for event in rounds] == [0, 1, 2]
    for event in rounds[1:]:
        # All clients take part in both phases, so that the places of each add up to the round.
        for places in event["clients"].values():
            assert sum(places.values()) == pytest.approx(event["seconds"]) and set(places) == set(PLACES)
    summary = json.loads((watched / "summary.json").read_text())
    assert summary["virtual"]["seconds"] == pytest.approx(rounds[-1]["virtual_elapsed"])
    assert "virtual" not in json.loads((plain / "summary.json").read_text())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, Any]]:
    """The phases that are replayed: round, name, and the work of the clients."""
    replayed: list[tuple[int, str, Any]] = []
    replay = VirtualTime.replay

    def spy(self: VirtualTime, phases: Any, round: int, phase: str) -> Any:
        replayed.append((round, phase, phases))
        return replay(self, phases, round, phase)

    monkeypatch.setattr(VirtualTime, "replay", spy)
    return replayed


def test_stages_and_replicas_leave_the_trace_of_one_trunk(play: Play, seen: list[tuple[int, str, Any]]) -> None:
    settings = {"network__profile": "lan", "cut": "0:2", "trunk__schedule": "copies", "train__clip": 0.05, "rounds": 1}
    traces = []
    for name, more in (("one", {}), ("stages", {"trunk__stages": "0:1:2"}), ("replicas", {"trunk__replicas": 2})):
        play(name, **settings, **more)
        traces.append(seen.copy())
        seen.clear()
    assert traces[0] == traces[1] == traces[2]


def test_the_trace_has_the_bytes_of_the_ledger(play: Play, seen: list[tuple[int, str, Any]]) -> None:
    folder = play("run", network__profile="lan", train__micro_batches=2, train__accumulation=2, train__clip=0.05)
    (cost,) = [event for event in events_of(folder, "cost") if event["round"] == 1]
    (phases,) = [phases for round, phase, phases in seen if (round, phase) == (1, "training")]
    crossings = [crossing for phase in phases.values() for crossing in phase.crossings]
    for kind, names in (("activation", ("forward",)), ("gradient", ("backward", "coefficient"))):
        of_kind = [crossing for crossing in crossings if crossing.kind in names]
        assert sum(crossing.up for crossing in of_kind) == cost["bytes"][f"{kind}_up"]
        assert sum(crossing.down for crossing in of_kind) == cost["bytes"][f"{kind}_down"]
    assert sum(phase.bytes_down for phase in phases.values()) == cost["bytes"]["adapter_down"]
    assert sum(phase.bytes_up for phase in phases.values()) == cost["bytes"]["adapter_up"]


@pytest.mark.parametrize("schedule", ["batched", "accumulate", "copies", "forward-only"])
def test_every_schedule_has_a_virtual_time(play: Play, schedule: str) -> None:
    every = {"trunk__every": 2} if schedule == "accumulate" else {}
    folder = play("run", network__profile=SLOW_FIRST, trunk__schedule=schedule, **every)
    event = events_of(folder, "network")[1]
    waits = {name: places["others"] for name, places in event["clients"].items()}
    assert event["stragglers"] == [next(iter(event["clients"]))]
    assert sorted(waits, key=waits.__getitem__)[0] == event["stragglers"][0]


@pytest.mark.parametrize("schedule", ["copies", "accumulate"])
def test_who_misses_the_deadline_is_left_out_exactly(play: Play, schedule: str) -> None:
    """What the slow client trained is nowhere, at the trunk neither: the result is that of a run without the client."""
    settings = {"network__profile": SLOW_FIRST, "trunk__schedule": schedule, "rounds": 1}
    folder = play("late", round_deadline=1.0, **settings)
    (event,) = events_of(folder, "network")[1:]
    assert len(event["late"]) == 1 and event["training_seconds"] == 1.0
    (unused,) = events_of(folder, "client-unused")
    assert (unused["client"], unused["cause"]) == (0, "late")
    assert "s of virtual time, and the deadline is 1.0 s" in unused["reason"]
    assert len(events_of(folder, "train")[0]["clients"]) == 2
    # The same client left out by over-selection: two of three are wanted, and the slow one comes last.
    surplus = play("surplus", fraction=0.67, network__over_select=1.5, **settings)
    (first_two,) = events_of(surplus, "network")[1:]
    assert first_two["surplus"] == event["late"] and not first_two["late"] and first_two["training_seconds"] < 1.0
    # And by its absence, so that it never trains.
    absent = {**SLOW_FIRST, "clients": [{**SLOW_FIRST["clients"][0], "availability": 1e-9}]}
    without = play("without", **{**settings, "network__profile": absent})
    assert events_of(without, "network")[1]["unavailable"] == event["late"]
    # None of the three is a failure: not in the events, and not in the counts.
    for run, cause in ((folder, "late"), (surplus, "surplus"), (without, "unavailable")):
        assert [one["cause"] for one in events_of(run, "client-unused")] == [cause]
        assert events_of(run, "client-failed") == []
        summary = json.loads((run / "summary.json").read_text())
        assert summary["client_rounds"]["failed"] == 0 and summary["virtual"][cause] == 1
    adapter = "adapter/adapter_model.safetensors"
    assert tensors_of(folder)[adapter] == tensors_of(surplus)[adapter] == tensors_of(without)[adapter]


def test_a_round_for_which_everybody_is_late_changes_nothing(play: Play) -> None:
    folder = play("run", network__profile="4g", trunk__schedule="copies", round_deadline=1.0, train__steps=20)
    assert [len(event["late"]) for event in events_of(folder, "network")] == [0, 3, 3]
    losses = [event["loss"] for event in events_of(folder, "evaluate")]
    assert losses[0] == losses[1] == losses[2]


def test_availability_is_drawn_from_the_seed_and_survives_resumption(play: Play) -> None:
    network = {"default": {"profile": "lan", "availability": 0.6, "jitter_ms": 20}}
    settings = {"network__profile": network, "trunk__schedule": "copies", "rounds": 4}
    whole = play("whole", **settings)
    missing = [event["unavailable"] for event in events_of(whole, "network")[1:]]
    assert any(missing) and not all(len(names) == 3 for names in missing)
    parts = play("parts", {"rounds": 2}, {"resume": str(whole.parent / "parts")}, **settings)
    assert events_of(parts, "network") == events_of(whole, "network")
    assert (
        tensors_of(parts)["adapter/adapter_model.safetensors"] == tensors_of(whole)["adapter/adapter_model.safetensors"]
    )


def test_no_client_at_all_is_a_round_of_rest(play: Play) -> None:
    network = {"default": {"profile": "lan", "availability": 1e-9}}
    folder = play("run", network__profile=network, trunk__schedule="copies")
    assert [len(event["unavailable"]) for event in events_of(folder, "network")] == [0, 3, 3]


def test_totals_go_through_a_checkpoint() -> None:
    totals = VirtualTotals(training=1.5, stragglers={"ann": 2})
    assert VirtualTotals(**json.loads(json.dumps(totals.document()))) == totals


@pytest.fixture
def clock() -> Callable[..., VirtualTime]:
    """Makes a virtual clock of four clients on home lines."""

    def made(**values: Any) -> VirtualTime:
        settings = {"clients": 4, "network.profile": "home", "fraction": 0.25}
        return VirtualTime(build({**settings, **values}), ["a", "b", "c", "d"])

    return made


def test_a_time_just_behind_the_deadline_is_written_with_more_digits(clock: Callable[..., VirtualTime]) -> None:
    late = clock(round_deadline=0.3)._late({0: 0.3, 1: 0.30042, 2: 0.35})
    assert late == {
        1: "its update would arrive after 0.3004 s of virtual time, and the deadline is 0.3000 s",
        2: "its update would arrive after 0.35 s of virtual time, and the deadline is 0.30 s",
    }


def test_surplus_clients_are_told_how_many_are_enough(clock: Callable[..., VirtualTime]) -> None:
    one = clock(**{"network.over_select": 2})._surplus({0: 2.0, 1: 1.0})
    assert one == {0: "1 update is needed, and arrived before its own, which would arrive after 2.0 s of virtual time"}
    two = clock(**{"network.over_select": 2, "fraction": 0.5})._surplus({0: 2.0, 1: 1.0, 2: 3.0})
    assert list(two) == [2] and two[2].startswith("2 updates are needed, and arrived before its own")


def test_over_selection_asks_more_and_never_more_than_all() -> None:
    values = {"clients": 10, "fraction": 0.5, "network.profile": "home", "network.over_select": 1.3}
    assert build(values).asked == 7
    assert build({**values, "network.over_select": 9}).asked == 10
    assert build({**values, "network.over_select": 1}).asked == 5
