"""Validators: the values that a setting may have, in words and as a test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fedsplit.settings.chains import chain_forms, chain_problem, parse_chain
from fedsplit.settings.choices import NETWORKS, PARTS, TRACKERS
from fedsplit.settings.parsing import (
    PARTITION_FORMS,
    find_partition,
    parse_cut,
    parse_labels,
    parse_memory,
    parse_quantization,
    parse_resources,
    parse_server,
    parse_stages,
    parse_weights,
)


@dataclass(frozen=True)
class Validator:
    """The values that a setting may have.

    Attributes:
        words: The values in words, for messages.
        test: Returns True for a possible value. Takes values of the setting's type only.
        explain: Returns words about one refused text, which say more than `words`; None if there are no such words.

    Example:
        >>> fraction = Validator("a number above 0, up to 1", lambda v: 0 < v <= 1)
        >>> fraction.test(0.5), fraction.test(2.0)
        (True, False)
    """

    words: str
    test: Callable[[Any], bool]
    explain: Callable[[str], str] | None = None


MOST = 2**31 - 1
"""Largest whole number of any setting but the seed. A larger count is surely a mistake."""

MOST_AT_ONCE = 2**16
"""Largest number of things that exist at the same time, such as sequences of a batch, or threads."""


MOST_TFLOPS = 1e6
"""Largest speed of a device, in units of 10^12 operations a second: an exaflop a second."""


def at_least(low: float, high: float = math.inf) -> Validator:
    """Allows finite numbers in [low, high].

    Example:
        >>> at_least(1, 4).words
        'a number from 1 to 4'
    """
    words = f"a number from {low:g} to {high:.10g}" if high < math.inf else f"a number of at least {low:g}"
    return Validator(words, lambda v: math.isfinite(v) and low <= v <= high)


def above(low: float) -> Validator:
    """Allows finite numbers larger than `low`."""
    return Validator(f"a finite number above {low:g}", lambda v: math.isfinite(v) and v > low)


def below(low: float, high: float) -> Validator:
    """Allows numbers in [low, high)."""
    return Validator(f"a number from {low:g} to below {high:g}", lambda v: low <= v < high)


def one_of(names: Collection[str]) -> Validator:
    """Allows a few names."""
    return Validator(" | ".join(names), lambda v: v in names)


def _is_warmup(value: float) -> bool:
    is_share = 0 <= value < 1
    is_number_of_steps = math.isfinite(value) and value >= 1 and value == int(value)
    return is_share or is_number_of_steps


def _are_ranks(values: Collection[int]) -> bool:
    return len(values) > 0 and all(1 <= rank <= 1024 for rank in values)


def _are_parts(values: Collection[str]) -> bool:
    without_repeats = set(values)
    return len(values) > 0 and len(without_repeats) == len(values) and without_repeats <= set(PARTS)


def _are_trackers(values: Collection[str]) -> bool:
    without_repeats = set(values)
    return len(without_repeats) == len(values) and without_repeats <= set(TRACKERS)


def _is_coefficient(value: float) -> bool:
    return value == -1 or (math.isfinite(value) and value >= 0)


def _are_gpus(names: Collection[str]) -> bool:
    without_repeats = set(names)
    return len(without_repeats) == len(names) and all(re.fullmatch(r"cuda:\d{1,3}", name) for name in names)


YES_OR_NO = Validator("true | false", lambda v: isinstance(v, bool))

ANYTHING = Validator("any text", lambda v: True)

TEXT = Validator("a text that is not empty", lambda v: bool(v.strip()))

FOLDER = Validator("a folder", lambda v: True)
"""A folder's name. Whether the folder exists is checked by the module that opens it."""

NAMES = Validator("names separated by commas", lambda v: all(name.strip() for name in v))

RANKS = Validator("whole numbers from 1 to 1024, separated by commas, or a file of them", _are_ranks)

COEFFICIENT = Validator("a number of at least 0, or -1 for what config.json says", _is_coefficient)

FRACTION = Validator("a number above 0, up to 1", lambda v: 0 < v <= 1)

