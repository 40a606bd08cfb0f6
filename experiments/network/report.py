"""Writes the tables of README.md from buys.json and real.json, and the picture.

python -m experiments.network.report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.report import conditions, number, table, write_between
from fedsplit.formatting import size
from fedsplit.network.profiles import PROFILES

HERE = Path(__file__).parent
BASELINES = {"micro-batches": "1", "local steps a round": "4", "schedule": "shared", "codec": "raw", "cut": "1:5"}
"""The row of each group that has the settings of the baseline."""


def seconds_of(record: Mapping[str, Any], network: str) -> float:
    """Virtual seconds of training on a network."""
    seconds: float = record["networks"][network]["seconds"]
    return seconds


def saved(records: Sequence[Mapping[str, Any]], record: Mapping[str, Any], network: str) -> float:
    """Returns the share of the baseline's virtual seconds that a row saves; below 0 it costs."""
    baseline = next(r for r in records if r["group"] == record["group"] and r["row"] == BASELINES[record["group"]])
    return 1 - seconds_of(record, network) / seconds_of(baseline, network)


def buys_text(result: Mapping[str, Any]) -> str:
    """The tables of `buys.py`, one for each group of rows."""
    records = result["records"]
    lines = [conditions(result["machine"]), ""]
    for group, baseline in BASELINES.items():
        rows = []
        for record in records:
            if record["group"] != group:
                continue
            cells = []
            for network in PROFILES:
                change = saved(records, record, network)
                seconds = number(seconds_of(record, network))
                is_baseline = record["row"] == baseline
                cells.append(seconds if is_baseline else f"{seconds} ({round(-change, 2) + 0.0:+.0%})")
            sent = sum(count for kind, count in record["bytes"].items() if not kind.startswith("evaluation"))
            rows.append((f"`{record['row']}`", *cells, size(sent), f"{record['held_out']:.4f}"))
        if rows:
            lines += table((group, *PROFILES, "sent", "held-out loss"), rows)
            lines.append("")
    return "\n".join(lines)


def real_text(result: Mapping[str, Any]) -> str:
    """The table of `real.py`."""
    rows = []
    for record in result["records"]:
        cells = (
            str(record["clients"]),
            str(record["micro_batches"]),
            f"{record['delay_ms']:g}",
            f"{record['mbps']:g}",
            f"{record['predicted']:.2f}",
            f"{record['measured']:.2f}",
            f"{record['ratio'] - 1:+.1%}",
            f"{record['load']:.0f}",
        )
        rows.append(cells)
    head = ("clients", "micro-batches", "latency, ms", "Mbit/s", "predicted, s", "measured, s", "difference", "load")
    return "\n".join([conditions(result["machine"]), "", *table(head, rows)])


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draws where the virtual time goes with the baseline, and what each setting leaves of it, on each network."""
    from matplotlib import pyplot

    records = result["records"]
    groups = [group for group in BASELINES if any(record["group"] == group for record in records)]
    figure, panels = pyplot.subplots(1, len(groups), figsize=(3.0 * len(groups), 3.2), sharey=True)
    for panel, group in zip(panels, groups, strict=True):
        own = [record for record in records if record["group"] == group]
        for look, record in enumerate(own):
            heights = [100 * (1 - saved(records, record, network)) for network in PROFILES]
            style = ("-", "--", "-.", ":")[look % 4]
            panel.plot(list(PROFILES), heights, marker="osD^vPX"[look % 7], linestyle=style, label=record["row"])
        panel.set_title(group, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.axhline(100, color="0.7", linewidth=0.7)
        panel.legend(fontsize=6, frameon=False)
    panels[0].set_ylabel("virtual time, % of the baseline", fontsize=8)
    panels[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Writes what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and the results are")
    folder = parser.parse_args().folder
    for name, text in {"buys.json": buys_text, "real.json": real_text}.items():
        if (folder / name).exists():
            write_between(folder / "README.md", name, text(json.loads((folder / name).read_text())))
    if (folder / "buys.json").exists():
        draw(json.loads((folder / "buys.json").read_text()), folder / "buys.png")


if __name__ == "__main__":
    main()
