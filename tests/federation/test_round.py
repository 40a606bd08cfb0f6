"""A round that is discarded leaves no trace: played again it gives what it would have given, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_federation import federate

from fedsplit.federation import supervision
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.attempts import Attempt
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.messages import Answer, Failure, Request, Train
from fedsplit.federation.round import Round
from fedsplit.federation.run_state import RunState
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.choices import CODECS, CodecEntry
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

STAGES = ("begin", "collect", "aggregate", "evaluate")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("fedavg", {"train.optimizer_state": "keep"}),  # the trunk learns at every step
    "folds": ("flora", {"trunk.schedule": "copies"}),  # base weights change at the clients and at the trunk
    "control": ("scaffold", {"trunk.schedule": "copies"}),  # clients keep state of their own
    "personal": ("fedsa", {"trunk.schedule": "copies", "share": "bottom,trunk"}),
    "exact": ("fedex", {"trunk.schedule": "copies"}),  # averages, and folds what averaging misses
    "adaptive": ("fedadam", {}),  # moments at the server
    "flower": ("flwr.serverapp.strategy:FedAdam", {"strategy.eta": 0.01}),  # a strategy that remembers by itself
    "codec": ("fedavg", {"wire.codec": "top-k"}),  # clients and trunk remember what they held back
    "stages": (
        "fedavg",
        {"wire.codec": "top-k", "cut": "0:2", "trunk.stages": "0:1:2"},
    ),  # so do both ends of the trunk
    "replicas": ("fedavg", {"trunk.replicas": 2, "train.optimizer_state": "keep"}),  # the end of a round averages them
}
"""Strategies by what of them a round changes."""

TIMES = (
    *("time", "seconds", "elapsed", "resident_memory", "train_seconds", "earlier_seconds", "client_memory"),
    *("client_seconds", "tokens_per_second", "client_tokens_per_second", "client_peak_memory"),
)
"""Numbers that no two runs have in common."""

WORK = (
    "forwards",
    "activation",
    "gradient",
    "between_stages",
    "evaluation_activation",
    "evaluation_up",
    "evaluation_down",
    *("framing.", "packets."),
)
"""Beginnings of names of the trunk's work and traffic, which a discarded attempt has caused, too."""

ALWAYS = ("evaluate-shared", "evaluate-folds", "evaluate-control", "evaluate-personal", "evaluate-flower")
ALWAYS += ("collect-codec", "evaluate-codec", "collect-stages", "evaluate-stages", "evaluate-replicas")
ALWAYS += ("begin-folds", "collect-folds", "aggregate-folds")
"""Stages and cases that the fast tests play; the last stage has changed all that any stage changes."""


def config_of(case: str, model: Path, corpus: Path, **more: Any) -> tuple[Config, Any]:
    """Returns a case's configuration, and its strategy, which has done nothing yet."""
    name, settings = CASES[case]
    values: dict[str, Any] = {"clients": 2, "rounds": 2, "model": str(model), "cut": "1:2", "dataset": str(corpus)}
    values |= {"partition": "iid", "lora.rank": 2, "train.steps": 2, "train.batch_size": 2, "train.max_length": 16}
    values |= {"train.lr": 0.02, "eval.samples": 2, "eval.after": 1, "strategy": name} | settings | more
    options = {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith("strategy.")}
    config = build(values, options)
    return config, load_strategy(name, options, strategy_defaults(config))


def without_times(document: Any) -> Any:
    """Returns a document without the numbers that no two runs have in common."""
    if isinstance(document, dict):
        kept = {name: value for name, value in document.items() if name not in TIMES and not name.startswith(WORK)}
        return {name: without_times(value) for name, value in kept.items()}
    return document


def left(out: Path) -> dict[str, Any]:
    """Returns all that a run leaves: tensors by their bytes, and documents and events as values."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.name == "state.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_dir():
            found[name] = "folder"
    return found


def written(out: Path) -> dict[str, bytes]:
    """Returns the files that a committed round writes: its checkpoint, and its events."""
    files = [out / "metrics.jsonl", *out.glob("checkpoints/**/*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def discarding(stage: str, out: Path) -> type[Round]:
    """Returns a round that discards its first attempt after a stage, and plays the second one."""

    class Discarding(Round):
        def play(self) -> RunState:
            if self.attempt.number:
                return super().play()
            before = written(out)
            for name in STAGES[: 1 + STAGES.index(stage)]:
                getattr(self, name)()
            again = type(self)(self._parties, self.discard(), Attempt(1))
            assert written(out) == before, "a round that did not commit has written something"
            state = again.play()
            assert written(out) != before
            self._loss = again.training_loss
            return state

    return Discarding


@pytest.fixture(autouse=True)
def top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the codec."""
    monkeypatch.setitem(CODECS, "top-k", CodecEntry("top_k:TopK"))


