"""What values a setting may take, and the error of one that is not among them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

ENGINES = ("ray", "local")

SCHEDULES = ("shared", "batched", "accumulate", "copies", "frozen", "forward-only")


ORDERS = ("random", "cyclic")


CODECS = {"raw": "fedsplit.wire.casting:Raw", "bf16": "fedsplit.wire.casting:BFloat16"}
"""Codecs by name: module and class, which `fedsplit.wire.codecs.make_codec` imports."""


KERNELS = ("fused", "library")


DTYPES = ("fp32", "bf16", "fp16")


OPTIMIZERS = ("adamw", "sgd", "adamw8bit")


RATES = ("constant", "linear", "cosine")


OPTIMIZER_STATES = ("reset", "keep")


WEIGHTS = ("examples", "tokens", "equal")


PARTS = ("bottom", "trunk", "top")


FORMATS = ("auto", "text", "completion", "chat", "classification")


PACKING = ("auto", "true", "false")


PROMPTED = ("prompt", "ptuning", "prefix")
PROMPTS = ("off", *PROMPTED)


STARTS = ("random", "vocab", "text", "zero")


ENCODERS = ("mlp", "lstm")


HEADS = ("frozen", "lora", "full")


class InputError(Exception):
    """Something that the user asked for wrongly; the message is the one line to show."""


class SettingError(InputError):
    """A setting with a value that is not possible.

    Attributes:
        setting: The setting's dotted name, as in TOML and flags.
        value: What was given.
        allowed: What could have been given instead.
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting}: {value} is not possible; allowed: {allowed}")
        self.setting, self.value, self.allowed = setting, value, allowed

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, object, str]]:
        return SettingError, (self.setting, self.value, self.allowed)


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an error's message, or the name of its class where it has none.

    Example:
        >>> first_line(OSError("disk is full\nat block 7")), first_line(MemoryError())
        ('disk is full', 'MemoryError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_of(value: object) -> str:
    """Returns the type of a value in words, for messages.

    Example:
        >>> kind_of(3), kind_of(int)
        ('an object of type int', 'the class int')
    """
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


@dataclass(frozen=True)
class Allowed:
    """What values a setting may take, in words and as a test."""

    words: str
    test: Callable[[Any], bool]


MOST = 2**31 - 1
"""The largest whole number of any setting but the seed: what counts more than this is a mistake."""

MOST_AT_ONCE = 2**16
"""The largest number of what is held or started at the same time, such as sequences of a batch, or threads."""


def at_least(low: float, high: float = math.inf) -> Allowed:
    """A finite number in [low, high]."""
    words = f"a number from {low:g} to {high:.10g}" if high < math.inf else f"a number of at least {low:g}"
    return Allowed(words, lambda v: math.isfinite(v) and low <= v <= high)


def above(low: float) -> Allowed:
    """A finite number larger than `low`."""
    return Allowed(f"a finite number above {low:g}", lambda v: math.isfinite(v) and v > low)


def below(low: float, high: float) -> Allowed:
    """A number in [low, high)."""
    return Allowed(f"a number from {low:g} to below {high:g}", lambda v: low <= v < high)


def _is_warmup(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))


def one_of(names: Collection[str]) -> Allowed:
    """One of a few names."""
    return Allowed(" | ".join(names), lambda v: v in names)


YES_OR_NO = Allowed("true | false", lambda v: isinstance(v, bool))


ANYTHING = Allowed("any text", lambda v: True)


TEXT = Allowed("a text that is not empty", lambda v: bool(v.strip()))


RANKS = Allowed(
    "whole numbers from 1 to 1024, separated by commas, or a file of them",
    lambda v: v != () and all(1 <= rank <= 1024 for rank in v),
)


COEFFICIENT = Allowed(
    "a number of at least 0, or -1 for what config.json says", lambda v: v == -1 or (math.isfinite(v) and v >= 0)
)


SHARES = Allowed("parts among bottom,trunk,top", lambda v: v != () and len({*v}) == len(v) and {*v} <= {*PARTS})


FIELDS = Allowed("a JSON object of fields, or a .json file that holds one", lambda v: True)


NAMES = Allowed("names separated by commas", lambda v: all(name.strip() for name in v))


WARMUP = Allowed("a whole number of steps, or a share of them from 0 to below 1", _is_warmup)


CUT = Allowed("LO:HI with 0 <= LO < HI, such as 1:5", lambda v: parse_cut(v) is not None)


MEMORY = Allowed("bytes with a unit, such as 800MB, 1.5GB or 2GiB", lambda v: v == "" or parse_memory(v) is not None)


DEVICE = Allowed("auto | cpu | cuda | cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)


OWN_DEVICE = Allowed(DEVICE.words, lambda v: v == "" or DEVICE.test(v))


QUANTIZATION = Allowed(
    "PART:BITS, separated by commas, with parts among bottom,trunk,top and 4 or 8 bits, such as trunk:4,top:8",
    lambda v: parse_quantization(v) is not None,
)


PARTITION = Allowed(
    "auto | natural[:COLUMN] | iid | dirichlet:ALPHA[:COLUMN] | inner-dirichlet:ALPHA:SIZE,SIZE,…[:COLUMN] "
    "| pathological:N[:COLUMN] | shard:N[:COLUMN] | linear | square | exponential | size:SIZE,SIZE,…",
    lambda v: _parse_partition(v) is not None,
)


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


def _parse_partition(value: str) -> PartitionSpec | None:
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
    spec = _parse_partition(value)
    if spec is None:
        raise SettingError("partition", value, PARTITION.words)
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
