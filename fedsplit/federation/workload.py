"""How much data a client works through in a round, which bounds the counts that it may report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedsplit.corpora.shards import Shard
from fedsplit.model.families import read_facts
from fedsplit.model.sources import config_folder
from fedsplit.settings.config import Config


@dataclass(frozen=True)
class Workload:
    """Counts that the server knows of a client's work, so that the client need not be believed.

    Attributes:
        examples: Sequences that it trains on in a round.
        tokens: Tokens of these sequences, at most.
        held_out: Predictions in an evaluation, at most: tokens, or classes of sequences.
        sample: Predictions right after its own steps, at most.
        routers: True if the model has routers that an auxiliary loss balances, which the client then reports.
    """

    examples: int
    tokens: int
    held_out: int
    sample: int
    routers: bool = False


def workloads(config: Config, shards: Iterable[Shard]) -> list[Workload]:
    """Returns the workload of each client.

    Args:
        config: The run's configuration.
        shards: Data by client, of which only the numbers of sequences are used.
    """
    routers = bool(read_facts(config_folder(config.model)).coefficient(config.router_aux_loss))
    return [_workload(config, shard, routers) for shard in shards]


def _workload(config: Config, shard: Shard, routers: bool) -> Workload:
    train, size = config.train, config.train.batch_size
    examples = train.steps * size * train.accumulation
    if train.epochs:
        available = len(shard.train)
        examples = train.epochs * (min(available, train.samples) if train.samples else available)

    held_out = min(len(shard.held_out), config.eval.samples)
    sample = min(held_out, -(-config.eval.after // size) * size)  # whole batches are drawn
    predictions = 1 if shard.classes else train.max_length - 1  # the first token of a sequence is not predicted
    return Workload(examples, examples * train.max_length, held_out * predictions, sample * predictions, routers)