@pytest.fixture(scope="module")
def undisturbed(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Makes the run of a case in which nothing is discarded, each only once; with the corpus that it is about."""
    from conftest import write_corpus

    runs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(case: str) -> tuple[Path, dict[str, Any]]:
        if case not in runs:
            folder = tmp_path_factory.mktemp(case)
            corpus = write_corpus(folder / "corpus.jsonl")
            with pytest.MonkeyPatch.context() as patch:
                federate(*in_order(case, tiny_models["gpt2"], corpus, folder / "run"), patch)
            runs[case] = corpus, left(folder / "run")
        return runs[case]

    return run


def in_order(case: str, model: Path, corpus: Path, out: Path) -> tuple[Config, Path, Any]:
    """Returns the arguments of `federate`."""
    config, strategy = config_of(case, model, corpus)
    return config, out, strategy


def every_stage_of_every_case() -> Iterator[Any]:
    for stage in STAGES:
        for case in CASES:
            name = f"{stage}-{case}"
            marks = () if name in ALWAYS else (pytest.mark.slow,)
            yield pytest.param(stage, case, id=name, marks=marks)


@pytest.mark.parametrize(("stage", "case"), every_stage_of_every_case())
def test_a_round_that_was_discarded_and_played_again_is_the_round_to_the_bit(
    stage: str,
    case: str,
    undisturbed: Callable[[str], tuple[Path, dict[str, Any]]],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Adapters, moments, checkpoints and events; each of two rounds is discarded once."""
    corpus, expected = undisturbed(case)
    out = tmp_path / "run"
    monkeypatch.setattr(supervision, "Round", discarding(stage, out))
    federate(*in_order(case, tiny_models["gpt2"], corpus, out), monkeypatch)
    found = left(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert {
        "metrics.jsonl",
        "checkpoints/round-0002/state.json",
        "checkpoints/round-0002/state.safetensors",
    } <= found.keys()


def test_a_round_leaves_the_state_before_it_as_it_was(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps the state can go back to it."""

    class Looking(Round):
        def held(self, state: RunState) -> list[object]:
            return [state.adapters, state.trunk, state.moments]

        def play(self) -> RunState:
            before = self._before
            facts = without_times(before.facts({}))
            snapshot = before.ledger.snapshot()[0]
            kept = self.held(before)
            state = super().play()
            assert without_times(before.facts({})) == facts
            assert before.ledger.snapshot()[0] == snapshot
            assert all(one is other for one, other in zip(kept, self.held(before), strict=True))
            assert state.round == before.round + 1 and state is not before
            return state

    monkeypatch.setattr(supervision, "Round", Looking)
    federate(*in_order("personal", tiny_models["gpt2"], corpus_file, tmp_path / "run"), monkeypatch)


def test_the_attempt_travels_with_every_request(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int]] = []

    def note(request: Request, answer: Answer) -> Answer:
        asked.append((type(request).__name__, request.round, request.attempt))
        return answer

    out = tmp_path / "run"
    monkeypatch.setattr(supervision, "Round", discarding("evaluate", out))
    config, strategy = config_of("shared", tiny_models["gpt2"], corpus_file)
    federate(config, out, strategy, monkeypatch, note)
    kinds = [one for one in dict.fromkeys(asked) if one[1] == 2]
    assert kinds == [("Train", 2, 0), ("Evaluate", 2, 0), ("Train", 2, 3), ("Evaluate", 2, 3)]


def test_a_round_that_fails_writes_nothing(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the events and the checkpoint of the round before."""

    def fails(request: Request, answer: Answer) -> Answer:
        if isinstance(request, Train) and request.round == 2:
            return Failure(request.client, "ValueError", "ValueError: no luck")
        return answer

    out = tmp_path / "run"
    config, strategy = config_of("shared", tiny_models["gpt2"], corpus_file)
    with pytest.raises(FederationFailed, match="no client answered: ValueError: no luck"):
        federate(config, out, strategy, monkeypatch, fails)
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] != "client-failed"] == [0, 0, 1, 1, 1, 1]
    assert [path.name for path in (out / "checkpoints").glob("round-*")] == ["round-0001"]
