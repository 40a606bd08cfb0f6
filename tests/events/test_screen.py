"""Lines where there is no terminal, and a bar that moves where there is one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import time

import pytest
from rich.console import Console
from test_final_table import SUMMARY

from fedsplit.events import ClientFailed, Notice, Progress, RoundEnded, RunEnded, RunFailed
from fedsplit.events.event_types import ClientUnused
from fedsplit.events.screen import (
    JsonLines,
    LiveScreen,
    PlainScreen,
    QuietScreen,
    line_of,
    make_screen,
    names_of,
    round_line,
    screen_for,
    status_of,
)
from fedsplit.settings.documents import build


def progress(done: int, of: int, **more) -> Progress:
    return Progress(**{"phase": "training", "round": 1, "rounds": 5, "done": done, "of": of, **more})


def ended(round: int, rounds: int, training: float | None, loss: float, accuracy, elapsed: float, speed: float):
    return RoundEnded(
        round=round,
        rounds=rounds,
        training_loss=training,
        held_out_loss=loss,
        accuracy=accuracy,
        elapsed=elapsed,
        tokens_per_second=speed,
    )


def test_plain_output_is_lines_without_escapes() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=40)
    with make_screen(console) as screen:
        assert type(screen) is PlainScreen
        screen.handle(progress(1, 2))
        screen.handle(Notice(text="[a line] longer than forty characters, kept as it is 1:5"))
    assert shown.getvalue() == "[a line] longer than forty characters, kept as it is 1:5\n"


def test_a_terminal_shows_what_is_under_way() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True)
    screen = make_screen(console)
    assert type(screen) is LiveScreen
    try:
        screen.handle(progress(3, 8, loss=2.5, tokens_per_second=7000.0))
        screen._progress.refresh()
        screen.handle(Notice(text="kept"))
        assert screen._progress.live.is_started
    finally:
        screen.close()
    assert not screen._progress.live.is_started
    assert "3/8 trained  loss 2.5000  7,000 tokens/s" in shown.getvalue()
    assert "kept" in shown.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_is_the_last_thing_that_a_run_shows(terminal: bool) -> None:
    """Whatever else is reported before the screen is closed."""
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=terminal, no_color=True)
    screen = make_screen(console)
    screen.handle(RunEnded(summary=SUMMARY, folder="runs/x"))
    screen.handle(Notice(text="a sink failed"))
    screen.close()
    text = shown.getvalue()
    assert text.index("a sink failed") < text.index("held-out loss") < text.index("fedsplit report runs/x")
    screen.close()
    assert shown.getvalue().count("fedsplit report") == 1


def test_a_run_that_failed_leaves_its_line_to_the_command() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=True)
    screen = make_screen(console)
    assert isinstance(screen, LiveScreen)
    screen.handle(RunFailed(reason="TrunkLost: the trunk is gone"))
    assert not screen._progress.live.is_started
    screen.close()
    assert "gone" not in shown.getvalue()


def test_the_spinner_and_the_clock_go_on_after_a_phase_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns shows what is under way in one line."""
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True)
    with LiveScreen(console) as screen:
        screen.handle(progress(8, 8))
        assert screen._progress.tasks[0].finished
        screen.handle(progress(3, 8, phase="evaluating"))
        (task,) = screen._progress.tasks
        assert not task.finished and task.finished_time is None
        spinner, clock = screen._progress.columns[0], screen._progress.columns[-1]
        frames, times = set(), set()
        for tenth in range(5):
            monkeypatch.setattr(task, "get_time", lambda now=tenth / 10: now)
            frames.add(str(spinner.render(task)))
            clock._began -= 61
            times.add(str(clock.render(task)))
        assert len(frames) > 1
        assert len(times) == 5
    screen = LiveScreen(Console(file=io.StringIO(), width=80, force_terminal=True))
    long = progress(512, 513, round=10, rounds=10, loss=2.9914, tokens_per_second=121_666.0)
    screen._progress.update(screen._task, description=status_of(long), completed=512, total=513)
    for round, now in ((8, 0.0), (9, 7200.0)):
        screen._forecast.see(progress(0, 513, round=round, rounds=10), now)
    clock = screen._progress.columns[-1]
    clock._began = 7200.0 - 6300.0
    monkeypatch.setattr(time, "monotonic", lambda: 7200.0)
    with console.capture() as captured:
        console.print(screen._progress)
    bar, below = captured.get().splitlines()
    assert "1:45:00" in bar and "about 4:00:00 left" in below


