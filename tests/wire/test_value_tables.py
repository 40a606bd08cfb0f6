"""Tables of values: numbers worked out by hand, and the codes of torchao and bitsandbytes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.packets import StepKey

ROLE = Role("activation", "up", StepKey(1, 0, 0))

TORCHAO_TYPES = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}

TORCHAO_DIGESTS = {
    "mxfp8": "59267982b35fc88364730f0fbd645663a81eaeb6bd623d0e328b544fe0b01103",
    "mxfp4": "c0434fab835499899fb9b55694386b1c88c39690f3816fdbd5eec91ceaf7b0f9",
}
"""sha256 of torchao's scales, then its codes, for `bfloat16_numbers`: `to_mx` of torchao 0.18.0."""


def bfloat16_numbers() -> Tensor:
    """Every bfloat16 that is neither subnormal nor near it, as float32, in groups of 32 of all magnitudes."""
    all_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = all_bits.view(torch.bfloat16).float()
    numbers = numbers[numbers.isfinite()]
    # A step without a common factor with the count goes through all numbers, and mixes magnitudes within a group.
    places = torch.arange(numbers.numel()) * 12_347 % numbers.numel()
    groups = numbers[places][: numbers.numel() // 32 * 32].view(-1, 32)
    # torchao computes with scales of at least 2^-126: below, its values are less exact than the format allows.
    return groups[groups.abs().amax(1) > 2.0**-110]


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


@pytest.mark.parametrize("name", TORCHAO_DIGESTS)
def test_mx_codes_of_all_magnitudes_are_those_that_torchao_made(name: str) -> None:
    encoded = make_codec(name).encode(bfloat16_numbers(), ROLE)
    made = encoded.array("scales").tobytes() + encoded.array("codes").tobytes()
    assert hashlib.sha256(made).hexdigest() == TORCHAO_DIGESTS[name]


@pytest.mark.parametrize("name", TORCHAO_TYPES)
def test_mx_codes_are_those_of_the_torchao_that_is_installed(name: str) -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    scales, codes = mx_tensor.to_mx(values, TORCHAO_TYPES[name], 32)
    encoded = make_codec(name).encode(values, ROLE)
    assert encoded.array("scales").tobytes() == scales.view(torch.uint8).numpy().tobytes()
    assert encoded.array("codes").tobytes() == codes.view(torch.uint8).numpy().tobytes()


def test_nf4_values_are_those_of_the_bitsandbytes_that_is_installed() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    values[:, ::64] = 4.0  # a scale that both types of scales hold
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(values, blocksize=64, quant_type="nf4"))
    encoded = make_codec("nf4").encode(values, ROLE)
    assert torch.equal(make_codec("nf4").decode(encoded, ROLE), theirs)
