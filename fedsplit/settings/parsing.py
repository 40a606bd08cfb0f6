"""Settings that are written in a form of their own: memory, cut, quantisation, partition."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import SettingError
from fedsplit.settings.choices import PARTS

PARTITION_FORMS = (
    "auto | natural[:COLUMN] | iid | dirichlet:ALPHA[:COLUMN] | inner-dirichlet:ALPHA:SIZE,SIZE,…[:COLUMN] "
    "| pathological:N[:COLUMN] | shard:N[:COLUMN] | linear | square | exponential | size:SIZE,SIZE,…"
)
"""Forms of `--partition`, in words."""


def parse_memory(value: str) -> int | None:
    """Bytes; units are powers of 1000, those with an i of 1024."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", value)
    if found is None or len(value) > 20:
        return None
    power = "kMGT".index(found[2]) + 1
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    return size or None


@dataclass(frozen=True)
class PartitionSpec:
    """A way to deal data out, read from `--partition`.

    Attributes:
        kind: "auto", "natural", "iid", "dirichlet", "inner-dirichlet", "pathological", "shard", "linear", "square",
            "exponential" or "size".
        alpha: The concentration of the Dirichlet kinds.
        number: The classes of a pathological client, or the shards of each client.
        sizes: Sequences a client, of "size" and "inner-dirichlet".
        column: The column whose values are dealt by; empty for the usual one.
    """

    kind: str
    alpha: float = 0.0
    number: int = 0
    sizes: tuple[int, ...] = ()
    column: str = ""


_PARTITIONS: Mapping[str, tuple[str, ...]] = {
    "auto": (),
    "natural": ("column",),
    "iid": (),
    "dirichlet": ("alpha", "column"),
    "inner-dirichlet": ("alpha", "sizes", "column"),
    "pathological": ("number", "column"),
    "shard": ("number", "column"),
    "linear": (),
    "square": (),
    "exponential": (),
    "size": ("sizes",),
}
"""What follows the name of each, between colons; the column may be left out."""


def find_partition(value: str) -> PartitionSpec | None:
    """Reads a way to deal data out; None where there is no such way."""
    kind, *given = value.split(":")
    wanted = _PARTITIONS.get(kind)
    if wanted is None or not len(wanted) - ("column" in wanted) <= len(given) <= len(wanted) or "" in given:
        return None
    found: dict[str, Any] = dict(zip(wanted, given, strict=False))
    try:
        if "alpha" in found:
            found["alpha"] = float(found["alpha"])
        if "number" in found:
            found["number"] = int(found["number"])
        if "sizes" in found:
            found["sizes"] = tuple(int(size) for size in found["sizes"].split(","))
    except ValueError:
        return None
    possible = math.isfinite(found.get("alpha", 1.0)) and found.get("alpha", 1.0) > 0 and found.get("number", 1) > 0
    return PartitionSpec(kind, **found) if possible and min(found.get("sizes", (1,))) > 0 else None


def parse_partition(value: str) -> PartitionSpec:
    """Reads a way to deal data out.

    Raises:
        SettingError: There is no such way.
    """
    spec = find_partition(value)
    if spec is None:
        raise SettingError("partition", value, PARTITION_FORMS)
    return spec


def parse_cut(value: str) -> tuple[int, int] | None:
    """LO and HI; None where it is no cut."""
    low, colon, high = value.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal()) or len(value) > 20 or int(low) >= int(high):
        return None
    return int(low), int(high)


def parse_quantization(value: str) -> dict[str, int] | None:
    """Bits by part, in the order of the parts."""
    found = [re.fullmatch(rf"({'|'.join(PARTS)}):([48])", item) for item in value.split(",")] if value else []
    bits = {match[1]: int(match[2]) for match in found if match}
    return {part: bits[part] for part in PARTS if part in bits} if len(bits) == len(found) else None
