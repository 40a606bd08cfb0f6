"""Parsers of settings with a special form: memory, cut, stages, quantisation, partition."""

from __future__ import annotations

import itertools
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
    """Parses a size in memory.

    Returns:
        The size in bytes; None if the text is no size, or less than a byte.

    Example:
        >>> parse_memory("1.5GB"), parse_memory("2kiB"), parse_memory("2")
        (1500000000, 2048, None)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", value)
    if match is None or len(value) > 20:  # more digits than any memory has
        return None
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    power = "kMGT".index(prefix) + 1
    size = int(float(number) * base**power)
    return size or None


def parse_resources(value: str) -> dict[str, float] | None:
    """Parses resources of a Ray actor.

    Returns:
        Amounts by name; None if the text is something else.

    Example:
        >>> parse_resources("CPU=2,GPU=0.5"), parse_resources(""), parse_resources("GPU=-1")
        ({'CPU': 2.0, 'GPU': 0.5}, {}, None)
    """
    found: dict[str, float] = {}
    for item in filter(None, value.split(",")):
        match = re.fullmatch(r"\s*([A-Za-z_][\w.:-]{0,99})\s*=\s*(\d{1,9}(?:\.\d{1,4})?)\s*", item)
        if match is None or match[1] in found:
            return None
        found[match[1]] = float(match[2])
    return found


def parse_labels(value: str) -> dict[str, str] | None:
    """Parses labels that a node of a Ray cluster must have.

    Returns:
        Values by key; None if the text is something else.

    Example:
        >>> parse_labels("site=north,zone=2"), parse_labels(""), parse_labels("north")
        ({'site': 'north', 'zone': '2'}, {}, None)
    """
    found: dict[str, str] = {}
    for item in filter(None, value.split(",")):
        match = re.fullmatch(r"\s*([\w./-]{1,100})\s*=\s*([\w.-]{1,100})\s*", item)
        if match is None or match[1] in found:
            return None
        found[match[1]] = match[2]
    return found


@dataclass(frozen=True)
class PartitionSpec:
    """A rule that divides a data set among clients, parsed from `--partition`.

    Attributes:
        kind: "auto", "natural", "iid", "dirichlet", "inner-dirichlet", "pathological", "shard", "linear", "square",
            "exponential" or "size".
        alpha: Concentration of the Dirichlet distribution, for "dirichlet" and "inner-dirichlet".
        number: Classes of a client for "pathological", shards of a client for "shard".
        sizes: Number of sequences of each client, for "size" and "inner-dirichlet".
        column: Column whose values group the rows; empty for the column of owners or classes.
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
"""Arguments that follow the name of each rule, between colons. The column may be left out."""


def find_partition(value: str) -> PartitionSpec | None:
    """Parses a rule that divides data; returns None if there is no such rule.

    Example:
        >>> find_partition("dirichlet:0.3:topic").alpha
        0.3
    """
    kind, *texts = value.split(":")
    names = _PARTITIONS.get(kind)
    if names is None or "" in texts:
        return None
    required = len(names) - ("column" in names)  # the column, always the last, may be left out
    if not required <= len(texts) <= len(names):
        return None

    arguments: dict[str, Any] = dict(zip(names, texts, strict=False))
    try:
        if "alpha" in arguments:
            arguments["alpha"] = float(arguments["alpha"])
        if "number" in arguments:
            arguments["number"] = int(arguments["number"])
        if "sizes" in arguments:
            arguments["sizes"] = tuple(int(size) for size in arguments["sizes"].split(","))
    except ValueError:
        return None

    # Arguments that the rule does not have get a possible value.
    alpha = arguments.get("alpha", 1.0)
    number = arguments.get("number", 1)
    sizes = arguments.get("sizes", (1,))
    is_possible = 0 < alpha < math.inf and number > 0 and min(sizes) > 0
    return PartitionSpec(kind, **arguments) if is_possible else None


def parse_partition(value: str) -> PartitionSpec:
    """Parses a rule that divides data.

    Raises:
        SettingError: There is no such rule.
    """
    spec = find_partition(value)
    if spec is None:
        raise SettingError("partition", value, PARTITION_FORMS)
    return spec


def parse_cut(value: str) -> tuple[int, int] | None:
    """Parses a cut into LO and HI; returns None if the text is no cut.

    Example:
        >>> parse_cut("1:5"), parse_cut("5:1")
        ((1, 5), None)
    """
    low, colon, high = value.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal()):  # `isdigit` takes ² for a digit, `int` does not
        return None
    if len(value) > 20 or int(low) >= int(high):  # int() raises an error for thousands of digits
        return None
    return int(low), int(high)


def parse_stages(value: str) -> tuple[int, ...] | None:
    """Parses the bounds of a trunk's stages; returns None if the text has no two stages.

    Example:
        >>> parse_stages("2:6:10"), parse_stages("2:10"), parse_stages("6:2:10")
        ((2, 6, 10), None, None)
    """
    numbers = value.split(":")
    are_numbers = all(number.isdecimal() and len(number) <= 6 for number in numbers)  # no model has 10**6 blocks
    if len(numbers) < 3 or not are_numbers:
        return None
    bounds = tuple(map(int, numbers))
    rises = all(low < high for low, high in itertools.pairwise(bounds))
    return bounds if rises else None


def parse_server(value: str) -> tuple[str, int] | None:
    """Parses the address of a server into host and port; returns None if the text is no address.

    Example:
        >>> parse_server("127.0.0.1:50052"), parse_server("[::1]:50052"), parse_server("trunk.example")
        (('127.0.0.1', 50052), ('::1', 50052), None)
    """
    match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", value, re.ASCII)
    if match is None or not 1 <= int(match[2]) <= 65535:
        return None
    return match[1].strip("[]"), int(match[2])


def parse_weights(value: str) -> tuple[float, ...] | None:
    """Parses weights; returns None if a weight is no number above 0.

    Example:
        >>> parse_weights("1,2.5"), parse_weights("1,0")
        ((1.0, 2.5), None)
    """
    try:
        weights = tuple(float(weight) for weight in value.split(","))
    except ValueError:
        return None
    return weights if all(math.isfinite(weight) and weight > 0 for weight in weights) else None


def parse_quantization(value: str) -> dict[str, int] | None:
    """Parses the bits of quantised parts.

    Returns:
        Bits by part, in the order of the parts; None if the text is malformed, or names a part twice.

    Example:
        >>> parse_quantization("top:8,trunk:4")
        {'trunk': 4, 'top': 8}
    """
    if not value:
        return {}
    bits = {}
    for item in value.split(","):
        match = re.fullmatch(rf"({'|'.join(PARTS)}):([48])", item)
        if match is None or match[1] in bits:
            return None
        bits[match[1]] = int(match[2])
    return {part: bits[part] for part in PARTS if part in bits}
