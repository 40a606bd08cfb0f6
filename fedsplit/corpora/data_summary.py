"""The data summary: amount and kinds of each client's data, as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.sharding import Partition
from fedsplit.errors import InputError
from fedsplit.formatting import aligned

SHOWN = 4
"""Number of owners or labels that the table names for each client, the most frequent first."""


def data_notes(partition: Partition) -> list[str]:
    """Returns the line about the data of a run, or no line for packed text without empty rows.

    Example:
        >>> data_notes(Partition([], "chat", packed=False, by="owner", cut=2, dropped=0))
        ['data: chat; a text a sequence, padded to the longest of its batch; 2 texts cut at the end']
    """
    notes = []
    if partition.packed and partition.format != "text":
        notes.append("whole texts packed into sequences")
    if not partition.packed:
        notes.append("a text a sequence, padded to the longest of its batch")
    if partition.cut:
        notes.append(f"{partition.cut:,} texts cut at the end")
    if partition.dropped:
        notes.append(f"{partition.dropped:,} left out, since nothing was left to predict")
    if partition.empty:
        rows = "row" if partition.empty == 1 else "rows"
        notes.append(f"{partition.empty:,} {rows} left out, without text")

    if partition.packed and partition.format == "text":
        if not partition.empty:
            return []
        notes.insert(0, "packed into sequences")
    return ["; ".join([f"data: {partition.format}", *notes])]


def as_document(partition: Partition) -> dict[str, Any]:
    """Returns the summary as plain values, for data.json.

    Each client has numbers of sequences, tokens and predicted tokens, and a distribution of sequences over owners or
    labels.

    Example:
        >>> as_document(Partition([], "text", packed=True, by="owner", cut=0, dropped=0))["by"]
        'owner'
    """
    facts: dict[str, Any] = {
        "format": partition.format,
        "packed": partition.packed,
        "cut": partition.cut,
        "dropped": partition.dropped,
        "empty": partition.empty,
        "by": partition.by,
    }
    if partition.classes:
        facts["classes"] = list(partition.classes)
    facts["clients"] = []
    for number, shard in enumerate(partition.shards):
        client = {
            "client": number,
            "name": shard.name,
            "train": _counts(shard.train),
            "held_out": _counts(shard.held_out),
            "shares": dict(shard.shares),
        }
        facts["clients"].append(client)
    return facts


def _counts(rows: Sequences) -> dict[str, int]:
    return {"sequences": len(rows), "tokens": rows.tokens, "predicted": rows.predicted}


def table(partition: Partition) -> list[str]:
    """Returns the summary as the lines of a table, a client a line, and the totals in the last line.

    Example:
        >>> import torch
        >>> from fedsplit.corpora.shards import Shard
        >>> text = Sequences.packed(torch.zeros(3, 8, dtype=torch.long))
        >>> shard = Shard("ann", train=text, held_out=text[:1], shares={"ann": 4})
        >>> for line in table(Partition([shard], "text", packed=True, by="owner", cut=0, dropped=0)):
        ...     print(line.rstrip())
               sequences  tokens  held out  tokens  owner
        0 ann          3      24         1       8  ann 100%
        all            3      24         1       8
    """
    header = ("", "sequences", "tokens", "held out", "tokens", partition.by)
    rows: list[tuple[str, ...]] = [header]
    totals = [0, 0, 0, 0]
    for number, shard in enumerate(partition.shards):
        train = shard.train
        held_out = shard.held_out
        numbers = [len(train), train.tokens, len(held_out), held_out.tokens]
        for place, count in enumerate(numbers):
            totals[place] += count
        # A client without an owner has its number in its name.
        name = shard.name if shard.name == f"client {number}" else f"{number} {shard.name}"
        rows.append((name, *_with_commas(numbers), _distribution(shard.shares)))
    rows.append(("all", *_with_commas(totals), ""))

    # `aligned` aligns to the right; the last column reads better from the left.
    width = max(len(row[-1]) for row in rows)
    filled = []
    for *others, last in rows:
        filled.append((*others, last.ljust(width)))
    return aligned(filled)


def _with_commas(numbers: list[int]) -> list[str]:
    return [f"{number:,}" for number in numbers]


def _distribution(shares: Mapping[str, int]) -> str:
    """Returns the most frequent owners or labels of a client in per cent, and the number of further owners or labels.

    Example:
        >>> _distribution({"bob": 1, "ann": 3})
        'ann 75%, bob 25%'
    """
    total = sum(shares.values())
    by_name = sorted(shares.items())
    ordered = sorted(by_name, key=lambda share: share[1], reverse=True)  # stable: equal shares stay in order of names
    shown = ", ".join(f"{name} {count / total:.0%}" for name, count in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def plot(partition: Partition, path: Path) -> None:
    """Draws a bar for each client, as long as its number of sequences, coloured by owner or label.

    Args:
        partition: The divided data set.
        path: File of the picture, with an ending for the type.

    Raises:
        InputError: matplotlib cannot write the file.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    from matplotlib import pyplot

    shards = partition.shards
    names = sorted({name for shard in shards for name in shard.shares})
    colours = pyplot.get_cmap("tab20")
    height = 1.2 + 0.3 * len(shards)
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")

    left = [0] * len(shards)
    for number, name in enumerate(names):
        widths = [shard.shares.get(name, 0) for shard in shards]
        colour = colours(number % 20)  # tab20 has 20 colours
        axes.barh(range(len(shards)), widths, left=left, color=colour, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]

    axes.set_yticks(range(len(shards)), [shard.name for shard in shards])
    axes.invert_yaxis()  # client 0 is at the top, as in the table
    axes.set_xlabel("sequences, held-out ones included")
    if len(names) <= 20:  # beyond that, colours repeat
        figure.legend(title=partition.by, fontsize="small", loc="outside right upper")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"plot: {path} cannot be written ({error})") from None
    finally:
        pyplot.close(figure)
