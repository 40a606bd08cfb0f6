"""SCAFFOLD (1910.06378): control variates correct the drift of each client towards the client's data.

Rule:
    client i steps along g - c_i + c, with g the gradient of the client
    theta <- theta + eta sum_i w_i (theta_i - theta)
    c <- c + (1/N) sum_i (c_i+ - c_i) over the clients that answered; N counts all clients

The new c_i+ is the mean of client i's raw gradients g over the local steps. With plain SGD the mean equals the paper's
option II, c_i - c + (theta_t - theta_i) / (K eta_l), since theta_t - theta_i is then eta_l sum_k (g_k - c_i + c). The
mean is also defined for AdamW. (The steps of AdamW do not add up to gradients.)

Needs: equal ranks; clients that correct their gradients and keep c_i from round to round.
Costs: twice FedAvg's traffic each way: c goes down, and c_i+ - c_i comes up.
The paper weights clients equally. In this file w_i are the run's weights, as in FedAvg; c is a plain mean, as in the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, State, Task, Traits, weighted
from strategies.server_optimiser import add_step, check_options, mean_step, zeros


class Scaffold:
    """Averages factors trained with control variates, and updates the server's control variate.

    Example:
        >>> from fedsplit.updates import ClientInfo
        >>> from strategies.example import lora
        >>> strategy = Scaffold()
        >>> adapters = lora(A=[[1, 0]], B=[[0]])
        >>> state = strategy.init(adapters)
        >>> task = strategy.broadcast(state, adapters, ClientInfo(client=0, rank=1)).task
        >>> task.control["layer.lora_A.weight"].tolist()  # c begins at zero
        [[0.0, 0.0]]
    """

    traits = Traits(linear=True)

    def __init__(self, eta: float = 1.0, clients: int = 0) -> None:
        """Sets the server's step size.

        Args:
            eta: Step size of the server; 1 averages as FedAvg does.
            clients: N, the number of clients in the federation; 0: as many as answer.
        """
        check_options(eta=eta)
        if clients < 0:
            raise ValueError(f"clients is {clients}; it must be 0 or more")
        self.eta = eta
        self.clients = clients

    def init(self, adapters: Adapters) -> State:
        """Returns the server's control variate at zero. Clients' control variates begin at zero, too."""
        return zeros(adapters, "c")

    def broadcast(self, state: State, adapters: Adapters, client: ClientInfo) -> Assignment:
        """Sends the adapters and c, in the adapters' types."""
        control = {}
        for name, tensor in adapters.tensors.items():
            c = state[f"c.{name}"]
            control[name] = c.to(tensor.dtype)
        task = Task(control=control)
        return Assignment(adapters.with_rank(client.rank), task)

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Moves theta by eta times the mean change, and c by the clients' changes over N.

        Raises:
            ValueError: No client trained on any example, or a client returned no control variate.
        """
        updates, _ = weighted(updates)
        clients = self.clients or len(updates)

        new_state = dict(state)
        step = {}
        for name, change in mean_step(adapters, updates).items():
            step[name] = self.eta * change
            # c is a mean over all N clients. The variates of clients that did not answer changed by zero.
            mean_change = _sum_of_changes(updates, name) / clients
            c = state[f"c.{name}"]
            new_state[f"c.{name}"] = c + mean_change
        return new_state, add_step(adapters, step)


def _sum_of_changes(updates: Sequence[ClientUpdate], name: str) -> Tensor:
    """Returns sum_i (c_i+ - c_i) for one tensor, in float64."""
    shape = updates[0].adapters.tensors[name].shape
    total = torch.zeros(shape, dtype=torch.float64)
    for update in updates:
        if name not in update.control:
            raise ValueError(f"client {update.client} returned no control variate for {name}")
        total += update.control[name].double()
    return total
