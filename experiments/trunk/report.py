"""Writes the tables of README.md from schedules.json, memory.json and scale.json; plots where matplotlib is there.

python -m experiments.trunk.report
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.report import conditions, middle, number, table, write_between
from experiments.strategies.report import origin

HERE = Path(__file__).parent
Record = Mapping[str, Any]
Curve = list[tuple[float, float]]


def curve(record: Record, what: str) -> Curve:
    """The held-out loss of each round against what training took until then: its "seconds" or its "tokens"."""
    spent = itertools.accumulate(round.get(what, 0.0) for round in record["rounds"])
    return [(x, round["held_out"]) for x, round in zip(spent, record["rounds"], strict=True)]


def reached(points: Curve, target: float) -> float | None:
    """Where a curve first comes down to a target, in a straight line between points; None where it does not."""
    if points[0][1] <= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def final(record: Record) -> float:
    """The held-out loss after the last round."""
    return record["rounds"][-1]["held_out"]


def targets(records: Sequence[Record]) -> dict[int, float]:
    """By seed, the worst final loss of those in which the trunk learns."""
    return {
        seed: max(final(r) for r in records if r["seed"] == seed and r["trains"]["trunk"])
        for seed in {r["seed"] for r in records if r["trains"]["trunk"]}
    }


def _forgotten(rounds: Sequence[Record]) -> float | None:
    each = [statistics.mean(r["forgotten"].values()) for r in rounds if r["forgotten"]]
    return statistics.mean(each) if each else None


def _exact(values: Sequence[float | None], digits: str) -> str:
    """Median and range, to so many digits; empty where there is a value missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return ""
    shown = [format(value, digits) for value in (statistics.median(known), min(known), max(known))]
    return shown[0] if len(known) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _reaches(own: Sequence[Record], aims: Mapping[int, float], what: str) -> str:
    found = [reached(curve(r, what), aims[r["seed"]]) for r in own if r["seed"] in aims]
    values = [value for value in found if value is not None]
    missing = len(found) - len(values)
    if not values:
        return "not reached"
    return middle(values) + (f", not reached in {missing}" if missing else "")


def _schedule_row(own: Sequence[Record], aims: Mapping[int, float]) -> list[str]:
    steady = [r["rounds"][2:] for r in own]
    return [
        own[0]["schedule"],
        middle([sum(x["tokens"] for x in rounds) / sum(x["seconds"] for x in rounds) for rounds in steady]),
        middle([sum(x["trunk"].get("steps", 0) for x in r["rounds"][1:]) for r in own]),
        _exact([final(r) for r in own], ".4f"),
        _reaches(own, aims, "seconds"),
        _reaches(own, aims, "tokens"),
        _exact([_forgotten(r["rounds"][-1:]) for r in own], "+.4f"),
        _exact([_forgotten(r["rounds"]) for r in own], "+.4f"),
    ]


def schedules_text(result: Mapping[str, Any]) -> str:
    """The tables of the study `schedules.toml`."""
    records = result["records"]
    names, aims = list(dict.fromkeys(r["schedule"] for r in records)), targets(records)
    by_name = {name: [r for r in records if r["schedule"] == name] for name in names}
    head = [
        "schedule",
        "tokens/s",
        "trunk's steps",
        "final held-out loss",
        "s to equal loss",
        "tokens to equal loss",
        "forgotten, last round",
        "forgotten, all rounds",
    ]
    goals = ", ".join(f"{target:.4f} (seed {seed})" for seed, target in sorted(aims.items()))
    lines = [origin(result), ""]
    lines += [f"Targets: {goals}.", "", *table(head, [_schedule_row(own, aims) for own in by_name.values()]), ""]
    rounds = range(len(records[0]["rounds"]))
    lines += ["**Held-out loss by round**, mean over the seeds, and in brackets the training seconds until then", ""]
    rows = []
    for name, own in by_name.items():
        curves = [curve(r, "seconds") for r in own]
        cells = [[statistics.mean(c[i][axis] for c in curves) for axis in (1, 0)] for i in rounds]
        rows.append([name, *(f"{loss:.4f} ({seconds:.1f})" for loss, seconds in cells)])
    lines += [*table(["schedule", *map(str, rounds)], rows), ""]
    return "\n".join(lines)


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f}"


def _memory_row(record: Record) -> list[str]:
    name = f"{record['clients']:,}"
    if "needs" in record:
        return [name, *[""] * 4, f"not run: would need about {_megabytes(record['needs'])}", *[""] * 4]
    if record.get("refused"):
        return [name, _megabytes(record["before"]), "", "", "", "refused: too small", *[""] * 4]
    steps, counts = record["steps"], record["counts"]
    return [
        name,
        _megabytes(record["before"]),
        f"{max((s['pending'] for s in steps), default=0):,}",
        _megabytes(max(s["resident"] for s in steps)) if steps else "",
        _megabytes(record["after"]),
        _megabytes(record["peak"]),
        number(statistics.median(s["seconds"] for s in steps)) if steps else "",
        *(f"{counts.get(what, 0):,}" for what in ("forwards", "recomputed", "waits")),
    ]


