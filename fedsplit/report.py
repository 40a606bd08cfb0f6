"""What a run shows: live progress on a terminal, plain lines elsewhere, a short table at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


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


class LiveWatcher(PlainWatcher):
    """For a terminal: a bar that moves below the lines."""

    def __init__(self, console: Console) -> None:
        """Writes to a console."""
        super().__init__(console)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def phase(self, text: str, done: int, of: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, description=text, completed=done, total=of or None)

    def __enter__(self) -> LiveWatcher:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def make_watcher(console: Console | None = None) -> PlainWatcher:
    """The watcher that suits where the output goes: standard output, where no console is given."""
    console = console or Console()
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
