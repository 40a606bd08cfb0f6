"""The sections of a report on what a run cost: bytes, seconds and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedsplit.formatting import size, virtual_duration
from fedsplit.network.times import PLACE_WORDS
from fedsplit.reporting import figures
from fedsplit.reporting.content import Picture, Section
from fedsplit.reporting.run_record import RunRecord, numbers, text
from fedsplit.reporting.series import KINDS, bytes_by_round, seconds_by_round, totals_by_client, virtual_places
from fedsplit.reporting.text_table import Table

MOST_BARS = 40
"""Most clients with a bar of their own."""

MOST_ROWS = 200
"""Most rows of a table."""

_PLACE_GROUPS = {
    "computing, its own and the trunk's": ("client_compute", "trunk_compute"),
    "on the wire, or waiting": ("wire_up", "wire_down", "trunk_queue", "others"),
}
"""Places of virtual time in the two pieces of a bar."""


def traffic(run: RunRecord) -> Section:
    """Returns the section on bytes by kind and round, and by client."""
    section = Section("Traffic")
    by_round = bytes_by_round(run)
    if by_round:
        series = {kind: {"up": ways.up, "down": ways.down} for kind, ways in by_round.items()}
        caption = "Bytes by kind and round. Up: from the clients, filled; down: to them, outlined."
        section.pictures.append(Picture("Bytes by kind and round", figures.panels(series, size), caption))
    totals = numbers(run.summary.get("bytes"))
    # A run that has not ended has no summary. The bytes so far are in the events of its rounds.
    if not totals:
        for event in run.of("cost"):
            for kind, count in numbers(event.get("bytes")).items():
                totals[kind] = totals.get(kind, 0.0) + count
    rows: list[tuple[str, ...]] = [("kind", "up", "down")]
    for kind, words in KINDS.items():
        up, down = totals.get(f"{kind}_up", 0.0), totals.get(f"{kind}_down", 0.0)
        if up or down:
            rows.append((words, size(up), size(down)))
    if len(rows) > 1:
        section.tables.append(Table("Bytes of the whole run", rows))
    by_client = totals_by_client(run, "client_bytes")
    if by_client:
        section.folded.append(_by_client("Bytes by client", by_client, size))
    return section


def time_spent(run: RunRecord) -> Section:
    """Returns the section on seconds by phase and round, and by client."""
    section = Section("Time")
    by_phase = seconds_by_round(run)
    if by_phase:
        series = {phase: {phase: points} for phase, points in by_phase.items()}
        caption = "Seconds by phase and round, at the server. Round 0 is the start, with the first evaluation."
        svg = figures.panels(series, _in_seconds)
        section.pictures.append(Picture("Seconds by phase and round", svg, caption))
    totals = totals_by_client(run, "client_seconds")
    by_client: dict[str, dict[str, float]] = {}
    # In the order of a round, whatever the order in the file.
    for phase in ("training", "sample", "evaluation"):
        if phase in totals:
            by_client[phase] = totals[phase]
    training = by_client.get("training", {})
    # One bar alone would compare with nothing.
    if 1 < len(training) <= MOST_BARS:
        evaluation = by_client.get("evaluation", {})
        sample = by_client.get("sample", {})
        pieces = {}
        for client, seconds in training.items():
            measuring = evaluation.get(client, 0.0) + sample.get(client, 0.0)
            pieces[client] = (seconds, measuring)
        svg = figures.bars(pieces, lambda seconds: f"{seconds:.2f} s", parts=("own training", "measuring"))
        caption = "Work of each client over all rounds, without waiting for a free process."
        section.pictures.append(Picture("Seconds by client", svg, caption))
    if by_client:
        section.folded.append(_by_client("Seconds by client", by_client, "{:.2f}".format))
    return section


def virtual_time(run: RunRecord) -> Section:
    """Returns the section on virtual time: where the time of the clients went on the run's network."""
    section = Section(
        "Virtual time",
        "The time that the run would take on its network, by the virtual clock. The clients of a round begin together.",
    )
    by_client = virtual_places(run)
    if not by_client:
        return section
    if len(by_client) <= MOST_BARS:
        sums = {}
        for name, places in by_client.items():
            pieces = []
            for group in _PLACE_GROUPS.values():
                pieces.append(sum(places.get(place, 0.0) for place in group))
            sums[name] = tuple(pieces)
        svg = figures.bars(sums, virtual_duration, parts=tuple(_PLACE_GROUPS))
        section.pictures.append(Picture("Virtual seconds by client", svg, "Over all rounds."))
    rows: list[tuple[str, ...]] = [("client", *PLACE_WORDS.values(), "sum")]
    for name, places in list(by_client.items())[:MOST_ROWS]:
        cells = [f"{places.get(place, 0.0):.2f}" for place in PLACE_WORDS]
        rows.append((name, *cells, f"{sum(places.values()):.2f}"))
    more = len(by_client) - MOST_ROWS
    table = Table("Where the virtual time went, in seconds", rows, f"… and {more} more" if more > 0 else "")
    section.tables.append(table)
    section.folded.extend(_uncounted(run))
    return section


