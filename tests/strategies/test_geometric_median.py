"""The geometric median: closed forms, the least sum of distances, and clients that are far out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Round, applied, by_hand, start
from test_distances import rotated

from fedsplit.updates import Adapters, weighted
from strategies.distances import Distances
from strategies.fedavg import FedAvg
from strategies.geometric_median import GeometricMedian, _betas

A, B = "l.lora_A.weight", "l.lora_B.weight"


def point(result: Adapters) -> tuple[float, float]:
    return result.tensors[A].item(), result.tensors[B].item()


def trained(count: int, seed: int, drift: float = 0.5):
    run = Round.begin(FedAvg(), start(seed=seed))
    run.aggregate(run.train([2] * 3, seed=seed))
    return run, run.train([2] * count, drift=drift, seed=seed)


def test_one_step_by_hand() -> None:
    """Points A = 3, 4, 12 on a line (B = 0) from theta = 0, d = 4: b is 1/4, 1/4, 1/12, so z = (21 + 12) / 7 = 33/7.

    The distances to z are 12/7, 5/7 and 51/7: b is 7/12, 7/5, 7/51, or 85, 204, 20 over 309, and
    A = (255 + 816 + 240) / 309 = 1311 / 309.
    """
    pairs = [([[a]], [[0.0]]) for a in (3.0, 4.0, 12.0)]
    result = by_hand(GeometricMedian("factors", iterations=1), pairs, [2, 2, 2], alpha=3.0)
    assert point(result) == (pytest.approx(1311 / 309, rel=1e-6), 0.0)


def test_of_four_corners_it_is_where_the_diagonals_cross() -> None:
    """(0, 0)-(4, 4) and (3, 0)-(0, 6): y = x and y = 6 - 2x cross at (2, 2)."""
    pairs = [([[0.0]], [[0.0]]), ([[3.0]], [[0.0]]), ([[4.0]], [[4.0]]), ([[0.0]], [[6.0]])]
    result = by_hand(GeometricMedian("factors", iterations=300), pairs, [5] * 4, alpha=3.0)
    assert point(result) == (pytest.approx(2.0, abs=1e-5), pytest.approx(2.0, abs=1e-5))


@pytest.mark.parametrize(
    ("values", "examples", "expected"),
    [((1.0, 2.0, 9.0), (1, 1, 1), 2.0), ((1.0, 2.0, 9.0), (1, 1, 5), 9.0), ((0.5, 1.0, 2.0, 9.0), (1, 1, 3, 2), 2.0)],
)
def test_on_a_line_it_is_the_weighted_median(values, examples, expected) -> None:
    pairs = [([[a]], [[-2.0 * a]]) for a in values]
    result = by_hand(GeometricMedian("factors", iterations=2000), pairs, examples, alpha=3.0)
    assert point(result) == (pytest.approx(expected, abs=1e-4), pytest.approx(-2.0 * expected, abs=2e-4))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), clients=st.integers(4, 6))
def test_no_point_nearby_has_a_lesser_sum_of_distances_and_ten_steps_are_nearly_there(seed, clients) -> None:
    """Nobody has half of the weight: else the median is that client, which ten steps are far from."""
    run, updates = trained(clients, seed)
    ordered, shares = weighted(updates)
    cloud, weights = Distances([u.adapters for u in ordered], "factors"), torch.tensor(shares, dtype=torch.float64)

    def objective(adapters: Adapters) -> float:
        return float(weights @ cloud.squared(adapters).sqrt())

    _, best = GeometricMedian("factors", iterations=400).aggregate({}, run.adapters, updates)
    _, ten = GeometricMedian("factors").aggregate({}, run.adapters, updates)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-1, 1e-3):
        for _ in range(5):
            moved = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in best.tensors.items()}
            assert objective(best) <= objective(best.with_tensors(moved)) + 1e-6
    plain = run.aggregate(updates)
    assert objective(best) - 1e-6 <= objective(ten) <= objective(best) * 1.01
    assert objective(ten) <= objective(plain) + 1e-6


@pytest.mark.parametrize("on", ["product", "factors"])
@pytest.mark.parametrize("far", [1e3, 1e6, -1e6])
def test_one_client_far_out_moves_it_by_less_than_the_others_are_apart(on, far) -> None:
    run, updates = trained(6, 4)
    updates = [replace(update, examples=3) for update in updates]
    _, honest = GeometricMedian(on).aggregate({}, run.adapters, updates[1:])
    away = {n: t * far for n, t in updates[0].adapters.tensors.items()}
    updates[0] = replace(updates[0], adapters=run.adapters.with_tensors(away))
    _, result = GeometricMedian(on).aggregate({}, run.adapters, updates)
    apart = Distances([update.adapters for update in updates[1:]], on).squared(honest).max()
    assert float(Distances([honest], on).squared(result)) < float(apart)
    assert float(Distances([honest], on).squared(run.aggregate(updates))) > 1e3 * float(apart)


@pytest.mark.parametrize("on", ["product", "factors"])
def test_a_client_that_did_not_move_does_not_hold_the_others(on) -> None:
    run, updates = trained(6, 5, drift=0.3)
    updates = [replace(update, examples=3) for update in updates]
    updates[0] = replace(updates[0], adapters=run.adapters)
    _, result = GeometricMedian(on).aggregate({}, run.adapters, updates)
    cloud = Distances([run.adapters], on)
    travelled = [float(cloud.squared(adapters)) for adapters in (result, run.aggregate(updates))]
    assert travelled[0] > 0.25 * travelled[1]


@pytest.mark.parametrize("seed", range(3))
def test_on_products_the_first_weights_do_not_see_a_rotation(seed) -> None:
    run, updates = trained(4, seed)
    turned = [replace(updates[0], adapters=rotated(updates[0].adapters, 3)), *updates[1:]]

    def shares(on: str, some: list) -> torch.Tensor:
        distances = Distances([update.adapters for update in some], on).squared(run.adapters).sqrt()
        return torch.tensor(_betas(weighted(some)[1], distances, float(distances.median())))

    torch.testing.assert_close(shares("product", turned), shares("product", updates), rtol=1e-5, atol=0)
    assert not torch.allclose(shares("factors", turned), shares("factors", updates), rtol=1e-3)


def test_what_distances_are_of_matters() -> None:
    run, updates = trained(4, 6)
    results = [GeometricMedian(on).aggregate({}, run.adapters, updates)[1] for on in ("product", "factors")]
    one, other = (applied(result) for result in results)
    assert any(not torch.allclose(one[layer], other[layer], rtol=1e-3) for layer in one)


@pytest.mark.parametrize("options", [{"on": "cosine"}, {"iterations": 0}, {"nu": 0.0}, {"nu": float("nan")}])
def test_options_that_are_none_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GeometricMedian(**options)
