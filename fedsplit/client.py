"""One client's local training: its data, the bottom and the top of the model, and the link between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsplit import lora
from fedsplit.config import TrainSettings
from fedsplit.devices import device_of
from fedsplit.kernels import IGNORED
from fedsplit.link import Link
from fedsplit.local import LocalRule
from fedsplit.optim import make_optimizer
from fedsplit.packets import StepKey
from fedsplit.partition import Shard, batch
from fedsplit.scaling import backward
from fedsplit.seeds import derive_seed
from fedsplit.split import Bottom, Top
from fedsplit.updates import ClientUpdate, Task


@dataclass(frozen=True)
class _MicroBatch:
    """Some rows of a batch, and their share in the batch's mean loss."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None
    share: float


def _micro_batches(ids: Tensor, mask: Tensor | None, count: int) -> list[_MicroBatch]:
    labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    count = min(max(1, count), len(ids))
    masks = [None] * count if mask is None else mask.tensor_split(count)
    split = zip(ids.tensor_split(count), labels.tensor_split(count), masks, strict=True)
    predicted = int((labels[:, 1:] != IGNORED).sum())
    return [
        _MicroBatch(rows, wanted, seen, int((wanted[:, 1:] != IGNORED).sum()) / predicted)
        for rows, wanted, seen in split
    ]


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
    """

    number: int
    shard: Shard
    bottom: Bottom
    top: Top
    link: Link
    settings: TrainSettings
    seed: int

    @property
    def steps(self) -> int:
        """Local steps a round."""
        if self.settings.epochs:
            return -(-len(self._train) * self.settings.epochs // self.settings.batch_size)
        return self.settings.steps

    @property
    def _train(self) -> Tensor:
        return self.shard.train[: self.settings.samples or None]

    def step(self, ids: Tensor, key: StepKey, mask: Tensor | None = None) -> Tensor:
        """Forward and backward of one batch; leaves gradients on the adapters of bottom and top.

        With several micro-batches, this client and the trunk work at the same time, each on another one.

        Args:
            ids: Tokens (B, T); they are the labels, too.
            key: Names the step to the trunk.
            mask: (B, T), 0 on padding, which is not predicted.

        Returns:
            The mean loss in nats, a scalar.
        """
        device = device_of(self.bottom)
        masks = None if mask is None else mask.to(device)
        parts = _micro_batches(ids.to(device), masks, self.settings.micro_batches)
        crossings, losses = [], []
        # 1. Up: what the bottom makes of the tokens.
        for micro, part in enumerate(parts):
            hidden = self.bottom(part.ids, part.mask)
            crossings.append(self.link.send(hidden, replace(key, micro=micro), part.mask, len(parts)))
        # 2. Down, through the top to the loss; and its gradient up.
        for crossing, part in zip(crossings, parts, strict=True):
            hidden = crossing.output()
            loss = self.top(hidden, part.labels, part.mask) * part.share
            crossing.send_back(backward(loss, self.top.parameters(), hidden))
            losses.append(loss.detach())
        # 3. Down: the gradient of what the bottom made.
        for crossing in crossings:
            crossing.finish(self.bottom.parameters())
        return torch.stack(losses).sum()

    def train(
        self, given: Mapping[str, Tensor], round: int, task: Task | None = None, own: Mapping[str, Tensor] | None = None
    ) -> ClientUpdate:
        """A round of local training.

        Everything that decides the outcome is set here anew: weights, moments, gradients, order, dropout.

        Args:
            given: The adapters to start from, by exported name.
            round: The round, from 1.
            task: What the strategy asks; nothing beyond the settings where not given.
            own: This client's control variate.

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
        order = derive_seed(self.seed, "client", self.number)
        self.bottom.train()
        self.top.train()
        losses, tokens = [], 0
        for step in range(self.steps):
            ids = batch(self._train, (round - 1) * self.steps + step, self.settings.batch_size, order)
            torch.manual_seed(derive_seed(self.seed, "client", self.number, round, step))
            losses.append(self.step(ids, StepKey(round, self.number, step)))
            if optimizer is not None:
                gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
                for name, gradient in rule.correct(gradients, parameters).items():
                    trained[name].grad = gradient
                optimizer.step()
                optimizer.zero_grad()
            tokens += ids.numel()
        return ClientUpdate(
            client=self.number,
            adapters=lora.read(self.bottom, self.top),
            examples=self.steps * self.settings.batch_size,
            tokens=tokens,
            loss=float(torch.stack(losses).mean()),
            control=rule.control_change(),
        )
