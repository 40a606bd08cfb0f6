"""One client's local training: its data, the bottom and the top of the model, and the link between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation import lora, rank_allocation
from fedsplit.adaptation.rank_allocation import RankAllocation
from fedsplit.client.link import Link, PendingStep
from fedsplit.config import TrainSettings
from fedsplit.corpora.sequences import Sequences, behind, predicted
from fedsplit.corpora.shards import Shard, batch, batch_of_epoch, steps_of_epoch
from fedsplit.model.devices import device_of
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import Bottom, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.optimization import optim
from fedsplit.optimization.bounds import is_bounded
from fedsplit.optimization.clipping import coefficient, squared_norm
from fedsplit.optimization.local import LocalRule
from fedsplit.optimization.optim import make_optimizer
from fedsplit.optimization.rates import share_of_rate
from fedsplit.seeds import derive_seed
from fedsplit.updates import ClientUpdate, Task
from fedsplit.wire.packets import StepKey
from fedsplit.wire.scaling import backward
from fedsplit.wire.steps import UnboundedStep


class Diverged(ArithmeticError):
    """A client's training has come to values that are not finite; says what is likely to help."""


@dataclass(frozen=True)
class _MicroBatch:
    """Some rows of a batch, and their share in the mean loss of the step."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    share: float


def _batches(
    ids: Tensor, labels: Tensor | None, mask: Tensor | None, batches: int, micros: int, virtual: int
) -> list[list[_MicroBatch]]:
    """A step's rows as batches that follow each other, each as micro-batches that are under way at once.

    Labels and mask also have the positions of virtual tokens, of which only the last predicts.
    """
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    labels, mask = behind(virtual, labels, mask)
    whole = predicted(labels)
    batches = min(batches, len(ids))
    micros = min(micros, len(ids) // batches)  # as many in each, since the trunk counts them
    masks = [None] * batches if mask is None else mask.tensor_split(batches)
    return [
        _micro_batches(rows, wanted, seen, micros, whole)
        for rows, wanted, seen in zip(ids.tensor_split(batches), labels.tensor_split(batches), masks, strict=True)
    ]


def _micro_batches(ids: Tensor, labels: Tensor, mask: Tensor | None, count: int, whole: int) -> list[_MicroBatch]:
    count = min(max(1, count), len(ids))
    masks = [None] * count if mask is None else mask.tensor_split(count)
    split = zip(ids.tensor_split(count), labels.tensor_split(count), masks, strict=True)
    return [_MicroBatch(rows, wanted, seen, predicted(wanted) / whole) for rows, wanted, seen in split]


def _weighted_mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """The mean over all that was predicted; where steps predict equally much, their mean to the bit."""
    weights = torch.tensor(counts, dtype=torch.float64) * len(counts) / sum(counts)
    return float((torch.stack(list(losses)).cpu() * weights.float()).mean())


@dataclass(frozen=True)
class Client:
    """A party of the federation.

    Clients of one process share `bottom` and `top`: what makes them different is their data and the
    adapters they are given, which are written into the parts before every use.

    Attributes:
        number: Its partition, from 0.
        shard: Its data.
        bottom: The first blocks, with adapters.
        top: The last blocks and the head, with adapters.
        link: The way through the trunk.
        settings: How it trains.
        seed: The run's seed.
        rounds: Rounds of the run, over which the learning rate takes its course.
        routers: The loss that balances its experts; by default there is none.
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

    @property
    def steps(self) -> int:
        """Local steps a round."""
        if self.settings.epochs:
            return self.settings.epochs * steps_of_epoch(len(self._train), self._sequences)
        return self.settings.steps

    @property
    def _sequences(self) -> int:
        """Sequences a step; the last one of an epoch may have fewer."""
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
    ) -> Tensor:
        """Forward and backward of one step; leaves gradients on the adapters of bottom and top.

        With several micro-batches, this client and the trunk work at the same time, each on another one. Where
        gradients are accumulated, batches follow each other, so that no more than one is ever under way.

        Args:
            ids: Tokens (B, T) of all batches.
            key: Names the step to the trunk.
            mask: (B, T), 0 on padding, which is not predicted.
            labels: The tokens (B, T), -100 where they are not predicted; all but padding are where not given.
            rate: The share of the learning rate at which the trunk makes the step.

        Returns:
            The mean loss in nats, a scalar; with that of the routers, where there is one.
        """
        settings = self.settings
        batches = _batches(ids, labels, mask, settings.accumulation, settings.micro_batches, self.bottom.virtual)
        losses = []
        for number, parts in enumerate(batches):
            loss, crossings = self._cross(parts, replace(key, batch=number), len(batches), rate)
            losses.append(loss)
        for part in (self.bottom, self.top):
            rank_allocation.regularise(part)
        if self.settings.clip:
            self._clip(crossings)
        return torch.stack(losses).sum()

    def _cross(
        self, parts: Sequence[_MicroBatch], key: StepKey, batches: int, rate: float
    ) -> tuple[Tensor, list[PendingStep]]:
        """One batch of a step, as micro-batches; its share in the step's loss, and what crossed."""
        crossings, losses = [], []
        # 1. Up: what the bottom makes of the tokens.
        for micro, part in enumerate(parts):
            with self.routers.through(self.bottom, part.mask) as seen:
                hidden = self.bottom(part.ids, part.mask)
            how: dict[str, Any] = {"micros": len(parts), "batches": batches, "rate": rate, "sums": seen.sums}
            crossings.append(self.link.send(hidden, replace(key, micro=micro), part.mask, **how))
        # 2. Down, through the top to the loss; and its gradient up.
        for crossing, part in zip(crossings, parts, strict=True):
            hidden = crossing.output()
            with self.routers.through(self.top, part.mask, crossing.sums) as seen:
                loss = self.top(hidden, part.labels, part.mask)
            loss = self.routers.added(loss, seen, part.share)
            crossing.send_back(backward(loss, self.top.parameters(), hidden))
            losses.append(loss.detach())
        # 3. Down: the gradient of what the bottom made.
        for crossing in crossings:
            crossing.finish(self.bottom.parameters())
        return torch.stack(losses).sum(), crossings

    def _clip(self, crossings: Sequence[PendingStep]) -> None:
        """Scales this client's gradients by the norm over all parts, and has the trunk scale its own.

        Args:
            crossings: Those of the step's last batch, one of which knows the norm of the trunk's gradient if it learns.
        """
        parameters = {**lora.parameters(self.bottom), **lora.parameters(self.top)}.values()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        trunk = [crossing.norm for crossing in crossings if crossing.norm is not None]
        scale = coefficient(squared_norm(gradients) + sum(trunk), self.settings.clip)
        for gradient in gradients:
            gradient.mul_(scale)
        if trunk:
            crossings[-1].scale(scale)

    def train(
        self,
        given: Mapping[str, Tensor],
        round: int,
        task: Task | None = None,
        own: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> ClientUpdate:
        """A round of local training.

        Everything that decides the outcome is set here anew: weights, moments, gradients, order, dropout.

        Args:
            given: The adapters to start from, by exported name.
            round: The round, from 1.
            task: What the strategy asks; nothing beyond the settings where not given.
            own: This client's control variate.
            moments: What its optimiser remembers; nothing where not given.

        Returns:
            The adapters it ends with, and what it went through.
        """
        lora.write(given, self.bottom, self.top)
        parameters = {**lora.parameters(self.bottom), **lora.parameters(self.top)}
        rule = LocalRule(task or Task(), given, own or {}, device_of(self.bottom))
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(rule.trains(name))
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        optimizer = make_optimizer(trained.values(), self.settings)
        optim.restore(optimizer, trained, moments or {})
        allocations = self._allocations(moments or {})
        order = derive_seed(self.seed, "client", self.number)
        self.bottom.train()
        self.top.train()
        of_step = batch_of_epoch if self.settings.epochs else batch
        losses, counts, tokens, examples = [], [], 0, 0
        for step in range(self.steps):
            done = (round - 1) * self.steps + step
            rate = share_of_rate(self.settings, done, self.rounds * self.steps)
            rows = of_step(self._train, done, self._sequences, order).to(device_of(self.bottom))
            torch.manual_seed(derive_seed(self.seed, "client", self.number, round, step))
            try:
                losses.append(self.step(rows.ids, StepKey(round, self.number, step), rows.mask, rows.labels, rate))
            except UnboundedStep as error:
                raise self._diverged(str(error)) from error
            counts.append(rows.predicted)
            examples += len(rows)
            if optimizer is not None:
                found = {name: p.grad for name, p in trained.items() if p.grad is not None}
                gradients = rule.correct(found, parameters)
                for name, gradient in gradients.items():
                    trained[name].grad = gradient
                optim.step(optimizer, rate)
                for allocation in allocations:
                    allocation.allocate(gradients, allocation.position(round, step + 1))
            tokens += rows.tokens
        adapters, loss = lora.read(self.bottom, self.top), _weighted_mean(losses, counts)
        if not (math.isfinite(loss) and is_bounded(*adapters.tensors.values())):
            raise self._diverged(f"round {round}, client {self.number}: its loss is {loss:g}, or its adapters are lost")
        return ClientUpdate(
            client=self.number,
            adapters=adapters,
            examples=examples,
            tokens=tokens,
            loss=loss,
            control=rule.control_change(),
            moments=self._remembered(optimizer, parameters, trained, moments or {}, allocations),
            router_loss=self.routers.mean(self.steps),
        )

    def _diverged(self, reason: str) -> Diverged:
        """Returns what to raise where a value is not finite, with the settings that are the likely cause."""
        rate, clip = f"--train.lr ({self.settings.lr:g})", f"--train.clip ({self.settings.clip:g})"
        advice = "lower it" if self.settings.clip else f"lower it, or bound a step's gradient by {clip}, such as 1"
        return Diverged(f"{reason}; most likely training has diverged, as {rate} is too large: {advice}")

    def _allocations(self, moments: Mapping[str, Tensor]) -> list[RankAllocation]:
        """Of each part, who deals its ranks out, where they are."""
        parts = (self.bottom, self.top)
        found = (rank_allocation.begin(lora.parameters(part), part.rank_budget, moments) for part in parts)
        return [allocation for allocation in found if allocation is not None]

    def _remembered(
        self,
        optimizer: torch.optim.Optimizer | None,
        parameters: Mapping[str, Tensor],
        trained: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        allocations: Sequence[RankAllocation],
    ) -> dict[str, Tensor]:
        """The moments to go on with; of what did not train in this round, those from before."""
        if self.settings.optimizer_state == "reset":
            return {}
        dealt = {name: value for allocation in allocations for name, value in allocation.moments().items()}
        return {**optim.fitting(before, parameters), **optim.moments(optimizer, trained), **dealt}
