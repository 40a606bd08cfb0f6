"""Steps of several clients as one batch, and back to each its own."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.trunk.pending import PendingBatch, dropout_seed
from fedsplit.wire.packets import Packet, StepKey

WIDTH = 3


def batch_of(shapes: list[tuple[int, int]], padded: set[int]) -> PendingBatch:
    """Steps of so many sequences and tokens; those of some clients have a mask."""
    inputs = {StepKey(1, n, 0): torch.rand(*shape, WIDTH) + 1 for n, shape in enumerate(shapes)}
    masks = {key: torch.rand(hidden.shape[:2]) < 0.5 for key, hidden in inputs.items() if key.client in padded}
    adapter: Any = None  # nothing here computes
    return PendingBatch(inputs, masks, adapter, {}, 0)


def test_nobodys_gradient_is_rounded_to_the_type_of_another() -> None:
    batch = batch_of([(1, 2), (1, 2)], set())
    narrow, wide = batch.inputs
    sent = {narrow: torch.ones(1, 2, WIDTH, dtype=torch.bfloat16), wide: torch.full((1, 2, WIDTH), 1.0009765625)}
    whole = batch.spread(sent, torch.zeros(2, 2, WIDTH, dtype=torch.bfloat16))
    assert torch.equal(batch.cut(whole)[wide], sent[wide]) and torch.equal(
        batch.cut(whole)[narrow], torch.ones(1, 2, WIDTH)
    )


SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4)


@given(SHAPES, st.sets(st.integers(0, 3)))
def test_what_is_joined_is_cut_again_to_the_bit(shapes: list[tuple[int, int]], padded: set[int]) -> None:
    batch = batch_of(shapes, padded)
    hidden, mask = batch.join()
    longest = max(length for _, length in shapes)
    assert hidden.shape == (sum(rows for rows, _ in shapes), longest, WIDTH)
    assert all(torch.equal(own, batch.inputs[key]) for key, own in batch.cut(hidden).items())
    assert int((hidden != 0).sum()) == WIDTH * batch.tokens  # padding is zero, and nothing else is
    assert (mask is None) == (not padded & {*range(len(shapes))})
    if mask is not None:
        seen = batch.cut(mask[:, :, None])
        for key, own in batch.inputs.items():
            expected = batch.masks.get(key, torch.ones(own.shape[:2], dtype=torch.bool))
            assert torch.equal(seen[key][:, :, 0], expected)
        assert int(mask.sum()) == sum(int(one.sum()) for one in seen.values())  # False where there is padding


@given(SHAPES, st.data())
def test_gradients_of_some_steps_are_zero_for_the_others(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    batch = batch_of(shapes, set())
    sent_by = data.draw(st.sets(st.integers(0, len(shapes) - 1), min_size=1))
    sent = {key: torch.rand(hidden.shape) for key, hidden in batch.inputs.items() if key.client in sent_by}
    whole = batch.spread(sent, batch.join()[0])
    for key, own in batch.cut(whole).items():
        assert torch.equal(own, sent.get(key, torch.zeros(own.shape)))


def test_dropout_is_drawn_from_seed_and_keys_and_nothing_else() -> None:
    def drawn(seed: int = 0, **key: int) -> int:
        micros = key.pop("micros", 1)
        return dropout_seed(seed, [Packet(StepKey(**{"round": 1, "client": 0, "step": 0, **key}), micros=micros)])

    seeds = [drawn(), drawn(1), drawn(round=2), drawn(client=1), drawn(step=1), drawn(micro=1, micros=2)]
    assert len({*seeds}) == len(seeds)
    assert drawn(attempt=1) == drawn()  # a round that is begun anew repeats itself
    assert drawn(batch=1, micro=1, micros=2) == drawn(micro=3, micros=4)  # parts of a step are counted through
