"""One client's local training: its data, the bottom and the top of the model, and the link between."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    """A client's training has come to values that are not finite. The message names the settings to change."""


def _weighted_mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Returns the mean loss over all predictions; the plain mean to the bit where steps have equally many."""
    weights = torch.tensor(counts, dtype=torch.float64) * len(counts) / sum(counts)
    return float((torch.stack(list(losses)).cpu() * weights.float()).mean())


@torch.no_grad()
def _place(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """Gives parameters other values and gradients; no gradient where none is named."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
        parameter.grad = gradients.get(name)


def _trunk_share(crossings: Sequence[PendingStep]) -> TrunkShare | None:
    """Returns the trunk's gradient of a step, where it waits for clipping.

    Args:
        crossings: Those of the step's last batch.
    """
    norms = [crossing.norm for crossing in crossings if crossing.norm is not None]
    return TrunkShare(sum(norms), crossings[-1].scale) if norms else None


@dataclass(frozen=True)
class Client:
    """A party of the federation.

    Clients of one process share `bottom` and `top`. Clients differ in their data and in their adapters, which are
    written into the parts before every use.

    Attributes:
        number: The client's partition, from 0.
        shard: The client's data.
        bottom: The first blocks, with adapters.
        top: The last blocks and the head, with adapters.
        link: The way through the trunk.
        settings: Settings of local training.
        seed: The run's seed.
        rounds: Rounds of the run, over which the learning rate follows its schedule.
        routers: The loss that balances a mixture of experts; none by default.
        objective: The loss of the top's logits; cross-entropy where not given.
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
        """Number of sequences in a step; the last step of an epoch may have fewer."""
        return self.settings.batch_size * self.settings.accumulation

    @property
    def _train(self) -> Sequences:
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
        """Forward and backward of one step, and its gradient stages; leaves gradients on the adapters of both parts.

        With several micro-batches, this client and the trunk work at the same time, each on another one. Where
        gradients are accumulated, batches follow each other, so that no more than one is ever under way.

        Args:
            ids: Tokens (B, T) of all batches.
            key: Names the step to the trunk.
            mask: (B, T), 0 on padding, which is not predicted.
            labels: The tokens (B, T), -100 where they are not predicted; all but padding are where not given.
            rate: The share of the learning rate at which the trunk makes the step.
            terms: The strategy's stages, the last ones of the step; none where not given.
            keys: Numbers of further steps, for stages that ask for gradients elsewhere. None: they cannot.

        Returns:
            The mean loss in nats, a scalar; with that of the routers and the stages' terms, where there are any.
        """
        terms = terms or Stages()
        settings = self.settings
        batches = batches_of(ids, labels, mask, settings.accumulation, settings.micro_batches, self.bottom.virtual)
        losses = []
        for number, parts in enumerate(batches):
            added = [terms.loss_term(self._rows_before(part, key)) for part in parts]
            loss, crossings = self._cross(parts, replace(key, batch=number), len(batches), rate, added)
            losses.append(loss)

        gradient_at = None if keys is None else functools.partial(self._gradient_at, batches, key, keys)
        self._run_stages(terms, crossings, gradient_at)
        return torch.stack(losses).sum()

    def _run_stages(
        self, terms: GradientStage, crossings: Sequence[PendingStep], gradient_at: GradientAt | None
    ) -> None:
        """Replaces the gradients on the adapters by what the stages make of them; `fedsplit.stages` has their order.

        Args:
            terms: The strategy's terms.
            crossings: Those of the step's last batch, one of which knows the norm of the trunk's gradient if it learns.
            gradient_at: As in `LocalStep`.
        """
        parameters = self._adapter()
        stages: list[GradientStage] = [
            Orthogonality(lora.parameters(part).keys(), part.rank_budget) for part in (self.bottom, self.top)
        ]
        if self.settings.clip:
            stages.append(Clip(self.settings.clip))
        stages.append(terms)

        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        step = LocalStep(parameters, _trunk_share(crossings), gradient_at)
        for name, gradient in Stages(*stages)(gradients, step).items():
            parameters[name].grad = gradient

    def _gradient_at(
        self,
        batches: Sequence[Sequence[MicroBatch]],
        key: StepKey,
        keys: Iterator[int],
        adapter: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns the gradients of a step's loss at another adapter; leaves all else as it is.

        Dropout is drawn anew. The trunk computes with its own adapter as it is now, and does not learn.

        Args:
            batches: The step's rows.
            key: The step.
            keys: Numbers of further steps.
            adapter: The other adapter of bottom and top, by exported name.

        Raises:
            ValueError: The adapter has other names.
        """
        routers_seen = len(self.routers.seen)
        key = replace(key, step=next(keys))
        try:
            with self._placed(adapter) as parameters, torch.enable_grad():
                for number, parts in enumerate(batches):
                    nothing = [None] * len(parts)
                    self._cross(parts, replace(key, batch=number), len(batches), 1.0, nothing, learns=False)
                return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        finally:
            del self.routers.seen[routers_seen:]

    def _rows_before(self, part: MicroBatch, key: StepKey) -> Rows:
        """Returns a micro-batch as stages see it before its forward."""
        return Rows(part.ids, part.labels, part.mask, functools.partial(self._states_at, part, key))

    @torch.no_grad()
    def _states_at(self, rows: MicroBatch, key: StepKey, adapter: Mapping[str, Tensor]) -> Tensor:
        """Returns the last hidden states (B, T, D) of a micro-batch at another adapter; leaves all else as it is.

        Args:
            rows: The micro-batch, which must not be under way.
            key: The step.
            adapter: The other adapter of bottom and top, by exported name.

        Raises:
            ValueError: The adapter has other names.
        """
        both: tuple[Part, ...] = (self.bottom, self.top)
        modes = [part.training for part in both]
        try:
            for part in both:
                part.eval()
            with self._placed(adapter):
                hidden = self.link.evaluate(self.bottom(rows.ids, rows.mask), key, rows.mask)
                return self.top.read(hidden, rows.mask)
        finally:
            for part, mode in zip(both, modes, strict=True):
                part.train(mode)

    @contextlib.contextmanager
    def _placed(self, adapter: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
        """Gives both parts another adapter, without gradients, while the context lasts.

        Args:
            adapter: The adapter, by exported name.

        Yields:
            The parameters, by exported name.

        Raises:
            ValueError: The adapter has other names.
        """
        parameters = self._adapter()
        if strange := sorted(adapter.keys() ^ parameters.keys()):
            raise ValueError(f"an adapter needs the names of the step's parameters; {strange[0]} is missing or unknown")
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
        """Takes one batch of a step through all parts and back, as micro-batches.

        Args:
            parts: The micro-batches.
            key: Names the batch to the trunk.
            batches: Number of batches in the step.
            rate: The share of the learning rate at which the trunk makes the step.
            terms: The stages' term of the loss of each micro-batch; None where there is none.
            learns: False where the trunk's adapter must not learn from the step.

        Returns:
            The batch's share of the step's loss, and its crossings.
        """
        crossings, losses = [], []
        # 1. Up: what the bottom makes of the tokens.
        for micro, part in enumerate(parts):
            with self.routers.through(self.bottom, part.mask) as seen:
                hidden = self.bottom(part.ids, part.mask)
            how: dict[str, Any] = {"micros": len(parts), "batches": batches, "rate": rate, "learns": learns}
            crossings.append(self.link.send(hidden, replace(key, micro=micro), part.mask, sums=seen.sums, **how))
        # 2. Down, through the top to the loss; and its gradient up.
        for crossing, part, term in zip(crossings, parts, terms, strict=True):
            hidden = crossing.output()
            with self.routers.through(self.top, part.mask, crossing.sums) as seen:
                loss = self.top(hidden, part.labels, part.mask, self.objective, term)
            loss = self.routers.added(loss, seen, part.share)
            crossing.send_back(backward(loss, self.top.parameters(), hidden))
            losses.append(loss.detach())
        # 3. Down: the gradient of what the bottom made.
        for crossing in crossings:
            crossing.finish(self.bottom.parameters())
        return torch.stack(losses).sum(), crossings

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

        Everything that decides the outcome is set here anew: weights, moments, gradients, order, dropout.

        Args:
            given: The adapters to start from, by exported name.
            round: The round, from 1.
            task: The strategy's task; the settings alone where not given.
            own: This client's control variate.
            moments: State of its optimiser after an earlier round; a new optimiser where not given.
            stage: The strategy's own gradient stage, new; none where not given.
            kept: State that the stage kept of this client's last round.

        Returns:
            The adapters it ends with, and what it went through.
        """
        task, moments = task or Task(), moments or {}
        device = device_of(self.bottom)
        parameters = self._start(given, task)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        terms = terms_of(task, own, device, stage)
        terms.begin(RoundStart(put(given, device), put(kept or {}, device)))
        optimizer = make_optimizer(trained.values(), self.settings)
        optim.restore(optimizer, trained, moments)
        allocations = self._allocations(moments)

        keys = itertools.count()
        losses: list[Tensor] = []
        batches: list[Sequences] = []
        for step in range(self.steps):
            rows = self._rows(round, step).to(device)
            rate = share_of_rate(self.settings, self._done(round, step), self.rounds * self.steps)
            torch.manual_seed(derive_seed(self.seed, "client", self.number, round, step))
            try:
                key = StepKey(round, self.number, next(keys))
                losses.append(self.step(rows.ids, key, rows.mask, rows.labels, rate, terms=terms, keys=keys))
            except UnboundedStep as error:
                raise self._diverged(str(error)) from error
            batches.append(rows)
            if optimizer is not None:
                gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
                optim.step(optimizer, rate)
                for allocation in allocations:
                    allocation.allocate(gradients, allocation.position(round, step + 1))

        adapters = lora.read(self.bottom, self.top)
        loss = _weighted_mean(losses, [rows.predicted for rows in batches])
        if not (math.isfinite(loss) and is_bounded(*adapters.tensors.values())):
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

    def _start(self, given: Mapping[str, Tensor], task: Task) -> dict[str, nn.Parameter]:
        """Makes both parts ready for a round.

        Args:
            given: The adapters to start from, by exported name.
            task: Decides which of them train.

        Returns:
            The parameters of the adapters, by exported name.
        """
        lora.write(given, self.bottom, self.top)
        parameters = self._adapter()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(task.teaches(name))
        self.bottom.train()
        self.top.train()
        return parameters

    def _done(self, round: int, step: int) -> int:
        """Returns how many steps of its own came before a step, as if the client had trained in every round."""
        return (round - 1) * self.steps + step

    def _rows(self, round: int, step: int) -> Sequences:
        """Returns the sequences of a step."""
        of_step = batch_of_epoch if self.settings.epochs else batch
        order = derive_seed(self.seed, "client", self.number)
        return of_step(self._train, self._done(round, step), self._sequences, order)

    def _diverged(self, reason: str) -> Diverged:
        """Returns what to raise where a value is not finite, with the settings that are the likely cause."""
        rate, clip = f"--train.lr ({self.settings.lr:g})", f"--train.clip ({self.settings.clip:g})"
        advice = "lower it" if self.settings.clip else f"lower it, or bound a step's gradient by {clip}, such as 1"
        return Diverged(f"{reason}; most likely training has diverged, as {rate} is too large: {advice}")

    def _allocations(self, moments: Mapping[str, Tensor]) -> list[RankAllocation]:
        """Returns the rank allocator of each part that has a budget of ranks."""
        parts = (self.bottom, self.top)
        begun = (rank_allocation.begin(lora.parameters(part), part.rank_budget, moments) for part in parts)
        return [allocation for allocation in begun if allocation is not None]

    def _remembered(
        self,
        optimizer: torch.optim.Optimizer | None,
        parameters: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        allocations: Sequence[RankAllocation],
    ) -> dict[str, Tensor]:
        """Returns the optimiser's state for the next round; a tensor that did not train keeps its earlier state."""
        if self.settings.optimizer_state == "reset":
            return {}
        dealt = {name: value for allocation in allocations for name, value in allocation.moments().items()}
        return {**optim.fitting(before, parameters), **optim.moments(optimizer, trained), **dealt}
