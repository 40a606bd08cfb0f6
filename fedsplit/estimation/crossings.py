"""Messages between a client and the trunk in a round, as the trunk's trace of a run would have them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsplit.client.measures import load_measures
from fedsplit.corpora.shards import spread, steps_of_epoch
from fedsplit.demands import REFERENCE
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic, Traffic
from fedsplit.metrics.metric import asked_by
from fedsplit.network.trace import Crossing


def step_sizes(parties: Parties) -> list[int]:
    """Returns the number of sequences of each local step of a round.

    Example:
        >>> from fedsplit.estimation.party_shapes import Workload
        >>> from fedsplit.settings.documents import build
        >>> step_sizes(Parties(build({"train.epochs": 2}), Workload(sequences=6)))
        [4, 2, 4, 2]
    """
    train = parties.config.train
    size = train.batch_size * train.accumulation
    if not train.epochs:
        return [size] * train.steps
    available = parties.workload.sequences
    count = min(available, train.samples) if train.samples else available
    steps = steps_of_epoch(count, size)
    last = count - (steps - 1) * size
    return ([size] * (steps - 1) + [last]) * train.epochs


def evaluation_sizes(parties: Parties) -> list[int]:
    """Returns the number of sequences of each batch of a client's evaluation."""
    config = parties.config
    count = min(config.eval.samples, parties.workload.held_out or config.eval.samples)
    count -= count % parties.demands.rows  # pairs are not divided
    size = config.train.batch_size
    return [len(batch) for batch in torch.arange(count).split(size)]


def sampled_batches(parties: Parties) -> dict[int, int]:
    """Returns the number of sequences of each batch that a client measures right after its local steps, by number."""
    sizes = evaluation_sizes(parties)
    count = -(-parties.config.eval.after // parties.config.train.batch_size)  # rounded up
    # The batches that `fedsplit.client.heldout` chooses in a run.
    chosen = spread(torch.arange(len(sizes)), count).tolist()
    return {number: sizes[number] for number in chosen}


def compares_at_evaluation(parties: Parties, after_training: bool) -> bool:
    """Returns True if the base model's states cross at an evaluation. Metrics are not measured after training."""
    _, metrics = load_measures(parties.config)
    asked = set() if after_training else asked_by(*metrics.values())
    is_of_pairs = parties.demands.mean_over == "pairs"
    return REFERENCE in asked or (is_of_pairs and parties.demands.compares)


class RoundCrossings:
    """Messages of one client in the phases of a round.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> parties = Parties(build({"train.steps": 1, "train.micro_batches": 1, "eval.after": 0}))
        >>> crossings = RoundCrossings(parties, StepTraffic(parties))
        >>> [crossing.kind for crossing in crossings.training(crossings.sizes)]
        ['backward', 'forward']
    """

    def __init__(self, parties: Parties, counted: StepTraffic) -> None:
        """Takes what decides about the messages.

        Args:
            parties: The parties of a run.
            counted: Bytes of steps and evaluations.
        """
        self._parties = parties
        self._counted = counted
        self.sizes: Sequence[int] = step_sizes(parties)
        self._sample = sampled_batches(parties)
        self.batches: Sequence[int] = evaluation_sizes(parties)
        self._compares = {after: compares_at_evaluation(parties, after) for after in (False, True)}

    def training(self, sizes: Sequence[int]) -> list[Crossing]:
        """Returns the messages of local steps, and of the sample that is measured after them, in the trace's order.

        Args:
            sizes: Sequences of each step.
        """
        crossings = []
        for step, rows in enumerate(sizes):
            crossings += [replace(crossing, step=step) for crossing in self._step(rows)]
        for number, rows in self._sample.items():
            crossings += self._held_out(number, rows, after_training=True)
        return sorted(crossings, key=lambda crossing: crossing.place)

    def evaluation(self, batches: Sequence[int]) -> list[Crossing]:
        """Returns the messages of an evaluation, in the trace's order.

        Args:
            batches: Sequences of each batch.
        """
        crossings = []
        for number, rows in enumerate(batches):
            crossings += self._held_out(number, rows, after_training=False)
        return sorted(crossings, key=lambda crossing: crossing.place)

    @functools.cache  # noqa: B019  # lives as long as the estimate
    def _step(self, rows: int) -> list[Crossing]:
        """Returns the messages of a step."""
        batches = self._counted.parts(rows)
        crossings: list[Crossing] = []
        for number, micros in enumerate(batches):
            for micro, size in enumerate(micros):
                is_last = number == len(batches) - 1 and micro == len(micros) - 1
                crossings += self._micro_batch(number, micro, size, is_last)
        return crossings

    def _micro_batch(self, batch: int, micro: int, rows: int, is_last: bool) -> list[Crossing]:
        """Returns the messages of a micro-batch, with those of clipping behind the last one of a step."""
        parties = self._parties
        traffic = self._counted.micro_batch(rows)
        clipping: Traffic = self._counted.clipping() if is_last else Traffic()
        base = Crossing(0, 0, 0, 0, batch, micro, "forward", 0, 0, rows, parties.positions)
        found = [replace(base, up=traffic["activation_up"], down=traffic["activation_down"])]
        if parties.demands.compares:
            length = parties.config.train.max_length  # the base model has no virtual tokens
            up, down = traffic["reference_up"], traffic["reference_down"]
            found.append(replace(base, kind="reference", up=up, down=down, length=length))
        if parties.schedule.expects_backward(parties.wants_gradient):
            gradients = replace(base, kind="backward", returns_gradient=parties.wants_gradient, ends=is_last)
            # The trunk's norm crosses beside the last gradient of a step.
            down = traffic["gradient_down"] + clipping["gradient_down"]
            found.append(replace(gradients, up=traffic["gradient_up"], down=down))
        if clipping:
            # As if the batch had one more micro-batch (`fedsplit.wire.packets.Packet.clipping_key`).
            coefficient = replace(base, kind="coefficient", micro=micro + 1, rows=0, length=0, ends=is_last)
            found.append(replace(coefficient, up=clipping["gradient_up"]))
        return found

    def _held_out(self, number: int, rows: int, after_training: bool) -> list[Crossing]:
        """Returns the messages of a batch of held-out text."""
        compares = self._compares[after_training]
        traffic = self._counted.evaluation(rows, compares)
        up, down = traffic["evaluation_up"], traffic["evaluation_down"]
        found = [Crossing(0, 0, 0, number, 0, 0, "evaluation", up, down, rows, self._parties.positions)]
        if compares:
            up, down = traffic["reference_up"], traffic["reference_down"]
            length = self._parties.config.train.max_length
            found.append(replace(found[0], kind="reference", up=up, down=down, length=length))
        return found
