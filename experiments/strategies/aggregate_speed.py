"""Seconds and memory of one aggregation of a model's size, by every strategy; no model and no training.

    python -m experiments.strategies.aggregate_speed

Every strategy has a process of its own. Clients' factors are random: each starts from what the strategy gives it, and
those factors that it would train are moved. The layers are those of a Llama with 7 billion parameters: 32 blocks of
width 4096 with projections q, k, v and o, and, under "all", gate, up and down between 4096 and 11008.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from experiments.speed.run import disturbed, machine
from fedsplit.durable import write_text
from fedsplit.environment import prepare
from fedsplit.studies.study import read_study
from strategies import STRATEGIES

if TYPE_CHECKING:
    from fedsplit.updates import Adapters, ClientUpdate

HERE = Path(__file__).parent
WIDTH, INNER, BLOCKS = 4096, 11008, 32
ATTENTION = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
MLP = {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
SIZES = {"attention": ATTENTION, "all": {**ATTENTION, **MLP}}
"""The adapted projections (out, in) of a block."""


def layers_of(size: str, scale: int = 1, blocks: int = BLOCKS) -> dict[str, tuple[int, int]]:
    """(out, in) of every adapted layer.

    Args:
        size: Which projections.
        scale: All sizes are divided by it, for a trial.
        blocks: How many.
    """
    return {
        f"model.layers.{block}.{name}": (out // scale, width // scale)
        for block in range(blocks)
        for name, (out, width) in SIZES[size].items()
    }


def start_of(layers: Mapping[str, tuple[int, int]], rank: int, alpha: float) -> Adapters:
    """Adapters as PEFT begins with them: A drawn, B zero."""
    import torch

    from fedsplit.updates import Adapters, Layer, fresh_factor

    tensors = {}
    for layer, (out, width) in layers.items():
        tensors[f"{layer}.lora_A.weight"] = fresh_factor(f"{layer}.lora_A.weight", (rank, width), 0)
        tensors[f"{layer}.lora_B.weight"] = torch.zeros(out, rank)
    return Adapters(tensors, {layer: Layer(alpha, False) for layer in layers})


def updates_of(strategy: Any, state: Any, start: Adapters, clients: int, rank: int) -> Iterator[ClientUpdate]:
    """What clients would send: of the factors that they train, all numbers are moved at random.

    A moves by a fifth of its own size; B is as large as that move.
    """
    import torch

    from fedsplit.federation.strategy import broadcast, traits_of
    from fedsplit.updates import ClientInfo, ClientUpdate, factor_of

    personal = traits_of(strategy).personal
    for client in range(clients):
        assigned = broadcast(strategy, state, start, ClientInfo(client, rank))
        if assigned is None:
            continue
        generator = torch.Generator().manual_seed(client)
        tensors = {}
        for name, tensor in assigned.adapters.tensors.items():
            moves = factor_of(name) in assigned.task.trains
            size = 0.2 / (3 * start.tensors[f"{name.rpartition('.lora_')[0]}.lora_A.weight"].shape[1]) ** 0.5
            tensors[name] = tensor + size * torch.randn(tensor.shape, generator=generator) if moves else tensor
        control = {name: 0.01 * tensor for name, tensor in tensors.items()} if assigned.task.control else {}
        sent = {name: tensor for name, tensor in tensors.items() if factor_of(name) not in personal}
        adapters = assigned.adapters.with_tensors(sent)
        yield ClientUpdate(client, adapters, 10 + client, given=assigned.adapters, control=control)


def options_of(name: str) -> dict[str, Any]:
    """Options of a strategy in the federations: those of the side with the strategy's name."""
    study = read_study(HERE / "sides.toml", {})
    side = next(run for run in study.runs if run.label == name)
    return dict(side.draft.config.strategy_options)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One strategy, in this process."""
    import torch

    from fedsplit.federation.aggregation_error import measure as measure_error
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.trunk.memory import peak_memory, resident_memory

    torch.set_num_threads(args.threads)
    strategy = load_strategy(name, options_of(name), {"seed": 0, "clients": args.clients})
    layers = layers_of(args.size, args.scale, args.blocks)
    start = start_of(layers, args.rank, args.alpha)
    state = strategy.init(start)
    updates = list(updates_of(strategy, state, start, args.clients, args.rank))
    before = resident_memory()
    result, aggregate = _timed(lambda: strategy.aggregate(state, start, updates)[1])
    peak = peak_memory()
    found, measured = _timed(lambda: measure_error(updates, result))
    return {
        **{"strategy": name, "size": args.size, "layers": len(layers), "clients": args.clients, "rank": args.rank},
        **{"threads": args.threads, "adapter": start.nbytes, "before": before, "peak": peak},
        **{"aggregate": aggregate, "measure": measured, "error": found.overall},
        "residual_rank": max(found.residual_rank.values(), default=0),
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What comes of some work; its seconds, those of this process alone, and the share of the cores of others."""
    times, own, began = psutil.cpu_times(), time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - own
    return result, {"seconds": seconds, "cpu": cpu, "others": disturbed(times, cpu, seconds)}


def _line(record: Mapping[str, Any]) -> str:
    each = (
        f"{what} {record[what]['seconds']:.2f} s, CPU {record[what]['cpu']:.2f} s" for what in ("aggregate", "measure")
    )
    error = "unknown" if record["error"] is None else f"{record['error']:.2g}"
    return (
        f"{record['size']} {record['strategy']}: {', '.join(each)}, peak {record['peak'] / 1e9:.1f} GB, error {error}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "aggregate_speed.json")
    parser.add_argument("--size", choices=SIZES, default="attention")
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=list(STRATEGIES))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--scale", type=int, default=1, help="all widths are divided by it")
    parser.add_argument("--threads", type=int, default=1, help="more are slower where others use the cores, too")
    return parser


def main() -> None:
    args = _parser().parse_args()
    prepare()
    import torch

    from fedsplit.federation import aggregation_error, strategy  # noqa: F401  # once, for all processes that are forked

    torch.set_num_threads(args.threads)
    old = json.loads(args.out.read_text())["records"] if args.out.exists() else []
    records = [r for r in old if (r["size"], r["strategy"]) not in {(args.size, name) for name in args.strategies}]
    here = machine()
    for name in args.strategies:
        with get_context("fork").Pool(1) as pool:  # a process each, whose peak is its own
            records.append(pool.apply(measure, (name, args)))
        print(_line(records[-1]), flush=True)
        write_text(args.out, json.dumps({"machine": here, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
