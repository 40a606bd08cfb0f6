"""SCAFFOLD (1910.06378): clients correct their gradients for where their own data would drag them.

Rule: a client steps along g - c_i + c; theta <- theta + eta sum_i w_i (theta_i - theta);
c <- c + (1/N) sum_i (c_i+ - c_i) over those who answered, N being the number of all clients.
A client's c_i+ is the mean of its raw gradients g over its local steps. With plain SGD this is the paper's
c_i - c + (theta_t - theta_i) / (K eta_l) (its option II) exactly, since theta_t - theta_i is then
eta_l sum_k (g_k - c_i + c); and it is defined for AdamW, too, whose steps do not add up to gradients.
Needs: equal ranks; clients that correct, and keep c_i from round to round. Costs: twice FedAvg's traffic each way,
as c goes down and c_i+ - c_i comes up. The paper weights clients equally; here w_i are the run's weights, as in
FedAvg, while c is a plain mean, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, Assignment, ClientInfo, ClientUpdate, Task, Traits, counted
from strategies.server_optimiser import check, mean_step, moved, zeros


class Scaffold:
    """The weighted average of factors that were trained with control variates, and the server's own variate."""

    traits = Traits(linear=True)

    def __init__(self, eta: float = 1.0, clients: int = 0) -> None:
        """Sets the server's step size.

        Args:
            eta: The server's step size; 1 averages as FedAvg.
            clients: N, how many clients the federation has; 0: as many as answer.
        """
        check(eta=eta)
        if clients < 0:
            raise ValueError(f"clients is {clients}; it must be 0 or more")
        self.eta, self.clients = eta, clients

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        """The server's control variate begins at zero, as those of the clients do."""
        return zeros(adapters, "c")

    def broadcast(self, state: Mapping[str, Tensor], adapters: Adapters, client: ClientInfo) -> Assignment:
        """The adapters, and c in their types."""
        control = {name: state[f"c.{name}"].to(tensor.dtype) for name, tensor in adapters.tensors.items()}
        return Assignment(adapters.with_rank(client.rank), Task(control=control))

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        """Moves theta by eta times the mean change, and c by the clients' changes over N.

        Raises:
            ValueError: No client has any example, or one that has returned no control variate.
        """
        ordered, _ = counted(updates)
        step = {name: self.eta * change for name, change in mean_step(adapters, ordered).items()}
        after = dict(state)
        for name in step:
            after[f"c.{name}"] = state[f"c.{name}"] + _summed(ordered, name) / (self.clients or len(ordered))
        return after, moved(adapters, step)


def _summed(updates: Sequence[ClientUpdate], name: str) -> Tensor:
    """What the control variates of all have changed by, for one tensor."""
    whole = torch.zeros(updates[0].adapters.tensors[name].shape, dtype=torch.float64)
    for update in updates:
        if name not in update.control:
            raise ValueError(f"client {update.client} returned no control variate for {name}")
        whole += update.control[name].double()
    return whole
