"""Every event reaches every sink, and a user's sink that raises costs nothing but itself."""

from __future__ import annotations

import re
import time

import pytest

from fedsplit import watchdog
from fedsplit.durable import NotWritten, Postponed
from fedsplit.events import Event, Notice, RunFailed, Sink
from fedsplit.events.emitter import Emitter
from fedsplit.watchdog import Hung, Watchdog


class Memory(Sink):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1

    @property
    def texts(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]


class Broken(Memory):
    """Raises at its second event, or when it is closed."""

    def __init__(self, error: BaseException, at_close: bool = False) -> None:
        super().__init__()
        self.error, self.at_close = error, at_close

    def handle(self, event: Event) -> None:
        super().handle(event)
        if len(self.events) == 2 and not self.at_close:
            raise self.error

    def close(self) -> None:
        super().close()
        if self.at_close:
            raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("no\nluck"), "ValueError: no luck"), (SystemExit(3), "SystemExit: 3")],
    ids=["error", "exit"],
)
def test_a_users_sink_that_raises_is_named_once_and_left_out(error: BaseException, words: str) -> None:
    own, broken, after = Memory(), Broken(error), Memory()
    with Emitter([own], [broken, after]) as emit:
        for text in "abc":
            emit(Notice(text=text))
    said = [text for text in own.texts if len(text) > 1]
    assert len(said) == 1
    what, _, where = said[0].partition(f": {words} ")
    assert what == "the sink Broken failed and is left out from here on"
    assert re.fullmatch(r"\(test_emitter\.py, line \d+\)", where)
    assert broken.texts == ["a", "b"] and broken.closed == 0
    assert [text for text in after.texts if len(text) == 1] == ["a", "b", "c"]
    assert [text for text in own.texts if len(text) == 1] == ["a", "b", "c"]
    assert (own.closed, after.closed) == (1, 1)


def test_a_users_sink_that_raises_at_its_end_is_named() -> None:
    own, broken, after = Memory(), Broken(ValueError("late"), at_close=True), Memory()
    with Emitter([own], [broken, after]) as emit:
        emit(Notice(text="a"))
    assert own.texts[0] == "a" and "the sink Broken failed" in own.texts[1]
    assert (own.closed, broken.closed, after.closed) == (1, 1, 1)


@pytest.mark.parametrize("at_close", [False, True])
def test_a_users_sink_that_hangs_ends_the_run_with_its_name(at_close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)

    class Sleeps(Memory):
        def handle(self, event: Event) -> None:
            if not at_close:
                time.sleep(600)

        def close(self) -> None:
            time.sleep(600)

    emit = Emitter([], [Sleeps()], Watchdog(0.05))
    if at_close:
        emit(Notice(text="a"))
    with pytest.raises(Hung, match=r"^the sink Sleeps has not returned for 0.05 seconds$"):
        emit.close() if at_close else emit(Notice(text="a"))


def test_what_a_sink_of_fedsplit_raises_ends_the_run() -> None:
    after = Memory()
    with pytest.raises(ValueError, match="disk"), Emitter([Broken(ValueError("disk"))], [after]) as emit:
        emit(Notice(text="a"))
        emit(Notice(text="b"))
    assert after.closed == 1


def test_sinks_learn_of_a_run_that_failed_and_are_closed() -> None:
    own, users = Memory(), Memory()
    with pytest.raises(KeyboardInterrupt), Emitter([own], [users]):
        raise KeyboardInterrupt
    for sink in (own, users):
        (event,) = sink.events
        assert isinstance(event, RunFailed) and event.reason == "KeyboardInterrupt"
        assert sink.closed == 1


def test_events_after_the_end_are_dropped() -> None:
    own = Memory()
    emit = Emitter([own])
    emit.close()
    emit(Notice(text="late"))
    emit.close()
    assert (own.events, own.closed) == ([], 1)


def test_a_file_that_is_written_later_is_a_line_and_not_the_end_of_the_run() -> None:
    own, full, other = Memory(), Broken(Postponed("metrics.jsonl waits")), Broken(NotWritten("summary.json"))
    with Emitter([full, own]) as emit:
        for text in "abc":
            emit(Notice(text=text))
    assert own.texts == ["a", "metrics.jsonl waits", "b", "c"]
    with pytest.raises(NotWritten, match=r"^summary\.json$"), Emitter([other]) as emit:
        emit(Notice(text="a"))
        emit(Notice(text="b"))
