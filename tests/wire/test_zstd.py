"""Compression without loss, and packets that would grow beyond bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.encoded import ARRAY_TYPES, Encoded, MalformedPacket
from fedsplit.wire.packets import StepKey

ROLE = Role("activation", "up", StepKey(1, 0, 0), most=1000)
FLOAT32 = ARRAY_TYPES.index("float32")


def packet(data: bytes, *form: int) -> Encoded:
    header = {"dtype": "float32", "form.values": form}
    return Encoded({"values": np.frombuffer(data, np.uint8)}, header)


def test_values_that_resemble_each_other_take_fewer_bytes() -> None:
    tensor = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    encoded = make_codec("zstd").encode(tensor, ROLE)
    assert encoded.nbytes < 0.95 * tensor.nbytes  # the exponents
    assert torch.equal(make_codec("zstd").decode(encoded, ROLE), tensor)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    assert len(bomb) < 2**13
    for size in (2**24, 1000):  # an honest header, and one that lies
        with pytest.raises(MalformedPacket):
            make_codec("zstd").decode(packet(bomb, FLOAT32, size), ROLE)


def test_a_stream_without_a_size_is_refused() -> None:
    """Its size shows only when it is decompressed."""
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(MalformedPacket, match="not of 40 bytes"):
        make_codec("zstd").decode(packet(compressor.compress(bytes(40)), FLOAT32, 10), ROLE)


@pytest.mark.parametrize("form", [(), (99, 10), (FLOAT32, 11), (FLOAT32, 2, 6)])
def test_a_form_that_does_not_fit_is_refused(form: tuple[int, ...]) -> None:
    data = zstandard.ZstdCompressor().compress(bytes(40))
    assert make_codec("zstd").decode(packet(data, FLOAT32, 2, 5), ROLE).shape == (2, 5)
    with pytest.raises(MalformedPacket):
        make_codec("zstd").decode(packet(data, *form), ROLE)
    with pytest.raises(MalformedPacket):
        make_codec("zstd").decode(packet(data + b"more", FLOAT32, 10), ROLE)