def verdict(records: Sequence[Record]) -> str:
    """Whether the budget was kept to, and everybody was served, in a sentence."""
    own = [r for r in records if "peak" in r]
    limit = own[0]["budget_bytes"]
    worst = max(own, key=lambda r: r["peak"])
    where = f"the highest peak is {_megabytes(worst['peak'])} MB, with {worst['clients']:,} clients"
    kept = "The budget was kept to" if worst["peak"] <= limit else "**The budget was exceeded**"
    lost = {r["clients"]: min(s["served"] for s in r["steps"]) for r in own if r["steps"]}
    missed = [f"{count:,} of {clients:,} clients" for clients, count in lost.items() if count < clients]
    served = f"**not all were served**: {', '.join(missed)}" if missed else "every client was served"
    return f"{kept}: {where}; {served}."


def each_copy(records: Sequence[Record]) -> str:
    """What a client's copy adds, in a sentence; empty where one number of clients was measured."""
    first, last = records[0], records[-1]
    if first is last:
        return ""
    added = (last["after"] - first["after"]) / (last["clients"] - first["clients"])
    theory = 4 * first["adapter"]
    return (
        f"A client adds {added / 1e6:.2f} MB; adapter, version in use and two moments are {theory / 1e6:.2f} MB, "
        f"{added / theory:.1f} times less."
    )


def memory_text(result: Mapping[str, Any]) -> str:
    """The tables of `memory.py`, one a model and kind."""
    lines = [conditions(result["machine"]), ""]
    head = ["clients", "before", "pending", "resident then", "after", "peak", "s a step", "forwards", "again", "waits"]
    for (model, kind), group in itertools.groupby(result["records"], lambda r: (r["model"], r["kind"])):
        own = list(group)
        limit = f", `--trunk.memory {own[0]['budget']}`" if own[0]["budget"] else ""
        least = f", least {_megabytes(max(r['least'] for r in own if 'least' in r))} MB" if limit else ""
        lines += [f"**{model}, {kind}**{limit}{least}", "", *table(head, [_memory_row(r) for r in own]), ""]
        measured = [r for r in own if "peak" in r]
        if kind == "budget" and measured:
            lines += [verdict(own), ""]
        if kind == "copies" and (said := each_copy(measured)):
            lines += [said, ""]
    return "\n".join(lines)


def _scale_row(record: Record) -> list[str]:
    train = [s for s in record["spans"] if s["event"] == "train"][-1]
    evaluate = [s for s in record["spans"] if s["event"] == "evaluate"][-1]
    clients, peaks = record["clients"], record["peak_memory"]
    return [
        f"{clients:,}",
        number(train["seconds"]),
        number(train["seconds"] / clients),
        number(train["cpu_seconds"] / clients),
        number(evaluate["seconds"] / clients),
        *(_megabytes(peaks[role]) if role in peaks else "" for role in ("client", "trunk", "command")),
        number(record["seconds_of_command"]),
        f"{record['others']:.0%}",
    ]


def scale_text(result: Mapping[str, Any]) -> str:
    """The table of `scale.py`."""
    head = [
        "clients",
        "s a round",
        "s a client",
        "CPU s a client",
        "evaluation, s a client",
        "peak MB: client",
        "trunk",
        "server",
        "s, whole command",
        "others",
    ]
    flags = f"Flags: `{' '.join(result['flags'])}`."
    rows = [_scale_row(record) for record in result["records"]]
    return "\n".join([conditions(result["machine"]), "", flags, "", *table(head, rows), ""])


def _plot_schedules(axes: Any, result: Mapping[str, Any]) -> None:
    first = result["records"][0]["seed"]
    for record in result["records"]:
        if record["seed"] == first:
            axes.plot(*zip(*curve(record, "seconds"), strict=True), marker="o", markersize=3, label=record["schedule"])
    axes.set(xlabel="training seconds", ylabel="held-out loss", title=f"seed {first}")


def _plot_memory(axes: Any, result: Mapping[str, Any]) -> None:
    for label, group in itertools.groupby(result["records"], lambda r: (r["model"], r["kind"], r["budget"])):
        points = [(r["clients"], r["peak"] / 1e6) for r in group if "peak" in r]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=" ".join(filter(None, label)))
    axes.set(xscale="log", yscale="log", xlabel="clients at the same time", ylabel="peak resident memory, MB")


def plot(draw: Callable[[Any, Mapping[str, Any]], None], result: Mapping[str, Any], path: Path) -> None:
    """Draws a figure of one pair of axes into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes, result)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and the results are")
    folder = parser.parse_args().folder
    texts = {"schedules": schedules_text, "memory": memory_text, "scale": scale_text}
    plots = {"schedules": _plot_schedules, "memory": _plot_memory}
    for name, text in texts.items():
        if not (folder / f"{name}.json").exists():
            continue
        result = json.loads((folder / f"{name}.json").read_text())
        written = text(result)
        if name in plots and importlib.util.find_spec("matplotlib"):
            plot(plots[name], result, folder / f"{name}.png")
        if (folder / f"{name}.png").exists() and name in plots:
            written += f"\n![{name}]({name}.png)\n"
        write_between(folder / "README.md", f"{name}.json", written)


if __name__ == "__main__":
    main()
