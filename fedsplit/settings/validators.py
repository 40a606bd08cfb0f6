"""Validators: the values that a setting may have, in words and as a test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fedsplit.settings.choices import PARTS
from fedsplit.settings.parsing import PARTITION_FORMS, find_partition, parse_cut, parse_memory, parse_quantization


@dataclass(frozen=True)
class Validator:
    """The values that a setting may have.

    Attributes:
        words: The values in words, for messages.
        test: Returns whether a value is among them.
    """

    words: str
    test: Callable[[Any], bool]


MOST = 2**31 - 1
"""The largest whole number of any setting but the seed: what counts more than this is a mistake."""

MOST_AT_ONCE = 2**16
"""The largest number of what is held or started at the same time, such as sequences of a batch, or threads."""


def at_least(low: float, high: float = math.inf) -> Validator:
    """A finite number in [low, high]."""
    words = f"a number from {low:g} to {high:.10g}" if high < math.inf else f"a number of at least {low:g}"
    return Validator(words, lambda v: math.isfinite(v) and low <= v <= high)


def above(low: float) -> Validator:
    """A finite number larger than `low`."""
    return Validator(f"a finite number above {low:g}", lambda v: math.isfinite(v) and v > low)


def below(low: float, high: float) -> Validator:
    """A number in [low, high)."""
    return Validator(f"a number from {low:g} to below {high:g}", lambda v: low <= v < high)


def _is_warmup(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))


def one_of(names: Collection[str]) -> Validator:
    """One of a few names."""
    return Validator(" | ".join(names), lambda v: v in names)


YES_OR_NO = Validator("true | false", lambda v: isinstance(v, bool))


ANYTHING = Validator("any text", lambda v: True)


TEXT = Validator("a text that is not empty", lambda v: bool(v.strip()))


RANKS = Validator(
    "whole numbers from 1 to 1024, separated by commas, or a file of them",
    lambda v: v != () and all(1 <= rank <= 1024 for rank in v),
)


COEFFICIENT = Validator(
    "a number of at least 0, or -1 for what config.json says", lambda v: v == -1 or (math.isfinite(v) and v >= 0)
)


SHARES = Validator("parts among bottom,trunk,top", lambda v: v != () and len({*v}) == len(v) and {*v} <= {*PARTS})


FIELDS = Validator("a JSON object of fields, or a .json file that holds one", lambda v: True)


NAMES = Validator("names separated by commas", lambda v: all(name.strip() for name in v))


WARMUP = Validator("a whole number of steps, or a share of them from 0 to below 1", _is_warmup)


CUT = Validator("LO:HI with 0 <= LO < HI, such as 1:5", lambda v: parse_cut(v) is not None)


MEMORY = Validator("bytes with a unit, such as 800MB, 1.5GB or 2GiB", lambda v: v == "" or parse_memory(v) is not None)


DEVICE = Validator("auto | cpu | cuda | cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)


OWN_DEVICE = Validator(DEVICE.words, lambda v: v == "" or DEVICE.test(v))


QUANTIZATION = Validator(
    "PART:BITS, separated by commas, with parts among bottom,trunk,top and 4 or 8 bits, such as trunk:4,top:8",
    lambda v: parse_quantization(v) is not None,
)


PARTITION = Validator(PARTITION_FORMS, lambda v: find_partition(v) is not None)