RAY_ADDRESS = Validator(
    "local | auto | HOST:PORT; ray://HOST:PORT leads through a proxy, which every packet would have to pass: run the "
    "command inside the cluster, as by `ray job submit --address http://HOST:8265 -- python -m fedsplit.simulate "
    "--ray.address auto …`",
    lambda v: re.fullmatch(r"local|auto|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}", v) is not None,
)

SERVER = Validator("HOST:PORT, such as 127.0.0.1:50052", lambda v: v == "" or parse_server(v) is not None)

FILE = Validator("a file", lambda v: True)
"""A file's name. Whether the file exists is checked by the module that opens it."""

RESOURCES = Validator(
    "NAME=AMOUNT, separated by commas, such as CPU=1,GPU=0.5", lambda v: parse_resources(v) is not None
)

LABELS = Validator("KEY=VALUE, separated by commas, such as site=north", lambda v: parse_labels(v) is not None)

SHARES = Validator("parts among bottom,trunk,top", _are_parts)

TRACKED = Validator(f"trackers among {','.join(TRACKERS)}, each once", _are_trackers)

FIELDS = Validator("a JSON object of fields, or a .json file that holds one", lambda v: True)
"""A JSON object. `fedsplit.settings.documents` parses it, and refuses anything else, before the test is asked."""

NETWORK = Validator(
    f"{' | '.join(NETWORKS)}, or a TOML file of profiles", lambda v: v in ("", *NETWORKS) or v.startswith("{")
)
"""A network. Of a file, `fedsplit.settings.documents` keeps the content as one line of JSON."""

COMPUTE_TABLE = "seconds_a_token"
"""Table in a file of measured compute times."""

TABLES = Validator(
    f"a TOML file with a table {COMPUTE_TABLE}, as fedsplit network measure writes it",
    lambda v: v == "" or v.startswith("{"),
)
"""A TOML file of compute times, whose content `fedsplit.settings.documents` keeps as one line of JSON."""

WARMUP = Validator("a whole number of steps, or a share of them from 0 to below 1", _is_warmup)

CUT = Validator("LO:HI with 0 <= LO < HI, such as 1:5", lambda v: parse_cut(v) is not None)

STAGES = Validator(
    "LO:MID:HI with LO < MID < HI, such as 2:6:10, of two stages or more",
    lambda v: v == "" or parse_stages(v) is not None,
)

SPEED = "speed"
"""Value of `trunk.weights` for weights that are measured at the start of a run."""

REPLICA_WEIGHTS = Validator(
    "speed, or a number above 0 for each replica, such as 1,3",
    lambda v: v in ("", SPEED) or parse_weights(v) is not None,
)

MEMORY = Validator("bytes with a unit, such as 800MB, 1.5GB or 2GiB", lambda v: v == "" or parse_memory(v) is not None)

CACHE = Validator("bytes with a unit, such as 64MB or 1GiB", lambda v: parse_memory(v) is not None)

DEVICE = Validator("auto | cpu | cuda | cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)

OWN_DEVICE = Validator(DEVICE.words, lambda v: v == "" or DEVICE.test(v))

DEVICES = Validator(
    "auto | cuda:N,cuda:N and so on, each once",
    lambda v: v in ("", "auto") or (_are_gpus(v.split(","))),
)

QUANTIZATION = Validator(
    "PART:BITS, separated by commas, with parts among bottom,trunk,top and 4 or 8 bits, such as trunk:4,top:8",
    lambda v: parse_quantization(v) is not None,
)

PARTITION = Validator(PARTITION_FORMS, lambda v: find_partition(v) is not None)

CODEC = Validator(chain_forms(), lambda v: parse_chain(v) is not None, chain_problem)

WITHOUT_DELTA = "a chain as for wire.codec, without delta"


def _is_adapter_chain(value: str) -> bool:
    links = parse_chain(value)
    # A chain has delta in the first place or nowhere.
    return links is not None and links[0].name != "delta"


ADAPTER_CODEC = Validator(
    WITHOUT_DELTA, _is_adapter_chain, lambda v: WITHOUT_DELTA if parse_chain(v) else chain_problem(v)
)

ROLE_CODEC = Validator("a chain as for wire.codec", lambda v: v == "" or parse_chain(v) is not None, chain_problem)
