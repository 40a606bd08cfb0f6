"""A product is that of float64, whichever library makes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsplit.model import products
from fedsplit.model.products import product

SHAPES = [(1, 768, 3072), (63, 96, 129), (256, 512, 512), (257, 513, 511), (252, 768, 2304), (3, 2**15 + 1, 90)]


def matrix(rows: int, columns: int, seed: int, transposed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(columns, rows, generator=generator).t()
        if transposed
        else torch.randn(rows, columns, generator=generator)
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_that_of_float64(shape: tuple[int, int, int], transposed: bool, biased: bool) -> None:
    count, terms, wide = shape
    rows, weight = matrix(count, terms, 0), matrix(terms, wide, 1, transposed)
    bias = matrix(1, wide, 2)[0] if biased else None
    expected = rows.double() @ weight.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(product(rows, weight, bias).double(), expected, rtol=0, atol=3e-5 * terms**0.5)
    if bias is None:
        out = torch.empty(count, wide)
        torch.testing.assert_close(product(rows, weight, out=out), product(rows, weight), rtol=0, atol=0)


def test_rows_that_lie_apart_are_taken_as_they_are() -> None:
    rows, weight = matrix(256, 1024, 0)[:, ::2], matrix(512, 512, 1)
    torch.testing.assert_close(product(rows, weight), rows @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not products.BOTH, reason="this build of torch has one library")
def test_the_faster_one_is_asked_for_what_is_large_and_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = torch.ops.mkldnn._linear_pointwise

    class Watched:
        @staticmethod
        def _linear_pointwise(rows: Tensor, *others: object) -> Tensor:
            asked.append(tuple(rows.shape))
            made: Tensor = real(rows, *others)
            return made

    monkeypatch.setattr(torch.ops, "mkldnn", Watched)
    rows, weight = matrix(256, 512, 0), matrix(512, 512, 1)
    assert rows.numel() * weight.shape[1] == products.LEAST
    product(rows, weight)
    assert asked == [(256, 512)]
    product(rows[1:], weight)
    product(rows[:0], weight)
    product(rows.bfloat16(), weight.bfloat16())
    product(matrix(4, 2**16, 0), matrix(2**16, 512, 1))
    with torch.backends.mkldnn.flags(enabled=False):
        product(rows, weight)
    assert asked == [(256, 512)]
