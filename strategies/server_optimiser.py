"""What strategies share that take the clients' mean change for a step of the server (2003.00295).

D = sum_i w_i (theta_i - theta) is to a server's optimiser what minus the gradient is to any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, Traits, counted


def check(**options: float) -> None:
    """Makes sure that step sizes and the like are positive, and that what begins with "beta" is in [0, 1).

    Raises:
        ValueError: One is not.
    """
    for name, value in options.items():
        if name.startswith("beta") or name.endswith("momentum"):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 0 and less than 1")
        elif not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be more than 0")


def mean_step(adapters: Adapters, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """D = sum_i w_i (theta_i - theta) by exported name, in float64, of everything that the updates hold.

    Raises:
        ValueError: No client has any example.
    """
    ordered, shares = counted(updates)
    step = {}
    for name in sorted(ordered[0].adapters.tensors):
        before = adapters.tensors[name].double()
        step[name] = torch.zeros_like(before)
        for update, share in zip(ordered, shares, strict=True):
            step[name] += share * (update.adapters.tensors[name].double() - before)
    return step


def moved(adapters: Adapters, step: Mapping[str, Tensor]) -> Adapters:
    """The adapters with a step in float64 added, rounded once."""
    sums = {name: (adapters.tensors[name].double() + by).to(adapters.tensors[name].dtype) for name, by in step.items()}
    return adapters.with_tensors({**adapters.tensors, **sums})


def zeros(adapters: Adapters, *prefixes: str) -> dict[str, Tensor]:
    """A float64 tensor of zeros for every tensor of the adapters, under each of some prefixes."""
    return {
        f"{prefix}.{name}": torch.zeros(tensor.shape, dtype=torch.float64)
        for prefix in prefixes
        for name, tensor in sorted(adapters.tensors.items())
    }


class Adaptive:
    """m <- beta_1 m + (1 - beta_1) D; theta <- theta + rate * m / (sqrt(v) + tau); how v moves tells them apart."""

    traits = Traits(linear=True)

    def __init__(self, eta: float, beta_1: float, beta_2: float, tau: float) -> None:
        """Checks the options; their meaning is the subclass's to tell."""
        check(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
        self.eta, self.beta_1, self.beta_2, self.tau = eta, beta_1, beta_2, tau

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """The new v, from the old one and D^2."""
        raise NotImplementedError

    def rate(self, round: int) -> float:
        """The step size in a round, of which the first is 1."""
        return self.eta

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """Both moments are zero."""
        return {"round": torch.zeros((), dtype=torch.int64), **zeros(adapters, "m", "v")}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """One step of the server's optimiser.

        Raises:
            ValueError: No client has any example.
        """
        after = {**state, "round": state["round"] + 1}
        rate, step = self.rate(int(after["round"])), {}
        for name, change in mean_step(adapters, updates).items():
            m = self.beta_1 * state[f"m.{name}"] + (1 - self.beta_1) * change
            v = self.second_moment(state[f"v.{name}"], change**2)
            after[f"m.{name}"], after[f"v.{name}"] = m, v
            step[name] = rate * m / (v.sqrt() + self.tau)
        return after, moved(adapters, step)
