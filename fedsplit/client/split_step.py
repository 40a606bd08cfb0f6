"""The step of split learning, with its micro-batches, its gradient stages and gradients at a second adapter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsplit.adaptation import lora
from fedsplit.client.further_arguments import PendingReference, aligned_mask
from fedsplit.client.link import Link, PendingStep
from fedsplit.client.micro_batches import MicroBatch, batches_of, numbered
from fedsplit.demands import MASK, REFERENCE
from fedsplit.model.parts import Bottom, Part, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.objectives.objective import Demands, Objective, demands_of
from fedsplit.optimization.clipping import Clip
from fedsplit.optimization.orthogonality import Orthogonality
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import GradientAt, GradientStage, LocalStep, LossTerm, Rows, Stages, TrunkShare
from fedsplit.wire.packets import StepKey
from fedsplit.wire.scaling import backward


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
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


class SplitStep:
    """Step of split learning: the forward through bottom, trunk and top, and the backward the other way.

    The class is an abstract base of `fedsplit.client.client.Client`, which has the attributes.

    Attributes:
        bottom: First blocks, with adapters.
        top: Last blocks and the head, with adapters.
        link: Way through the trunk.
        settings: Settings of local training.
        routers: Loss that balances a mixture of experts.
        objective: Loss of the top's logits; None for cross-entropy.
    """

    bottom: Bottom
    top: Top
    link: Link
    settings: TrainSettings
    routers: RouterLoss
    objective: Objective | None

    @functools.cached_property
    def demands(self) -> Demands:
        """What the objective asks for."""
        return demands_of(self.objective)

    def step(
        self,
        ids: Tensor,
        key: StepKey,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        rate: float = 1.0,
        terms: GradientStage | None = None,
        keys: Iterator[int] | None = None,
        examples: Sequence[int] = (),
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
            examples: Number of each row within the client's data, for codecs; empty if the numbers are not known.

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
            demands=self.demands,
        )
        batches = numbered(batches, examples)
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
        parameters = self.adapter()
        stages: list[GradientStage] = []
        for part in (self.bottom, self.top):
            names = lora.parameters(part).keys()
            stages.append(Orthogonality(names, part.rank_budget))
        if self.settings.clip:
            stages.append(Clip(self.settings.clip))
        stages.append(terms)

        step = LocalStep(parameters, _trunk_share(pending), gradient_at)
        for name, gradient in Stages(*stages)(gradients_of(parameters), step).items():
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
            with self._placed(adapter) as parameters, torch.enable_grad():  # stages run without autograd
                for number, parts in enumerate(batches):
                    batch_key = replace(key, batch=number)
                    # `LocalStep.gradient_at` promises the gradient of the loss alone, without the stages' terms.
                    no_terms = [None] * len(parts)
                    self._cross(parts, batch_key, len(batches), 1.0, no_terms, learns=False)
                return gradients_of(parameters)
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
        parameters = self.adapter()
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

    def adapter(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the adapters of both parts, by exported name."""
        # Names are those of the unsplit model, so that the two parts have none in common.
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
        references = []
        for micro, part in enumerate(parts):
            micro_key = replace(key, micro=micro)
            with self.routers.through(self.bottom, part.mask) as seen:
                hidden = self.bottom(part.ids, part.mask)
            pending.append(
                self.link.send(
                    hidden,
                    micro_key,
                    part.mask,
                    micros=len(parts),
                    batches=batches,
                    rate=rate,
                    sums=seen.sums,
                    learns=learns,
                    examples=part.examples,
                )
            )
            references.append(self._send_reference(part, micro_key, len(parts), batches))
        # 2. Down, through the top to the loss; then up: the gradient of the loss.
        losses = []
        for crossing, reference, part, term in zip(pending, references, parts, terms, strict=True):
            hidden = crossing.output()
            objective = self._objective_for(part, reference)
            with self.routers.through(self.top, part.mask, crossing.sums) as seen:
                loss = self.top(hidden, part.labels, part.mask, objective, term)
            loss = self.routers.added(loss, seen, part.share)
            crossing.send_back(backward(loss, self.top.parameters(), hidden))
            losses.append(loss.detach())  # without its graph, which would stay in memory to the end of the step
        # 3. Down: the gradient of the bottom's hidden states, and through the bottom.
        for crossing in pending:
            crossing.finish(self.bottom.parameters())
        return torch.stack(losses).sum(), pending

    def _send_reference(
        self,
        part: MicroBatch,
        key: StepKey,
        micros: int,
        batches: int,
    ) -> PendingReference | None:
        """Sends a micro-batch through the base model, too, if the objective compares with it. Nothing waits here.

        Args:
            part: The micro-batch.
            key: Name of the micro-batch for the trunk.
            micros: Number of micro-batches in the batch.
            batches: Number of batches in the step.
        """
        if not self.demands.compares:
            return None
        return PendingReference(self.bottom, self.link, part.ids, part.mask, key, micros, batches)

    def _objective_for(self, part: MicroBatch, reference: PendingReference | None) -> Objective | None:
        """Returns the objective, with the further arguments for a micro-batch; None for cross-entropy."""
        if self.objective is None or not self.demands.further:
            return self.objective
        further: dict[str, Tensor] = {}
        if MASK in self.demands.further:
            further[MASK] = aligned_mask(part.labels, part.mask)
        if reference is not None:
            further[REFERENCE] = reference.logits(self.top)
        return functools.partial(self.objective, **further)
