"""The table that a run ends with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedsplit.formatting import counted, measures_pairs, metric_mean, perplexity, size, virtual_duration
from fedsplit.network.times import PLACE_WORDS

MOST_STRAGGLERS = 5
"""Most stragglers of a run that are named."""


def final_table(summary: Mapping[str, Any], folder: str) -> Table:
    """Returns the table at the end of a run.

    Args:
        summary: Content of summary.json.
        folder: Folder of the run.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    # Folded, and not cut: the path of the run's folder is to be copied.
    table.add_column(overflow="fold")
    rows = [
        *_quality(summary),
        *_parameters(summary),
        *_traffic(summary),
        *_machine(summary),
        *_virtual(summary),
        ("files", folder),
        *_failures(summary),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def legend(summary: Mapping[str, Any]) -> list[str]:
    """Returns a line for each word of the table that needs an explanation.

    Example:
        >>> legend({"forgotten": -0.0173, "aggregation_error": None})
        ['forgotten: what sharing costs a client in loss; below 0 it helps']
    """
    lines = []
    if summary.get("aggregation_error") is not None:
        lines.append("aggregation error: the share of the clients' mean change that averaging lost")
    if summary.get("forgotten") is not None:
        lines.append("forgotten: what sharing costs a client in loss; below 0 it helps")
    return lines


def next_commands(summary: Mapping[str, Any], folder: str) -> list[str]:
    """Returns the commands that a reader of the table may want next, for this very run.

    Args:
        summary: Content of summary.json.
        folder: Folder of the run.

    Example:
        >>> next_commands({"task": "text"}, "runs/a b")[-1]
        "fedsplit report 'runs/a b'"
    """
    run = shlex.quote(folder)
    commands = [f"fedsplit report {run}"]
    if not summary.get("at_sites"):  # then the held-out text is not here
        commands.insert(0, f"fedsplit evaluate --run {run}")
    if not summary.get("accuracy"):  # a classifier writes no text
        commands.insert(0, f'fedsplit generate --run {run} --prompt "…"')
    return commands


def _quality(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on the quality of the model, and on the round of the adapter."""
    before = summary["eval_loss"]["before"]
    after = summary["eval_loss"]["after"]
    rows = [("held-out loss", f"{before:.4f} -> {after:.4f}")]

    if accuracy := summary.get("accuracy"):
        rows.append(("accuracy", f"{accuracy['before']:.2%} -> {accuracy['after']:.2%}"))
    elif not measures_pairs(summary.get("metrics")):
        rows.append(("perplexity", f"{perplexity(before):.2f} -> {perplexity(after):.2f}"))

    for name, ends in summary.get("metrics", {}).items():
        rows.append((name, f"{metric_mean(ends['before'])} -> {metric_mean(ends['after'])}"))

    error = summary.get("aggregation_error")
    if error is not None:
        rows.append(("aggregation error", f"{error:.3g} in the last round"))

    forgotten = summary.get("forgotten")
    if forgotten is not None:
        rows.append(("forgotten", f"{forgotten:+.4f} nats a token"))

    last_round = summary.get("last_round")
    adapter_round = summary.get("adapter_round")
    if adapter_round != last_round:  # under --keep-best
        rows.append(("adapter", f"of round {adapter_round}, the best of {last_round}"))
    return rows


def _parameters(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns a row for the parameters of each part."""
    rows = []
    for part, counts in summary["parameters"].items():
        rows.append((f"{part} parameters", f"{counts['total']:,}, of which trained {counts['trainable']:,}"))
    return rows


def _traffic(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on the bytes that crossed."""
    sent = summary["bytes"]

    def both_ways(purpose: str) -> str:
        up = size(sent.get(f"{purpose}_up", 0))
        down = size(sent.get(f"{purpose}_down", 0))
        return f"{up} up, {down} down"

    rows = [
        ("activations", both_ways("activation")),
        ("gradients", both_ways("gradient")),
        ("adapters", both_ways("adapter")),
        ("for evaluation", both_ways("evaluation")),
    ]
    # Only some runs have these: an objective with a reference, a trunk in stages, a cluster without a shared folder.
    if sent.get("reference_up"):
        rows.append(("base model", f"{both_ways('reference')}, for its logits"))
    if sent.get("between_stages_up"):
        rows.append(("between stages", both_ways("between_stages")))
    if sent.get("client_files_up") or sent.get("client_files_down"):
        rows.append(("clients' files", f"{both_ways('client_files')}, between nodes"))
    return rows


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on memory and time."""
    memory = summary["peak_memory"]
    rows = [("peak memory", f"client process {size(memory['client'])}, trunk {size(memory['trunk'])}")]

    speed = f"{summary['tokens']:,} tokens trained, {summary['tokens_per_second']:,.0f} a second"
    rows.append(("time", f"{summary['wall_seconds']:.1f} s; {speed}"))
    return rows


def _virtual(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns rows on virtual time, of a run with a network."""
    virtual = summary.get("virtual")
    if not virtual:
        return []
    training, evaluation = virtual_duration(virtual["training"]), virtual_duration(virtual["evaluation"])
    split = f"training {training}, evaluation {evaluation}"
    rows = [("virtual time", f"{virtual_duration(virtual['seconds'])} on the network: {split}")]
    places = virtual["places"]
    total = sum(places.values())
    if total:
        shares = [f"{words} {places[place] / total:.0%}" for place, words in PLACE_WORDS.items()]
        rows.append(("where it went", ", ".join(shares)))
    rows += _uncounted(virtual, summary.get("client_rounds", {}))
    if virtual["stragglers"]:
        ordered = sorted(virtual["stragglers"].items(), key=lambda one: (-one[1], one[0]))
        often = ordered[:MOST_STRAGGLERS]
        rows.append(
            ("stragglers", ", ".join(f"{name} in {counted(count, 'round', 'rounds')}" for name, count in often))
        )
    return rows


def _uncounted(
    virtual: Mapping[str, Any],
    requests: Mapping[str, int],
) -> list[tuple[str, str]]:
    """Returns a row on the requests to train whose update did not count on the network, none of them for a failure."""
    words = {"surplus": "not needed (over-selection)", "late": "after the deadline", "unavailable": "not available"}
    counts = [f"{virtual[cause]:,} {what}" for cause, what in words.items() if virtual.get(cause)]
    if not counts:
        return []
    asked = requests.get("asked", 0)
    of_all = f", of {counted(asked, 'request', 'requests')} to train" if asked else ""
    return [("not counted", f"{', '.join(counts)}{of_all}")]


def _failures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the last row of a run in which clients failed."""
    counts = summary.get("client_rounds", {})
    if not counts.get("failed"):
        return []
    return [("failures", f"{counts['failed']} of {counts['asked']} client-rounds failed")]
