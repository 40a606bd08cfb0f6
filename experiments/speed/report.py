"""Writes the tables of README.md from result.json and remote.json.

python -m experiments.speed.report
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.overhead import ENGINES, overhead

HERE = Path(__file__).parent
ROLES = {"worker": "process", "client": "client", "trunk": "trunk", "command": "server"}


def number(value: float) -> str:
    """Three digits, and no more than that."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def middle(values: Sequence[float]) -> str:
    """Median and range."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def speed(record: Mapping[str, Any]) -> float:
    """Tokens a second once it is warm."""
    return record["tokens"] / record["seconds"]


def ratios(records: Iterable[Mapping[str, Any]], side: str) -> list[float]:
    """A side's speed by that of `whole`, repeat by repeat."""
    by_repeat: dict[int, dict[str, float]] = {}
    for record in records:
        by_repeat.setdefault(record["repeat"], {})[record["side"]] = speed(record)
    return [speeds[side] / speeds["whole"] for speeds in by_repeat.values() if {side, "whole"} <= speeds.keys()]


def _with_first(record: Mapping[str, Any]) -> float | None:
    """Tokens a second of all rounds, the first one included."""
    rounds = record.get("rounds")
    return rounds and sum(r["tokens"] for r in rounds) / sum(r["seconds"] for r in rounds)


def _row(records: Sequence[Mapping[str, Any]], side: str) -> list[str]:
    own = [record for record in records if record["side"] == side]
    peaks: dict[str, int] = {}
    for record in own:
        for role, peak in record["peak_memory"].items():
            peaks[role] = max(peak, peaks.get(role, 0))
    against = ratios(records, side)
    first = [value for record in own if (value := _with_first(record)) is not None]
    return [
        side,
        middle([speed(record) for record in own]),
        middle(against) if against else "",
        number(statistics.median(first)) if first else "",
        number(statistics.median(r["cpu_seconds"] / r["tokens"] * 1000 for r in own)),
        number(statistics.median(r["cpu_seconds"] / r["seconds"] for r in own)),
        ", ".join(f"{name} {peaks[role] / 1e6:,.0f}" for role, name in ROLES.items() if role in peaks),
        f"{statistics.median(record['others'] for record in own):.0%}",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def conditions(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB; {versions}; "
        f"fedsplit {machine['commit']}; {machine['date']}."
    )


def sides_text(result: Mapping[str, Any]) -> str:
    """The tables of `run.py`, one a model and type."""
    lines = [conditions(result["machine"]), ""]
    if result["extra"]:
        lines += [f"fedsplit was given `{' '.join(result['extra'])}`.", ""]
    head = [
        "side",
        "tokens/s",
        "of `whole`",
        "tokens/s, first round too",
        "CPU s / 1,000 tokens",
        "cores busy",
        "peak MB a process",
        "others",
    ]
    for (name, dtype), group in itertools.groupby(result["records"], lambda r: (r["model"], r["dtype"])):
        records, model = list(group), result["models"][name]
        repeats = len({record["repeat"] for record in records})
        shape = f"batch {model['batch_size']} x {model['max_length']}, cut {model['cut']}"
        steps = records[0].get("steps", model["steps"])
        lines += [f"**{name}, {dtype}**: {shape}, {steps} steps a round, repeats: {repeats}", ""]
        sides = list(dict.fromkeys(record["side"] for record in records))
        lines += [*table(head, [_row(records, side) for side in sides]), ""]
        if sent := {record["side"]: record["bytes"]["ratio"] for record in records if "bytes" in record}:
            each = ", ".join(f"{side} {ratio:.6g}" for side, ratio in sent.items())
            lines += [f"Hidden states and gradients sent, by what four tensors a step come to: {each}.", ""]
    return "\n".join(lines)


def remote_text(result: Mapping[str, Any]) -> str:
    """The table of `remote.py`."""
    rows = []
    for name in dict.fromkeys(record["model"] for record in result["records"]):
        own = [record for record in result["records"] if record["model"] == name]
        rows.append(
            [
                name,
                middle([record["local"] for record in own]),
                middle([record["inside"] for record in own]),
                middle([record["remote"] for record in own]),
                middle([record["remote"] / record["local"] for record in own]),
                number(statistics.median(1000 / record["remote"] - 1000 / record["inside"] for record in own)),
            ]
        )
    head = ["model", "local, pairs/s", "inside", "remote", "remote / local", "remote - inside, ms a pair"]
    return "\n".join([conditions(result["machine"]), "", *table(head, rows), ""])


def overhead_text(result: Mapping[str, Any]) -> str:
    """The table of `overhead.py`."""
    names = {
        "a round": "round",
        "training, with no step": "train",
        "evaluation, with no sequence": "evaluate",
        "between them": "between",
        "not computation, in all": "fixed",
    }
    head = ["", *(f"{engine}, ms | " for engine in ENGINES)]
    rows = [[name] for name in names]
    for engine in ENGINES:
        found = overhead([record for record in result["records"] if record["engine"] == engine])
        found["fixed"] = found["share"] * found["round"]
        for row, what in zip(rows, names.values(), strict=True):
            row.append(f"{number(1000 * found[what])} | {found[what] / found['round']:.1%}")
    lines = table(head, rows)
    lines[1] = "| --- |" + " ---: | ---: |" * len(ENGINES)
    return "\n".join([conditions(result["machine"]), "", *lines, ""])


def write_between(readme: Path, marker: str, text: str) -> None:
    """Replaces what stands between a marker's two comments."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{readme.name} has no place for {marker}")
    readme.write_text(f"{before}{begin}\n{text.rstrip()}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and the results are")
    folder = parser.parse_args().folder
    for name, text in {"result.json": sides_text, "remote.json": remote_text, "overhead.json": overhead_text}.items():
        if (folder / name).exists():
            write_between(folder / "README.md", name, text(json.loads((folder / name).read_text())))


if __name__ == "__main__":
    main()
