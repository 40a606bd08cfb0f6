"""Krum and Multi-Krum (1703.02757): select the clients that lie nearest to their neighbours.

Rule:
    score_i = sum of the squared distances from client i to its n - f - 2 nearest neighbours
    Krum: theta <- theta_i of the lowest score
    Multi-Krum: theta <- the w-weighted average of the m clients of the lowest scores
    n clients answered, of whom f may be malicious. A tie goes to the client of the lower number.

Distances (`on`): "product" compares the changes s_i B_i A_i. No rotation of a client's factors alters a change.
"factors" compares all factors as one vector, as the paper and Flower do. Tensors outside of the pairs of factors count
in the distances entry by entry, and come from the selected clients.

Needs: equal ranks; n >= 2 f + 3; the adapters of every single client.
Costs: FedAvg's traffic; O(n^2 (out + in) r^2) a layer on products, O(n^2 (out + in) r) on factors.
The paper averages the m clients with equal weights; Flower and this strategy use the weights w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.updates import Adapters, ClientUpdate, State, Traits, average_adapters, weighted
from strategies.distances import Distances, check_kind


def scores(clients: Sequence[Adapters], malicious: int, on: str) -> Tensor:
    """Returns Krum's score of each client (n,). A low score means a client near to its neighbours.

    Args:
        clients: Adapters, client by client.
        malicious: f, the number of clients that may be malicious.
        on: "product" or "factors".

    Raises:
        ValueError: The number of clients is below 2 f + 3.

    Example:
        >>> from strategies.example import lora
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 3, 100)]
        >>> scores(clients, malicious=0, on="product").tolist()
        [5.0, 2.0, 5.0, 19013.0]
    """
    n = len(clients)
    needed = 2 * malicious + 3
    if n < needed:
        raise ValueError(
            f"{n} clients answered, but Krum needs {needed} with malicious = {malicious} (2 * malicious + 3)"
        )

    distances = Distances(clients, on)
    nearest = n - malicious - 2
    result = []
    for number, client in enumerate(clients):
        squares = distances.squared(client)
        before = squares[:number]
        after = squares[number + 1 :]
        neighbours = torch.cat([before, after])  # without the client itself
        rising = neighbours.sort().values
        result.append(rising[:nearest].sum())
    return torch.stack(result)


class MultiKrum:
    """Averages the clients that lie nearest to their neighbours.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 3, 1000)]
        >>> _, B = one_round(MultiKrum(keep=3), start, clients).factors("layer")
        >>> B.tolist()  # the client at 1000 is left out
        [[2.0]]
    """

    traits = Traits(fewest=3)

    def __init__(self, malicious: int = 0, keep: int = 0, on: str = "product") -> None:
        """Sets the number of trusted clients.

        Args:
            malicious: f, the number of clients that may be malicious.
            keep: m, the number of clients to average; 0: n - f, as in the paper's experiments.
            on: Distances between changes ("product"), or between factors ("factors").

        Raises:
            ValueError: A number is negative, or `on` is unknown.
        """
        check_kind(on)
        for name, value in (("malicious", malicious), ("keep", keep)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        self.malicious = malicious
        self.keep = keep
        self.on = on
        fewest = max(2 * malicious + 3, keep)
        self.traits = Traits(fewest=fewest, multiplies=on == "product")

    def init(self, adapters: Adapters) -> State:
        """Returns an empty state: Krum remembers nothing."""
        return {}

    def aggregate(self, state: State, adapters: Adapters, updates: Sequence[ClientUpdate]) -> tuple[State, Adapters]:
        """Returns the weighted average of the selected clients.

        Raises:
            ValueError: No client trained on any example, or fewer answered than 2 * malicious + 3 or than `keep`.
        """
        # The updates are in the order of the clients, so that a stable sort gives a tie to the lower number.
        updates, _ = weighted(updates)
        clients = [update.adapters for update in updates]
        client_scores = scores(clients, self.malicious, self.on)
        by_score = client_scores.argsort(stable=True)

        keep = self.keep or len(updates) - self.malicious
        if keep > len(updates):
            raise ValueError(f"{len(updates)} clients answered, of whom Multi-Krum is to keep {keep}")

        chosen = [updates[int(number)] for number in by_score[:keep]]
        selected, weights = weighted(chosen)  # again: the weights of the selected clients sum to 1
        return state, average_adapters(adapters, selected, weights)


class Krum(MultiKrum):
    """Returns the adapters of the client nearest to all neighbours, to the bit.

    Example:
        >>> from strategies.example import lora, one_round
        >>> start = lora(A=[[1]], B=[[0]])
        >>> clients = [lora(A=[[1]], B=[[value]]) for value in (1, 2, 3, 1000)]
        >>> _, B = one_round(Krum(), start, clients).factors("layer")
        >>> B.tolist()
        [[2.0]]
    """

    def __init__(self, malicious: int = 0, on: str = "product") -> None:
        """Sets the number of trusted clients.

        Args:
            malicious: f, the number of clients that may be malicious.
            on: Distances between changes ("product"), or between factors ("factors").
        """
        super().__init__(malicious, 1, on)
