"""What a run shows: live progress on a terminal, plain lines elsewhere, a short table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns that a line of a round takes at most: those of a terminal as it opens."""

BAR = 10
"""Columns of the bar that shows how far a phase is."""


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def phase(self, text: str, done: int, of: int) -> None:
        """Something is under way: `done` of `of` clients have answered."""
        ...

    def line(self, text: str) -> None:
        """Something to keep on the screen."""
        ...


class PlainWatcher:
    """For output that is no terminal: a line a round, nothing that moves."""

    def __init__(self, console: Console) -> None:
        """Writes to a console."""
        self._console = console

    def phase(self, text: str, done: int, of: int) -> None:
        """Is not shown."""

    def line(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any], folder: str) -> None:
        """Shows the table at the end of a run."""
        self._console.print(final_table(summary, folder))

    def __enter__(self) -> PlainWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Clock(ProgressColumn):
    """Time since the command began."""

    def __init__(self, began: float) -> None:
        super().__init__()
        self._began = began

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(time.monotonic() - self._began))), style="progress.elapsed")


class LiveWatcher(PlainWatcher):
    """For a terminal: a bar that moves below the lines."""

    def __init__(self, console: Console) -> None:
        """Writes to a console."""
        super().__init__(console)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(BAR), _Clock(time.monotonic()))
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def phase(self, text: str, done: int, of: int) -> None:
        """Moves the bar."""
        if self._progress.tasks[0].finished:  # rich stops the spinner of a task that was full once
            self._progress.reset(self._task)
        self._progress.update(self._task, description=text, completed=done, total=of or None)

    def __enter__(self) -> LiveWatcher:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def make_watcher(console: Console | None = None, errors: bool = False) -> PlainWatcher:
    """The watcher that suits where the output goes.

    Args:
        console: Where; standard output if None.
        errors: Standard error in its place, for a command whose standard output is its result alone.
    """
    console = console or Console(stderr=errors)
    return LiveWatcher(console) if console.is_terminal else PlainWatcher(console)


def perplexity(loss: float) -> float:
    """Exp of a mean loss in nats."""
    return math.exp(loss) if loss < 700 else math.inf


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def fitted(fields: Sequence[str], width: int = WIDTH) -> str:
    """Joins the fields of a line, and leaves out from the end what does not fit.

    Args:
        fields: Words, the most important ones first.
        width: Columns of the line at most.

    Example:
        >>> fitted(["round 1/5", "training loss 3.10", "7,367 tokens/s"], width=30)
        'round 1/5  training loss 3.10'
    """
    line = fields[0]
    for field in fields[1:]:
        if len(line) + len("  ") + len(field) > width:
            break
        line += f"  {field}"
    return line


def round_line(
    label: str,
    training: float | None,
    held_out: float,
    accuracy: float | None,
    seconds: float,
    speed: float,
    metrics: Mapping[str, float | None] | None = None,
) -> str:
    """The line of a round; what does not fit is in the table at the end of the run.

    Args:
        label: The round.
        training: Mean training loss in nats; None before the first round.
        held_out: Held-out loss in nats.
        accuracy: Share of held-out texts whose class was found; None where tokens are predicted.
        seconds: Time since the command began.
        speed: Tokens a second of training.
        metrics: Means over all clients, by the metric's name; None where nothing was measured.
    """
    fields = [label]
    if training is not None:
        fields.append(f"training loss {training:.4f}")
    fields.append(f"held-out loss {held_out:.4f}")
    if accuracy is not None:
        fields.append(f"accuracy {accuracy:.2%}")
    elif training is None:
        fields.append(f"perplexity {perplexity(held_out):.2f}")
    fields += [f"{name} {_mean(value)}" for name, value in (metrics or {}).items()]
    fields.append(f"{seconds:.1f} s")
    if training is not None:
        fields.append(f"{speed:,.0f} tokens/s")
    return fitted(fields)


def _mean(value: float | None) -> str:
    """Returns a metric's mean for people; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.4g}"


def final_table(summary: Mapping[str, Any], folder: str) -> Table:
    """The end of a run: losses, parameters, bytes, time, and where the files are."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before, after = summary["eval_loss"]["before"], summary["eval_loss"]["after"]
    table.add_row("held-out loss", f"{before:.4f} -> {after:.4f}")
    if accuracy := summary.get("accuracy"):
        table.add_row("accuracy", f"{accuracy['before']:.2%} -> {accuracy['after']:.2%}")
    else:
        table.add_row("perplexity", f"{perplexity(before):.2f} -> {perplexity(after):.2f}")
    for name, ends in summary.get("metrics", {}).items():
        table.add_row(name, f"{_mean(ends['before'])} -> {_mean(ends['after'])}")
    if (error := summary.get("aggregation_error")) is not None:
        table.add_row("aggregation error", f"{error:.3g} in the last round; 0: averaging loses nothing")
    if (forgotten := summary.get("forgotten")) is not None:
        table.add_row("forgotten", f"{forgotten:+.4f} nats a token, compared with after own steps")
    if (left := summary.get("adapter_round")) != (last := summary.get("last_round")):
        table.add_row("adapter", f"of round {left}, the best of {last}")
    for part, counts in summary["parameters"].items():
        table.add_row(f"{part} parameters", f"{counts['total']:,}, of which trained {counts['trainable']:,}")
    sent = summary["bytes"]
    for what in ("activation", "gradient", "adapter"):
        table.add_row(f"{what}s", f"{size(sent[f'{what}_up'])} up, {size(sent[f'{what}_down'])} down")
    table.add_row("for evaluation", f"{size(sent['evaluation_up'])} up, {size(sent['evaluation_down'])} down")
    memory = summary["peak_memory"]
    table.add_row("peak memory", f"client process {size(memory['client'])}, trunk {size(memory['trunk'])}")
    counts = summary.get("client_rounds", {})
    if failed := counts.get("failed"):
        table.add_row("failures", f"{failed} of {counts['asked']} client-rounds failed")
    speed = f"{summary['tokens']:,} tokens trained, {summary['tokens_per_second']:,.0f} a second"
    table.add_row("time", f"{summary['wall_seconds']:.1f} s; {speed}")
    table.add_row("files", folder)
    return table


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
