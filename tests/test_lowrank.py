"""Thin factors against the matrices they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.lowrank import LowRank, balanced, total


def thin(seed: int, out: int, inner: int, width: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return LowRank(draw(out, inner), draw(inner, width))


def dense(matrix: LowRank) -> torch.Tensor:
    return matrix.up.double() @ matrix.down.double()


SIZES = st.tuples(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 12), st.integers(1, 9))


@given(SIZES, st.floats(-3, 3))
def test_it_is_the_matrix_it_stands_for(sizes, factor: float) -> None:
    seed, out, inner, width = sizes
    one, other = thin(seed, out, inner, width), thin(seed + 1, out, 3, width)
    whole = dense(one)
    assert one.shape == (out, width) and one.rank == inner
    assert one.norm() == pytest.approx(float(whole.norm()), abs=1e-9)
    assert one.inner(other) == pytest.approx(float((whole * dense(other)).sum()), abs=1e-9)
    for got, wanted in (
        (one + other, whole + dense(other)),
        (one - other, whole - dense(other)),
        (one.times(factor), whole * factor),
        (total([one, other, one]), 2 * whole + dense(other)),
    ):
        assert torch.allclose(dense(got), wanted, atol=1e-9)


@given(SIZES, st.integers(0, 12))
def test_norm_and_distance_are_those_of_the_matrices(sizes, inner: int) -> None:
    seed, out, _, width = sizes
    one, other = thin(*sizes), thin(seed + 1, out, inner, width)
    norm, distance = one.norm_and_distance(other)
    assert norm == pytest.approx(float(dense(one).norm()), abs=1e-9)
    assert distance == pytest.approx(float((dense(one) - dense(other)).norm()), abs=1e-9)
    assert one.norm_and_distance(one)[1] < 1e-12


@given(SIZES)
def test_singular_values_are_those_of_the_matrix(sizes) -> None:
    seed, out, inner, width = sizes
    one = thin(seed, out, inner, width)
    u, s, v = one.svd()
    assert torch.allclose((u * s) @ v, dense(one), atol=1e-9)
    assert torch.allclose(u.T @ u, torch.eye(len(s), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(v @ v.T, torch.eye(len(s), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(s, torch.linalg.svdvals(dense(one))[: len(s)], atol=1e-9)


@given(SIZES, st.integers(1, 5))
def test_the_nearest_of_a_rank_misses_what_eckart_and_young_say(sizes, rank: int) -> None:
    seed, out, inner, width = sizes
    one = thin(seed, out, inner, width)
    near = balanced(*one.svd(), rank)
    missing = torch.linalg.svdvals(dense(one))[rank:].norm()
    assert near.rank <= rank
    assert float((dense(one) - dense(near)).norm()) == pytest.approx(float(missing), abs=1e-9)


@given(SIZES)
def test_compressing_loses_nothing_and_keeps_no_more_than_the_rank(sizes) -> None:
    seed, out, inner, width = sizes
    one = thin(seed, out, inner, width)
    small = total([one, one.times(2.0)]).compressed()
    assert small.rank == min(out, inner, width)
    assert torch.allclose(dense(small), 3 * dense(one), atol=1e-9)


def test_nothing_has_no_rank() -> None:
    zero = LowRank(torch.zeros(3, 2), torch.zeros(2, 4))
    assert zero.compressed().rank == 0 and zero.norm() == 0.0
    assert zero.compressed().compressed().shape == (3, 4)


def test_equal_matrices_have_equal_factors() -> None:
    """Whatever signs or rotations the factors come with."""
    one = thin(3, 6, 2, 5)
    rotation = torch.linalg.qr(thin(4, 2, 2, 2).up)[0]
    other = LowRank(-one.up @ rotation, -rotation.T @ one.down)
    for a, b in zip(one.svd(), other.svd(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
