"""FedDyn, Ditto and MOON as a user writes them: one file, nothing of fedsplit touched.

`--strategy tests/own_stages.py:FedDyn --strategy.alpha 0.1`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.stages import Gradients, GradientStage, LocalStep, LossTerm, Outcome, RoundStart, Rows
from fedsplit.updates import Adapters, ClientUpdate, average
from strategies.fedavg import FedAvg


class DynamicPenalty(GradientStage):
    """FedDyn's half at a client: it minimises L_k(theta) - <h_k, theta> + alpha / 2 * ||theta - theta_t||^2."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def begin(self, start: RoundStart) -> None:
        self.start = start.adapters
        self.h = {name: start.kept.get(name, torch.zeros_like(tensor)) for name, tensor in start.adapters.items()}

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        return {
            name: gradient - self.h[name] + self.alpha * (step.parameters[name] - self.start[name])
            for name, gradient in gradients.items()
        }

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        moved = {name: parameters[name] - self.start[name] for name in self.h}
        return Outcome(kept={name: self.h[name] - self.alpha * moved[name] for name in self.h})


class FedDyn:
    """FedDyn (2111.04263): h <- h - alpha / N * sum_k (theta_k - theta); theta <- mean_k theta_k - h / alpha."""

    def __init__(self, alpha: float = 0.1, clients: int = 0) -> None:
        self.alpha, self.clients = alpha, clients

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in adapters.tensors.items()}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        h, theta = {}, {}
        for name, old in adapters.tensors.items():
            ends = [update.adapters.tensors[name] for update in updates]
            moved = torch.stack([end - old for end in ends]).sum(0)
            h[name] = state[name] - self.alpha / (self.clients or len(ends)) * moved
            theta[name] = average(ends, [1 / len(ends)] * len(ends)) - h[name] / self.alpha
        return h, adapters.with_tensors(theta)

    def stage(self) -> GradientStage:
        return DynamicPenalty(self.alpha)


class PersonalModel(GradientStage):
    """Ditto's half at a client: v <- v - rate * (grad F(v) + pull * (v - theta_t)), beside the training of theta."""

    def __init__(self, rate: float, pull: float) -> None:
        self.rate, self.pull = rate, pull

    def begin(self, start: RoundStart) -> None:
        self.start = start.adapters
        self.own = dict(self.personalise(start))

    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        if step.gradient_at is not None:  # at the trunk there is nothing personal
            for name, gradient in step.gradient_at(self.own).items():
                pulled = gradient + self.pull * (self.own[name] - self.start[name])
                self.own[name] = self.own[name] - self.rate * pulled
        return gradients

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        return Outcome(kept=self.own)

    def personalise(self, start: RoundStart) -> Mapping[str, Tensor]:
        return {name: start.kept.get(name, tensor) for name, tensor in start.adapters.items()}


class Ditto(FedAvg):
    """Ditto (2012.04221): FedAvg's model, and beside it a personal one at each client, held near it."""

    def __init__(self, rate: float = 0.1, pull: float = 0.5) -> None:
        self.rate, self.pull = rate, pull

    def stage(self) -> GradientStage:
        return PersonalModel(self.rate, self.pull)


def representation(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean last hidden state (B, D) of each sequence, padding left out."""
    if mask is None:
        return states.mean(1)
    seen = mask.unsqueeze(-1).to(states.dtype)
    return (states * seen).sum(1) / seen.sum(1)


class Contrast(GradientStage):
    """MOON's half at a client: mu times the contrastive loss of its representation z.

    -log(exp(sim(z, z_global) / t) / (exp(sim(z, z_global) / t) + exp(sim(z, z_previous) / t))): z_global comes from the
    model that the round begins with, z_previous from the model that the client ended its last round with.
    """

    def __init__(self, mu: float, temperature: float) -> None:
        self.mu, self.temperature = mu, temperature

    def begin(self, start: RoundStart) -> None:
        self.given = start.adapters
        self.previous = {name: start.kept.get(name, tensor) for name, tensor in start.adapters.items()}

    def loss_term(self, rows: Rows) -> LossTerm:
        near = representation(rows.states_at(self.given), rows.mask)
        far = representation(rows.states_at(self.previous), rows.mask)

        def contrast(states: Tensor) -> Tensor:
            z = representation(states, rows.mask)
            likeness = torch.stack([torch.cosine_similarity(z, near), torch.cosine_similarity(z, far)])
            return -self.mu * functional.log_softmax(likeness / self.temperature, 0)[0].mean()

        return contrast

    def end(self, parameters: Mapping[str, Tensor]) -> Outcome:
        return Outcome(kept=parameters)


class Moon(FedAvg):
    """MOON (2103.10257): FedAvg, with clients held near the global model's representations."""

    def __init__(self, mu: float = 1.0, temperature: float = 0.5) -> None:
        self.mu, self.temperature = mu, temperature

    def stage(self) -> GradientStage:
        return Contrast(self.mu, self.temperature)
