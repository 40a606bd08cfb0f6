"""Writes the tables of README.md from the committed results, and draws result.svg.

    python -m experiments.strategies.report

Without matplotlib the picture that is there stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.speed.report import conditions, number, table, write_between
from fedsplit.settings.documents import dotted
from fedsplit.studies.run_measures import ERROR, LOSS, MB_DOWN, MB_UP, WORST

HERE = Path(__file__).parent
FEDERATIONS = ("presidents", "dirichlet", "dirichlet-32", "books")
"""Comparisons with tables of all sides, by the name of the study file."""

STEP_SIZES = "step-sizes"
"""Comparison of step sizes."""

REFERENCE = "fedavg"
"""Side to which the others are compared, seed by seed."""

MIXED = ", mixed ranks"
"""End of the name of a side with mixed ranks."""

PICTURE = "result.svg"

Values = Mapping[int, float]
"""Value by seed."""


@dataclass(frozen=True)
class Comparison:
    """A committed comparison of a study.

    Attributes:
        document: Content of the file that `fedsplit sweep` wrote.
        values: Value by measure, side and seed.
    """

    document: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Values]]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of all runs by dotted name."""
        return dotted(self.document["study"]["settings"])

    def perplexity(self, side: str) -> dict[int, float]:
        """Perplexity of a side by seed."""
        return exponential(self.values[LOSS][side])

    def differences(self, side: str) -> dict[int, float]:
        """Perplexity of a side less that of the reference with the same seed, by seed."""
        reference = self.perplexity(REFERENCE)
        return {seed: value - reference[seed] for seed, value in self.perplexity(side).items() if seed in reference}

    def sides(self, mixed: bool) -> list[str]:
        """Sides with or without mixed ranks that have a result, in the order of their difference to the reference."""
        names = [side for side in self.values[LOSS] if side.endswith(MIXED) == mixed and self.differences(side)]
        return sorted(names, key=lambda side: statistics.mean(self.differences(side).values()))


def read_comparison(path: Path) -> Comparison:
    """Reads a file comparison.json."""
    document = json.loads(path.read_text())
    values: dict[str, dict[str, Values]] = {}
    for line in document["comparison"]:
        by_seed = {int(seed): value for seed, value in line["values"].items()}
        values.setdefault(line["measure"], {})[line["label"]] = by_seed
    return Comparison(document, values)


def exponential(losses: Values) -> dict[int, float]:
    """Perplexities from losses."""
    return {seed: math.exp(loss) for seed, loss in losses.items()}


