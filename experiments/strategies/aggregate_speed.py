"""Seconds and memory of one aggregation of a model's size, by every strategy; no model and no training.

    python -m experiments.strategies.aggregate_speed

Every strategy has a process of its own. Clients' factors are random: each starts from what the strategy gives it, and
those factors that it would train are moved. The layers are those of a Llama with 7 billion parameters: 32 blocks of
width 4096 with projections q, k, v and o, and, under "all", gate, up and down between 4096 and 11008.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from experiments.speed.run import disturbed, environment, machine
from experiments.strategies.run import read_plan, side_of, write
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

    from fedsplit.strategy import broadcast, traits_of
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


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One strategy, in this process."""
    import torch

    from fedsplit.fidelity import measure as measure_error
    from fedsplit.memory import peak_memory, resident_memory
    from fedsplit.strategy import load_strategy

    torch.set_num_threads(args.threads)
    strategy = load_strategy(*side_of(read_plan(), name), {"seed": 0, "clients": args.clients})
    layers = layers_of(args.size, args.scale, args.blocks)
    start = start_of(layers, args.rank, args.alpha)
    state = strategy.init(start)
    updates = list(updates_of(strategy, state, start, args.clients, args.rank))
    before, seconds = resident_memory(), {"aggregate": [], "measure": []}
    times, own, started = psutil.cpu_times(), time.process_time(), time.monotonic()
    for _ in range(args.repeats):
        began = time.perf_counter()
        _, result = strategy.aggregate(state, start, updates)
        seconds["aggregate"].append(time.perf_counter() - began)
    peak = peak_memory()
    for _ in range(args.repeats):
        began = time.perf_counter()
        found = measure_error(updates, result)
        seconds["measure"].append(time.perf_counter() - began)
    return {
        **{"strategy": name, "size": args.size, "layers": len(layers), "clients": args.clients, "rank": args.rank},
        **{"threads": args.threads, "adapter": start.nbytes, "before": before, "peak": peak, **seconds},
        **{"error": found.overall, "residual_rank": max(found.residual_rank.values(), default=0)},
        "others": disturbed(times, time.process_time() - own, time.monotonic() - started),
    }


def _line(record: Mapping[str, Any]) -> str:
    aggregate, measured = (", ".join(f"{s:.2f}" for s in record[what]) for what in ("aggregate", "measure"))
    error = "unknown" if record["error"] is None else f"{record['error']:.2g}"
    return (
        f"{record['size']} {record['strategy']}: aggregate {aggregate} s, measure {measured} s, "
        f"peak {record['peak'] / 1e9:.1f} GB, error {error}, others {record['others']:.0%}"
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=STRATEGIES, help="measure one in this process, and print what was found")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(given)
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    old = json.loads(args.out.read_text())["records"] if args.out.exists() else []
    records = [r for r in old if (r["size"], r["strategy"]) not in {(args.size, name) for name in args.strategies}]
    here = machine()
    for name in args.strategies:
        command = [sys.executable, "-m", "experiments.strategies.aggregate_speed", *given, "--only", name]
        # As for the command: threads that wait would otherwise burn their core, which others may need.
        own = {**environment(), "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=True)
        records.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(records[-1]), flush=True)
        write(args.out, {"machine": here, "records": records})


if __name__ == "__main__":
    main()
