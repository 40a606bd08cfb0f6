"""The events of whole runs: their order, their figures, and sinks of the user's beside the files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from local_federation import federate

from fedsplit.commands.reference import events_schema
from fedsplit.commands.simulate import main
from fedsplit.events import Event, Progress, RoundCost, RoundEnded, RoundEvaluated, RoundTrained, RunEnded, RunStarted
from fedsplit.federation.messages import Answer, Failure, Request, Train
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.settings.flags import parse
from strategies.fedavg import FedAvg

SETTINGS: dict[str, Any] = {
    "clients": 3,
    "rounds": 2,
    "cut": "1:2",
    "partition": "natural",
    "lora.rank": 2,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.max_length": 16,
    "train.lr": 0.02,
    "train.schedule": "linear",
}


@pytest.fixture
def settings(tiny_models: dict[str, Path], corpus_file: Path) -> dict[str, Any]:
    return {**SETTINGS, "model": str(tiny_models["gpt2"]), "dataset": str(corpus_file)}


def of_kind(events: list[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_the_events_of_a_run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and with the figures of the files; the bytes of all rounds add up to the summary's."""
    federation, sink = federate(build(settings), tmp_path / "run", FedAvg(), monkeypatch)
    names = [event.name for event in sink.events if event.name not in ("progress", "notice")]
    each = ["train", "aggregate", "evaluate", "cost", "round-ended"]
    assert names == ["run-started", "evaluate", "cost", "round-ended", *each, *each, "run-ended"]
    assert sink.events[0].time <= sink.events[-1].time

    # The events of a round come when it is committed, which is after its last client has answered.
    waiting = [number for number, event in enumerate(sink.events) if isinstance(event, Progress) and event.round == 1]
    trained = sink.events.index(of_kind(sink.events, RoundTrained)[0])
    assert waiting[-1] < trained

    (started,) = of_kind(sink.events, RunStarted)
    assert started.clients == ["ann", "bob", "cid"] and started.after_round == 0
    assert started.folder == str(tmp_path / "run")
    assert from_document(started.settings) == federation._config
    assert json.loads(json.dumps(started.to_document()))["parameters"]["trunk"]["trainable"] > 0

    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == [
        json.loads(json.dumps(event.to_document()))
        for event in sink.events
        if event.name in ("train", "aggregate", "evaluate", "cost")
    ]
    validator = Draft202012Validator(events_schema())
    for event in sink.events:
        validator.validate(json.loads(json.dumps(event.to_document())))

    (ended,) = of_kind(sink.events, RunEnded)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == ended.summary

    crossed: Counter[str] = Counter()
    for evaluated in of_kind(sink.events, RoundEvaluated):
        crossed.update(evaluated.bytes)
        assert evaluated.adapter_bytes == {way: evaluated.bytes[f"adapter_{way}"] for way in ("up", "down")}
    assert dict(crossed) == ended.summary["bytes"] and crossed["activation_up"] > 0

    check_costs(of_kind(sink.events, RoundCost), ended.summary)

    # Steps 2 of 4 and 4 of 4, as they were made: the first is made at the whole rate.
    assert [event.learning_rate for event in of_kind(sink.events, RoundTrained)] == pytest.approx([0.015, 0.005])
    assert of_kind(sink.events, RoundTrained)[1].client_learning_rates == pytest.approx(
        dict.fromkeys(("ann", "bob", "cid"), 0.005)
    )
    assert [event.round for event in of_kind(sink.events, RoundEnded)] == [0, 1, 2]


def check_costs(costs: list[RoundCost], summary: dict[str, Any]) -> None:
    """The costs of all rounds add up to the totals of the run, and those of all clients to the costs of a round."""
    crossed: Counter[str] = Counter()
    framing: Counter[str] = Counter()
    packets: Counter[str] = Counter()
    for cost in costs:
        crossed.update(cost.bytes)
        framing.update(cost.framing)
        packets.update(cost.packets)
        of_clients = {kind: sum(clients.values()) for kind, clients in cost.client_bytes.items()}
        assert of_clients == {kind: count for kind, count in cost.bytes.items() if count}
        assert sum(cost.client_tokens.values()) == cost.tokens
    assert dict(crossed) == summary["bytes"]
    assert (dict(framing), dict(packets)) == (summary["framing"], summary["packets"])
    assert packets["activation_up"] == packets["gradient_down"] > 0
    assert framing["activation_up"] > 100 * packets["activation_up"]
    assert sum(cost.tokens for cost in costs) == summary["tokens"]
    spent = sum(sum(cost.seconds.values()) for cost in costs)
    assert spent == pytest.approx(costs[-1].elapsed) and costs[-1].elapsed <= summary["wall_seconds"]

    assert costs[0].client_seconds.keys() == {"evaluation"} and not costs[0].tokens
    last = costs[-1]
    assert [*last.client_seconds] == ["training", "sample", "evaluation"]
    assert all([*clients] == ["ann", "bob", "cid"] for clients in last.client_seconds.values())
    # Clients of the engine `local` work one after the other, inside of the server's time.
    assert 0 < sum(last.client_seconds["training"].values()) < last.seconds["training"]
    assert last.tokens_per_second == pytest.approx(last.tokens / last.seconds["training"])
    assert min(last.client_peak_memory.values()) > 10**7


