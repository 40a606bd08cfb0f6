"""Windows: neither side waits for ever, and no more bytes are on the way than the window has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.wire.chunks import LARGEST_CHUNK, Refused
from fedsplit.wire.windows import SMALLEST_WINDOW, ReceiveWindow, SendWindow


@given(st.integers(SMALLEST_WINDOW, 8 * LARGEST_CHUNK), st.lists(st.integers(1, LARGEST_CHUNK), max_size=50))
def test_a_sender_never_waits_for_a_reader_who_is_done(size: int, sizes: list[int]) -> None:
    sender, reader = SendWindow(), ReceiveWindow(size)
    sender.add(reader.grant())
    for nbytes in sizes:
        assert sender.room == reader.outstanding <= size
        assert sender.room >= nbytes
        sender.spend(nbytes)
        reader.take(nbytes)
        sender.add(reader.grant())


@given(st.lists(st.integers(0, 3 * LARGEST_CHUNK), max_size=20))
def test_bytes_that_are_held_lessen_the_credit(held: list[int]) -> None:
    reader = ReceiveWindow(SMALLEST_WINDOW)
    reader.grant()
    for nbytes in held:
        reader.take(min(LARGEST_CHUNK, reader.outstanding))
        before = reader.outstanding
        assert reader.grant(nbytes) in (0, SMALLEST_WINDOW - nbytes - before)
        assert reader.outstanding <= max(before, SMALLEST_WINDOW - nbytes)


def test_bytes_beyond_the_window_are_refused() -> None:
    reader = ReceiveWindow(SMALLEST_WINDOW)
    reader.grant()
    reader.take(SMALLEST_WINDOW)
    with pytest.raises(Refused, match="1 bytes came where the window of 2097152 bytes had 0 left") as refused:
        reader.take(1)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
