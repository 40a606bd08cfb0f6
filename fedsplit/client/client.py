"""One client's local training: the client's data, the bottom and the top of the model, and the link between."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedsplit.adaptation import lora, rank_allocation
from fedsplit.adaptation.rank_allocation import RankAllocation
from fedsplit.client.link import Link, PendingStep
from fedsplit.client.micro_batches import MicroBatch, batches_of
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch, batch_of_epoch, steps_of_epoch
from fedsplit.model.devices import CPU, device_of, put
from fedsplit.model.parts import Bottom, Part, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.objectives.objective import Objective
from fedsplit.optimization import optim
from fedsplit.optimization.bounds import is_bounded
from fedsplit.optimization.clipping import Clip
from fedsplit.optimization.optim import make_optimizer
from fedsplit.optimization.orthogonality import Orthogonality
from fedsplit.optimization.rates import share_of_rate
from fedsplit.optimization.terms import terms_of
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import GradientAt, GradientStage, LocalStep, LossTerm, RoundStart, Rows, Stages, TrunkShare
from fedsplit.updates import ClientUpdate, Task
from fedsplit.wire.packets import StepKey
from fedsplit.wire.scaling import backward
from fedsplit.wire.steps import UnboundedStep


class Diverged(ArithmeticError):
    """A client's training has led to values that are not finite. The message names the settings to change."""


