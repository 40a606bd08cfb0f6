"""What a codec has encoded: its bytes, its form, and what is no such thing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedsplit.wire.encoded import MOST_ARRAYS, MOST_FACTS, Encoded, MalformedPacket, check_encoded

MANY_FACTS = {str(number): number for number in range(MOST_FACTS)}
VALUES = np.zeros((2, 3), np.float32)
GOOD: dict[str, Any] = {"arrays": {"values": VALUES}, "header": {"dtype": "float32"}}


def test_the_bytes_are_those_of_all_arrays_and_of_nothing_else() -> None:
    encoded = Encoded({"values": VALUES, "places": np.zeros(5, np.int16)}, {"dtype": "float32", "shape": (2, 3)})
    assert encoded.nbytes == 2 * 3 * 4 + 5 * 2
    check_encoded("hidden", encoded)


def test_what_a_codec_asks_for_is_there_or_is_said_to_be_missing() -> None:
    encoded = Encoded(**GOOD)
    assert encoded.array("values") is VALUES and encoded.fact("dtype", str) == "float32"
    with pytest.raises(MalformedPacket, match="no array 'places'"):
        encoded.array("places")
    for name in ("dtype", "shape"):
        with pytest.raises(MalformedPacket, match=f"header's '{name}' is not of type tuple"):
            encoded.fact(name, tuple)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"arrays": [VALUES]}, "arrays and facts by name"),
        ({"arrays": {0: VALUES}}, "arrays and facts by name"),
        ({"arrays": {str(number): VALUES for number in range(MOST_ARRAYS + 1)}}, f"up to {MOST_ARRAYS} arrays"),
        ({"arrays": {"values": [1.0]}}, "a list, not an array"),
        ({"arrays": {"values": np.zeros(2, object)}}, "1 dimensions of object"),
        ({"arrays": {"values": np.zeros((1, 1, 1, 1))}}, "4 dimensions"),
        ({"header": {}}, "does not say what type"),
        (
            {"header": {"dtype": "float32", **MANY_FACTS}},
            f"up to {MOST_FACTS} arrays and facts",
        ),
        ({"header": {"dtype": "x" * 65}}, "a str as 'dtype'"),
        ({"header": {"dtype": "float32", "more": [1]}}, "a list as 'more'"),
        ({"header": {"dtype": "float32", "more": (-1,)}}, "a tuple as 'more'"),
        ({"header": {"dtype": "float32", "more": 2**64}}, "a int as 'more'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_another_form_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedPacket, match=f"hidden of a packet.*{words}"):
        check_encoded("hidden", Encoded(**{**GOOD, **wrong}))
