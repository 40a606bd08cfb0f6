"""Headers: form of a decoded tensor, and one encoded tensor within another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.wire.casting import Raw
from fedsplit.wire.codecs import Role
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.headers import Form, array_in, decoded_part, form_in, form_of, matrix_of, nested, part_of
from fedsplit.wire.packets import StepKey

ROLE = Role("gradient", "up", StepKey(1, 0, 0), most=12)


def test_a_form_returns_from_its_header() -> None:
    form = form_of(torch.zeros(2, 3, 2, dtype=torch.bfloat16), ROLE)
    assert form == Form(torch.bfloat16, (2, 3, 2)) and (form.rows, form.width, form.count) == (6, 2, 12)
    assert form_in(Encoded({}, form.header()), ROLE) == form
    assert Form(torch.float32, ()).width == Form(torch.float32, ()).rows == 1


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"dtype": "int64", "shape": (2,)}, "no floating-point type"),
        ({"dtype": "float32"}, "'shape' is not of type tuple"),
        ({"dtype": "float32", "shape": (13,)}, "more than 12 values"),
    ],
)
def test_a_header_without_a_possible_form_is_refused(header: dict[str, object], words: str) -> None:
    with pytest.raises(MalformedPacket, match=words):
        form_in(Encoded({}, header), ROLE)  # type: ignore[arg-type]


def test_a_matrix_has_a_row_for_each_token() -> None:
    assert matrix_of(torch.zeros(2, 3, 5)).shape == (6, 5)
    assert matrix_of(torch.tensor(1.0)).shape == (1, 1)
    assert matrix_of(torch.zeros(2, 0, 5)).shape == (0, 5)


def test_an_array_of_another_type_or_shape_is_refused() -> None:
    encoded = Encoded({"codes": np.zeros((2, 3), np.int8)})
    assert array_in(encoded, "codes", np.int8, 2, 3).shape == (2, 3)
    for kind, shape in ((np.uint8, (2, 3)), (np.int8, (3, 2)), (np.int8, (6,))):
        with pytest.raises(MalformedPacket, match="the array 'codes' is"):
            array_in(encoded, "codes", kind, *shape)


def test_a_part_returns_from_the_whole() -> None:
    part = Raw().encode(torch.ones(2, 3), ROLE)
    arrays, facts = nested({"left": part, "leftmost": Raw().encode(torch.zeros(1), ROLE)})
    whole = Encoded(arrays, facts)
    assert part_of(whole, "left").header == part.header
    assert torch.equal(decoded_part(whole, "left", Raw(), ROLE, (2, 3)), torch.ones(2, 3))
    with pytest.raises(MalformedPacket, match=r"the part 'left' is \(2, 3\)"):
        decoded_part(whole, "left", Raw(), ROLE, (3, 2))
