"""Server optimisers (2003.00295): the clients' mean change is a step for an optimiser at the server.

The mean change D = sum_i w_i (theta_i - theta) plays the part of the negative gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, weighted


def check_options(**options: float) -> None:
    """Checks the options of a server optimiser.

    Options with names like "beta…" or "…momentum" must lie in [0, 1). All further options, such as step sizes, must be
    positive and finite.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> check_options(eta=0.1, beta_1=0.9)
        >>> check_options(beta_1=1.0)
        Traceback (most recent call last):
        ValueError: beta_1 is 1.0; it must be at least 0 and less than 1
    """
    for name, value in options.items():
        is_decay = name.startswith("beta") or name.endswith("momentum")
        if is_decay and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and less than 1")
        if not is_decay and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be more than 0")


def mean_step(adapters: Adapters, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Returns D = sum_i w_i (theta_i - theta) by exported name, in float64, for every tensor of the updates.

    Args:
        adapters: theta, the adapters at the start of the round.
        updates: Updates of the clients, with theta_i.

    Raises:
        ValueError: No client trained on any example.

    Example:
        >>> from strategies.example import lora
        >>> theta = lora(A=[[1, 0]], B=[[0]])
        >>> update = ClientUpdate(0, lora(A=[[1, 2]], B=[[3]]), examples=1)
        >>> mean_step(theta, [update])["layer.lora_A.weight"].tolist()
        [[0.0, 2.0]]
    """
    # In the order of the clients, not of arrival: a sum of floats depends on the order in its last bits.
    updates, weights = weighted(updates)
    step = {}
    for name in sorted(updates[0].adapters.tensors):
        before = adapters.tensors[name].double()
        step[name] = torch.zeros_like(before)
        for update, weight in zip(updates, weights, strict=True):
            after = update.adapters.tensors[name].double()
            step[name] += weight * (after - before)
    return step


def add_step(adapters: Adapters, step: Mapping[str, Tensor]) -> Adapters:
    """Returns the adapters with a step in float64 added. Each sum is rounded once.

    Example:
        >>> from strategies.example import lora
        >>> step = {"layer.lora_B.weight": torch.tensor([[0.5]]).double()}
        >>> add_step(lora(A=[[1]], B=[[2]]), step).tensors["layer.lora_B.weight"].tolist()
        [[2.5]]
    """
    moved = {}
    for name, change in step.items():
        before = adapters.tensors[name]
        after = before.double() + change
        moved[name] = after.to(before.dtype)
    return adapters.updated(moved)  # tensors without a step stay unchanged


def zeros(adapters: Adapters, *prefixes: str) -> dict[str, Tensor]:
    """Returns float64 zeros in the shape of every adapter tensor, named PREFIX.NAME, for each prefix.

    Example:
        >>> from strategies.example import lora
        >>> list(zeros(lora(A=[[1]], B=[[2]]), "m"))
        ['m.layer.lora_A.weight', 'm.layer.lora_B.weight']
    """
    tensors = {}
    for prefix in prefixes:
        for name, tensor in sorted(adapters.tensors.items()):
            tensors[f"{prefix}.{name}"] = torch.zeros(tensor.shape, dtype=torch.float64)
    return tensors


class Adaptive:
    """Base class of the adaptive server optimisers: Adagrad, Adam and Yogi.

    Rule, entry by entry:
        m <- beta_1 m + (1 - beta_1) D
        v <- second_moment(v, D^2), defined by each subclass
        theta <- theta + rate(t) * m / (sqrt(v) + tau)
    """

    traits = Traits(linear=True)

    def __init__(self, eta: float, beta_1: float, beta_2: float, tau: float) -> None:
        """Checks and stores the options. Each subclass documents the options."""
        check_options(eta=eta, beta_1=beta_1, beta_2=beta_2, tau=tau)
        self.eta = eta
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.tau = tau

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Returns the new v, given the old v and D^2."""
        raise NotImplementedError

    def rate(self, round: int) -> float:
        """Returns the step size of a round, counted from 1."""
        return self.eta

    def init(self, adapters: Adapters) -> State:
        """Returns both moments at zero."""
        finished_rounds = torch.zeros((), dtype=torch.int64)
        return {"round": finished_rounds, **zeros(adapters, "m", "v")}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Makes one step of the server's optimiser.

        Raises:
            ValueError: No client trained on any example.
        """
        new_state = {**state, "round": state["round"] + 1}
        rate = self.rate(int(new_state["round"]))

        # D plays the part of the negative gradient, so the step is added.
        step = {}
        for name, change in mean_step(adapters, updates).items():
            old_m = state[f"m.{name}"]
            old_v = state[f"v.{name}"]
            m = self.beta_1 * old_m + (1 - self.beta_1) * change
            v = self.second_moment(old_v, change**2)
            step[name] = rate * m / (v.sqrt() + self.tau)
            new_state[f"m.{name}"] = m
            new_state[f"v.{name}"] = v
        return new_state, add_step(adapters, step)
