"""Groups of runs that differ in their seeds alone: which runs count, what a group is called, what to say beside."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit.reporting.figures import LABEL_CHARACTERS
from fedsplit.reporting.origin import differing
from fedsplit.reporting.run_record import RunRecord, numbers, text

UNLIKE = (
    *("seed", "sinks", "sink_options", "track", "report", "push_to_hub", "quiet", "json"),
    *("workers", "threads"),
)
"""Settings that do not make runs different: repetitions of one experiment may differ in them."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        name: Values of the settings in which the groups differ; the run's name, where there is one group a run.
        runs: The runs that count: one of each seed.
        label: Name in figures, which no other group has: the name itself if it is short, else a letter.
        repeated: Runs whose settings and seed are those of a run that counts. They are no repetitions: the same seed
            draws the same numbers.
    """

    name: str
    runs: Sequence[RunRecord]
    label: str = ""
    repeated: Sequence[RunRecord] = ()


def distinct(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    """Returns runs with each folder once, and a notice for each folder that was given again."""
    found: dict[Path, RunRecord] = {}
    again: dict[Path, RunRecord] = {}
    for run in runs:
        # Two spellings of a path, or a link, may name one folder.
        folder = run.folder.resolve()
        if folder in found:
            again[folder] = run
        else:
            found[folder] = run
    notices = [f"{_place(run)} was given more than once, and counts once." for run in again.values()]
    return list(found.values()), notices


def groups_of(runs: Sequence[RunRecord]) -> list[Group]:
    """Returns runs in groups of equal settings, in the order of the first run of each group.

    A folder that was given twice is used once. Of runs with equal settings and an equal seed, the first counts. A run
    whose settings are not known is like no other run.
    """
    runs, _ = distinct(runs)
    unlike = {name: values for name, values in differing(runs).items() if name not in UNLIKE}
    found: dict[tuple[str, ...], list[RunRecord]] = {}
    for place, run in enumerate(runs):
        alone = () if run.settings else (str(run.folder),)
        of_run = [values[place] for values in unlike.values()]
        found.setdefault((*of_run, *alone), []).append(run)
    names = [_name(list(unlike), values, members) for values, members in found.items()]
    # Some groups are named after a run, and runs in different folders may have one name.
    if len(set(names)) < len(names):
        names = [_place(members[0]) for members in found.values()]
    groups = []
    for name, label, members in zip(names, labels_of(names), found.values(), strict=True):
        seeds: dict[str, RunRecord] = {}
        for run in members:
            seeds.setdefault(run.setting("seed"), run)
        repeated = [run for run in members if seeds[run.setting("seed")] is not run]
        groups.append(Group(name, list(seeds.values()), label, repeated))
    return groups


def _name(unlike: Sequence[str], values: Sequence[str], members: Sequence[RunRecord]) -> str:
    """Returns the name of a group.

    Args:
        unlike: Settings in which the groups differ.
        values: Values of the group.
        members: Runs of the group.
    """
    if not members[0].settings:
        return members[0].name
    if not unlike and len(members) > 1:
        return "all runs"
    # A bare value says enough where a single setting differs, such as the strategy.
    words = [value or "-" for value in values]
    if len(unlike) > 1:
        words = [f"{name} {value}" for name, value in zip(unlike, words, strict=True)]
    is_short = bool(unlike) and sum(map(len, words)) <= 40
    return ", ".join(words) if is_short else members[0].name


def labels_of(names: Sequence[str]) -> list[str]:
    """Returns names for figures, which have little room: the names if all are short and unlike, else letters.

    Example:
        >>> labels_of(["fedavg", "flora"])
        ['fedavg', 'flora']
        >>> labels_of(["strategy fedavg, train.lr 0.1", "strategy fedavg, train.lr 0.2"])
        ['A', 'B']
    """
    if max(map(len, names)) <= LABEL_CHARACTERS and len(set(names)) == len(names):
        return list(names)
    # Numbers go on where the letters end.
    letters = string.ascii_uppercase
    return [letters[place] if place < len(letters) else str(place + 1) for place in range(len(names))]


def label_beside(groups: Sequence[Group], baseline: RunRecord) -> str:
    """Returns the name of the baseline in figures, which no group has."""
    labels = {group.label for group in groups}
    is_free = len(baseline.name) <= LABEL_CHARACTERS and baseline.name not in labels
    # A run may itself be called "baseline".
    possible = [*([baseline.name] if is_free else []), "baseline", "--baseline"]
    return next(label for label in possible if label not in labels)


def key_of(groups: Sequence[Group], baseline: RunRecord | None = None) -> str:
    """Returns what labels in a figure stand for, to go on after its caption; empty if the labels are the names."""
    meant = {group.label: group.name for group in groups}
    if baseline is not None:
        meant[label_beside(groups, baseline)] = baseline.name
    return "".join(f" {label}: {name}." for label, name in meant.items() if label != name)


def notices(runs: Sequence[RunRecord]) -> list[str]:
    """Returns lines to read beside a comparison: runs that do not count, and losses on different texts."""
    runs, lines = distinct(runs)
    for group in groups_of(runs):
        for run in group.repeated:
            first = next(each for each in group.runs if each.setting("seed") == run.setting("seed"))
            others = list(differing([first, run]))
            but = f" (but for {_listed(others)})" if others else ""
            lines.append(
                f"{_place(run)} has the settings{but} and the seed {text(run.setting('seed'))} of {_place(first)}, and "
                "does not count: equal seeds are no repetitions."
            )
    return lines + unlike_texts(runs)


MEASURED_ON = ("dataset", "partition", "clients", "eval.samples", "eval.fraction")
"""Settings that, beside those of the section `data`, decide on which texts a loss is measured."""

LOOKS_ONLY = ("data.show",)
"""Settings of the section `data` that change no text."""


def unlike_texts(runs: Sequence[RunRecord]) -> list[str]:
    """Returns a line if the losses of runs are measured on different texts; none if nothing shows that they are.

    Another seed may divide the data in another way, which is part of a repetition: counts are compared between runs of
    one seed.
    """
    reasons = []
    for name in differing(runs):
        is_of_data = name.startswith(("data.", "partition")) and name not in LOOKS_ONLY
        if name in MEASURED_ON or is_of_data:
            reasons.append(name)
    counts: dict[str, set[tuple[tuple[str, float], ...]]] = {}
    for run in runs:
        held_out = _held_out(run)
        if held_out:
            counts.setdefault(run.setting("seed"), set()).add(held_out)
    if any(len(unlike) > 1 for unlike in counts.values()):
        reasons.append("the clients' held-out sequences and tokens (data.json)")
    if not reasons:
        return []
    return [f"The losses are measured on different texts: the runs differ in {_listed(reasons)}."]


def _held_out(run: RunRecord) -> tuple[tuple[str, float], ...]:
    """Returns the counts of the held-out data of each client in data.json; nothing if they are not known."""
    clients = run.data.get("clients")
    counts: list[tuple[str, float]] = []
    for client in clients if isinstance(clients, list) else []:
        if isinstance(client, Mapping):
            # Sorted, since the counts of runs are compared, and each file has an order of its own.
            counts.extend(sorted(numbers(client.get("held_out")).items()))
    return tuple(counts)


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _place(run: RunRecord) -> str:
    """Returns the folder of a run as it was given."""
    return text(run.folder, 200)
