"""Network profiles: the link and the device of a client, and five named profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.errors import InputError, shortened


@dataclass(frozen=True)
class Profile:
    """Link and device of one client.

    Attributes:
        uplink_mbps: Bandwidth from the client to the trunk, in megabits a second (10^6 bits).
        downlink_mbps: Bandwidth from the trunk to the client, in megabits a second.
        rtt_ms: Round-trip time in milliseconds, without the time that the bytes of a message take.
        jitter_ms: Largest additional delay of one message, in milliseconds; each message draws from 0 to this.
        loss: Share of the packets that are lost and sent again.
        compute: Speed of the device as a multiple of the stated one; 0.5 takes twice as long.
        availability: Probability that the client takes part in a round for which it is asked.

    Example:
        >>> Profile(uplink_mbps=10, downlink_mbps=30, rtt_ms=20).uplink_bytes
        1250000.0
        >>> Profile(uplink_mbps=-1, downlink_mbps=30, rtt_ms=20)
        Traceback (most recent call last):
        fedsplit.errors.InputError: uplink_mbps: -1 is not possible; allowed: a number from 0.001 to 1,000,000
    """

    uplink_mbps: float
    downlink_mbps: float
    rtt_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0
    compute: float = 1.0
    availability: float = 1.0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            InputError: A field is not a number, or a number that is not possible.
        """
        for name in RANGES:
            value = getattr(self, name)
            # A boolean is an int in Python, and no number here.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not _is_in_range(name, value):
                raise InputError(f"{name}: {shortened(value)} is not possible; allowed: {words_of_range(name)}")

    @property
    def uplink_bytes(self) -> float:
        """Bandwidth to the trunk in bytes a second."""
        return self.uplink_mbps * BYTES_OF_A_MEGABIT

    @property
    def downlink_bytes(self) -> float:
        """Bandwidth from the trunk in bytes a second."""
        return self.downlink_mbps * BYTES_OF_A_MEGABIT

    def document(self) -> dict[str, float]:
        """Returns all fields as numbers of TOML and JSON."""
        return {name: float(value) for name, value in dataclasses.asdict(self).items()}


BYTES_OF_A_MEGABIT = 1e6 / 8
"""Bytes in a megabit."""

RANGES: Mapping[str, tuple[float, float]] = {
    "uplink_mbps": (0.001, 1e6),
    "downlink_mbps": (0.001, 1e6),
    "rtt_ms": (0, 3_600_000),
    "jitter_ms": (0, 3_600_000),
    "loss": (0, 0.99),
    "compute": (0.0001, 10_000),
    "availability": (0, 1),
}
"""Least and largest value of each field of a profile. An availability of 0 is not possible either: such a client would
be no client."""


def _is_in_range(name: str, value: float) -> bool:
    """Returns True if a number is a possible value of a field. NaN is possible nowhere."""
    low, high = RANGES[name]
    return low <= value <= high and not (name == "availability" and value == 0)


def words_of_range(name: str) -> str:
    """Returns the possible values of a field in words.

    Example:
        >>> words_of_range("rtt_ms"), words_of_range("availability")
        ('a number from 0 to 3,600,000', 'a number above 0, up to 1')
    """
    low, high = RANGES[name]
    if name == "availability":
        return f"a number above 0, up to {high:g}"
    return f"a number from {low:g} to {high:,.10g}"


PROFILES: Mapping[str, Profile] = {
    # Gigabit Ethernet in one building. Assumption: half a millisecond through two switches.
    "lan": Profile(uplink_mbps=1000, downlink_mbps=1000, rtt_ms=0.5, jitter_ms=0.1),
    # A wireless LAN in front of a fast line. Assumption: the airtime is the bottleneck, equal in both directions.
    "wifi": Profile(uplink_mbps=100, downlink_mbps=100, rtt_ms=5, jitter_ms=5, loss=0.001),
    # The profile "LTE" of WebPageTest: 12 Mbit/s both ways, 70 ms. Jitter and loss are assumptions.
    "4g": Profile(uplink_mbps=12, downlink_mbps=12, rtt_ms=70, jitter_ms=20, loss=0.005),
    # A household's asymmetric line: 10 Mbit/s up, 30 down. Latency, jitter and loss are assumptions.
    "home": Profile(uplink_mbps=10, downlink_mbps=30, rtt_ms=20, jitter_ms=5, loss=0.001),
    # Sites on two continents: 100 Mbit/s. Assumption: 100 ms, the time of light through 20,000 km of fibre.
    "wan": Profile(uplink_mbps=100, downlink_mbps=100, rtt_ms=100, jitter_ms=5, loss=0.0005),
}
"""Named profiles. Values without a source are stated assumptions; docs/network.md has the reasons."""
