"""A client's local training: the steps of a round, with optimiser, learning rate and order of the data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedsplit.adaptation import lora, rank_allocation
from fedsplit.adaptation.rank_allocation import RankAllocation
from fedsplit.client.link import Link
from fedsplit.client.split_step import SplitStep, gradients_of
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch, batch_of_epoch, rows_of, steps_of_epoch
from fedsplit.model.devices import CPU, device_of, put, seed_generators
from fedsplit.model.parts import Bottom, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.objectives.objective import Objective
from fedsplit.optimization import optim
from fedsplit.optimization.bounds import is_bounded
from fedsplit.optimization.optim import make_optimizer
from fedsplit.optimization.rates import share_of_rate
from fedsplit.optimization.terms import terms_of
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import GradientStage, RoundStart
from fedsplit.updates import ClientUpdate, Task
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import UnboundedStep


class Diverged(ArithmeticError):
    """A client's training has led to values that are not finite. The message names the settings to change."""


def _weighted_mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Returns the mean loss over all steps.

    For equal counts the result is the plain mean, to the bit.

    Args:
        losses: Mean loss of each step.
        counts: Number of predictions, or of what else the loss is a mean over, of each step.

    Example:
        >>> _weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], counts=[2, 1])
        2.0
    """
    # Scaled to a mean of 1: equal counts then give weights of exactly 1, which leave every loss as it is.
    weights = torch.tensor(counts, dtype=torch.float64) * len(counts) / sum(counts)
    by_step = torch.stack(list(losses)).cpu()  # one copy from the device, and not one for each step
    return float((by_step * weights.float()).mean())


@dataclass(frozen=True)
class Client(SplitStep):
    """A party of the federation.

    Clients of one process share `bottom` and `top`. Clients differ in data and adapters. A client's adapters are
    written into the parts before every use.

    Attributes:
        number: Number of the client's partition, from 0.
        shard: Data of the client.
        bottom: First blocks, with adapters.
        top: Last blocks and the head, with adapters.
        link: Way through the trunk.
        settings: Settings of local training.
        seed: Seed of the run.
        rounds: Rounds of the run, for the schedule of the learning rate.
        routers: Loss that balances a mixture of experts; by default no loss.
        objective: Loss of the top's logits; None for cross-entropy.
    """

    number: int
    shard: Shard
    bottom: Bottom
    top: Top
    link: Link
    settings: TrainSettings
    seed: int
    rounds: int = 1
    routers: RouterLoss = field(default_factory=RouterLoss)
    objective: Objective | None = None

    @property
    def steps(self) -> int:
        """Number of local steps in a round."""
        if self.settings.epochs:
            return self.settings.epochs * steps_of_epoch(len(self._train), self._sequences)
        return self.settings.steps

    @property
    def _sequences(self) -> int:
        """Number of sequences in a step. The last step of an epoch may have fewer."""
        return self.settings.batch_size * self.settings.accumulation

    @property
    def _train(self) -> Sequences:
        """Sequences to train on: all, or the first `--train.samples`."""
        return self.shard.train[: self.settings.samples or None]

    def train(
        self,
        given: Mapping[str, Tensor],
        round: int,
        task: Task | None = None,
        own: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Tensor] | None = None,
        stage: GradientStage | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> ClientUpdate:
        """Trains for a round.

        The method sets all state that decides on the outcome: weights, moments, gradients, order, dropout. So a
        repeated round gives equal bits, whatever this process did before.

        Args:
            given: Adapters at the start, by exported name.
            round: Number of the round, from 1.
            task: Task of the strategy; None for the settings alone.
            own: Control variate of the client.
            moments: State of the client's optimiser after an earlier round; None for a new optimiser.
            stage: New gradient stage of the strategy; None for no stage.
            kept: State of the stage after the client's last round.

        Returns:
            The adapters at the end, with counts, loss and state.

        Raises:
            Diverged: The loss or the adapters are not finite.
        """
        task = task or Task()
        moments = moments or {}
        device = device_of(self.bottom)
        parameters = self._start(given, task)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        terms = terms_of(task, own, device, stage)
        start = RoundStart(put(given, device), put(kept or {}, device))
        terms.begin(start)
        # A new one for each round: in between, the parts serve other clients, and this client may move to another
        # process.
        optimizer = make_optimizer(trained.values(), self.settings)
        optim.restore(optimizer, trained, moments)
        allocations = self._allocations(moments)

        losses, batches = self._run_steps(round, terms, optimizer, trained, allocations)

        adapters = lora.read(self.bottom, self.top)
        loss = _weighted_mean(losses, [self.demands.weight(rows.labels) for rows in batches])
        is_finite = math.isfinite(loss) and is_bounded(*adapters.tensors.values())
        if not is_finite:  # the server must not average such adapters into everybody's
            raise self._diverged(f"round {round}, client {self.number}: its loss is {loss:g}, or its adapters are lost")
        outcome = terms.end(parameters)
        return ClientUpdate(
            client=self.number,
            adapters=adapters,
            examples=sum(len(rows) for rows in batches),
            tokens=sum(rows.tokens for rows in batches),
            loss=loss,
            control=put(outcome.sent, CPU),
            moments=self._remembered(optimizer, parameters, trained, moments, allocations),
            router_loss=self.routers.mean(self.steps),
            kept=put(outcome.kept, CPU),
        )

    def _run_steps(
        self,
        round: int,
        terms: GradientStage,
        optimizer: torch.optim.Optimizer | None,
        trained: Mapping[str, nn.Parameter],
        allocations: Sequence[RankAllocation],
    ) -> tuple[list[Tensor], list[Sequences]]:
        """Makes all steps of a round.

        Args:
            round: Number of the round, from 1.
            terms: The strategy's stages.
            optimizer: Optimiser of the adapters; None if nothing is trained.
            trained: Trained parameters by exported name.
            allocations: Rank allocators of the parts.

        Returns:
            The loss and the rows of each step.

        Raises:
            Diverged: The trunk refused values that are not finite.
        """
        device = device_of(self.bottom)
        keys = itertools.count()  # not the number of the step: a stage may add steps of its own
        losses: list[Tensor] = []
        batches: list[Sequences] = []
        for step in range(self.steps):
            examples = self._chosen(round, step)
            rows = self._train[examples].to(device)
            done = self._done(round, step)
            rate = share_of_rate(self.settings, done, total=self.rounds * self.steps)
            # For the dropout of bottom and top. The trunk has seeds of its own, by the keys of steps.
            seed_generators(derive_seed(self.seed, "client", self.number, round, step), [device])
            key = StepKey(round, self.number, next(keys))
            try:
                loss = self.step(
                    rows.ids,
                    key,
                    rows.mask,
                    rows.labels,
                    rate,
                    terms=terms,
                    keys=keys,
                    examples=examples,
                )
            except UnboundedStep as error:
                raise self._diverged(str(error)) from error
            losses.append(loss)
            batches.append(rows)
            if optimizer is not None:
                gradients = gradients_of(trained)  # the optimiser's step drops the gradients
                optim.step(optimizer, rate)
                for allocation in allocations:
                    allocation.allocate(gradients, allocation.position(round, step + 1))
        return losses, batches

    def _start(self, given: Mapping[str, Tensor], task: Task) -> dict[str, nn.Parameter]:
        """Prepares both parts for a round.

        Args:
            given: Adapters at the start, by exported name.
            task: Task of the strategy, with the choice of trained tensors.

        Returns:
            The parameters of the adapters, by exported name.
        """
        lora.write(given, self.bottom, self.top)
        parameters = self.adapter()
        # The parts may have served another client, or an attempt that ended between backward and step.
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(task.teaches(name))
        self.bottom.train()  # an evaluation may have come before
        self.top.train()
        return parameters

    def _done(self, round: int, step: int) -> int:
        """Returns the number of steps before a step, as if the client had trained in every round.

        So rate and order of the data do not depend on the rounds in which the client was sampled.
        """
        return (round - 1) * self.steps + step

    def _chosen(self, round: int, step: int) -> list[int]:
        """Returns the numbers of a step's sequences within the training data."""
        of_step = batch_of_epoch if self.settings.epochs else batch
        # Without the round: one order for the whole run, in which `done` tells the place.
        order = derive_seed(self.seed, "client", self.number)
        done = self._done(round, step)
        together = self.demands.rows
        # Examples are drawn, and not rows: the rows of a pair must come in one step.
        examples = torch.arange(len(self._train) // together)
        chosen = of_step(examples, done, self._sequences // together, order)
        return rows_of(chosen, together)

    def _diverged(self, reason: str) -> Diverged:
        """Returns the error about a value that is not finite, with the settings that are the likely cause."""
        rate = f"--train.lr ({self.settings.lr:g})"
        clip = f"--train.clip ({self.settings.clip:g})"
        advice = "lower it" if self.settings.clip else f"lower it, or bound a step's gradient by {clip}, such as 1"
        return Diverged(f"{reason}; most likely training has diverged, as {rate} is too large: {advice}")

    def _allocations(self, moments: Mapping[str, Tensor]) -> list[RankAllocation]:
        """Returns the rank allocators of bottom and top. A part without a budget of ranks has no allocator."""
        allocations = []
        for part in (self.bottom, self.top):
            allocation = rank_allocation.begin(lora.parameters(part), part.rank_budget, moments)
            if allocation is not None:
                allocations.append(allocation)
        return allocations

    def _remembered(
        self,
        optimizer: torch.optim.Optimizer | None,
        parameters: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        allocations: Sequence[RankAllocation],
    ) -> dict[str, Tensor]:
        """Returns the optimiser's state for the next round. The earlier state of untrained tensors stays.

        Args:
            optimizer: Optimiser of the round; None if nothing was trained.
            parameters: All parameters of the adapters by exported name.
            trained: The trained parameters by exported name.
            before: State after an earlier round.
            allocations: Rank allocators of the round.
        """
        if self.settings.optimizer_state == "reset":
            return {}
        state = {**optim.fitting(before, parameters), **optim.moments(optimizer, trained)}
        for allocation in allocations:
            state |= allocation.moments()
        return state
