"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedsplit.report import metric_mean, perplexity, size


def final_table(summary: Mapping[str, Any], folder: str) -> Table:
    """Returns the table at the end of a run.

    Args:
        summary: Content of summary.json.
        folder: Folder of the run.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        *_quality(summary),
        *_parameters(summary),
        *_traffic(summary),
        *_machine(summary),
        ("files", folder),
        *_failures(summary),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _quality(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on how well the model does, and which round its adapter is of."""
    before, after = summary["eval_loss"]["before"], summary["eval_loss"]["after"]
    rows = [("held-out loss", f"{before:.4f} -> {after:.4f}")]

    if accuracy := summary.get("accuracy"):
        rows.append(("accuracy", f"{accuracy['before']:.2%} -> {accuracy['after']:.2%}"))
    else:
        rows.append(("perplexity", f"{perplexity(before):.2f} -> {perplexity(after):.2f}"))

    for name, ends in summary.get("metrics", {}).items():
        rows.append((name, f"{metric_mean(ends['before'])} -> {metric_mean(ends['after'])}"))

    error = summary.get("aggregation_error")
    if error is not None:
        rows.append(("aggregation error", f"{error:.3g} in the last round; 0: averaging loses nothing"))

    forgotten = summary.get("forgotten")
    if forgotten is not None:
        rows.append(("forgotten", f"{forgotten:+.4f} nats a token, compared with after own steps"))

    last_round, adapter_round = summary.get("last_round"), summary.get("adapter_round")
    if adapter_round != last_round:
        rows.append(("adapter", f"of round {adapter_round}, the best of {last_round}"))
    return rows


def _parameters(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns a row for the parameters of each part."""
    return [
        (f"{part} parameters", f"{counts['total']:,}, of which trained {counts['trainable']:,}")
        for part, counts in summary["parameters"].items()
    ]


def _traffic(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on the bytes that crossed."""
    sent = summary["bytes"]
    rows = [
        (f"{what}s", f"{size(sent[f'{what}_up'])} up, {size(sent[f'{what}_down'])} down")
        for what in ("activation", "gradient", "adapter")
    ]
    rows.append(("for evaluation", f"{size(sent['evaluation_up'])} up, {size(sent['evaluation_down'])} down"))
    return rows


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on memory and time."""
    memory = summary["peak_memory"]
    rows = [("peak memory", f"client process {size(memory['client'])}, trunk {size(memory['trunk'])}")]

    speed = f"{summary['tokens']:,} tokens trained, {summary['tokens_per_second']:,.0f} a second"
    rows.append(("time", f"{summary['wall_seconds']:.1f} s; {speed}"))
    return rows


def _failures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the last row of a run in which clients failed."""
    counts = summary.get("client_rounds", {})
    if not counts.get("failed"):
        return []
    return [("failures", f"{counts['failed']} of {counts['asked']} client-rounds failed")]
