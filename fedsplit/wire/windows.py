"""Windows: how many bytes one side of a stream may send before the other side has taken them.

Each side gives the other credit. A reader that is slow, or has much to do, gives none. So the reader's own stream
waits, and no other.
"""

from __future__ import annotations

from fedsplit.wire.chunks import LARGEST_CHUNK, Refused

SMALLEST_WINDOW = 2 * LARGEST_CHUNK
"""Fewest bytes of a window: a whole chunk must fit in, however the credit is divided."""

_SHARE = 4
"""A reader gives credit once a quarter of the window can be given. A message for every chunk would cost more."""


class SendWindow:
    """Credit that the peer has given.

    Example:
        >>> window = SendWindow()
        >>> window.add(100)
        >>> window.spend(30)
        >>> window.room
        70
    """

    def __init__(self) -> None:
        """Has no credit yet."""
        self.room = 0

    def add(self, credit: int) -> None:
        """Notes credit that has come."""
        self.room += credit

    def spend(self, nbytes: int) -> None:
        """Notes bytes that are sent."""
        self.room -= nbytes


class ReceiveWindow:
    """Credit that this side gives.

    Example:
        >>> window = ReceiveWindow(SMALLEST_WINDOW)
        >>> window.grant() == SMALLEST_WINDOW
        True
        >>> window.take(1000)
        >>> window.grant()  # the peer has enough
        0
    """

    def __init__(self, size: int) -> None:
        """Has given no credit yet.

        Args:
            size: Most bytes that the peer may have sent, and that are not done with.
        """
        assert size >= SMALLEST_WINDOW
        self._size = size
        self._granted = 0
        self._taken = 0

    @property
    def outstanding(self) -> int:
        """Bytes that the peer may still send."""
        return self._granted - self._taken

    def take(self, nbytes: int) -> None:
        """Notes bytes that have come.

        Raises:
            Refused: The peer had no credit for the bytes.
        """
        if nbytes > self.outstanding:
            words = f"{nbytes} bytes came where the window of {self._size} bytes had {self.outstanding} left"
            raise Refused("RESOURCE_EXHAUSTED", words)
        self._taken += nbytes

    def grant(self, held: int = 0) -> int:
        """Returns the bytes of further credit for the peer; 0 if the credit would be too small for a message.

        Args:
            held: Bytes that have come, and that this side is not done with.
        """
        credit = self._size - held - self.outstanding
        if credit < self._size // _SHARE:
            return 0
        self._granted += credit
        return credit
