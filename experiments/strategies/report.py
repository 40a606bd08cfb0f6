"""Writes the tables of README.md from result.json, grid.json and aggregate_speed.json, and draws result.svg.

    python -m experiments.strategies.report

Without matplotlib the picture that is there stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.report import conditions, number, table, write_between

HERE = Path(__file__).parent
REFERENCE = "fedavg"
"""The side to which the others are compared, at equal ranks, seed by seed."""

Record = Mapping[str, Any]


def good(result: Mapping[str, Any]) -> list[Record]:
    """The records of runs that ended."""
    return [record for record in result["records"] if "failed" not in record]


def spread(values: Sequence[float], digits: str) -> str:
    """Mean and range, to so many digits."""
    mean = format(statistics.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ({min(values):{digits}} to {max(values):{digits}})"


def differences(records: Sequence[Record], own: Sequence[Record]) -> dict[int, float]:
    """By seed, perplexity less that of the reference in the same federation."""
    place = own[0]["federation"]
    base = {
        record["seed"]: record["perplexity"]
        for record in records
        if (record["federation"], record["side"], record["ranks"]) == (place, REFERENCE, "equal")
    }
    return {r["seed"]: r["perplexity"] - base[r["seed"]] for r in own if r["seed"] in base}


def _mean(own: Sequence[Record], what: str, scale: float = 1.0, digits: str = ".3g") -> str:
    values = [record[what] * scale for record in own if record[what] is not None]
    return format(statistics.mean(values), digits) if values else ""


def _row(records: Sequence[Record], own: Sequence[Record]) -> list[str]:
    apart = list(differences(records, own).values())
    return [
        own[0]["side"] + (" (each client its own B)" if own[0]["personal"] else ""),
        spread([record["perplexity"] for record in own], ".3f"),
        spread(apart, "+.3f") if apart else "",
        _mean(own, "worst", digits=".2f"),
        _mean(own, "error_mean"),
        _mean(own, "error_last"),
        _mean(own, "up", 1e-6, ".2f"),
        _mean(own, "down", 1e-6, ".2f"),
        _mean(own, "residual_rank", digits=".1f"),
        _mean(own, "aggregation_seconds", 1e3, ".0f"),
        str(len(own)),
    ]


HEAD = (
    *("side", "perplexity", "less fedavg's", "worst client", "error, mean", "error, last"),
    *("MB up", "MB down", "folded rank", "ms", "seeds"),
)


def groups(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, list[Record]]]:
    """The records by federation and ranks, and by side.

    Sides are in the order of their perplexity, less the reference's of the same seeds: text differs from seed to seed,
    and some sides have more seeds than others.
    """
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        found.setdefault((record["federation"], record["ranks"]), {}).setdefault(record["side"], []).append(record)

    def place(own: Sequence[Record]) -> tuple[bool, float]:
        apart = list(differences(records, own).values())
        return not apart, statistics.mean(apart or [record["perplexity"] for record in own])

    return {key: dict(sorted(sides.items(), key=lambda item: place(item[1]))) for key, sides in found.items()}


def missing(result: Mapping[str, Any]) -> str:
    """Which runs of the configuration are not there, in a sentence; empty where all are."""
    from experiments.strategies.run import case_of, cases

    there = {case_of(record) for record in good(result)}
    wanted = list(cases(result["plan"]))
    lacking: dict[tuple[str, str, int], list[str]] = {}
    for case in wanted:
        if case not in there:
            lacking.setdefault((case.federation, case.ranks, case.seed), []).append(case.side)
    if not lacking:
        return ""
    sides = len(result["plan"]["sides"])
    each = [
        f"{place}, {ranks} ranks, seed {seed}: " + ("all" if len(names) == sides else ", ".join(names))
        for (place, ranks, seed), names in lacking.items()
    ]
    return f"{len(wanted) - len(there)} of {len(wanted)} runs are missing: {'; '.join(each)}."


def _places(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The groups in the order of the configuration."""
    plan = result["plan"]
    names = list(plan["federations"])
    return sorted(groups(good(result)), key=lambda key: (list(plan["ranks"]).index(key[1]), names.index(key[0])))


