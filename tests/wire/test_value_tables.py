"""Tables of values: numbers worked out by hand."""

from __future__ import annotations

import torch

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.packets import StepKey

ROLE = Role("activation", "up", StepKey(1, 0, 0))


def through(chain: str, *values: float) -> list[float]:
    decoded: list[float] = make_codec(chain).decode(make_codec(chain).encode(torch.tensor(values), ROLE), ROLE).tolist()
    return decoded


def test_nf4_rounds_to_the_nearest_quantile() -> None:
    assert through("nf4", 1.0, -1.0, 0.0, 0.86) == [1.0, -1.0, 0.0, 0.7229568362236023]


def test_mxfp4_rounds_ties_to_even_codes_and_cuts_off_at_6() -> None:
    """7 has the exponent 2, so that the scale is 1."""
    values = 7.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.1
    assert through("mxfp4", *values) == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -6.0]


def test_mx_scales_are_biased_powers_of_two() -> None:
    encoded = make_codec("mxfp4").encode(torch.tensor([[7.0] * 32 + [0.875] * 32]), ROLE)
    assert encoded.array("scales").tolist() == [127, 124]
    encoded = make_codec("mxfp8").encode(torch.tensor([448.0, torch.nan]), ROLE)
    assert encoded.array("scales").tolist() == [255]
    assert through("mxfp8", 256.0, 17.0, 3e-3) == [256.0, 16.0, 2 * 2**-9]
