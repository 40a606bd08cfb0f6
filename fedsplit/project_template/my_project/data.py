"""The clients' data: the logs of four weather stations, made up here. Put your own data in their place."""

from __future__ import annotations

import random

STATIONS = {"coast": "fog", "forest": "rain", "hills": "snow", "plain": "sun"}
"""The usual weather of each station, which is a client."""

DAYS = 400


def load() -> dict[str, list[str]]:
    """Returns the texts of each client by the client's name.

    A list of dicts of values by column, or a data set of the library `datasets`, would do as well.
    """
    return {station: _log(station, usual) for station, usual in STATIONS.items()}


def _log(station: str, usual: str) -> list[str]:
    """Returns one text a day."""
    # A generator of its own: the texts are the same in every process.
    chance = random.Random(station)
    entries = []
    for day in range(1, DAYS + 1):
        weather = usual if chance.random() < 0.7 else chance.choice(["cloud", "wind", "frost"])
        degrees = chance.randint(-5, 25)
        entries.append(f"Day {day} at the {station}: {weather} in the morning, {degrees} degrees at noon.")
    return entries