def result_text(result: Mapping[str, Any]) -> str:
    """The tables of `run.py`, one a federation and ranks."""
    records, plan = good(result), result["plan"]
    others = sorted({r["commit"] for r in records} - {result["machine"]["commit"]})
    lines = [conditions(result["machine"]) + (f" Some runs at {', '.join(others)}." if others else ""), ""]
    settings = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
    lines += [f"Settings: {settings}. Seeds: {', '.join(map(str, plan['seeds']))}.", ""]
    if lacking := missing(result):
        lines += [lacking, ""]
    grouped = groups(records)
    for place, ranks in _places(result):
        sides = grouped[place, ranks]
        own = ", ".join(f"{name} {value}" for name, value in plan["federations"][place].items())
        dealt = ",".join(map(str, plan["ranks"][ranks]))
        before = spread([r["before"] for r in {r["seed"]: r for rows in sides.values() for r in rows}.values()], ".3f")
        lines += [f"**{place}, {ranks} ranks**: {own}; ranks {dealt}; perplexity before training {before}", ""]
        lines += [*table(HEAD, [_row(records, rows) for rows in sides.values()]), ""]
    options = {name: given for name, given in plan["sides"].items() if given}
    words = [f"{name}: {', '.join(f'{k} {v}' for k, v in given.items())}" for name, given in options.items()]
    picture = "![Perplexity less that of fedavg with the same seed, by side, a point a seed](result.svg)"
    return "\n".join([*lines, f"Options: {'; '.join(words)}.", "", picture, ""])


def grid_text(result: Mapping[str, Any]) -> str:
    """The table of `run.py --grid`."""
    rows = [
        [record["side"], f"{record['perplexity']:.3f}", ", ".join(f"{norm:.3f}" for norm in record["change_norms"])]
        for record in good(result)
    ]
    head = ["side", "perplexity", "median norm of a client's change, by round"]
    grid = result["plan"]["grid"]
    settings = ", ".join(f"{name} {value}" for name, value in grid["settings"].items())
    words = f"{grid['federation']}, seed {grid['seed']}; {settings}."
    return "\n".join([conditions(result["machine"]), "", words, "", *table(head, rows), ""])


def speed_text(result: Mapping[str, Any]) -> str:
    """The tables of `aggregate_speed.py`, one a choice of layers."""
    lines = [conditions(result["machine"]), ""]
    head = ["strategy", "CPU s to aggregate", "s", "CPU s to measure", "s", "peak GB", "error", "folded rank"]
    for size in dict.fromkeys(record["size"] for record in result["records"]):
        own = sorted((r for r in result["records"] if r["size"] == size), key=lambda r: r["aggregate"]["cpu"])
        first, parts = own[0], ("aggregate", "measure")
        rows = [
            [
                record["strategy"],
                *(number(record[part][what]) for part in parts for what in ("cpu", "seconds")),
                f"{record['peak'] / 1e9:.1f}",
                "" if record["error"] is None else f"{record['error']:.2g}",
                str(record["residual_rank"] or ""),
            ]
            for record in own
        ]
        others = statistics.median(record[part]["others"] for record in own for part in parts)
        words = (
            f"**{size}**: {first['layers']} adapted layers, {first['clients']} clients of rank {first['rank']}, "
            f"{first['adapter'] / 1e6:,.0f} MB an adapter, threads: {first['threads']}; "
            f"others used {others:.0%} of the cores (median)"
        )
        lines += [words, "", *table(head, rows), ""]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws what each side's perplexity is beside the reference's, a point a seed, a pair of axes a federation."""
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "strategies", "svg.fonttype": "none", "font.size": 8})
    from matplotlib.figure import Figure

    records = good(result)
    places = [key for key in _places(result) if key[1] == "equal"]
    grouped = groups(records)
    order = list(reversed(grouped[places[0]]))
    figure = Figure(figsize=(3 + 2.5 * len(places), 1 + 0.17 * len(order)), layout="constrained")
    for axes, place in zip(figure.subplots(1, len(places), squeeze=False, sharey=True)[0], places, strict=True):
        for height, side in enumerate(order):
            apart = differences(records, grouped[place].get(side, [])) if side in grouped[place] else {}
            axes.plot(list(apart.values()), [height] * len(apart), "o", markersize=3, color="C0", alpha=0.7)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=place[0], xlabel="perplexity less fedavg's of the same seed")
        axes.set_yticks(range(len(order)), order)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


TEXTS = {"result": result_text, "grid": grid_text, "aggregate_speed": speed_text}


def text_of(folder: Path, name: str) -> str:
    """What stands in the README of a committed result."""
    return TEXTS[name](json.loads((folder / f"{name}.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and the results are")
    folder = parser.parse_args().folder
    for name in TEXTS:
        if (folder / f"{name}.json").exists():
            write_between(folder / "README.md", f"{name}.json", text_of(folder, name))
    if (folder / "result.json").exists() and importlib.util.find_spec("matplotlib"):
        draw(json.loads((folder / "result.json").read_text()), folder / "result.svg")


if __name__ == "__main__":
    main()