def test_the_line_of_a_round_fits_a_terminal_and_names_what_matters_most() -> None:
    line = round_line(ended(0, 5, None, 3.0, None, 20.7, 0.0))
    assert line == "round 0/5  held-out loss 3.0000  perplexity 20.09  20.7 s"
    line = round_line(ended(1, 5, 3.1, 3.0, None, 27.9, 7617.0))
    assert line == "round 1/5  training loss 3.1000  held-out loss 3.0000  27.9 s  7,617 tokens/s"
    for accuracy in (None, 0.875):
        long = round_line(ended(1000, 1000, 13.1, 13.0, accuracy, 123456.7, 7617123.0))
        assert len(long) <= 80 and "held-out loss 13.0000" in long
    assert "accuracy 87.50%" in long


def test_every_phase_has_its_text() -> None:
    loading = progress(1, 8, phase="loading", round=0)
    assert status_of(loading) == "loading the parts"
    assert status_of(progress(0, 8)) == "round 1/5  training"
    assert status_of(progress(0, 8, phase="evaluating")) == "round 1/5  evaluating"


def test_a_failure_and_a_refusal_are_told_apart() -> None:
    common = {"round": 1, "phase": "training", "client": 1, "client_name": "bob"}
    failed = ClientFailed(**common, reason="out of luck")
    assert line_of(failed) == "bob failed and is left out: out of luck"
    unused = ClientUnused(**common, cause="unavailable", reason="it is not available (availability 0.5)")
    assert line_of(unused) == "bob does not count in round 1: it is not available (availability 0.5)"
    refused = ClientFailed(**common, reason="client 1 (bob) sent NaN", refused=True)
    assert line_of(refused) == "client 1 (bob) sent NaN; it is left out"


@pytest.mark.parametrize("installed", [True, False])
def test_a_notebook_shows_a_bar_where_its_widgets_are_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich would warn at every step where they are not."""
    spec = importlib.machinery.ModuleSpec("ipywidgets", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    shown = io.StringIO()
    console = Console(file=shown, force_jupyter=True)
    assert type(make_screen(console)) is (LiveScreen if installed else PlainScreen)
    assert type(make_screen(Console(file=io.StringIO(), force_jupyter=False))) is PlainScreen


def test_metrics_stand_behind_the_loss() -> None:
    metrics = {"rouge": 0.123456, "length": None}
    losses = {"training_loss": 3.1, "held_out_loss": 3.0, "accuracy": None, "metrics": metrics}
    line = round_line(RoundEnded(round=1, rounds=5, tokens_per_second=7617.0, elapsed=27.9, **losses))
    assert line == "round 1/5  training loss 3.1000  held-out loss 3.0000  rouge 0.1235  length -"


def test_the_clients_that_are_waited_for_stand_below_the_bar() -> None:
    event = progress(1, 3, waiting=["ada", "bob"], failed=["[cy]"])
    assert names_of(event) == "waiting for ada, bob; failed: [cy]"
    assert names_of(progress(0, 3)) == ""
    shown = io.StringIO()
    console = Console(file=shown, width=30, force_terminal=True)
    screen = LiveScreen(console)
    screen.handle(event)
    with console.capture() as captured:
        console.print(screen._progress)
    screen.close()
    assert "waiting for ada, bob; failed:" in captured.get().splitlines()[-1]


def test_a_quiet_run_shows_what_goes_wrong_alone() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    screen = QuietScreen(console)
    screen.handle(progress(1, 2))
    screen.handle(ended(1, 5, 3.1, 3.0, None, 27.9, 7617.0))
    screen.handle(Notice(text="micro-batches: 2"))
    screen.handle(RunEnded(summary=SUMMARY, folder="runs/x"))
    assert shown.getvalue() == ""
    screen.handle(ClientFailed(round=1, phase="training", client=1, client_name="bob", reason="out of luck"))
    screen.handle(Notice(text="no checkpoint", warning=True))
    screen.close()
    assert shown.getvalue() == "bob failed and is left out: out of luck\nno checkpoint\n"


def test_events_as_json_are_a_line_each() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=20)
    screen = JsonLines(console)
    screen.handle(Notice(text="[bold]a text that is longer than the console"))
    screen.handle(RunEnded(summary=SUMMARY, folder="runs/x"))
    notice, end = map(json.loads, shown.getvalue().splitlines())
    assert notice["text"].startswith("[bold]a text")
    assert end["summary"] == SUMMARY


def test_the_settings_choose_the_screen() -> None:
    kinds = [type(screen_for(build(settings))) for settings in ({}, {"quiet": True}, {"quiet": True, "json": True})]
    assert kinds == [PlainScreen, QuietScreen, JsonLines]


def test_after_the_last_round_nobody_is_waited_for() -> None:
    with LiveScreen(Console(file=io.StringIO(), width=80, force_terminal=True)) as screen:
        screen.handle(progress(7, 8, round=5, waiting=["ada"]))
        screen.handle(ended(5, 5, 3.1, 3.0, None, 27.9, 7617.0))
        assert screen._progress.names == ""
        assert screen._progress.tasks[0].description == "writing the results"