_CAUSES = {
    "surplus": "not needed (over-selection)",
    "late": "after the deadline",
    "unavailable": "not available",
}
"""Causes of the event `client-unused` in words."""


def _uncounted(run: RunRecord) -> list[Table]:
    """Returns the table of the clients that did not count in a round; none if all did."""
    rows: list[tuple[str, ...]] = [("round", "client", "why", "in words")]
    for event in run.of("client-unused"):
        why = _CAUSES.get(text(event.get("cause")), "")
        client = text(event.get("client_name"))
        reason = text(event.get("reason"), 300)
        rows.append((str(event["round"]), client, why, reason))
    if len(rows) == 1:
        return []
    # The head is no client.
    more = len(rows) - 1 - MOST_ROWS
    note = f"… and {more} more" if more > 0 else ""
    return [Table("Clients that did not count in a round: no failures", rows[: MOST_ROWS + 1], note, is_words=True)]


def _in_seconds(seconds: float) -> str:
    """Returns a duration; a short one in milliseconds."""
    return f"{1000 * seconds:.4g} ms" if 0 < seconds < 0.1 else f"{seconds:.4g} s"


def memory(run: RunRecord) -> Section:
    """Returns the section on the peak memory of clients and trunk."""
    section = Section("Memory")
    peaks = numbers(run.summary.get("peak_memory"))
    words = {"client": "a client's process", "trunk": "trunk"}
    drawn = {words.get(party, party): (peak,) for party, peak in peaks.items()}
    if drawn:
        caption = "Largest resident memory. With the engine local, all parties share one process."
        section.pictures.append(Picture("Peak memory by party", figures.bars(drawn, size), caption))
    by_client: dict[str, float] = {}
    for event in run.of("cost"):
        for client, peak in numbers(event.get("client_peak_memory")).items():
            by_client[client] = max(peak, by_client.get(client, 0.0))
    if by_client:
        rows = [("client", "peak of its process")]
        rows += [(name, size(peak)) for name, peak in by_client.items()]
        # One row more, for the head.
        section.folded.append(Table("Memory by client", rows[: MOST_ROWS + 1]))
    return section


def _by_client(
    title: str,
    values: Mapping[str, Mapping[str, float]],
    write: Callable[[float], str],
) -> Table:
    """Returns the table of sums by client and kind."""
    kinds = list(values)
    names = dict.fromkeys(name for of_kind in values.values() for name in of_kind)
    heads = [kind.replace("_", " ") for kind in kinds]
    rows: list[tuple[str, ...]] = [("client", *heads)]
    for name in list(names)[:MOST_ROWS]:
        cells = [write(values[kind].get(name, 0.0)) for kind in kinds]
        rows.append((name, *cells))
    more = len(names) - MOST_ROWS
    return Table(title, rows, f"… and {more} more" if more > 0 else "")