def spread(values: Sequence[float], digits: str) -> str:
    """Mean and range, to so many digits."""
    mean = format(statistics.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ({min(values):{digits}} to {max(values):{digits}})"


def origin(document: Mapping[str, Any]) -> str:
    """Versions, commits and cores with which the runs were played, in a sentence, and the note of the result."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if name != "fedsplit")
    commits = sorted({_commit(run["git"]) for run in document["runs"]})
    days = sorted({run["date"][:10] for run in document["runs"] if run.get("date")})
    facts = [f"{document['host']['cores']} cores", versions, f"fedsplit {', '.join(commits)}", *days]
    return " ".join([f"{'; '.join(facts)}.", *([document["note"]] if "note" in document else [])])


def _commit(git: Mapping[str, Any]) -> str:
    """A commit in few digits, and whether files had been changed since."""
    return git["commit"][:7] + ("-dirty" if git["dirty"] else "")


HEAD = ("side", "perplexity", "less fedavg's", "worst client", "error", "MB up", "MB down", "seeds")


def _row(comparison: Comparison, side: str) -> list[str]:
    """Cells of a side."""
    rounds = comparison.settings["rounds"]
    values = comparison.values
    worst = exponential(values[WORST].get(side, {}))
    perplexity = list(comparison.perplexity(side).values())
    return [
        side.removesuffix(MIXED),
        spread(perplexity, ".3f"),
        spread(list(comparison.differences(side).values()), "+.3f"),
        _mean(worst, ".2f"),
        _mean(values[ERROR].get(side, {}), ".3g"),
        *(_mean(values[measure].get(side, {}), ".2f", rounds) for measure in (MB_UP, MB_DOWN)),
        str(len(perplexity)),
    ]


def _mean(values: Values, digits: str, rounds: int = 1) -> str:
    """Mean over the seeds as a cell, for each round; empty without values."""
    return format(statistics.mean(values.values()) / rounds, digits) if values else ""


def missing(document: Mapping[str, Any]) -> str:
    """Runs of the study without a result, in a sentence; empty if there are none."""
    study = document["study"]
    wanted = [(variant["name"], seed) for seed in study["seeds"] for variant in study["variants"]]
    played = {(run["label"], run["seed"]) for run in document["runs"]}
    lacking = [f"{label}, seed {seed}" for label, seed in wanted if (label, seed) not in played]
    return f"{len(lacking)} of {len(wanted)} runs are missing: {'; '.join(lacking)}." if lacking else ""


def federation_text(comparison: Comparison) -> str:
    """The tables of a federation: all sides, and those with mixed ranks."""
    lines = [origin(comparison.document), ""]
    if lacking := missing(comparison.document):
        lines += [lacking, ""]
    settings = ", ".join(f"{name} {value}" for name, value in comparison.settings.items())
    lines += [f"Settings: {settings}.", ""]
    for mixed, title in ((False, "equal ranks"), (True, "mixed ranks")):
        rows = [_row(comparison, side) for side in comparison.sides(mixed)]
        lines += [f"**{title}**", "", *table(HEAD, rows), ""]
    return "\n".join(lines)


def step_sizes_text(comparison: Comparison) -> str:
    """The table of step sizes."""
    rows = [
        [variant["name"], spread(list(comparison.perplexity(variant["name"]).values()), ".3f")]
        for variant in comparison.document["study"]["variants"]
    ]
    return "\n".join([origin(comparison.document), "", *table(["side", "perplexity"], rows), ""])


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


def draw(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Draws the differences to the reference at equal ranks: a point a seed, a pair of axes a federation."""
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "strategies", "svg.fonttype": "none", "font.size": 8})
    from matplotlib.figure import Figure

    order = list(reversed(next(iter(comparisons.values())).sides(mixed=False)))
    figure = Figure(figsize=(3 + 2.5 * len(comparisons), 1 + 0.17 * len(order)), layout="constrained")
    every = figure.subplots(1, len(comparisons), squeeze=False, sharey=True)[0]
    for axes, (name, comparison) in zip(every, comparisons.items(), strict=True):
        known = comparison.sides(mixed=False)
        for height, side in enumerate(order):
            apart = list(comparison.differences(side).values()) if side in known else []
            axes.plot(apart, [height] * len(apart), "o", markersize=3, color="C0", alpha=0.7)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="perplexity less fedavg's of the same seed")
        axes.set_yticks(range(len(order)), order)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


NAMES = (*FEDERATIONS, STEP_SIZES, "aggregate_speed")
"""Committed results, each with a place in README.md."""


def text_of(folder: Path, name: str) -> str:
    """What stands in the README of a committed result."""
    path = folder / f"{name}.json"
    if name == "aggregate_speed":
        return speed_text(json.loads(path.read_text()))
    write = step_sizes_text if name == STEP_SIZES else federation_text
    return write(read_comparison(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and the results are")
    folder = parser.parse_args().folder
    for name in NAMES:
        if (folder / f"{name}.json").exists():
            write_between(folder / "README.md", f"{name}.json", text_of(folder, name))
    files = {name: folder / f"{name}.json" for name in FEDERATIONS}
    comparisons = {name: read_comparison(file) for name, file in files.items() if file.exists()}
    if comparisons and importlib.util.find_spec("matplotlib"):
        draw(comparisons, folder / PICTURE)


if __name__ == "__main__":
    main()
