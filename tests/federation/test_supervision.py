"""Whatever dies in the middle of a round, the run ends with the adapters that it would have had, to the bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_corpus
from local_federation import federate
from test_round import config_of, left

from experiments.reliability.mortal import MortalTrunk
from fedsplit.engines import in_process
from fedsplit.events import Event
from fedsplit.events.event_types import ClientFailed, ClientLost, RoundDiscarded
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.federation import Federation
from fedsplit.federation.messages import CLIENT_LOST, Answer, Evaluate, Failure, Request, Train
from fedsplit.settings.choices import CODECS, CodecEntry
from fedsplit.trunk import local

CASES = ("shared", "folds", "control", "personal", "flower", "exact", "adaptive", "stages", "replicas")
"""Cases of `test_round.CASES`."""


def cases_with_fast(*fast: str) -> list[Any]:
    """Returns all cases; those that are not named are slow tests."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in CASES]


Spoil = Callable[[Request, Answer], Answer]


def numbers(out: Path) -> dict[str, Any]:
    """Returns the tensors that a run leaves, and the events of its rounds without the trunk's counts."""
    found = left(out)
    del found["metrics.jsonl"]
    return {name: content for name, content in found.items() if not name.endswith("state.json")}


class Scene:
    """A case with its undisturbed run.

    Attributes:
        whole: Numbers of the undisturbed run.
        handled: What the trunk was asked in it, in order.
    """

    def __init__(self, case: str, model: Path, folder: Path) -> None:
        self._case = case
        self._model = model
        self._folder = folder
        self._count = itertools.count()
        self._corpus = write_corpus(folder / "corpus.jsonl")
        self.whole, _, _ = self.play()
        self.handled = list(MortalTrunk.handled)

    def play(
        self,
        deaths: set[float] | None = None,
        spoil: Spoil = lambda request, answer: answer,
        **settings: Any,
    ) -> tuple[dict[str, Any], list[Event], Federation]:
        """Plays the run, in which trunks die at some points and answers are spoilt."""
        out = self._folder / f"run-{next(self._count)}"
        MortalTrunk.reset(set(deaths or ()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CODECS, "top-k", CodecEntry("top_k:TopK"))
            patch.setattr(local, "LocalTrunk", MortalTrunk)
            config, strategy = config_of(self._case, self._model, self._corpus, **settings)
            federation, lines = federate(config, out, strategy, patch, spoil)
        return numbers(out), lines.events, federation


@pytest.fixture(scope="module")
def scenes(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}

    def scene(case: str) -> Scene:
        if case not in made:
            made[case] = Scene(case, tiny_models["gpt2"], tmp_path_factory.mktemp(case))
        return made[case]

    return scene


def points_of(handled: list[str]) -> list[float]:
    """Returns one point before and one after each kind of call, at its last occurrence: in the second round."""
    last = {name: number for number, name in enumerate(handled)}
    return sorted(point for number in last.values() for point in (number, number + 0.5))


@pytest.mark.parametrize("case", ["shared", "folds"])
def test_a_trunk_that_dies_changes_no_number(case: str, scenes: Callable[[str], Scene]) -> None:
    """At a step of the second round, and around its commit; the slow tests try every point."""
    scene = scenes(case)
    last = {name: number for number, name in enumerate(scene.handled)}
    for point in (last["gradient of training"] + 0.5, last["EndRound"], last["ReadMoments"] + 0.5):
        found, events, _ = scene.play({point})
        assert found == scene.whole, f"killed at {point}"
        assert [event.round for event in events if isinstance(event, RoundDiscarded)] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_trunk_that_dies_before_or_after_any_call_changes_no_number(
    case: str, scenes: Callable[[str], Scene]
) -> None:
    scene = scenes(case)
    points = points_of(scene.handled)
    # Nobody waits for a client that has not left, so that no client says that it leaves.
    assert "Leave" not in scene.handled
    # Where the server does not set the trunk's copies and replicas are not averaged, that was one of nine kinds.
    kinds = 8 if case in ("shared", "flower", "adaptive", "stages") else 9
    assert len(points) >= 2 * kinds, scene.handled
    discarded = 0
    for point in points:
        found, events, _ = scene.play({point})
        assert found == scene.whole, f"killed at {point}, {scene.handled[int(point)]}"
        discarded += any(isinstance(event, RoundDiscarded) for event in events)
    assert discarded >= len(points) - 4  # a trunk that dies around its last call costs no round


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_trunks_that_die_at_random_change_no_number(case: str, seed: int, scenes: Callable[[str], Scene]) -> None:
    scene = scenes(case)
    draw = random.Random(seed)
    # After the clients are met: for the meeting itself there are three attempts, and four deaths could be too many.
    met = scene.handled.index("forward of evaluation")
    deaths = {draw.randrange(2 * met, 2 * len(scene.handled)) / 2 for _ in range(4)}
    found, _, _ = scene.play(deaths)
    assert found == scene.whole, deaths


def losing(kind: type[Request], client: int, times: int, round: int = 2) -> Spoil:
    """Returns a spoiler that loses the process of a client after its work, some times."""
    left = itertools.count(1)

    def spoil(request: Request, answer: Answer) -> Answer:
        if isinstance(request, kind) and (request.client, request.round) == (client, round) and next(left) <= times:
            return Failure(client, CLIENT_LOST, "the worker died")
        return answer

    return spoil


@pytest.mark.parametrize("case", cases_with_fast("shared", "control"))
@pytest.mark.parametrize("kind", [Train, Evaluate])
@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_dies_after_its_work_changes_no_number(
    case: str, kind: type[Request], times: int, scenes: Callable[[str], Scene]
) -> None:
    """Its client begins again where the trunk can forget its steps; elsewhere the round is played again."""
    scene = scenes(case)
    found, events, federation = scene.play(spoil=losing(kind, client=1, times=times))
    assert found == scene.whole
    lost = [event for event in events if isinstance(event, ClientLost | RoundDiscarded)]
    assert len(lost) == times
    assert not any(isinstance(event, ClientFailed) for event in events)
    assert federation.summary is not None and federation.summary["complete"]


@pytest.mark.parametrize("case", ["folds", "control", "exact"])
@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_arrival_changes_no_number(
    case: str, seed: int, scenes: Callable[[str], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a schedule that is deterministic by nature."""
    scene = scenes(case)
    draw = random.Random(seed)

    def ask(clients: Any, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        shuffled = list(requests)
        draw.shuffle(shuffled)
        yield from map(clients.answer, shuffled)

    monkeypatch.setattr(in_process.LocalClients, "ask", ask)
    found, _, _ = scene.play()
    assert found == scene.whole


@pytest.mark.parametrize("case", ["shared", "control"])
def test_a_client_that_is_lost_again_and_again_counts_as_failed(case: str, scenes: Callable[[str], Scene]) -> None:
    """The round stands without it."""

    scene = scenes(case)
    found, events, federation = scene.play(spoil=losing(Train, client=1, times=99))
    failed = [event for event in events if isinstance(event, ClientFailed)]
    assert [(event.client, event.round, event.phase) for event in failed] == [(1, 2, "training")]
    assert federation.summary is not None
    assert federation.summary["client_rounds"] == {"asked": 4, "failed": 1}
    assert found != scene.whole


def test_a_round_without_its_quorum_is_played_again_and_then_given_up(scenes: Callable[[str], Scene]) -> None:
    scene = scenes("control")

    def fails(request: Request, answer: Answer) -> Answer:
        if isinstance(request, Train) and (request.client, request.round) == (1, 2):
            return Failure(1, "ValueError", "ValueError: no luck")
        return answer

    _, events, federation = scene.play(spoil=fails, quorum=1.0, max_failures=2)
    discarded = [event for event in events if isinstance(event, RoundDiscarded)]

    assert "1 of 2 clients have sent an update that can be used, 2 are needed" in discarded[0].reason
    summary = federation.summary
    assert summary is not None
    assert (summary["complete"], summary["last_round"]) == (False, 1)
    assert summary["ended"].startswith("round 2 was lost 3 times: 1 of 2 clients")


def test_a_run_without_a_single_round_fails_with_the_reason(scenes: Callable[[str], Scene]) -> None:
    with pytest.raises(FederationFailed, match=r"round 1 was lost 2 times: .*the worker died"):
        scenes("shared").play(spoil=losing(Train, client=1, times=99, round=1), max_failures=1)


def test_clients_that_are_late_count_as_failed(scenes: Callable[[str], Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process clients take turns: the second one's turn comes after the deadline."""
    now = itertools.count()
    monkeypatch.setattr(in_process.time, "monotonic", lambda: next(now))

    def slow(request: Request, answer: Answer) -> Answer:
        if isinstance(request, Train) and request.round == 2:
            for _ in range(1000):
                next(now)
        return answer

    _, events, federation = scenes("control").play(spoil=slow, round_deadline=500.0)
    failed = [event for event in events if isinstance(event, ClientFailed)]
    assert [(event.round, event.phase) for event in failed] == [(2, "training")]
    assert failed[0].reason == "it has not answered within 500 seconds"
    assert federation.summary is not None and federation.summary["client_rounds"]["failed"] == 1
