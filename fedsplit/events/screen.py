"""The sink that shows a run: live progress on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import importlib.util
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fedsplit.events.event_types import (
    ClientFailed,
    ClientLost,
    Event,
    Notice,
    Progress,
    RoundDiscarded,
    RoundEnded,
    RunEnded,
)
from fedsplit.events.final_table import final_table
from fedsplit.report import fitted, metric_mean, perplexity

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
    if isinstance(event, ClientLost):
        return f"{event.client_name} begins again: {event.reason}"
    if isinstance(event, RoundDiscarded):
        label = f"round {event.round}/{event.rounds}"
        return f"{label} {'is played again' if event.again else 'is given up'}: {event.reason}"
    if isinstance(event, RoundEnded):
        return round_line(event)
    return None


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
    elif event.training_loss is None and event.held_out_loss is not None:
        fields.append(f"perplexity {perplexity(event.held_out_loss):.2f}")

    fields += [f"{name} {metric_mean(value)}" for name, value in (event.metrics or {}).items()]
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
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Shows the table of a run that has ended."""
        if self._ended is not None:
            self._console.print(final_table(self._ended.summary, self._ended.folder))
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
        return Text(str(timedelta(seconds=int(time.monotonic() - self._began))), style="progress.elapsed")


class LiveScreen(PlainScreen):
    """A sink for a terminal: a bar that moves below the lines."""

    def __init__(self, console: Console) -> None:
        """Takes the console to write to; the bar starts with the first event."""
        super().__init__(console)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(BAR), _Clock(time.monotonic()))
        self._progress = Bar(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task("starting", total=None)

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
