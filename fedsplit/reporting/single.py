"""The sections of a report on one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.formatting import measures_pairs, perplexity, size
from fedsplit.reporting import figures
from fedsplit.reporting.completeness import notes_of
from fedsplit.reporting.content import Page, Picture, Section
from fedsplit.reporting.costs import memory, time_spent, traffic, virtual_time
from fedsplit.reporting.figures import Line
from fedsplit.reporting.origin import origin
from fedsplit.reporting.run_record import RunRecord, number, numbers, text
from fedsplit.reporting.series import (
    Losses,
    Points,
    by_block,
    errors,
    learning_rates,
    loss_against,
    losses,
    training_bytes,
)
from fedsplit.reporting.text_table import Table

MOST_LINES = 8
"""Most clients with a line of their own in a figure; of more, the range is drawn."""

MOST_BARS = 40
"""Most clients with a bar of their own."""

MOST_POINTS = 100
"""Most points of a line over all clients."""

MOST_ROWS = 200
"""Most rows of a table; a page must stay small."""


def page_of(run: RunRecord, baseline: RunRecord | None = None) -> Page:
    """Returns the content of the report on one run.

    Args:
        run: The run.
        baseline: Run to compare the losses with, such as one that is not aggregated; None for none.
    """
    sections = [
        loss_section(run, baseline),
        data_section(run),
        traffic(run),
        time_spent(run),
        virtual_time(run),
        aggregation_section(run),
        memory(run),
        troubles(run),
        origin(run),
    ]
    words = [run.setting("strategy"), run.setting("model"), f"{len(run.clients)} clients", date_of(run)]
    subtitle = " · ".join(word for word in words if word)
    return Page(run.name, subtitle, key_figures(run), notes_of(run), sections)


def date_of(run: RunRecord) -> str:
    """Returns the day on which a run began; of its first event, where the summary is missing."""
    first = next((event for name in ("evaluate", "train") for event in run.of(name)), {})
    return text(run.summary.get("date") or first.get("time"))[:10]


def unit_of(run: RunRecord) -> str:
    """Returns the unit of a run's held-out loss in words."""
    if run.setting("data.format") == "classification":
        return "nats a text"
    return "a pair" if measures_pairs(as_mapping(run.summary.get("metrics"))) else "nats a token"


def as_mapping(value: object) -> Mapping[str, Any]:
    """Returns a value of a file if it is a mapping, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def key_figures(run: RunRecord) -> list[tuple[str, str]]:
    """Returns the few numbers that tell the most about a run, as words and values."""
    summary = run.summary
    found = []
    measured = losses(run).held_out
    ends = numbers(summary.get("eval_loss"))
    # A run that has not ended has no summary. Its first and last measurements stand in.
    if not ends and len(measured) > 1:
        ends = {"before": measured[0][1], "after": measured[-1][1]}
    if ends.keys() >= {"before", "after"}:
        found.append(("held-out loss", f"{ends['before']:.4f} → {ends['after']:.4f}"))
        if unit_of(run) == "nats a token":
            before, after = perplexity(ends["before"]), perplexity(ends["after"])
            found.append(("perplexity", f"{before:.2f} → {after:.2f}"))
    accuracy = numbers(summary.get("accuracy"))
    if accuracy.keys() >= {"before", "after"}:
        found.append(("accuracy", f"{accuracy['before']:.2%} → {accuracy['after']:.2%}"))
    crossed = numbers(summary.get("bytes"))
    if crossed:
        found.append(("bytes of training", size(training_bytes(crossed))))
    seconds = number(summary.get("wall_seconds"))
    if seconds is not None:
        found.append(("time", f"{seconds:,.1f} s"))
    speed = number(summary.get("tokens_per_second"))
    if speed is not None:
        found.append(("speed", f"{speed:,.0f} tokens/s"))
    return found


def loss_section(run: RunRecord, baseline: RunRecord | None) -> Section:
    """Returns the section on losses: by round and client, against bytes, against time, and the user's metrics."""
    found = losses(run)
    unit = unit_of(run)
    section = Section("Loss")
    if not found.held_out and not found.training:
        return section
    section.pictures.append(_loss_by_round(found, baseline, unit))
    if len(found.clients) > 1:
        section.pictures.append(_loss_by_client(found, unit))
    for what, words in _AGAINST.items():
        scale = 1e6 if what == "bytes" else 1.0
        drawn = [Line("this run" if baseline else "", _scaled(loss_against(run, what), scale), look=0)]
        if baseline is not None:
            drawn.append(Line(baseline.name, _scaled(loss_against(baseline, what), scale), look=1))
        # A single evaluation makes no curve, and a run without a network has no virtual time.
        if len(drawn[0].points) > 1:
            svg = figures.lines(drawn, words, f"held-out loss ({unit})", whole=False)
            against = {"bytes": "traffic", "seconds": "time", "virtual": "virtual time"}[what]
            section.pictures.append(
                Picture(f"Loss against {against}", svg, f"One mark for each evaluation; {_SPENT[what]}.")
            )
    section.pictures.extend(_metrics(run))
    section.folded.append(_rounds(run, found))
    return section


