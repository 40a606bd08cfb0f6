"""Rows of a step in batches and micro-batches."""

from __future__ import annotations

import pytest
import torch

from fedsplit.client.micro_batches import batches_of
from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.objective import Demands

IDS = torch.arange(20).reshape(5, 4)


@pytest.mark.parametrize(
    ("batches", "micros", "sizes"),
    [(1, 1, [[5]]), (1, 2, [[3, 2]]), (2, 2, [[2, 1], [1, 1]]), (9, 3, [[1]] * 5), (2, 9, [[2, 1], [1, 1]])],
)
def test_rows_keep_their_order_and_their_labels(batches: int, micros: int, sizes: list[list[int]]) -> None:
    cut = batches_of(IDS, None, None, batches, micros, virtual=0)
    assert [[len(micro.ids) for micro in batch] for batch in cut] == sizes
    assert torch.equal(torch.cat([micro.ids for batch in cut for micro in batch]), IDS)
    assert torch.equal(torch.cat([micro.labels for batch in cut for micro in batch]), IDS)
    assert all(micro.mask is None for batch in cut for micro in batch)


def test_shares_are_by_what_is_predicted() -> None:
    """Three, two and no more tokens of five; the first of a row never is, and padding is not."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    ((one, two, three),) = batches_of(IDS[:3], None, mask, 1, 3, virtual=0)
    assert [micro.share for micro in (one, two, three)] == [3 / 5, 2 / 5, 0.0]
    assert two.labels.tolist() == [[4, 5, 6, IGNORED]]
    assert torch.equal(three.mask, mask[2:])


def test_virtual_tokens_have_positions_in_labels_and_mask() -> None:
    ((one,),) = batches_of(IDS[:1], None, torch.ones(1, 4, dtype=torch.long), 1, 1, virtual=2)
    assert one.labels.tolist() == [[IGNORED, IGNORED, 0, 1, 2, 3]]
    assert one.mask is not None and one.mask.tolist() == [[1] * 6]


@pytest.mark.parametrize(
    ("batches", "micros", "sizes"), [(1, 1, [[8]]), (1, 3, [[4, 2, 2]]), (3, 2, [[4], [2], [2]]), (9, 9, [[2]] * 4)]
)
def test_a_pair_is_never_divided(batches: int, micros: int, sizes: list[list[int]]) -> None:
    ids = torch.arange(32).reshape(8, 4)
    cut = batches_of(ids, None, None, batches, micros, virtual=0, demands=Demands(mean_over="pairs"))
    assert [[len(micro.ids) for micro in batch] for batch in cut] == sizes
    assert torch.equal(torch.cat([micro.ids for batch in cut for micro in batch]), ids)


@pytest.mark.parametrize(("mean_over", "shares"), [("sequences", [2 / 4, 2 / 4]), ("labels", [5 / 7, 2 / 7])])
def test_shares_are_by_what_the_loss_is_a_mean_over(mean_over: str, shares: list[float]) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    (micros,) = batches_of(IDS[:4], None, mask, 1, 2, virtual=0, demands=Demands(mean_over=mean_over))
    assert [micro.share for micro in micros] == shares


def test_beside_the_base_model_the_first_token_behind_virtual_ones_is_not_predicted() -> None:
    demands = Demands(frozenset({"reference"}))
    ((one,),) = batches_of(IDS[:1], None, torch.ones(1, 4, dtype=torch.long), 1, 1, virtual=2, demands=demands)
    assert one.labels.tolist() == [[IGNORED, IGNORED, IGNORED, 1, 2, 3]]
    assert one.mask.tolist() == [[1] * 6]
