"""What hangs is ended with its name; what goes on is left alone."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from fedsplit import watchdog
from fedsplit.watchdog import Hung, Watchdog


def test_beats_keep_work_alive() -> None:
    now = 0.0
    dog = Watchdog(10, clock=lambda: now)
    with dog.doing("a client"):
        for _ in range(5):
            now += 9
            dog.check()
            dog.beat()
        now += 10
        with pytest.raises(Hung, match=r"^a client has not returned for 10 seconds$"):
            dog.check()


def test_work_that_has_ended_is_not_missed() -> None:
    now = 0.0
    dog = Watchdog(10, clock=lambda: now)
    with pytest.raises(ValueError, match="broken"), dog.doing("a strategy"):
        raise ValueError("broken")
    now = 100.0
    dog.check()


def test_work_within_work_is_watched_by_itself_and_then_the_other_again() -> None:
    now = 0.0
    dog = Watchdog(10, clock=lambda: now)
    with dog.doing("a round"):
        now += 9
        with dog.doing("a sink"):
            now += 9
            dog.check()
            now += 9
            with pytest.raises(Hung, match="a sink"):
                dog.check()
        dog.check()  # the sink has returned, which is a sign of life
        now += 10
        with pytest.raises(Hung, match="a round"):
            dog.check()


def test_looking_within_looking_goes_on_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    dog = Watchdog(0.05)
    with pytest.raises(Hung, match="the data set"), dog.guarding("the data set"):
        with dog.guarding("a sink"):
            pass
        time.sleep(600)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_sleep_in_the_main_thread_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    before = signal.getsignal(signal.SIGALRM)
    dog = Watchdog(0.05)
    with pytest.raises(Hung, match="the data set"), dog.looking(), dog.doing("the data set"):
        time.sleep(600)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_nobody_looks() -> None:
    done = []

    def work() -> None:
        with Watchdog(0.0).looking():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