_AGAINST = {
    "bytes": "MB sent in training",
    "seconds": "seconds since the start",
    "virtual": "virtual seconds on the network",
}
"""What the loss is drawn against, in words. Only a run with a network has virtual time."""

_SPENT = {
    "bytes": "bytes of evaluation, and files between nodes of a cluster, are left out",
    "seconds": "evaluation, checkpoints and the start count, too",
    "virtual": "evaluation counts, too",
}


def _scaled(points: Points, scale: float) -> Points:
    return [(x / scale, y) for x, y in points]


def _loss_by_round(found: Losses, baseline: RunRecord | None, unit: str) -> Picture:
    """Returns the figure of the losses over all clients, by round."""
    drawn = [
        Line("held-out", found.held_out, look=0),
        Line("training", found.training, look=1),
    ]
    caption = "Held-out loss over all clients, and mean training loss."
    if found.own:
        drawn.append(Line("before aggregation", found.own, look=2))
        caption += (
            " Before aggregation: held-out loss with the adapters that each client had right after its own steps, by "
            "the samples of --eval.after."
        )
    if baseline is not None:
        drawn.append(Line(baseline.name, losses(baseline).held_out, look=3))
        caption += f" For comparison, the held-out loss of {baseline.name}."
    level = None if found.before is None else ("untrained", found.before)
    return Picture("Loss by round", figures.lines(drawn, "round", f"loss ({unit})", level), caption)


