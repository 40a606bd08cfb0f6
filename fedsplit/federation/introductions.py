"""Introductions of clients: a client's number, name and parts, written by the client and checked by the server."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.corpora.shards import DataSize
from fedsplit.errors import printable
from fedsplit.federation import messages
from fedsplit.federation.messages import Reply
from fedsplit.federation.replies import check_types
from fedsplit.settings.choices import PARTS
from fedsplit.updates import Adapters, Layer, RefusedUpdate

LARGEST_COUNT = 2**53
"""Number of parameters above which an introduction is refused; a float holds every whole number up to it."""

LONGEST_NAME = 4096
"""Most characters in the name of a client."""

LONGEST_INTRODUCTION = 2**24
"""Most characters in an introduction; the layers of a model with 100 blocks take some 10**5."""


@dataclasses.dataclass(frozen=True)
class Introduction:
    """A client's introduction, read and checked.

    Attributes:
        client: Number of the client, as the client reports it. Nobody else knows the number.
        name: Owner of the client's data.
        parameters: Counts of parameters by part: {"bottom": {"total": …, "trainable": …}, "top": …}.
        start: Adapters that training starts from, by part. Only the first client has any.
        data: Size of the client's data, as the client reports it.
    """

    client: int
    name: str
    parameters: Mapping[str, Any]
    start: Mapping[str, Adapters]
    data: DataSize = dataclasses.field(default_factory=DataSize)


def about_of(introduced: Introduction) -> str:
    """Returns the JSON of an introduction, without the tensors."""
    about: dict[str, Any] = {
        "client": introduced.client,
        "name": introduced.name,
        "parameters": introduced.parameters,
        "data": dataclasses.asdict(introduced.data),
    }
    for part, adapters in introduced.start.items():
        about[part] = {layer: dataclasses.asdict(facts) for layer, facts in adapters.layers.items()}
    return json.dumps(about)


def introduce(introduced: Introduction) -> Reply:
    """Makes a client's reply to `fedsplit.federation.messages.Introduce`."""
    return messages.introduction(introduced.client, about_of(introduced), introduced.start)


def read_introduction(reply: Reply) -> Introduction:
    """Reads a client's introduction.

    Raises:
        RefusedUpdate: The reply is no introduction.
    """
    sender = "a client" if reply.client < 0 else f"client {reply.client}"  # the engine may not know who sent it
    try:
        if reply.malformed:
            raise ValueError(reply.malformed)
        introduced = _parsed(reply)
        if reply.client not in (-1, introduced.client):
            raise ValueError(f"it says that it is client {introduced.client}")
        return introduced
    # RecursionError comes from JSON with thousands of brackets.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RefusedUpdate) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedUpdate(f"{sender} introduced itself in a wrong form: {type(error).__name__}: {reason}") from error


def _parsed(reply: Reply) -> Introduction:
    """Parses an introduction.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError, RefusedUpdate: The reply is no introduction, or
            a value is not possible.
    """
    if len(reply.about) > LONGEST_INTRODUCTION:
        raise ValueError(f"it has {len(reply.about)} characters, more than {LONGEST_INTRODUCTION}")
    about = json.loads(reply.about)
    if not isinstance(about, dict):
        raise TypeError("it is no object")
    start = {}
    for part, tensors in reply.tensors.items():
        layers = about.pop(part)  # `pop`, so that only the common keys are left below
        start[part] = _start_of(part, layers, tensors)
    if about.keys() != {"client", "name", "parameters", "data"}:
        raise ValueError(f"it has {', '.join(map(str, sorted(about)))[:80]}, not client, name, parameters and data")

    client = about["client"]
    name = about["name"]
    # `type`, not `isinstance`: JSON's true and false are instances of int.
    if type(client) is not int or not 0 <= client < LARGEST_COUNT:
        raise TypeError("its client is no number")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise TypeError(f"its name is no text of 1 to {LONGEST_NAME} characters")
    parameters = _counts_of(about["parameters"])
    data = _size_of(about["data"])
    return Introduction(client, printable(name), parameters, start, data)


def _size_of(data: Any) -> DataSize:
    """Checks the size of a client's data.

    Raises:
        TypeError: The value has another form.
    """
    names = {field.name for field in dataclasses.fields(DataSize)}
    if not isinstance(data, dict) or data.keys() != names:
        raise TypeError("the size of its data is not told by train, held_out and classes")
    if not all(type(count) is int and 0 <= count < LARGEST_COUNT for count in data.values()):
        raise TypeError("the size of its data is not told in numbers from 0")
    return DataSize(**data)


def _counts_of(parameters: Any) -> Mapping[str, Mapping[str, int]]:
    """Checks counts of parameters by part.

    Raises:
        TypeError: The value has another form.
    """
    if not isinstance(parameters, dict) or not parameters.keys() <= {*PARTS}:
        raise TypeError("its parameters are not counted by part")
    for counts in parameters.values():
        if not isinstance(counts, dict) or counts.keys() != {"total", "trainable"}:
            raise TypeError("its parameters are not counted as total and trainable")
        if not all(type(count) is int and 0 <= count < LARGEST_COUNT for count in counts.values()):
            raise TypeError("its counts of parameters are no numbers from 0")
    return parameters


def _start_of(part: str, layers: Any, tensors: Mapping[str, Tensor]) -> Adapters:
    """Checks the adapters that a part starts from.

    Raises:
        ValueError, TypeError, RefusedUpdate: Layers and tensors do not fit each other.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part[:40]!r}")
    named = {name: _layer_of(name, facts) for name, facts in layers.items()}
    adapters = Adapters(dict(tensors), named)
    adapters.check_fits(adapters.tensors, f"its {part}")
    check_types(adapters.tensors, dict.fromkeys(tensors, torch.float32), f"its {part}")
    for layer in [*adapters.complete, *adapters.stacked]:
        a, b = adapters.factors(layer)
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"the factors of {layer} do not fit each other")
        rows = a.shape[0]  # the rank, times the number of experts
        if rows != b.shape[1] or rows % named[layer].experts:
            raise ValueError(f"the factors of {layer} do not fit each other")
    return adapters


def _layer_of(name: str, facts: Any) -> Layer:
    """Checks the constants of a layer.

    Raises:
        TypeError: A constant is missing, or has another type.
    """
    layer = Layer(**facts)
    is_number = type(layer.alpha) in (int, float) and math.isfinite(layer.alpha)
    is_count = type(layer.experts) is int and 0 < layer.experts < LARGEST_COUNT
    are_switches = type(layer.transposed) is bool and type(layer.rslora) is bool
    if not (is_number and is_count and are_switches and isinstance(layer.parameter, str)):
        raise TypeError(f"the constants of {name[:80]} have other types")
    return layer
