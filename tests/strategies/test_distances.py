"""Distances between adapters, against dense matrices and plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, start

from fedsplit.updates import Adapters
from strategies.distances import Distances, check_kind
from strategies.fedavg import FedAvg


def points(count: int, seed: int, drift: float = 0.5) -> list[Adapters]:
    run = Round.begin(FedAvg(), start(seed=seed))
    run.aggregate(run.train([2] * 3, seed=seed))
    return [update.adapters for update in run.train([2] * count, drift=drift, seed=seed)]


def rotated(adapters: Adapters, seed: int) -> Adapters:
    """The same changes s B A from other factors (B R) (R^T A)."""
    factors = {}
    for layer in adapters.complete:
        a, b = adapters.factors(layer)
        r, _ = torch.linalg.qr(torch.randn(a.shape[0], a.shape[0], generator=torch.Generator().manual_seed(seed)))
        factors[layer] = r.T @ a, b @ r
    return adapters.with_factors(factors)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 10**6), drift=st.sampled_from([1e-2, 0.5, 1e3]))
def test_product_distances_are_those_of_the_dense_changes(count, seed, drift) -> None:
    some = points(count, seed, drift)
    for point in some:
        expected = [
            sum(float(((applied(point)[layer] - applied(other)[layer]) ** 2).sum()) for layer in point.layers)
            for other in some
        ]
        got = Distances(some, "product").squared(point)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9 * drift**4)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_factor_distances_are_those_of_all_entries(count, seed) -> None:
    some = points(count, seed)
    for point in some:
        expected = [
            sum(float(((t.double() - other.tensors[n].double()) ** 2).sum()) for n, t in point.tensors.items())
            for other in some
        ]
        got = Distances(some, "factors").squared(point)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_a_rotation_of_the_factors_is_seen_by_factor_distances_only() -> None:
    some = points(3, 0)
    turned = rotated(some[1], 5)
    product, factors = Distances(some, "product"), Distances(some, "factors")
    torch.testing.assert_close(product.squared(turned), product.squared(some[1]), rtol=1e-6, atol=1e-6)
    assert float(factors.squared(turned)[1]) > 1e-2
    assert not torch.allclose(factors.squared(turned), factors.squared(some[1]), rtol=1e-2)


def test_by_hand_with_a_tensor_that_is_no_factor() -> None:
    """alpha = 4 at rank 1: products 4 * 2 * 3 = 24 and 4 * 1 * 1 = 4, so 20^2 = 400; and (5 - 2)^2 = 9 besides."""
    adapters = start(rank=1, alpha=4.0, shapes={"l": (1, 1, False)})

    def point(a: float, b: float, magnitude: float) -> Adapters:
        return adapters.with_tensors(
            {
                "l.lora_A.weight": torch.tensor([[a]]),
                "l.lora_B.weight": torch.tensor([[b]]),
                "l.lora_magnitude_vector": torch.tensor([magnitude]),
            }
        )

    one, other = point(2.0, 3.0, 5.0), point(1.0, 1.0, 2.0)
    assert Distances([one], "product").squared(other).tolist() == [409.0]
    assert Distances([one], "factors").squared(other).tolist() == [1.0 + 4.0 + 9.0]


def test_without_pairs_products_are_not_asked_for() -> None:
    some = [point.only(frozenset("A")) for point in points(3, 1)]
    product, factors = (Distances(some, on).squared(some[0]) for on in ("product", "factors"))
    assert torch.equal(product, factors) and float(product[1]) > 0


def test_other_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="on is 'cosine'; it must be one of product, factors"):
        check_kind("cosine")
