"""Whether metrics.jsonl holds all rounds that summary.json counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedsplit.events.run_files import METRICS
from fedsplit.formatting import size
from fedsplit.reporting.run_record import RunRecord, numbers

MOST_ROUNDS = 1_000_000
"""Most rounds that are looked for. A file may claim any number."""


def notes_of(run: RunRecord) -> list[str]:
    """Returns what a run lacks, a line each: files, and events of single rounds."""
    return [*run.notes, *missing_events(run)]


def missing_events(run: RunRecord) -> Iterator[str]:
    """Yields a line on events that rounds lack, and a line if the bytes of the rounds are not those of the run."""
    last = run.summary.get("last_round")
    has_events = (run.folder / METRICS).is_file()
    # `read_run` notes a missing file by itself. `type`, since `isinstance` would take true in the file for a number.
    if not has_events or type(last) is not int or not 0 <= last <= MOST_ROUNDS:
        return
    # A round in which all clients rest aggregates nothing, so that no `aggregate` is due.
    due = {
        "train": range(1, last + 1),
        "evaluate": _evaluated(run.settings, last),
        "cost": range(last + 1),
    }
    lacking = []
    for name, rounds in due.items():
        found = {event["round"] for event in run.of(name)}
        missing = [round for round in rounds if round not in found]
        if missing:
            lacking.append(f"event {name} of {_ranges(missing)}")
    if lacking:
        yield (
            f"metrics.jsonl is not whole: summary.json ends with round {last}, but there is no "
            f"{', no '.join(lacking)}. Figures and tables by round lack them."
        )

    total = numbers(run.summary.get("bytes"))
    costs = [numbers(event.get("bytes")) for event in run.of("cost")]
    by_round = {kind: sum(cost.get(kind, 0.0) for cost in costs) for kind in total}
    # Bytes are whole numbers, which floats add exactly up to 2**53. No tolerance is needed.
    if by_round != total:
        crossed, whole = sum(by_round.values()), sum(total.values())
        yield (
            "The bytes of the rounds in metrics.jsonl do not add up to those of the run in summary.json: "
            f"{size(crossed)} ({crossed:,.0f} bytes) instead of {size(whole)} ({whole:,.0f} bytes)."
        )


def _evaluated(settings: Mapping[str, object], last: int) -> Sequence[int]:
    """Returns the rounds that evaluate: every few, and the last one that was planned.

    Without settings that is not known: no rounds.
    """
    every = settings.get("eval.every")
    if type(every) is not int or every < 1:
        return ()
    rounds = list(range(0, last + 1, every))
    if settings.get("rounds") == last and rounds[-1] != last:
        rounds.append(last)
    return rounds


def _ranges(rounds: Sequence[int]) -> str:
    """Returns rounds in words, those that follow each other as a range.

    Example:
        >>> _ranges([2]), _ranges([1, 4, 5, 6])
        ('round 2', 'rounds 1, 4 to 6')
    """
    found: list[list[int]] = []
    for round in rounds:
        if found and round == found[-1][1] + 1:
            found[-1][1] = round
        else:
            found.append([round, round])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in found]
    # A damaged file may have any number of gaps, and a note is to stay a line.
    listed = ", ".join(words[:5]) + (f" and {len(words) - 5} more gaps" if len(words) > 5 else "")
    return f"round {listed}" if len(rounds) == 1 else f"rounds {listed}"
