"""Amount of work of a client in a round, by which the server checks the counts in the client's replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedsplit.corpora.shards import DataSize, steps_of_epoch
from fedsplit.model.facts import read_facts
from fedsplit.model.sources import config_folder
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config


@dataclass(frozen=True)
class Workload:
    """Bounds of the counts in a client's replies, from the settings and from the size of the client's data.

    Attributes:
        examples: Number of training sequences in a round.
        tokens: Largest number of tokens in the training sequences.
        held_out: Largest number of predictions in an evaluation: of tokens, of classes, or of preferences in pairs.
        sample: Largest number of predictions right after local training.
        steps: Number of local steps in a round.
        routers: True if an auxiliary loss balances routers, so that the client reports the loss.
    """

    examples: int
    tokens: int
    held_out: int
    sample: int
    steps: int = 0
    routers: bool = False


def workloads(config: Config, sizes: Iterable[DataSize]) -> list[Workload]:
    """Returns the workload of each client.

    Args:
        config: Configuration of the run.
        sizes: Size of the data by client.
    """
    routers = bool(read_facts(config_folder(config.model)).coefficient(config.router_aux_loss))
    return [_workload(config, size, routers) for size in sizes]


def _workload(config: Config, data: DataSize, routers: bool) -> Workload:
    train = config.train
    size = train.batch_size
    steps = train.steps
    examples = steps * size * train.accumulation
    if train.epochs:
        available = data.train
        in_epoch = min(available, train.samples) if train.samples else available
        steps = train.epochs * steps_of_epoch(in_epoch, size * train.accumulation)
        examples = train.epochs * in_epoch

    held_out = min(data.held_out, config.eval.samples)
    sample = min(held_out, -(-config.eval.after // size) * size)  # whole batches are drawn
    predictions = 1 if data.classes else train.max_length - 1  # the first token of a sequence is not predicted
    tokens = examples * train.max_length
    if config.data.format == PAIRS:
        return Workload(examples, tokens, held_out // 2, sample // 2, steps, routers)  # a score counts pairs
    return Workload(examples, tokens, held_out * predictions, sample * predictions, steps, routers)
