"""The blocks of each stage, and what is exact between them."""

from __future__ import annotations

import pytest

from fedsplit.settings.documents import build
from fedsplit.settings.sections import WireSettings
from fedsplit.trunk.spans import Span, spans_of
from fedsplit.wire.casting import BFloat16, Raw

WIRE = WireSettings(codec="bf16")


def test_a_trunk_in_one_piece_is_one_span_with_the_runs_codec() -> None:
    config = build({"cut": "1:5"})
    (span,) = spans_of(config)
    assert span == Span(1, 5) and span.config(config) == config
    assert {type(one) for one in span.codec(WIRE, seed=0).codecs.values()} == {BFloat16}


def test_every_block_is_in_one_stage_and_no_stage_has_stages() -> None:
    config = build({"cut": "0:6", "trunk.stages": "0:1:3:6"})
    spans = spans_of(config)
    assert [(span.low, span.high) for span in spans] == [(0, 1), (1, 3), (3, 6)]
    for span in spans:
        own = span.config(config)
        assert own.bounds == (span.low, span.high) and spans_of(own) == [Span(span.low, span.high)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_only_towards_clients_the_runs_codec_is_used(number: int) -> None:
    codec = spans_of(build({"cut": "0:6", "trunk.stages": "0:1:3:6"}))[number].codec(WIRE, seed=0)
    towards_clients = [
        {("activation", "up"), ("gradient", "down")},
        set(),
        {("activation", "down"), ("gradient", "up")},
    ][number]
    for place, one in codec.codecs.items():
        assert type(one) is (BFloat16 if place in towards_clients else Raw)
