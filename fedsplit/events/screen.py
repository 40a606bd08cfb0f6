"""The sinks that show a run: live progress on a terminal, plain lines elsewhere, or JSON; and a table at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fedsplit.events.event_types import (
    ClientFailed,
    ClientLost,
    ClientUnused,
    Event,
    Notice,
    Progress,
    RoundDiscarded,
    RoundEnded,
    RoundReplayed,
    RunEnded,
)
from fedsplit.events.final_table import final_table, legend, next_commands
from fedsplit.events.forecast import Forecast
from fedsplit.events.sink import Sink
from fedsplit.formatting import fitted, measures_pairs, metric_mean, perplexity, virtual_duration
from fedsplit.settings.config import Config

MOST_STRAGGLERS = 3
"""Most stragglers of a round that are named."""

BAR = 10
"""Columns of the bar that shows how far a phase is."""


def line_of(event: Event) -> str | None:
    """Returns the line that an event leaves on the screen; None for an event that leaves none.

    Example:
        >>> line_of(Notice(text="micro-batches: 2"))
        'micro-batches: 2'
    """
    if isinstance(event, Notice):
        return event.text
    if isinstance(event, ClientFailed):
        if event.refused:
            return f"{event.reason}; it is left out"
        if event.phase == "loading":
            return f"{event.client_name} is left out of the whole run: {event.reason}"
        return f"{event.client_name} failed and is left out: {event.reason}"
    if isinstance(event, ClientUnused):
        return f"{event.client_name} does not count in round {event.round}: {event.reason}"
    if isinstance(event, ClientLost):
        return f"{event.client_name} begins again: {event.reason}"
    if isinstance(event, RoundDiscarded):
        label = f"round {event.round}/{event.rounds}"
        return f"{label} {'is played again' if event.again else 'is given up'}: {event.reason}"
    if isinstance(event, RoundReplayed) and event.stragglers:
        return stragglers_line(event)
    if isinstance(event, RoundEnded):
        return round_line(event)
    return None


def stragglers_line(event: RoundReplayed) -> str:
    """Returns the line about the clients that arrive much later than the others in virtual time.

    Example:
        >>> arrivals = {"ann": 2.0, "bob": 9.5}
        >>> seconds = dict.fromkeys(("seconds", "training_seconds", "evaluation_seconds", "virtual_elapsed"), 9.5)
        >>> of_clients = {"clients": {}, "arrivals": arrivals, "late": [], "surplus": [], "unavailable": []}
        >>> stragglers_line(RoundReplayed(round=1, stragglers=["bob"], **seconds, **of_clients))
        'stragglers in virtual time: bob after 9.5 s; the first client after 2.0 s'
    """
    named = [f"{name} after {virtual_duration(event.arrivals[name])}" for name in event.stragglers[:MOST_STRAGGLERS]]
    more = len(event.stragglers) - len(named)
    others = f" and {more} more" if more > 0 else ""
    first = min(event.arrivals.values())
    return f"stragglers in virtual time: {', '.join(named)}{others}; the first client after {virtual_duration(first)}"


def round_line(event: RoundEnded) -> str:
    """Returns the line of a round; what does not fit is in the table at the end of the run.

    Example:
        >>> losses = {"training_loss": 3.1, "held_out_loss": 3.0, "accuracy": None}
        >>> round_line(RoundEnded(round=1, rounds=5, tokens_per_second=7617.0, elapsed=27.9, **losses))
        'round 1/5  training loss 3.1000  held-out loss 3.0000  27.9 s  7,617 tokens/s'
    """
    fields = [f"round {event.round}/{event.rounds}"]
    if event.training_loss is not None:
        fields.append(f"training loss {event.training_loss:.4f}")
    if event.held_out_loss is not None:
        fields.append(f"held-out loss {event.held_out_loss:.4f}")

    if event.accuracy is not None:
        fields.append(f"accuracy {event.accuracy:.2%}")
    elif event.training_loss is None and event.held_out_loss is not None and not measures_pairs(event.metrics):
        fields.append(f"perplexity {perplexity(event.held_out_loss):.2f}")

    fields += [f"{name} {metric_mean(value)}" for name, value in (event.metrics or {}).items()]
    if event.virtual_elapsed is not None:
        fields.append(f"virtual {virtual_duration(event.virtual_elapsed)}")
    fields.append(f"{event.elapsed:.1f} s")
    if event.training_loss is not None:
        fields.append(f"{event.tokens_per_second:,.0f} tokens/s")
    return fitted(fields)


def status_of(event: Progress) -> str:
    """Returns the text beside the bar while a phase is under way.

    Example:
        >>> status_of(Progress(phase="evaluating", round=1, rounds=5, done=3, of=8))
        'round 1/5  evaluating'
    """
    if event.phase == "loading":
        return "loading the parts"
    label = f"round {event.round}/{event.rounds}"
    if event.loss is None:
        return f"{label}  {event.phase}"
    speed = f"{event.tokens_per_second or 0.0:,.0f} tokens/s"
    return f"{label}  {event.done}/{event.of} trained  loss {event.loss:.4f}  {speed}"


class _Console(Console):
    """A console whose reader may go away. rich would exit the program then, in silence."""

    def on_broken_pipe(self) -> None:
        """Raises the error on, once: what is shown later is dropped."""
        self.quiet = True
        raise  # rich calls this while it handles the error


class PlainScreen:
    """A sink for output that is no terminal: a line a round, nothing that moves.

    Example:
        >>> with PlainScreen(Console(width=80)) as screen:
        ...     screen.handle(Notice(text="micro-batches: 2"))
        micro-batches: 2
    """

    def __init__(self, console: Console) -> None:
        """Takes the console to write to."""
        self._console = console
        self._ended: RunEnded | None = None

    def handle(self, event: Event) -> None:
        """Prints the line of an event, or shows how far a phase is."""
        if isinstance(event, Progress):
            self.phase(status_of(event), event.done, event.of)
        elif isinstance(event, RunEnded):
            self._ended = event  # the table comes last, after whatever else is shown
        elif (text := line_of(event)) is not None:
            self.line(text)

    def phase(self, text: str, done: int, of: int) -> None:
        """Shows nothing: a line for each client would be too many."""

    def line(self, text: str) -> None:
        """Prints a line as it is."""
        # Texts may have brackets, which rich would take for markup. Lines are not broken, so that they can be copied.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Shows the table of a run that has ended."""
        if self._ended is not None:
            summary, folder = self._ended.summary, self._ended.folder
            self._console.print(final_table(summary, folder))
            for line in legend(summary):
                self._console.print(f"  {line}", style="dim", markup=False, highlight=False)
            lines = ["next:", *(f"  {command}" for command in next_commands(summary, folder))]
            self._console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
            self._ended = None

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Clock(ProgressColumn):
    """Time since the command began."""

    def __init__(self, began: float) -> None:
        super().__init__()
        self._began = began

    def render(self, task: Task) -> Text:
        return Text(_clock_time(time.monotonic() - self._began), style="progress.elapsed")