def test_bytes_of_attempts_that_were_given_up_are_in_the_sums_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a round that was played twice, and of the one that the run ended in."""

    def fails(request: Request, answer: Answer) -> Answer:
        is_lost = isinstance(request, Train) and request.client == 2 and (request.round == 2 or not request.attempt)
        return Failure(2, "ValueError", "ValueError: no luck") if is_lost else answer

    config = build({**settings, "quorum": 1.0, "max_failures": 1})
    federation, _ = federate(config, tmp_path / "run", FedAvg(), monkeypatch, fails)
    assert federation.summary is not None and not federation.summary["complete"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    costs = [event for event in map(json.loads, lines) if event["event"] == "cost"]
    assert [cost["round"] for cost in costs] == [0, 1, 2]
    crossed: Counter[str] = Counter()
    for cost in costs:
        crossed.update(cost["bytes"])
    assert dict(crossed) == federation.summary["bytes"]
    played_twice, given_up = (cost["bytes"]["activation_up"] for cost in costs[1:])
    assert played_twice > 0 and given_up > 0


def test_under_epochs_the_learning_rate_is_the_mean_of_the_clients(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients make different numbers of steps; the rate falls along a line, and is 0 behind the last step."""
    rows = [{"text": "x" * 40, "president": owner} for owner in "aaaaabb"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, Any] = {
        "clients": 2,
        "rounds": 2,
        "model": str(tiny_models["gpt2"]),
        "cut": "1:2",
        "lora.rank": 2,
    }
    values |= {"dataset": str(tmp_path / "rows.jsonl"), "partition": "natural", "data.owner": "president"}
    values |= {"data.packing": "false", "train.max_length": 16, "train.batch_size": 1, "train.epochs": 1}
    config = build(values | {"train.schedule": "linear", "train.lr": 0.06})
    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    steps = [work.steps for work in federation._job.workloads]
    assert len(set(steps)) == 2
    expected = [sum(0.06 * (2 * n - (round * n - 1)) / (2 * n) for n in steps) / 2 for round in (1, 2)]
    assert [event.learning_rate for event in of_kind(lines.events, RoundTrained)] == pytest.approx(expected)


MINE = """
import json
from pathlib import Path

from fedsplit.events import RoundEvaluated, RunStarted, Sink


class Losses(Sink):
    def __init__(self):
        self.lines = []

    def handle(self, event):
        if isinstance(event, RunStarted):
            self.file = Path(event.folder) / "losses.txt"
            self.lines.append(f"after round {event.after_round}")
        if isinstance(event, RoundEvaluated):
            self.lines.append(f"{event.round} {event.loss:.4f}")

    def close(self):
        with open(self.file, "a") as file:
            file.write("\\n".join(self.lines) + "\\n")


class Broken(Sink):
    def handle(self, event):
        if isinstance(event, RoundEvaluated):
            raise ValueError("the tracker is gone")
"""


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def test_sinks_of_the_users_by_flag_and_one_that_raises(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], without_ray: None
) -> None:
    """The one that raises is named once; the other gets everything, in a run that goes on, too."""
    (tmp_path / "mine.py").write_text(MINE)
    run = tmp_path / "run"
    sinks = [f"--sink={tmp_path}/mine.py:{name}" for name in ("Broken", "Losses")]
    assert main([*flags({**settings, "rounds": 1}), *sinks, "--out", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    failed = [line for line in said if "Broken" in line]
    assert len(failed) == 1
    assert failed[0].startswith(
        "the sink Broken failed and is left out from here on: ValueError: the tracker is gone ("
    )
    assert [line.split()[0] for line in said if line].index("files") > said.index(failed[0])  # the table comes last

    assert main(["--resume", str(run), "--rounds", "2"]) == 0  # with the sinks of its config.toml
    losses = [line.split()[:1] for line in (run / "losses.txt").read_text().splitlines()]
    assert losses == [["after"], ["0"], ["1"], ["after"], ["2"]]
    written = [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert written == [0, 0, *[1] * 4, *[2] * 4]


def test_a_sink_that_is_not_there_stops_the_run_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(settings), "--sink", "nowhere.py:Mine", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "fedsplit: sinks: nowhere.py is not possible; allowed: a Python file that is there\n"
    )
    assert not (tmp_path / "run").exists()


def test_sinks_add_up_on_the_command_line_and_come_back_from_a_file() -> None:
    config = parse(["--sink", "one.py:A", "--sink", "two.py:B,three:C"])
    assert config.sinks == ("one.py:A", "two.py:B", "three:C")
    assert from_document(as_document(config)) == config
    assert Config().sinks == ()
