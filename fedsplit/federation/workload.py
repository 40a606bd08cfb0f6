"""How much data a client works through in a round, which bounds the counts that it may report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedsplit.corpora.shards import Shard, steps_of_epoch
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
        steps: Local steps that it makes in a round.
        routers: True if the model has routers that an auxiliary loss balances, which the client then reports.
    """

    examples: int
    tokens: int
    held_out: int
    sample: int
    steps: int = 0
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
    steps = train.steps
    examples = steps * size * train.accumulation
    if train.epochs:
        available = len(shard.train)
        in_epoch = min(available, train.samples) if train.samples else available
        steps = train.epochs * steps_of_epoch(in_epoch, size * train.accumulation)
        examples = train.epochs * in_epoch

    held_out = min(len(shard.held_out), config.eval.samples)
    sample = min(held_out, -(-config.eval.after // size) * size)  # whole batches are drawn
    predictions = 1 if shard.classes else train.max_length - 1  # the first token of a sequence is not predicted
    predicted = held_out * predictions
    return Workload(examples, examples * train.max_length, predicted, sample * predictions, steps, routers)
