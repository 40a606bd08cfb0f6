"""Held-out text, and the loss on it through the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit import lora
from fedsplit.client import Client
from fedsplit.config import Config
from fedsplit.devices import device_of
from fedsplit.families import read_facts
from fedsplit.packets import StepKey
from fedsplit.partition import Shard, make_shards, spread


@dataclass(frozen=True)
class HeldOut:
    """A loss and what it was measured on.

    Attributes:
        nats: Sum of the losses of all predicted tokens.
        tokens: How many were predicted.
    """

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; its exponential is the perplexity."""
        return self.nats / self.tokens

    def __add__(self, other: HeldOut) -> HeldOut:
        return HeldOut(self.nats + other.nats, self.tokens + other.tokens)


def pooled(measured: Iterable[HeldOut]) -> HeldOut:
    """Several measurements as one; of nothing, no tokens."""
    return sum(measured, HeldOut(0.0, 0))


def measure(loss_of: Callable[[int, Tensor], Tensor], batches: Sequence[tuple[int, Tensor]]) -> HeldOut:
    """Measures a model on batches of tokens.

    Args:
        loss_of: The number of a batch and its tokens (B, T) to the mean loss.
        batches: Numbers and tokens.
    """
    total = HeldOut(0.0, 0)
    for number, ids in batches:
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        total += HeldOut(float(loss_of(number, ids)) * predicted, predicted)
    return total


def held_out_batches(shard: Shard, most: int, batch_size: int) -> list[tuple[int, Tensor]]:
    """A client's held-out text in numbered batches.

    Args:
        shard: The client's data.
        most: Sequences at most, spread evenly over all it has.
        batch_size: Sequences a batch.
    """
    return list(enumerate(spread(shard.held_out, most).split(batch_size)))


def sample(batches: Sequence[tuple[int, Tensor]], sequences: int, batch_size: int) -> list[tuple[int, Tensor]]:
    """Some of the batches, spread evenly: as many as it takes for so many sequences."""
    chosen = spread(torch.arange(len(batches)), -(-sequences // batch_size))
    return [batches[number] for number in chosen.tolist()]


@torch.no_grad()
def through_split(
    client: Client, given: Mapping[str, Tensor], round: int, batches: Sequence[tuple[int, Tensor]]
) -> list[HeldOut]:
    """A client's loss on each of some batches, with the given adapters and the trunk as it is now.

    Args:
        client: Whose parts.
        given: Adapters of bottom and top by exported name.
        round: The round, for the step's key.
        batches: Numbers and tokens (B, T).
    """
    lora.write(given, client.bottom, client.top)
    client.bottom.eval()
    client.top.eval()
    device = device_of(client.bottom)

    def loss_of(number: int, ids: Tensor) -> Tensor:
        ids = ids.to(device)
        hidden = client.link.evaluate(client.bottom(ids), StepKey(round, client.number, number))
        return client.top(hidden, ids)

    return [measure(loss_of, [batch]) for batch in batches]


def shards_of(config: Config) -> list[Shard]:
    """The data of every client of a run."""
    path = config.model_path
    length, end = config.train.max_length, read_facts(path).end
    return make_shards(config.dataset, config.partition, config.clients, length, config.seed, path, end)