def _weighted_mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Returns the mean loss over all predictions.

    For equal counts the result is the plain mean, to the bit.

    Args:
        losses: Mean loss of each step.
        counts: Number of predictions of each step.

    Example:
        >>> _weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], counts=[2, 1])
        2.0
    """
    weights = torch.tensor(counts, dtype=torch.float64) * len(counts) / sum(counts)
    by_step = torch.stack(list(losses)).cpu()  # one copy from the device, and not one for each step
    return float((by_step * weights.float()).mean())


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the gradients of parameters by name. A parameter without a gradient is left out."""
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@torch.no_grad()
def _place(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """Sets values and gradients of parameters. A parameter that is missing in `gradients` gets no gradient."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
        parameter.grad = gradients.get(name)


def _trunk_share(pending: Sequence[PendingStep]) -> TrunkShare | None:
    """Returns the trunk's share of a step's gradient; None unless the trunk waits for a clipping coefficient.

    Args:
        pending: Micro-batches of the step's last batch.
    """
    norms = [micro.norm for micro in pending if micro.norm is not None]
    if not norms:
        return None
    return TrunkShare(sum(norms), pending[-1].scale)


@dataclass(frozen=True)
class Client:
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

    def step(
        self,
        ids: Tensor,
        key: StepKey,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        rate: float = 1.0,
        terms: GradientStage | None = None,
        keys: Iterator[int] | None = None,
    ) -> Tensor:
        """Computes forward and backward of one step, and runs the gradient stages.

        The gradients are on the adapters of both parts afterwards. With several micro-batches, client and trunk work
        at the same time, on different micro-batches. Batches of accumulated gradients follow each other, so the trunk
        never holds more than one batch of the client.

        Args:
            ids: Tokens (B, T) of all batches.
            key: Name of the step for the trunk.
            mask: (B, T), 0 on padding. Padding is not predicted.
            labels: Tokens (B, T), -100 for tokens that are not predicted; None predicts all tokens but padding.
            rate: Share of the learning rate for the trunk's step.
            terms: The strategy's stages, which run last; None for no stage.
            keys: Numbers of further steps, for stages that ask for gradients at a second adapter; None forbids them.

        Returns:
            Mean loss in nats, a scalar, including the routers' loss and the stages' terms.
        """
        terms = terms or Stages()
        settings = self.settings
        batches = batches_of(
            ids,
            labels,
            mask,
            batches=settings.accumulation,
            micros=settings.micro_batches,
            virtual=self.bottom.virtual,
        )
        losses = []
        for number, parts in enumerate(batches):
            # Before the forward: a term may compute with a second adapter, which must not replace this one midway.
            added = [terms.loss_term(self._rows_before(part, key)) for part in parts]
            batch_key = replace(key, batch=number)
            loss, pending = self._cross(parts, batch_key, len(batches), rate, added)
            losses.append(loss)

        gradient_at = None if keys is None else functools.partial(self._gradient_at, batches, key, keys)
        self._run_stages(terms, pending, gradient_at)
        return torch.stack(losses).sum()

    def _run_stages(self, terms: GradientStage, pending: Sequence[PendingStep], gradient_at: GradientAt | None) -> None:
        """Replaces the gradients on the adapters by the results of the stages; `fedsplit.stages` has the order.

        Args:
            terms: The strategy's terms.
            pending: Micro-batches of the step's last batch. One has the norm of the trunk's gradient, with clipping.
            gradient_at: As in `LocalStep`.
        """
        parameters = self._adapter()
        stages: list[GradientStage] = []
        for part in (self.bottom, self.top):
            names = lora.parameters(part).keys()
            stages.append(Orthogonality(names, part.rank_budget))
        if self.settings.clip:
            stages.append(Clip(self.settings.clip))
        stages.append(terms)

        step = LocalStep(parameters, _trunk_share(pending), gradient_at)
        for name, gradient in Stages(*stages)(_gradients(parameters), step).items():
            parameters[name].grad = gradient

    def _gradient_at(
        self,
        batches: Sequence[Sequence[MicroBatch]],
        key: StepKey,
        keys: Iterator[int],
        adapter: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns the gradients of a step's loss at a second adapter. All state stays unchanged.

        Dropout is drawn anew. The trunk computes with the newest snapshot of its adapter, and does not learn.

        Args:
            batches: Rows of the step.
            key: The step.
            keys: Numbers of further steps.
            adapter: The second adapter of bottom and top, by exported name.

        Raises:
            ValueError: The names of the adapter are not those of the step's parameters.
        """
        routers_seen = len(self.routers.seen)
        # A number of its own, since the trunk answers a repeated number with the answer of the first time.
        key = replace(key, step=next(keys))
        try:
            with self._placed(adapter) as parameters, torch.enable_grad():
                for number, parts in enumerate(batches):
                    batch_key = replace(key, batch=number)
                    no_terms = [None] * len(parts)
                    self._cross(parts, batch_key, len(batches), 1.0, no_terms, learns=False)
                return _gradients(parameters)
        finally:
            del self.routers.seen[routers_seen:]  # the report of the round counts the step once

    def _rows_before(self, part: MicroBatch, key: StepKey) -> Rows:
        """Returns a micro-batch for the stages, before the forward."""
        states_at = functools.partial(self._states_at, part, key)
        return Rows(part.ids, part.labels, part.mask, states_at)

    @torch.no_grad()
    def _states_at(self, rows: MicroBatch, key: StepKey, adapter: Mapping[str, Tensor]) -> Tensor:
        """Returns the last hidden states (B, T, D) of a micro-batch at a second adapter. All state stays unchanged.

        Args:
            rows: The micro-batch. Its forward must not have begun.
            key: The step.
            adapter: The second adapter of bottom and top, by exported name.

        Raises:
            ValueError: The names of the adapter are not those of the step's parameters.
        """
        both: tuple[Part, ...] = (self.bottom, self.top)
        modes = [part.training for part in both]
        try:
            for part in both:
                part.eval()
            with self._placed(adapter):
                hidden = self.bottom(rows.ids, rows.mask)
                hidden = self.link.evaluate(hidden, key, rows.mask)
                return self.top.read(hidden, rows.mask)
        finally:
            for part, mode in zip(both, modes, strict=True):
                part.train(mode)

    @contextlib.contextmanager
    def _placed(self, adapter: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
        """Writes a second adapter without gradients into both parts. The first adapter returns after the context.

        Args:
            adapter: The second adapter, by exported name.

        Yields:
            The parameters, by exported name.

        Raises:
            ValueError: The names of the adapter are not those of the step's parameters.
        """
        parameters = self._adapter()
        strange = sorted(adapter.keys() ^ parameters.keys())
        if strange:
            raise ValueError(f"an adapter needs the names of the step's parameters; {strange[0]} is missing or unknown")
        # Values are copied, since `_place` writes in place; gradient tensors are exchanged, and need no copy.
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        try:
            _place(parameters, adapter, {})
            yield parameters
        finally:
            _place(parameters, values, gradients)

    def _adapter(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the adapters of both parts, by exported name."""
        return {**lora.parameters(self.bottom), **lora.parameters(self.top)}

    def _cross(
        self,
        parts: Sequence[MicroBatch],
        key: StepKey,
        batches: int,
        rate: float,
        terms: Sequence[LossTerm | None],
        learns: bool = True,
    ) -> tuple[Tensor, list[PendingStep]]:
        """Takes one batch of a step through all parts and back, in micro-batches.

        Args:
            parts: The micro-batches.
            key: Name of the batch for the trunk.
            batches: Number of batches in the step.
            rate: Share of the learning rate for the trunk's step.
            terms: The stages' term of the loss, for each micro-batch; None for no term.
            learns: False if the trunk's adapter must not learn from the step.

        Returns:
            The batch's share of the step's loss, and the finished micro-batches.
        """
        # 1. Up: the bottom's hidden states. Nothing waits here, so the trunk begins with the first micro-batch while
        # the bottom computes the second.
        pending = []
        for micro, part in enumerate(parts):
            with self.routers.through(self.bottom, part.mask) as seen:
                hidden = self.bottom(part.ids, part.mask)
            pending.append(
                self.link.send(
                    hidden,
                    replace(key, micro=micro),
                    part.mask,
                    micros=len(parts),
                    batches=batches,
                    rate=rate,
                    sums=seen.sums,
                    learns=learns,
                )
            )
        # 2. Down, through the top to the loss; then up: the gradient of the loss.
        losses = []
        for crossing, part, term in zip(pending, parts, terms, strict=True):
            hidden = crossing.output()
            with self.routers.through(self.top, part.mask, crossing.sums) as seen:
                loss = self.top(hidden, part.labels, part.mask, self.objective, term)
            loss = self.routers.added(loss, seen, part.share)
            crossing.send_back(backward(loss, self.top.parameters(), hidden))
            losses.append(loss.detach())
        # 3. Down: the gradient of the bottom's hidden states, and through the bottom.
        for crossing in pending:
            crossing.finish(self.bottom.parameters())
        return torch.stack(losses).sum(), pending

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
        optimizer = make_optimizer(trained.values(), self.settings)
        optim.restore(optimizer, trained, moments)
        allocations = self._allocations(moments)

        losses, batches = self._run_steps(round, terms, optimizer, trained, allocations)

        adapters = lora.read(self.bottom, self.top)
        loss = _weighted_mean(losses, [rows.predicted for rows in batches])
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
            rows = self._rows(round, step).to(device)
            done = self._done(round, step)
            rate = share_of_rate(self.settings, done, total=self.rounds * self.steps)
            torch.manual_seed(derive_seed(self.seed, "client", self.number, round, step))
            key = StepKey(round, self.number, next(keys))
            try:
                loss = self.step(rows.ids, key, rows.mask, rows.labels, rate, terms=terms, keys=keys)
            except UnboundedStep as error:
                raise self._diverged(str(error)) from error
            losses.append(loss)
            batches.append(rows)
            if optimizer is not None:
                gradients = _gradients(trained)  # the optimiser's step drops the gradients
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
        parameters = self._adapter()
        # The parts may have served another client, or an attempt that ended between backward and step.
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(task.teaches(name))
        self.bottom.train()
        self.top.train()
        return parameters

    def _done(self, round: int, step: int) -> int:
        """Returns the number of steps before a step, as if the client had trained in every round.

        So rate and order of the data do not depend on the rounds in which the client was sampled.
        """
        return (round - 1) * self.steps + step

    def _rows(self, round: int, step: int) -> Sequences:
        """Returns the sequences of a step."""
        of_step = batch_of_epoch if self.settings.epochs else batch
        order = derive_seed(self.seed, "client", self.number)
        return of_step(self._train, self._done(round, step), self._sequences, order)

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
