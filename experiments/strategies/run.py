"""Every aggregation strategy on the same federations.

    python -m experiments.strategies.run --grid    # grid.json: step sizes on a short run
    python -m experiments.strategies.run           # result.json

Each run is a whole federation in one process with one thread (`fedsplit.engines.in_process`); as many processes as
cores work through the queue of `config.toml`. The result is written after every run. What it holds already is not run
again, so an experiment that was interrupted goes on; runs whose settings have changed are dropped from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.speed.run import CORES, machine
from fedsplit.environment import prepare
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        federation: Which of the configuration's.
        side: The strategy with its options, as the tables name it.
        ranks: "equal" or "mixed".
        seed: The run's seed.
    """

    federation: str
    side: str
    ranks: str
    seed: int


def read_plan(path: Path = HERE / "config.toml") -> dict[str, Any]:
    """The experiment's configuration."""
    return tomllib.loads(path.read_text())


def side_of(plan: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """A side's strategy and its options."""
    options = dict(plan["sides"][name])
    return options.pop("strategy", name), options


def takes_mixed_ranks(plan: Mapping[str, Any], name: str) -> bool:
    """Whether a side's strategy lets clients have different ranks."""
    from fedsplit.federation.strategy import load_strategy, traits_of

    return traits_of(load_strategy(*side_of(plan, name), {})).mixed_ranks


def cases(plan: Mapping[str, Any]) -> Iterator[Case]:
    """All runs, the most important first."""
    sides, queue, (first, *seeds) = list(plan["sides"]), plan["queue"], plan["seeds"]
    early = queue["first"]
    late = [side for side in sides if side not in early]
    mixed = [side for side in sides if takes_mixed_ranks(plan, side)]
    yield from (Case(place, side, "equal", first) for place in queue["equal"] for side in sides)
    yield from (Case(place, side, "mixed", first) for place in queue["mixed"] for side in mixed)
    for some in (early, late):
        yield from (Case(at, side, "equal", seed) for at in queue["equal"] for seed in seeds for side in some)
    yield from (Case(place, side, "mixed", seed) for seed in seeds for place in queue["mixed"] for side in mixed)
    for seed in plan["seeds"]:
        for place in queue["last"]:
            yield from (Case(place, side, "equal", seed) for side in sides)
            yield from (Case(place, side, "mixed", seed) for side in mixed)


def settings(plan: Mapping[str, Any], case: Case) -> Config:
    """A run's configuration."""
    strategy, options = side_of(plan, case.side)
    own = {"strategy": strategy, "lora.rank": plan["ranks"][case.ranks], "seed": case.seed}
    return build({**plan["settings"], **plan["federations"][case.federation], **own}, options)


def grid_of(plan: Mapping[str, Any]) -> tuple[dict[str, Any], list[Case]]:
    """The configuration whose sides are the points of the grid, and its cases."""
    grid = plan["grid"]
    sides = {
        ", ".join([name, *(f"{key} {value:g}" for key, value in options.items())]): {"strategy": name, **options}
        for name, choices in grid["sides"].items()
        for options in choices
    }
    place = {grid["federation"]: {**plan["federations"][grid["federation"]], **grid["settings"]}}
    changed = {**plan, "sides": sides, "federations": place}
    return changed, [Case(grid["federation"], side, "equal", grid["seed"]) for side in sides]


def measure(config: Config) -> dict[str, Any]:
    """Runs a federation in this process.

    Raises:
        SettingError: Its strategy cannot do what the run asks of it.
    """
    from fedsplit.engines.in_process import federate
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import check_strategy, load_strategy

    started = time.perf_counter()
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    check_strategy(strategy, config)
    norms = watch_norms(strategy)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        summary = federate(config, out, strategy).summary
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert summary is not None
    return {**outcome(config, events, summary), "change_norms": norms, "seconds": time.perf_counter() - started}


def watch_norms(strategy: Any) -> list[float]:
    """The median norm of a client's change, over all that it sends, in each round; filled as the rounds go by."""
    norms: list[float] = []
    aggregate = strategy.aggregate

    def watched(state: Any, adapters: Any, updates: Sequence[Any]) -> Any:
        each = []
        for update in updates:
            before = (update.given or adapters).tensors
            squares = [
                float((t.double() - before[n].double()).square().sum()) for n, t in update.adapters.tensors.items()
            ]
            each.append(math.sqrt(math.fsum(squares)))
        norms.append(statistics.median(each))
        return aggregate(state, adapters, updates)

    strategy.aggregate = watched
    return norms


def outcome(config: Config, events: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    from fedsplit.federation.strategy import load_strategy, traits_of

    measured = [event for event in events if event["event"] == "evaluate"]
    merged = [event for event in events if event["event"] == "aggregate"]
    errors = [event.get("error") for event in merged]
    known = [error for error in errors if error is not None]
    folded = [sum(event["residual_rank"].values()) for event in merged if event.get("residual_rank")]
    traits = traits_of(load_strategy(config.strategy, config.strategy_options, {}))
    return {
        "perplexity": math.exp(measured[-1]["loss"]),
        "worst": math.exp(max(measured[-1]["clients"].values())),
        "before": math.exp(measured[0]["loss"]),
        "losses": [event["loss"] for event in measured],
        "error_mean": statistics.mean(known) if known else None,
        "error_last": errors[-1],
        "up": summary["bytes"]["adapter_up"] / config.rounds,
        "down": summary["bytes"]["adapter_down"] / config.rounds,
        "aggregation_seconds": statistics.mean(event["seconds"] for event in merged),
        "residual_rank": statistics.mean(folded) / len(merged[-1]["residual_rank"]) if folded else None,
        "personal": bool(traits.personal),
    }


def _begin() -> None:
    """Prepares a process of the pool."""
    prepare()

    import functools
    import warnings

    from fedsplit.corpora import partition

    warnings.simplefilter("ignore")
    # Many runs in a row have the same text, which would take each of them seconds to read and partition.
    partition.make_partition = functools.lru_cache(maxsize=2)(partition.make_partition)


def make_corpora(plan: Mapping[str, Any], todo: Iterable[Case]) -> None:
    """Writes what the runs read and is not there yet."""
    from experiments.strategies import books

    named = {plan["federations"][case.federation].get("dataset") for case in todo} - {None}
    for path in (Path(name) for name in named):
        if not path.exists():
            books.write(path)


def run_all(
    plan: Mapping[str, Any], todo: Sequence[Case], processes: int, minutes: float = math.inf
) -> Iterator[dict[str, Any]]:
    """The records of the cases, as they become known; of one that failed, why.

    Args:
        plan: The configuration.
        todo: What is run, in this order.
        processes: How many at a time.
        minutes: After so many no run is begun.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    waiting, until = list(reversed(todo)), time.monotonic() + 60 * minutes
    asked: dict[Future[dict[str, Any]], Case] = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        while True:
            while waiting and len(asked) < processes and time.monotonic() < until:
                case = waiting.pop()
                asked[pool.submit(measure, settings(plan, case))] = case
            if not asked:
                return
            for future in wait(asked, return_when=FIRST_COMPLETED).done:
                case = asked.pop(future)
                error = future.exception()
                found = {"failed": f"{type(error).__name__}: {error}"} if error else future.result()
                yield {**asdict(case), "strategy": settings(plan, case).strategy, **found}


def case_of(record: Mapping[str, Any]) -> Case:
    """The case that a record is of."""
    return Case(*(record[name] for name in ("federation", "side", "ranks", "seed")))


def still_good(old: Mapping[str, Any], plan: Mapping[str, Any], wanted: Iterable[Case]) -> list[dict[str, Any]]:
    """The records of an earlier result that hold for these settings, too."""
    wanted = set(wanted)
    return [
        record
        for record in old["records"]
        if (case := case_of(record)) in wanted
        and "failed" not in record
        and settings(old["plan"], case) == settings(plan, case)
    ]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the result whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    label = " ".join(str(record[name]) for name in ("federation", "side", "ranks", "seed"))
    if "failed" in record:
        return f"{label}: failed: {record['failed']}"
    error = "" if record["error_mean"] is None else f", error {record['error_mean']:.3g}"
    return f"{label}: perplexity {record['before']:.3f} -> {record['perplexity']:.3f}{error}, {record['seconds']:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: result.json or grid.json beside this script")
    parser.add_argument("--grid", action="store_true", help="run the grid of step sizes")
    parser.add_argument("--processes", type=int, default=CORES)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    args = parser.parse_args()
    plan = read_plan()
    wanted = list(cases(plan))
    if args.grid:
        plan, wanted = grid_of(plan)
    out = args.out or HERE / ("grid.json" if args.grid else "result.json")
    here, records = machine(), []
    if out.exists():
        records = still_good(json.loads(out.read_text()), plan, wanted)
    done = {case_of(record) for record in records}
    todo = [case for case in wanted if case not in done]
    make_corpora(plan, todo)
    failures = 0
    for record in run_all(plan, todo, args.processes, args.minutes):
        records.append({**record, "commit": here["commit"]})
        failures += "failed" in record
        print(_line(record), flush=True)
        write(out, {"machine": here, "processes": args.processes, "plan": plan, "records": records})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
