"""Operations and weights of a model block by block, so that any cut is a sum over blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.estimation.party_memory import counts_of
from fedsplit.estimation.party_shapes import Parties
from fedsplit.model.flops import Flops, flops_by_block, head_flops
from fedsplit.model.parts import Kind, ranges
from fedsplit.network.compute import Operations, Task


@dataclass(frozen=True)
class Layout:
    """A model block by block, with adapters, for one batch.

    Attributes:
        blocks: Operations of each block.
        head: Operations of the head.
        weights: Bytes of the weights of each block.
        ends: Bytes of embedding, last norm and head, which a client has under every cut.
    """

    blocks: tuple[Flops, ...]
    head: Flops
    weights: tuple[int, ...]
    ends: int

    def flops(self, bounds: tuple[int, int]) -> dict[Kind, Flops]:
        """Returns the operations of each part under a cut.

        Args:
            bounds: The cut (LO, HI).

        Example:
            >>> from fedsplit.settings.config import Config
            >>> layout = layout_of(Parties(Config()), rows=4)
            >>> whole = layout.flops((0, 6))
            >>> whole["bottom"].total, whole["top"] == layout.head
            (0.0, True)
        """
        costs: dict[Kind, Flops] = {}
        for kind, numbers in ranges(len(self.blocks), bounds).items():
            costs[kind] = sum((self.blocks[number] for number in numbers), Flops())
        costs["top"] += self.head
        return costs

    def client_weights(self, bounds: tuple[int, int]) -> int:
        """Returns the bytes of the weights of a client under a cut (LO, HI)."""
        low, high = bounds
        return self.ends + sum(self.weights[:low]) + sum(self.weights[high:])


def layout_of(parties: Parties, rows: int) -> Layout:
    """Returns the layout of a model.

    The first trained block of the model costs the same in every part: no gradient goes on below it.

    Args:
        parties: The parties of a run, under any cut.
        rows: Sequences of the batch.
    """
    length = parties.config.train.max_length
    gradient_below = False
    blocks: list[Flops] = []
    weights: list[int] = []
    inside = 0
    for part in (parties.bottom, *parties.stages, parties.top):
        costs = flops_by_block(part, rows, length, gradient_below)
        blocks += costs
        gradient_below = gradient_below or any(cost.backward for cost in costs)
        for block in getattr(part.decoder, part.family.blocks):
            frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
            weights.append(sum(parameter.numel() * parameter.element_size() for parameter in frozen))
        inside += sum(weights[len(weights) - len(costs) :]) if part.kind != "trunk" else 0
    head = head_flops(parties.top, rows, length, gradient_below)
    # What is left of the ends without their blocks: embedding, last norm and head.
    ends = counts_of(parties, ["bottom", "top"]).weights - inside
    return Layout(tuple(blocks), head, tuple(weights), ends)


def operations(layout: Layout, bounds: tuple[int, int], rows: int) -> Operations:
    """Returns the numbers of operations of the parts under a cut, for the virtual clock.

    Args:
        layout: The layout, for one batch.
        bounds: The cut (LO, HI).
        rows: Sequences of the batch.

    Example:
        >>> from fedsplit.settings.config import Config
        >>> layout = layout_of(Parties(Config()), rows=4)
        >>> of_cut = operations(layout, (1, 5), rows=4)
        >>> of_cut("trunk-forward", 2, 128) == layout.flops((1, 5))["trunk"].forward / 2
        True
    """
    costs = layout.flops(bounds)

    def of_task(task: Task, size: int, length: int) -> float:
        """Returns the operations of a task for some sequences of full length."""
        part, _, direction = task.partition("-")
        cost = costs[part]  # type: ignore[index]  # the name of a part
        return (cost.forward if direction == "forward" else cost.backward) * size / rows

    return of_task


def total(costs: Mapping[Kind, Flops]) -> float:
    """Returns the operations of all parts, forward and backward.

    Example:
        >>> total({"bottom": Flops(1, 2), "trunk": Flops(3, 4)})
        10
    """
    return sum(cost.total for cost in costs.values())
