"""What clients say of themselves: it comes back, or it is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.corpora.shards import DataSize
from fedsplit.federation.introductions import Introduction, introduce, read_introduction
from fedsplit.federation.messages import ADAPTERS
from fedsplit.updates import Adapters, Layer, RefusedUpdate

START = Adapters({"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)})
COUNTS = {"bottom": {"total": 9, "trainable": 2}}
SIZE = DataSize(train=12, held_out=3, classes=2)
FACTS = asdict(SIZE)
LAYERS = {"l": asdict(START.layers["l"])}


def test_introductions_come_back() -> None:
    introduced = Introduction(4, "Ann", COUNTS, {"top": START}, SIZE)
    back = read_introduction(introduce(introduced))
    assert (back.client, back.name, back.parameters, back.data) == (4, "Ann", COUNTS, SIZE)
    assert list(back.start) == ["top"]
    assert back.start["top"].layers == START.layers
    assert all(torch.equal(tensor, back.start["top"].tensors[name]) for name, tensor in START.tensors.items())
    assert read_introduction(introduce(Introduction(4, "Ann", {}, {}))).start == {}


@pytest.mark.parametrize(
    "about",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        json.dumps({"client": [4], "parameters": {}, "name": "Ann", "top": {}, "data": FACTS}),
        json.dumps({"client": True, "parameters": {}, "name": "Ann", "top": {}, "data": FACTS}),
        json.dumps({"client": 4, "parameters": 3, "name": "Ann", "top": {}, "data": FACTS}),
        json.dumps({"client": 4, "parameters": {}, "top": {}, "data": FACTS}),
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "data": FACTS}),  # nothing of the top's layers
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "top": {"l": {"size": 3}}, "data": FACTS}),
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "top": LAYERS}),  # nothing of the data
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "top": LAYERS, "data": {**FACTS, "train": -1}}),
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "top": LAYERS, "data": {**FACTS, "train": True}}),
        json.dumps({"client": 4, "parameters": {}, "name": "Ann", "top": LAYERS, "data": {"train": 3}}),
    ],
    ids=lambda about: about[:80],
)
def test_an_introduction_in_a_wrong_form_is_refused(about: str) -> None:
    good = introduce(Introduction(4, "Ann", {}, {"top": START}))
    with pytest.raises(RefusedUpdate, match=r"^client 4 introduced itself in a wrong form: ") as caught:
        read_introduction(replace(good, about=about))
    assert "\n" not in str(caught.value)


def test_an_introduction_whose_tensors_cannot_be_read_is_refused() -> None:
    good = introduce(Introduction(4, "Ann", {}, {"top": START}))
    with pytest.raises(RefusedUpdate, match="introduced itself in a wrong form: ValueError: x is no array"):
        read_introduction(replace(good, malformed="x is no array"))
    assert ADAPTERS not in good.tensors


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = (
    ("client",),
    ("name",),
    ("parameters",),
    ("parameters", "bottom"),
    ("parameters", "bottom", "total"),
    ("parameters", "bottom", "more"),
    ("data",),
    ("data", "train"),
    ("data", "more"),
    ("top",),
    ("top", "l"),
    ("top", "x"),
    *(("top", "l", name) for name in ("alpha", "transposed", "rslora", "experts", "parameter", "more")),
    ("bottom",),
    ("more",),
)


@settings(max_examples=100)
@given(place=st.sampled_from(PLACES), value=JSON, removed=st.booleans())
def test_whatever_an_introduction_says_it_is_one_or_is_refused(
    place: tuple[str, ...], value: Any, removed: bool
) -> None:
    good = introduce(Introduction(4, "Ann", COUNTS, {"top": START}, SIZE))
    about = json.loads(good.about)
    owner = about
    for name in place[:-1]:
        owner = owner[name]
    if removed:
        owner.pop(place[-1], None)
    else:
        owner[place[-1]] = value
    try:
        found = read_introduction(replace(good, about=json.dumps(about)))
    except RefusedUpdate as refused:
        assert str(refused).startswith("client 4 introduced itself in a wrong form: ")
        assert "\n" not in str(refused) and len(str(refused)) < 400
        return
    assert found.client == 4 and found.name.isprintable() and len(found.name) <= 4096
    assert all(type(count) is int for counts in found.parameters.values() for count in counts.values())
    assert all(
        type(count) is int and count >= 0 for count in (found.data.train, found.data.held_out, found.data.classes)
    )
    for adapters in found.start.values():
        for layer in adapters.layers:
            if layer in adapters.complete:
                assert math.isfinite(adapters.scaling(layer))


@pytest.mark.parametrize(
    "tensors",
    [
        {"top": {"l.lora_A.weight": torch.full((2, 3), math.nan), "l.lora_B.weight": torch.zeros(4, 2)}},
        {"top": {"l.lora_A.weight": torch.ones(2, 3).double(), "l.lora_B.weight": torch.zeros(4, 2)}},
        {"top": {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.zeros(4, 3)}},
        {"top": {"l.lora_A.weight": torch.ones(2), "l.lora_B.weight": torch.zeros(4, 2)}},
        {"top": {"l.lora_A.weight": "ones"}},
        {"../top": {}},
    ],
    ids=["nan", "float64", "ranks", "dimensions", "text", "another part"],
)
def test_an_introduction_with_a_start_that_cannot_be_is_refused(tensors: dict[str, Any]) -> None:
    good = introduce(Introduction(4, "Ann", COUNTS, {"top": START}, SIZE))
    with pytest.raises(RefusedUpdate, match=r"^client 4 introduced itself in a wrong form: "):
        read_introduction(replace(good, tensors=tensors))


def test_a_client_that_introduces_itself_as_another_is_refused_by_its_own_number() -> None:
    other = introduce(Introduction(4, "Ann", COUNTS, {}))
    with pytest.raises(RefusedUpdate, match=r"^client 2 introduced itself .*: it says that it is client 4$"):
        read_introduction(replace(other, client=2))
    assert read_introduction(replace(other, client=-1)).client == 4  # a node whose client is not known yet


def test_a_name_reaches_the_screen_in_one_line() -> None:
    back = read_introduction(introduce(Introduction(4, "Ann\n\x1b[31m", COUNTS, {})))
    assert back.name == "Ann  [31m"