def _clock_time(seconds: float) -> str:
    """Returns seconds as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


class _Bar(Bar):
    """A bar, and a line below it: the time that is left, and names of clients.

    Attributes:
        forecast: Estimates the time that is left.
        names: Clients that are waited for, in words.
    """

    forecast = Forecast()
    names = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bar, and the line below if there is anything to tell."""
        yield from super().get_renderables()
        left = self.forecast.seconds_left(time.monotonic())
        time_left = "" if left is None or left < 1 else f"about {_clock_time(left)} left"
        if words := "; ".join(filter(None, [time_left, self.names])):
            yield Text(words, style="dim", no_wrap=True, overflow="ellipsis")


def names_of(event: Progress) -> str:
    """Returns words for the clients that are waited for, and those that have failed.

    Example:
        >>> names_of(Progress(phase="training", round=1, rounds=5, done=5, of=8, waiting=["ada", "bob"], failed=["cy"]))
        'waiting for ada, bob; failed: cy'
    """
    words = []
    if event.waiting:
        words.append(f"waiting for {', '.join(event.waiting)}")
    if event.failed:
        words.append(f"failed: {', '.join(event.failed)}")
    return "; ".join(words)


class LiveScreen(PlainScreen):
    """A sink for a terminal: a bar that moves below the lines."""

    def __init__(self, console: Console) -> None:
        """Takes the console to write to; the bar starts with the first event."""
        super().__init__(console)
        self._forecast = Forecast()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(BAR), _Clock(time.monotonic()))
        # Transient: the bar leaves the terminal to the table.
        self._progress = _Bar(*columns, console=console, transient=True)
        self._progress.forecast = self._forecast
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def handle(self, event: Event) -> None:
        """Prints the line of an event, or shows how far a phase is and who is waited for."""
        if isinstance(event, Progress):
            self._forecast.see(event, time.monotonic())
            self._progress.names = names_of(event)
        super().handle(event)
        if isinstance(event, RoundEnded):
            self._progress.names = ""
            if event.round == event.rounds:
                self.phase("writing the results", 0, 0)

    def phase(self, text: str, done: int, of: int) -> None:
        """Moves the bar.

        Args:
            text: What is under way.
            done: Clients that are done.
            of: Clients in all; 0 where that is not known.
        """
        self._progress.start()  # no effect on a bar that is shown
        if self._progress.tasks[0].finished:  # rich stops the spinner of a task that was full once
            self._progress.reset(self._task)
        # Without a total, rich moves the bar to and fro.
        self._progress.update(self._task, description=text, completed=done, total=of or None)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.start()
        super().line(text)

    def close(self) -> None:
        """Removes the bar, and shows the table of a run that has ended."""
        self._progress.stop()
        super().close()

    def __enter__(self) -> LiveScreen:
        self._progress.start()
        return self