def _loss_by_client(found: Losses, unit: str) -> Picture:
    """Returns the figure of the clients' held-out losses, by round."""
    ylabel = f"held-out loss ({unit})"
    # Drawn last, and so above the lines of the clients.
    everybody = Line("all", found.held_out, look=0)
    if len(found.clients) <= MOST_LINES:
        drawn = [Line(name, points) for name, points in found.clients.items()]
        svg = figures.lines([*drawn, everybody], "round", ylabel)
        return Picture("Loss by client", svg, "A thin line for each client, and the loss over all of them.")

    by_round: dict[float, list[float]] = {}
    for points in found.clients.values():
        for round, loss in points:
            by_round.setdefault(round, []).append(loss)
    ordered = [(round, sorted(values)) for round, values in sorted(by_round.items())]
    lowest = [(round, values[0]) for round, values in ordered]
    highest = [(round, values[-1]) for round, values in ordered]
    # The upper one of two middle values: the line is always the loss of a client, and no mean of two.
    median = [(round, values[len(values) // 2]) for round, values in ordered]
    drawn = [
        Line("highest", highest),
        Line("lowest", lowest),
        Line("median client", median, look=1),
        everybody,
    ]
    svg = figures.lines(drawn, "round", ylabel, band=(lowest, highest))
    caption = f"The range of the {len(found.clients)} clients, the median client, and the loss over all of them."
    return Picture("Loss by client", svg, caption)


def _metrics(run: RunRecord) -> list[Picture]:
    """Returns a figure for the accuracy of a classifier, and for each of the user's metrics."""
    by_metric: dict[str, Points] = {}
    for event in run.of("evaluate"):
        values = numbers(event.get("metrics"))
        accuracy = number(event.get("accuracy"))
        if accuracy is not None:
            # The accuracy comes first. A metric of the user's with this name replaces the value.
            values = {"accuracy": accuracy, **values}
        for name, value in values.items():
            by_metric.setdefault(name, []).append((float(event["round"]), value))
    pictures = []
    for name, points in list(by_metric.items())[:MOST_LINES]:
        svg = figures.lines([Line("", points, look=0)], "round", name)
        pictures.append(Picture(name.replace("_", " ").capitalize(), svg, "Mean over all clients."))
    return pictures


def _rounds(run: RunRecord, found: Losses) -> Table:
    """Returns the table of all rounds."""
    head = ("round", "training loss", "held-out loss", "learning rate", "bytes", "seconds", "tokens/s")
    training = dict(found.training)
    held_out = dict(found.held_out)
    rates = dict(learning_rates(run))
    costs = {float(event["round"]): event for event in run.of("cost")}
    rows: list[tuple[str, ...]] = [head]
    # A round may lack an event: its clients may have rested, or the run may have been killed.
    for round in sorted({*training, *held_out, *costs})[:MOST_ROWS]:
        cost = costs.get(round, {})
        crossed = numbers(cost.get("bytes"))
        seconds = numbers(cost.get("seconds"))
        speed = number(cost.get("tokens_per_second"))
        row = (
            f"{round:.0f}",
            _or_dash(training.get(round), ".4f"),
            _or_dash(held_out.get(round), ".4f"),
            _or_dash(rates.get(round), ".3g"),
            size(sum(crossed.values())) if crossed else "-",
            f"{sum(seconds.values()):,.2f}" if seconds else "-",
            _or_dash(speed, ",.0f"),
        )
        rows.append(row)
    return Table("Rounds", rows)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def data_section(run: RunRecord) -> Section:
    """Returns the section on who holds which data."""
    section = Section("Data")
    by = text(run.data.get("by")) or "group"
    rows: list[tuple[str, ...]] = [("client", "sequences", "tokens", "held-out sequences", "held-out tokens", by)]
    counts: dict[str, tuple[float, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    listed = run.data.get("clients")
    for place, client in enumerate(listed if isinstance(listed, list) else []):
        facts = as_mapping(client)
        name = text(facts.get("name")) or f"client {place}"
        train = numbers(facts.get("train"))
        held_out = numbers(facts.get("held_out"))
        counts[name] = (train.get("sequences", 0.0), held_out.get("sequences", 0.0))
        shares[name] = numbers(facts.get("shares"))
        cells = [f"{each.get(key, 0):,.0f}" for each in (train, held_out) for key in ("sequences", "tokens")]
        rows.append((name, *cells, _largest(shares[name])))
    if not counts:
        return section

    if len(counts) <= MOST_BARS:
        svg = figures.bars(counts, "{:,.0f}".format, parts=("sequences to train on", "held out"))
    else:
        drawn = []
        for look, words in enumerate(("to train on", "held out")):
            ordered = sorted(count[look] for count in counts.values())
            drawn.append(Line(words, _thinned(ordered), look=look))
        svg = figures.lines(drawn, "share of the clients, the smallest first (%)", "sequences of a client", whole=False)
    section.pictures.append(Picture("Sequences by client", svg))
    kinds = sorted({kind for of_client in shares.values() for kind in of_client})
    is_mixed = any(len(of_client) > 1 for of_client in shares.values())
    # Discs show nothing where each client has one kind only, and are too small to see where there are many.
    if is_mixed and len(counts) <= MOST_BARS and 1 < len(kinds) <= MOST_BARS:
        svg = figures.bubbles(shares, kinds)
        section.pictures.append(Picture(f"Who holds what, by {by}", svg, "A disc's area is the number of sequences."))
    section.folded.append(Table(f"Data of {len(counts)} clients", rows[: MOST_ROWS + 1], _left_out(rows)))
    return section


def _thinned(ordered: Sequence[float]) -> Points:
    """Returns the values of many clients as a line over their share in per cent, with few points.

    Example:
        >>> _thinned([1.0, 2.0, 4.0])
        [(0.0, 1.0), (50.0, 2.0), (100.0, 4.0)]
    """
    last = len(ordered) - 1
    places = sorted({round(last * share / MOST_POINTS) for share in range(MOST_POINTS + 1)})
    return [(100 * place / last, ordered[place]) for place in places]


def _left_out(rows: list[tuple[str, ...]]) -> str:
    more = len(rows) - 1 - MOST_ROWS
    return f"… and {more} more" if more > 0 else ""


def _largest(shares: Mapping[str, float]) -> str:
    """Returns the most frequent owners or labels of a client in per cent."""
    total = sum(shares.values())
    if not total:
        return ""
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    words = ", ".join(f"{name} {count / total:.0%}" for name, count in ordered[:3])
    return words if len(ordered) <= 3 else f"{words}, {len(ordered) - 3} more"


def aggregation_section(run: RunRecord) -> Section:
    """Returns the section on the aggregation error, and on the norms of the adapter."""
    section = Section(
        "Adapters",
        "The aggregation error is the part of the clients' mean change that the aggregated adapter misses; at 0, "
        "aggregation loses nothing. The norm is that of the change that the adapter makes to a layer's weights.",
    )
    by_round = errors(run)
    if len(by_round) > 1:
        svg = figures.lines([Line("", by_round, look=0)], "round", "aggregation error")
        section.pictures.append(Picture("Aggregation error by round", svg, "Over all layers."))
    last = run.of("aggregate")[-1] if run.of("aggregate") else {}
    of_layers = numbers(last.get("layers"))
    norms = numbers(run.summary.get("adapter_norms"))
    for title, values in (("Aggregation error by layer", of_layers), ("Norm of the adapter by layer", norms)):
        blocks = by_block(values)
        if not blocks:
            continue
        drawn = [Line(name, points, look=look) for look, (name, points) in enumerate(blocks.items())]
        caption = "In the last round." if values is of_layers else "Of the adapter that the run left."
        svg = figures.lines(drawn[:MOST_LINES], "block", "", None)
        section.pictures.append(Picture(title, svg, caption))
    if of_layers or norms:
        rows = [("layer", "aggregation error", "norm")]
        for layer in {**of_layers, **norms}:
            error = _or_dash(of_layers.get(layer), ".4g")
            norm = _or_dash(norms.get(layer), ".4g")
            rows.append((layer, error, norm))
        section.folded.append(Table("Layers", rows[: MOST_ROWS + 1]))
    return section


def troubles(run: RunRecord) -> Section:
    """Returns the section on clients that failed, and on rounds that were discarded."""
    section = Section("Failures")
    rows: list[tuple[str, ...]] = [("round", "what", "client", "reason")]
    words = {"client-failed": "client failed", "client-lost": "process lost", "round-discarded": "round discarded"}
    for name, what in words.items():
        for event in run.of(name):
            refused = " (refused)" if event.get("refused") is True else ""
            client = text(event.get("client_name"))
            reason = text(event.get("reason"), 300)
            rows.append((str(event["round"]), f"{what}{refused}", client, reason))
    if len(rows) > 1:
        section.tables.append(Table("", rows[: MOST_ROWS + 1], _left_out(rows), is_words=True))
    return section
