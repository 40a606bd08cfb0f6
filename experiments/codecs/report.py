"""Tables of `result.json` and `smollm2.json`, and a picture of both.

python -m experiments.codecs.report
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.report import write_between

HERE = Path(__file__).parent

MODELS = {"result.json": "the bundled model", "smollm2.json": "SmolLM2-135M"}
"""Titles of the results."""


def bytes_a_token(run: Mapping[str, Any]) -> float:
    """Bytes of hidden states and gradients, up and down, for each trained token."""
    return float(sum(run["bytes"].values()) / run["tokens"])


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds of each codec, from the fewest bytes on. Perplexities are compared seed by seed."""
    exact = {run["seed"]: run for run in runs if run["codec"] == "raw"}
    rows = []
    for codec in {run["codec"]: None for run in runs}:
        own = [run for run in runs if run["codec"] == codec and run["seed"] in exact]
        changes = [run["perplexity"] / exact[run["seed"]]["perplexity"] - 1 for run in own]
        through = [run["through_the_wire"] / exact[run["seed"]]["perplexity"] - 1 for run in own]
        last = [run["bytes_by_round"][-1] * len(run["bytes_by_round"]) / run["tokens"] for run in own]
        rows.append(
            {
                "codec": codec,
                "seeds": len(own),
                "bytes": statistics.mean(map(bytes_a_token, own)),
                "bytes_last": statistics.mean(last),
                "perplexity": statistics.mean(run["perplexity"] for run in own),
                "change": statistics.mean(changes),
                "spread": max(changes) - min(changes),
                "through": statistics.mean(through),
                "share": statistics.mean(run["codec_seconds"] / run["training_seconds"] for run in own),
            }
        )
    return sorted(rows, key=lambda row: float(row["bytes"]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    exact = next(row["bytes"] for row in rows if row["codec"] == "raw")
    lines = [
        "| codec | seeds | bytes a token | of raw | in the last pass | perplexity | beside raw | spread | "
        "measured through the codec | share of a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        codec = row["codec"].replace("|", "; gradients")
        share = f"1/{exact / row['bytes']:.1f}"
        lines.append(
            f"| `{codec}` | {row['seeds']} | {row['bytes']:.0f} | {share} | {row['bytes_last']:.0f} "
            f"| {row['perplexity']:.3f} | {row['change']:+.2%} | {row['spread']:.2%} | {row['through']:+.2%} "
            f"| {row['share']:.1%} |"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Perplexity beside raw against bytes, one pair of axes for each model.

    Args:
        results: Rows by title.
        path: File of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(len(results), 1, figsize=(9, 5.5 * len(results)), squeeze=False)
    for axes, (title, rows) in zip(every[:, 0], results.items(), strict=True):
        exact = next(row["bytes"] for row in rows if row["codec"] == "raw")
        for row in rows:
            share, change = row["bytes"] / exact, 100 * row["change"]
            axes.errorbar(share, change, yerr=50 * row["spread"], fmt="o", markersize=4, capsize=2, color="#3465a4")
            axes.annotate(row["codec"], (share, change), xytext=(4, 3), textcoords="offset points", fontsize=6)
        axes.axvline(1 / 16, color="#888888", linestyle=":", linewidth=1)
        axes.axhline(0.5, color="#888888", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("bytes a token as a share of raw, up and down (dotted: a sixteenth)")
        axes.set_ylabel("held-out perplexity beside raw, % (dotted: 0.5 %)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Writes the picture, and the tables into README.md."""
    results = {}
    for name, title in MODELS.items():
        rows = rows_of(json.loads((HERE / name).read_text())["runs"])
        write_between(HERE / "README.md", name, table(rows))
        results[title] = rows
    draw(results, HERE / "codecs.png")


if __name__ == "__main__":
    main()
