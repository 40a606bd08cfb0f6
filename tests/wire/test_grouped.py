"""Whole numbers of 8 and 4 bits, and floats of 8 bits: numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.grouped import packed
from fedsplit.wire.packets import StepKey

ROLE = Role("activation", "up", StepKey(1, 0, 0))


def test_int8_divides_each_group_by_its_own_scale() -> None:
    """The first group has the scale 1, the second one 0.5."""
    tensor = torch.cat([torch.full((1, 64), 127.0), torch.full((1, 2), -63.5)], 1)
    tensor[0, 0] = 2.6
    encoded = make_codec("int8").encode(tensor, ROLE)
    assert encoded.array("codes")[0, [0, 1, 64]].tolist() == [3, 127, -127]
    scales = torch.from_numpy(encoded.array("scales")).view(torch.bfloat16)
    assert scales.tolist() == [1.0, 0.5]
    assert make_codec("int8").decode(encoded, ROLE)[0, [0, 1, 64]].tolist() == [3.0, 127.0, -63.5]


def test_int4_puts_two_numbers_into_a_byte() -> None:
    encoded = make_codec("int4").encode(torch.tensor([7.0, -7.0, 0.4]), ROLE)
    assert encoded.array("codes").tolist() == [15 | 1 << 4, 8]
    assert packed(torch.tensor([], dtype=torch.uint8)).tolist() == []


def test_few_integers_are_the_digits_of_a_byte() -> None:
    """Digits are the whole numbers and 1, the first one the lowest: 2, 0, 1, 1 and 2 in the base 3; then 1 alone."""
    encoded = make_codec("integers:1").encode(torch.tensor([4.0, -3.9, 0.1, -1.9, 2.1, 0.0]), ROLE)
    assert encoded.array("codes").tolist() == [2 + 1 * 9 + 1 * 27 + 2 * 81, 1]
    assert make_codec("integers:1").decode(encoded, ROLE).tolist() == [4.0, -4.0, 0.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("chain", "bits"),
    [
        ("raw", 32.0),
        ("bf16", 16.0),
        ("fp16", 16.0),
        ("fp8_e4m3", 8 + 16 / 256),
        ("fp8_e5m2", 8 + 16 / 256),
        ("int8", 8.25),
        ("int8s", 8.25),
        ("int4", 4.25),
        ("int4s", 4.25),
        ("integers:1", 8 * -(-16 * 256 // 5) / (16 * 256) + 0.25),
        ("integers:2", 8 * -(-16 * 256 // 3) / (16 * 256) + 0.25),
        ("integers:3", 4.25),
        ("nf4", 4.25),
        ("mxfp8", 8.25),
        ("mxfp4", 4.25),
        ("topk:0.25", 0.25 * 32 + 1),
        ("topk:0.01", 3 / 256 * (32 + 16)),
        ("lowrank:2", 2 * 32 * (16 + 256) / (16 * 256)),
        ("topk:0.25,int4", 0.25 * 4.25 + 1),
    ],
)
def test_the_bits_of_a_value_are_those_of_the_documentation(chain: str, bits: float) -> None:
    encoded = make_codec(chain).encode(torch.ones(16, 256), ROLE)
    assert encoded.nbytes * 8 / (16 * 256) == bits


def test_floats_of_8_bits_round_as_their_mantissa_says() -> None:
    """1.1 lies between 1 and 1.125 with three bits, and between 1 and 1.25 with two."""
    tensor = torch.tensor([[448.0, 1.1]])
    assert make_codec("fp8_e4m3").decode(make_codec("fp8_e4m3").encode(tensor, ROLE), ROLE)[0, 1] == 1.125
    tensor = torch.tensor([[57344.0, 1.1]])
    assert make_codec("fp8_e5m2").decode(make_codec("fp8_e5m2").encode(tensor, ROLE), ROLE)[0, 1] == 1.0
