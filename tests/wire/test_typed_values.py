"""Declared types as bytes: every value comes back to the bit, and nothing else is taken."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from declared_values import plain, values
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.tensor_files import tensors_as_bytes
from fedsplit.wire.typed_values import MalformedValue, as_bytes, form_of, from_bytes


@dataclass(frozen=True)
class Inner:
    kind: Literal["up", "down"]
    weight: Tensor
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outer:
    number: int
    share: float
    is_last: bool
    words: str
    inner: Inner | None
    by_client: Mapping[int, Mapping[str, Tensor]]
    several: tuple[Inner, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


@given(values(Outer))
def test_every_value_comes_back_to_the_bit(value: Outer) -> None:
    form = form_of(Outer)
    assert plain(from_bytes(form, as_bytes(form, value))) == plain(value)


def raw(header: Any, *tensors: Tensor) -> bytes:
    text = json.dumps(header).encode()
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    return struct.pack("<I", len(text)) + text + tensors_as_bytes(named)


INNER = {"kind": "up", "weight": 0, "names": []}


@pytest.mark.parametrize(
    ("hint", "data", "words"),
    [
        (int, raw(True), "the value is True, not a whole number"),
        (int, raw(1.0), "the value is 1.0, not a whole number"),
        (float, raw(1), "the value is 1, not a number"),
        (bool, raw(0), "the value is 0, not true or false"),
        (str, raw(None), "the value is None, not a text"),
        (type(None), raw(0), "the value is 0, not null"),
        (str, raw(["x" * 99]), "…, not a text"),
        (tuple[int, ...], raw({"0": 1}), "not a list"),
        (tuple[int, ...], raw([0, "1"]), r"the value\[1\] is '1', not a whole number"),
        (dict[int, int], raw({"1": 2}), "not a list of names and values"),
        (dict[int, int], raw([[1, 2, 3]]), "not a list of names and values"),
        (dict[int, int], raw([["1", 2]]), "a name in the value is '1', not a whole number"),
        (dict[int, int], raw([[1, 2], [1, 3]]), "the value has 1 twice"),
        (Inner, raw({**INNER, "kind": "left"}, torch.ones(1)), "Inner.kind is 'left', not one of up, down"),
        (Inner, raw({**INNER, "weight": 1}, torch.ones(1)), "Inner.weight is 1, not the number of a tensor"),
        (Inner, raw({**INNER, "weight": -1}, torch.ones(1)), "Inner.weight is -1, not the number of a tensor"),
        (Inner, raw({**INNER, "weight": False}, torch.ones(1)), "Inner.weight is False, not the number of a tensor"),
        (Inner, raw({"kind": "up", "weight": 0}, torch.ones(1)), "not the fields of a Inner"),
        (Inner, raw({**INNER, "more": 1}, torch.ones(1)), "not the fields of a Inner"),
        (Inner, raw(INNER, torch.ones(1), torch.ones(1)), "1 tensors came that no field names"),
        (tuple[Tensor, ...], raw([0, 0], torch.ones(1)), r"the value\[1\] is 0, not the number of a tensor"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_in_a_line_that_names_it(hint: Any, data: bytes, words: str) -> None:
    with pytest.raises(MalformedValue, match=words) as refused:
        from_bytes(form_of(hint), data)
    assert "\n" not in str(refused.value)


@given(st.binary(max_size=64))
def test_bytes_of_a_stranger_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedValue):
        from_bytes(form_of(Outer), data)


@given(values(Outer), st.integers(0, 10**9), st.binary(max_size=4))
def test_bytes_that_changed_on_the_way_end_in_no_other_error(value: Outer, at: int, instead: bytes) -> None:
    data = as_bytes(form_of(Outer), value)
    at %= len(data)
    try:
        found = from_bytes(form_of(Outer), data[:at] + instead + data[at + len(instead) + 1 :])
    except MalformedValue as refused:
        assert "\n" not in str(refused)  # any other error fails the test
    else:
        assert isinstance(found, Outer)


def test_deep_nesting_is_refused() -> None:
    text = b"[" * 10**5
    with pytest.raises(MalformedValue):
        from_bytes(form_of(int), struct.pack("<I", len(text)) + text + tensors_as_bytes({}))


def test_tensors_that_share_memory_cross_apart() -> None:
    form = form_of(tuple[Tensor, ...])
    both = torch.arange(4.0)
    first, second = from_bytes(form, as_bytes(form, (both[:3], both[1:])))
    first += 1
    assert second.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("value", [True, 3, 0.5, "a text"])
def test_a_value_of_several_plain_types_keeps_its_type(value: Any) -> None:
    form = form_of(bool | int | float | str)
    back = from_bytes(form, as_bytes(form, value))
    assert back == value and type(back) is type(value)
    with pytest.raises(MalformedValue, match="not true or false or a whole number"):
        from_bytes(form_of(bool | int), as_bytes(form, "a text"))


@pytest.mark.parametrize("hint", [object, list[int], tuple[int, str], int | Tensor, set[int], Any], ids=str)
def test_a_type_without_a_form_is_refused_at_once(hint: Any) -> None:
    with pytest.raises(TypeError, match="have no form as bytes"):
        form_of(hint)
