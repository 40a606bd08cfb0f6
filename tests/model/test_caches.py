"""What a part remembers: under the numbers of its blocks, as long as it is looked at, from the right position on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import WINDOW
from split_models import parts_of

from fedsplit.model.caches import PartCache, Past


def test_blocks_keep_their_numbers_and_the_part_counts_from_0(any_model_path: Path) -> None:
    _, _, top = parts_of(any_model_path, (1, 2))
    assert list(top.blocks) == [2]
    past = Past(top)
    past.extend(torch.randn(2, 4, 32))
    assert [layer.get_seq_length() for layer in past._cache.layers] == [4]
    assert past._cache.get_seq_length() == past.length == 4


def test_a_part_without_blocks_remembers_nothing_but_the_place(any_model_path: Path) -> None:
    bottom, _, top = parts_of(any_model_path, (0, 3))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for part, start in ((bottom, torch.tensor([[0, 5, 6], [7, 8, 9]])), (top, torch.randn(2, 3, 32))):
        past = Past(part, mask)
        first, then = past.extend(start), past.extend(start[:, :1])
        assert first.shape == (2, 3, 32) and then.shape == (2, 1, 32)
        assert past.nbytes == 0 and past.length == 4


@pytest.mark.parametrize(("family", "kept"), [("mistral", WINDOW - 1), ("llama", 12)])
def test_of_a_window_no_more_is_kept_than_is_looked_at(family: str, kept: int, tiny_models: dict[str, Path]) -> None:
    _, trunk, _ = parts_of(tiny_models[family], (1, 2))
    past = Past(trunk)
    past.extend(torch.randn(2, 9, 32))
    for _ in range(3):
        past.extend(torch.randn(2, 1, 32))
    # Keys and values of two sequences: two heads of eight numbers of four bytes.
    assert past.nbytes == 2 * 2 * 2 * 8 * 4 * kept
    assert past.length == 12


def test_positions_begin_after_the_padding(tiny_models: dict[str, Path]) -> None:
    bottom, *_ = parts_of(tiny_models["opt"], (1, 2))
    seen = []
    bottom.decoder.embed_positions.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    past = Past(bottom, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    past.extend(torch.ones(2, 4, dtype=torch.long))
    past.extend(torch.ones(2, 1, dtype=torch.long))
    past.extend(torch.ones(2, 1, dtype=torch.long))
    assert seen == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


def test_the_caches_of_a_part_do_not_mix(tiny_models: dict[str, Path]) -> None:
    _, trunk, _ = parts_of(tiny_models["llama"], (1, 2))
    texts = [torch.randn(1, 3, 32), torch.randn(1, 5, 32)]
    alone = []
    for text in texts:
        past = Past(trunk)
        alone.append([past.extend(text), past.extend(text[:, :1])])
    pasts = [Past(trunk) for _ in texts]
    mixed = [[past.extend(text)] for past, text in zip(pasts, texts, strict=True)]
    for row, past, text in zip(mixed, pasts, texts, strict=True):
        row.append(past.extend(text[:, :1]))
    for one, other in zip(alone, mixed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_kept_needs_no_gradient(tiny_models: dict[str, Path]) -> None:
    _, trunk, _ = parts_of(tiny_models["gpt2"], (1, 2))
    cache = PartCache(trunk)
    keys, values = cache.update(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), 1)
    assert keys.shape == values.shape == (1, 4, 2, 8)
    past = Past(trunk)
    assert not past.extend(torch.randn(1, 2, 32)).requires_grad
