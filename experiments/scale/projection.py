"""What a round would take with 10, 100 and 1,000 clients on GPUs: computed, not measured.

    python -m experiments.scale.projection                    # the table of README.md

Measured on this project's machine, and read from the committed results: seconds of the server for a client between
two rounds (clients.json), and of a packet and a byte over TCP (packets.json). From a data sheet: the speed of the GPU.
Assumed: all that is in `ASSUMED`. Computed: floating-point operations and bytes of a step, from the shape of the model.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.scale import packets

HERE = Path(__file__).parent

PEAK = 989e12
"""Operations a second of an NVIDIA H100 SXM in bfloat16: half of the 1,979e12 with sparsity of NVIDIA's data sheet."""

ASSUMED = {
    "utilisation": 0.3,  # share of the peak that training reaches; small batches reach less
    "link": 25e9 / 8,  # bytes a second of each node's network, one 25-gigabit port, each way
    "steps": 10,  # of each client in a round, fedsplit's default
    "sequences": 4,  # of a batch
    "tokens": 512,  # of a sequence
    "client_gpus": 8,  # at most; each plays one client at a time, and all share one trunk on one GPU
}
"""Assumptions. Not known at all: how a GPU is shared by processes, and switches between many nodes."""


@dataclass(frozen=True)
class Shape:
    """Shape of a model, in bfloat16.

    Attributes:
        name: Name for the table.
        blocks: Number of blocks.
        width: Size of hidden states.
        vocabulary: Number of tokens.
        at_clients: Blocks at the clients, in bottom and top.
    """

    name: str
    blocks: int
    width: int
    vocabulary: int
    at_clients: int

    def operations(self, blocks: int, has_head: bool) -> float:
        """Returns the operations of a training step on some blocks, and on the head.

        A weight costs two operations a token in the forward, and two in the backward. Frozen weights have no gradient
        of their own, and adapters are left out. Attention's products with 512 tokens are left out, too.
        """
        weights = blocks * 12 * self.width**2 + (self.width * self.vocabulary if has_head else 0)
        return 4.0 * weights * ASSUMED["sequences"] * ASSUMED["tokens"]

    @property
    def packet(self) -> float:
        """Bytes of a packet: hidden states or their gradient, of 16 bits each."""
        return 2.0 * ASSUMED["sequences"] * ASSUMED["tokens"] * self.width


SHAPES = (Shape("GPT-2 small", 12, 768, 50257, 4), Shape("Llama-2 7B", 32, 4096, 32000, 4))


@dataclass(frozen=True)
class Costs:
    """Measured costs.

    Attributes:
        message: Seconds of a packet and its answer over TCP, without its bytes.
        byte: Seconds of the processors for a byte that goes and comes.
        between: Seconds of the server for a client between two rounds: aggregation, its error, and the checkpoint.
    """

    message: float
    byte: float
    between: float


def read_costs(folder: Path = HERE) -> Costs:
    """Reads the measured costs from the committed results."""
    message, byte = packets.costs(json.loads((folder / "packets.json").read_text())["records"], tls=False)
    records = json.loads((folder / "clients.json").read_text())["records"]
    trained = 100  # clients that train in a round of that experiment, of however many are registered
    between = [
        (whole - train - evaluate) / trained
        for record in records
        for whole, train, evaluate in zip(record["round"], record["train"], record["evaluate"], strict=True)
    ]
    return Costs(message, byte, statistics.median(between))


def project(shape: Shape, clients: int, costs: Costs) -> dict[str, Any]:
    """Returns the seconds of a round's parts, and what limits it.

    A step has two packets and two answers. Each of the three limits is a lower bound, and the largest one counts: the
    trunk serves one client after the other; a client's step passes through client, network and trunk in turn; all
    packets pass the trunk's network.
    """
    speed = PEAK * ASSUMED["utilisation"]
    trunk = shape.operations(shape.blocks - shape.at_clients, has_head=False) / speed
    client = shape.operations(shape.at_clients, has_head=True) / speed
    crossing = 2 * (costs.message + shape.packet * costs.byte + 2 * shape.packet / ASSUMED["link"])
    at_once = min(clients, ASSUMED["client_gpus"])
    of_a_step = {
        "trunk": clients * trunk,
        "clients": math.ceil(clients / at_once) * (client + crossing + trunk),
        "network": clients * 2 * shape.packet / ASSUMED["link"],
    }
    limit = max(of_a_step, key=lambda name: of_a_step[name])
    training = ASSUMED["steps"] * of_a_step[limit]
    between = clients * costs.between
    tokens = clients * ASSUMED["steps"] * ASSUMED["sequences"] * ASSUMED["tokens"]
    return {
        "model": shape.name,
        "clients": clients,
        "training": training,
        "between": between,
        "tokens_per_second": tokens / (training + between),
        "limit": limit,
        "trunk_busy": ASSUMED["steps"] * of_a_step["trunk"] / training,
    }


def table(costs: Costs) -> list[str]:
    """Returns the rows of the table."""
    lines = [
        "| model | clients | training, s | between rounds, s | tokens/s | limited by | trunk busy |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for shape in SHAPES:
        for clients in (10, 100, 1000):
            row = project(shape, clients, costs)
            lines.append(
                f"| {row['model']} | {clients:,} | {row['training']:.2f} | {row['between']:.2f} | "
                f"{row['tokens_per_second']:,.0f} | {row['limit']} | {row['trunk_busy']:.0%} |"
            )
    return lines


if __name__ == "__main__":
    found = read_costs()
    print(f"a message {found.message * 1e3:.2f} ms, a byte {found.byte * 1e9:.2f} ns, ", end="")
    print(f"between rounds {found.between * 1e3:.1f} ms a client")
    print("\n".join(table(found)))
