"""Who holds what: a table, a document and a picture of a data set that has been dealt out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.allowed import InputError
from fedsplit.corpora.partition import Partition
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard
from fedsplit.report import aligned

SHOWN = 4
"""Owners or labels that the table names for each client: those it has most of."""


def stated(deal: Partition) -> list[str]:
    """Returns the run's line on the data; none for packed text of which nothing is lost but a rest."""
    empty = f"; {deal.empty:,} {'row' if deal.empty == 1 else 'rows'} left out, without text" if deal.empty else ""
    if deal.packed and deal.format == "text":
        return [f"data: text; packed into sequences{empty}"] if empty else []
    how = (
        "whole texts packed into sequences" if deal.packed else "a text a sequence, padded to the longest of its batch"
    )
    lost = f"; {deal.cut:,} texts cut at the end" if deal.cut else ""
    lost += f"; {deal.dropped:,} left out, since nothing was left to predict" if deal.dropped else ""
    return [f"data: {deal.format}; {how}{lost}{empty}"]


def _counts(rows: Sequences) -> dict[str, int]:
    return {"sequences": len(rows), "tokens": rows.tokens, "predicted": rows.predicted}


def as_document(deal: Partition) -> dict[str, Any]:
    """A deal as plain values: every client's sequences, tokens and predicted tokens, and its shares."""
    clients = [
        {
            "client": number,
            "name": shard.name,
            "train": _counts(shard.train),
            "held_out": _counts(shard.held_out),
            "shares": dict(shard.shares),
        }
        for number, shard in enumerate(deal.shards)
    ]
    facts: dict[str, Any] = {
        "format": deal.format,
        "packed": deal.packed,
        "cut": deal.cut,
        "dropped": deal.dropped,
        "empty": deal.empty,
        "by": deal.by,
    }
    if deal.classes:
        facts["classes"] = list(deal.classes)
    return {**facts, "clients": clients}


def table(deal: Partition) -> list[str]:
    """Lines of a table, a client each, with all of them as one in the last."""
    rows: list[tuple[str, ...]] = [("", "sequences", "tokens", "held out", "tokens", deal.by)]
    for number, shard in enumerate(deal.shards):
        name = shard.name if shard.name == f"client {number}" else f"{number} {shard.name}"
        rows.append((name, *_cells(shard), _shares(shard.shares)))
    whole = [sum(int(row[place].replace(",", "")) for row in rows[1:]) for place in (1, 2, 3, 4)]
    rows.append(("all", *(f"{count:,}" for count in whole), ""))
    widths = [max(len(row[5]) for row in rows)]
    return aligned([(*row[:5], row[5].ljust(widths[0])) for row in rows])


def _cells(shard: Shard) -> tuple[str, str, str, str]:
    train, held_out = shard.train, shard.held_out
    return f"{len(train):,}", f"{train.tokens:,}", f"{len(held_out):,}", f"{held_out.tokens:,}"


def _shares(shares: Mapping[str, int]) -> str:
    """Of what a client has most, and how much of it, in per cent."""
    ordered = sorted(shares.items(), key=lambda share: (-share[1], share[0]))
    words = [f"{name} {count / sum(shares.values()):.0%}" for name, count in ordered[:SHOWN]]
    more = len(ordered) - SHOWN
    return ", ".join(words) + (f" and {more} more" if more > 0 else "")


def plot(deal: Partition, path: Path) -> None:
    """Draws a bar a client, as long as it has sequences, in the colours of their owners or labels.

    Args:
        deal: The data.
        path: A picture's file; its ending decides the type.

    Raises:
        InputError: matplotlib is not there, or cannot write such a file.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("plot: matplotlib is not installed; 'pip install fedsplit[plots]' brings it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({name for shard in deal.shards for name in shard.shares})
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(deal.shards)), layout="constrained")
    places, left = range(len(deal.shards)), [0] * len(deal.shards)
    for number, name in enumerate(names):
        widths = [shard.shares.get(name, 0) for shard in deal.shards]
        axes.barh(places, widths, left=left, color=colours(number % 20), label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [shard.name for shard in deal.shards])
    axes.invert_yaxis()
    axes.set_xlabel("sequences, held-out ones included")
    if len(names) <= 20:
        figure.legend(title=deal.by, fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"plot: {path} cannot be written ({error})") from None
    finally:
        pyplot.close(figure)