class QuietScreen:
    """A sink that shows failures alone.

    Example:
        >>> with QuietScreen(Console(width=80)) as screen:
        ...     screen.handle(Notice(text="micro-batches: 2"))
        ...     screen.handle(RoundDiscarded(round=1, rounds=5, attempt=0, again=True, reason="no trunk", elapsed=1.0))
        round 1/5 is played again: no trunk
    """

    def __init__(self, console: Console) -> None:
        """Takes the console to write to."""
        self._console = console

    def handle(self, event: Event) -> None:
        """Prints the line of a failure."""
        is_failure = isinstance(event, ClientFailed | ClientLost | RoundDiscarded)
        is_warning = isinstance(event, Notice) and event.warning
        text = line_of(event)
        if text is not None and (is_failure or is_warning):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Has nothing to do."""

    def __enter__(self) -> QuietScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines:
    """A sink that prints each event as JSON, an object a line; the last object of a run holds its summary.

    Example:
        >>> JsonLines(Console(width=80)).handle(Notice(text="a note", time="2030-01-02T03:04:05.678+00:00"))
        {"event": "notice", "text": "a note", "warning": false, "time": "2030-01-02T03:04:05.678+00:00"}
    """

    def __init__(self, console: Console) -> None:
        """Takes the console to write to."""
        self._console = console

    def handle(self, event: Event) -> None:
        """Prints an event."""
        self._console.print(json.dumps(event.to_document()), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Has nothing to do."""


def screen_for(config: Config) -> Sink:
    """Returns the screen that a run's settings ask for."""
    if config.json:
        return JsonLines(_Console())
    if config.quiet:
        return QuietScreen(_Console(stderr=True))
    return make_screen()


@contextlib.contextmanager
def busy(text: str) -> Iterator[None]:
    """Shows on a terminal what a command is busy with; on standard error, and nothing elsewhere.

    Example:
        >>> with busy("adding the adapter to the weights"):
        ...     total = sum(range(1000))
    """
    with make_screen(errors=True) as screen:
        screen.phase(text, 0, 0)
        yield


def make_screen(console: Console | None = None, errors: bool = False) -> PlainScreen:
    """Returns the screen that suits where the output goes.

    Args:
        console: Console to write to; standard output if None.
        errors: Writes to standard error instead, for a command whose standard output is its result alone.
    """
    console = console or _Console(stderr=errors)
    # In a notebook rich moves its bar by way of ipywidgets, and warns where these are not installed.
    moves = console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
    return LiveScreen(console) if moves else PlainScreen(console)
