"""Every field of a packet, with every kind of spoil: the step is refused, and the others learn as without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_local import config_of
from torch import Tensor

from fedsplit.optimization.clipping import coefficient
from fedsplit.trunk.local import LocalTrunk
from fedsplit.wire.casting import EXACT
from fedsplit.wire.encoded import Encoded
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import RefusedStep

ROWS, LENGTH, WIDTH = 2, 3, 32
CLIP = 1.0

Spoil = Callable[[Packet], Packet]


def values(client: int, step: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(100 * client + 10 * step + len(kind))
    return torch.randn(ROWS, LENGTH, WIDTH, generator=generator)


def packet(client: int, step: int, kind: str) -> Packet:
    """Returns an honest packet; hidden states come with a mask."""
    tensors = {kind: EXACT.encode(values(client, step, kind))}
    if kind == "hidden":
        mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        mask[0, -1] = False
        tensors["mask"] = EXACT.encode(mask)
    return Packet(StepKey(1, client, step, run="run"), tensors, incarnation="first")


def exchange(trunk: LocalTrunk, sent: Packet, spoil: Spoil | None = None) -> Packet:
    """Sends a packet; one that is spoilt first, which must be refused by the trunk's own error, in one line."""
    if spoil is not None:
        spoilt = spoil(sent)
        with pytest.raises(RefusedStep) as refused:
            trunk.send(spoilt)()
        words = str(refused.value)
        assert words and "\n" not in words and len(words) < 600
    return trunk.send(sent)()


def scale(trunk: LocalTrunk, sent: Packet, answer: Packet, spoil: Spoil | None = None) -> None:
    """Sends a step's clipping coefficient, as the trunk waits for it."""
    squared = float(EXACT.decode(answer.tensors["norm"]))
    value = EXACT.encode(torch.tensor(coefficient(squared, CLIP), dtype=torch.float64))
    exchange(trunk, replace(sent, key=sent.clipping_key, tensors={"coefficient": value}), spoil)


def train(trunk: LocalTrunk, spoils: Mapping[str, Spoil], clip: bool = False) -> list[Tensor]:
    """Has two clients make two steps each; client 1 spoils packets of its first step before it sends the right ones."""
    for step in range(2):
        for client in range(2):
            spoil = spoils.get if client == 1 and step == 0 else lambda kind: None
            exchange(trunk, packet(client, step, "hidden"), spoil("hidden"))
            gradient = packet(client, step, "gradient")
            answer = exchange(trunk, gradient, spoil("gradient"))
            if clip:
                scale(trunk, gradient, answer, spoil("coefficient"))
    trunk.end_round([0, 1])
    copies = [copy.adapters for _, copy in sorted(trunk.copies([0, 1]).items())]
    adapters = [tensor for adapters in (trunk.read(), *copies) for tensor in adapters.tensors.values()]
    return [*adapters, *trunk.moments().values()]


def trunk_of(tiny_models: dict[str, Path], schedule: str = "shared", clip: bool = False) -> LocalTrunk:
    settings = {"clients": 2, "rounds": 3, "train__batch_size": ROWS, "train__accumulation": 2}
    return LocalTrunk(
        config_of(tiny_models, trunk__schedule=schedule, train__clip=CLIP if clip else 0.0, **settings), "run"
    )


Undisturbed = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def undisturbed(tiny_models: dict[str, Path]) -> Undisturbed:
    """Returns what honest clients leave, by schedule and clipping."""
    found: dict[tuple[str, bool], list[Tensor]] = {}

    def numbers(schedule: str = "shared", clip: bool = False) -> list[Tensor]:
        if (schedule, clip) not in found:
            found[schedule, clip] = train(trunk_of(tiny_models, schedule, clip), {}, clip)
        return found[schedule, clip]

    return numbers


# -------------------- plain fields


def with_key(**changes: Any) -> Spoil:
    return lambda sent: replace(sent, key=replace(sent.key, **changes))


def with_fields(**changes: Any) -> Spoil:
    return lambda sent: replace(sent, **changes)


NOT_COUNTS: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "a fraction": 0.5,
    "huge": 10**400,
    "negative": -1,
    "text": "one",
    "none": None,
    "list": [1],
}
COUNTS = ("round", "client", "step", "attempt", "micro", "batch")
TOO_MANY = {"round": 4, "client": 2, "micro": 7, "batch": 7}
TEXTS: dict[str, Any] = {
    "long": "x" * 10**6,
    "another": "another",
    "bytes": b"run",
    "none": None,
    "number": 3,
    "list": [],
}


def fields() -> Iterator[Any]:
    for name in COUNTS:
        for kind, value in NOT_COUNTS.items():
            yield pytest.param(with_key(**{name: value}), id=f"key.{name}-{kind}")
    for name, value in TOO_MANY.items():
        yield pytest.param(with_key(**{name: value}), id=f"key.{name}-too large")
    for kind, value in TEXTS.items():
        yield pytest.param(with_key(run=value), id=f"key.run-{kind}")
        yield pytest.param(with_fields(incarnation=value), id=f"incarnation-{kind}")
        if kind != "another":  # it would be that of a session
            yield pytest.param(with_key(session=value), id=f"key.session-{kind}")
    for name in ("micros", "batches"):
        for kind, value in {**NOT_COUNTS, "zero": 0, "too many": 9}.items():
            yield pytest.param(with_fields(**{name: value}), id=f"{name}-{kind}")
    for name in ("training", "wants_gradient", "learns"):
        for kind, value in {"number": 1, "text": "yes", "none": None, "nan": math.nan}.items():
            yield pytest.param(with_fields(**{name: value}), id=f"{name}-{kind}")
    for kind, value in NOT_COUNTS.items():
        if kind != "a fraction":
            yield (
                pytest.param(with_fields(wait=value), id=f"wait-{kind}")
                if kind != "negative"
                else pytest.param(with_fields(wait="soon"), id="wait-soon")
            )
            yield pytest.param(with_fields(shape=value), id=f"shape-{kind}")
    for kind, value in {"texts": ("a",), "negative": (-1,), "long": (1,) * 10**5, "fractions": (0.5,)}.items():
        yield pytest.param(with_fields(shape=value), id=f"shape-{kind}")
    for kind, value in {"list": [], "none": None, "text": "hidden"}.items():
        yield pytest.param(with_fields(tensors=value), id=f"tensors-{kind}")
    yield pytest.param(with_fields(tensors={}, shape=(ROWS + 1, LENGTH, WIDTH)), id="shape-more sequences")
    yield pytest.param(with_fields(tensors={}, shape=(ROWS, 10**6, WIDTH)), id="shape-more positions")
    yield pytest.param(with_fields(key=None), id="key-none")


@pytest.mark.parametrize("spoil", fields())
def test_a_field_that_cannot_be_is_refused_and_changes_nothing(
    spoil: Spoil, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    expected = undisturbed()
    found = train(trunk_of(tiny_models), {"hidden": spoil, "gradient": spoil})
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, -0.1, 1.1, 1e30, "full", None, [1.0]], ids=str)
def test_a_rate_that_cannot_be_is_refused_and_changes_nothing(
    rate: Any, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    """It counts with the gradient."""
    expected = undisturbed()
    found = train(trunk_of(tiny_models), {"gradient": with_fields(rate=rate)})
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


# -------------------- tensors


def with_tensor(name: str, change: Callable[[Tensor], Any]) -> Spoil:
    def spoil(sent: Packet) -> Packet:
        tensor = EXACT.decode(sent.tensors[name]).clone()
        changed = change(tensor)
        encoded = EXACT.encode(changed) if isinstance(changed, Tensor) else changed
        return replace(sent, tensors={**sent.tensors, name: encoded})

    return spoil


def in_one_place(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def lying(**header: Any) -> Callable[[Tensor], Encoded]:
    return lambda tensor: Encoded(EXACT.encode(tensor).arrays, {"dtype": "float32", **header})


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "nan": in_one_place(math.nan),
    "inf": in_one_place(math.inf),
    "-inf": in_one_place(-math.inf),
    "1e30": in_one_place(1e30),
    "all 1e30": lambda tensor: torch.full_like(tensor, 1e30),
    "more sequences": lambda tensor: torch.cat([tensor, tensor]),
    "more positions": lambda tensor: tensor.repeat(1, 20, 1),
    "wider": lambda tensor: tensor.repeat(1, 1, 2),
    "flat": lambda tensor: tensor.flatten(1),
    "a scalar": lambda tensor: tensor.sum(),
    "empty": lambda tensor: tensor[:0],
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "text": lambda tensor: "a tensor",
    "none": lambda tensor: None,
    "an array": lambda tensor: tensor.numpy(),
    "objects": lambda tensor: Encoded({"values": np.array([None])}, {"dtype": "float32"}),
    "no array": lambda tensor: Encoded({}, {"dtype": "float32"}),
    "no header": lambda tensor: Encoded(EXACT.encode(tensor).arrays, {}),
    "another type": lying(dtype="int64"),
    "no type": lying(dtype="tensor"),
    "a scale of nan": lying(scale=math.nan),
    "a scale of 0": lying(scale=0.0),
    "a tiny scale": lying(scale=1e-300),
    "a scale of text": lying(scale="1"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("schedule", ["shared", "copies", "accumulate", "frozen"])
def test_tensors_that_cannot_be_are_refused_and_change_nothing(
    schedule: str, kind: str, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    expected = undisturbed(schedule)
    spoils = {name: with_tensor(name, TENSORS[kind]) for name in ("hidden", "gradient")}
    found = train(trunk_of(tiny_models, schedule), spoils)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_batch_has_no_more_sequences_than_the_settings_say(
    tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    """With a mask or without one."""
    larger = {"hidden": EXACT.encode(torch.ones(ROWS + 1, LENGTH, WIDTH))}
    found = train(trunk_of(tiny_models), {"hidden": with_fields(tensors=larger)})
    assert all(torch.equal(one, other) for one, other in zip(undisturbed(), found, strict=True))


MASKS: dict[str, Callable[[Tensor], Any]] = {
    "shorter": lambda mask: mask[:, :-1],
    "of one sequence": lambda mask: mask[:1],
    "flat": lambda mask: mask.flatten(),
    "of numbers": lambda mask: mask.float(),
    "of integers": lambda mask: mask.long(),
    "text": lambda mask: "all",
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_cannot_be_is_refused_and_changes_nothing(
    kind: str, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    expected = undisturbed()
    found = train(trunk_of(tiny_models), {"hidden": with_tensor("mask", MASKS[kind])})
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def with_more(name: str, tensor: Tensor) -> Spoil:
    return lambda sent: replace(sent, tensors={**sent.tensors, name: EXACT.encode(tensor)})


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("hidden", "norm", torch.tensor(1.0)),
        ("hidden", "routers", torch.ones(1)),
        ("hidden", "routers", torch.ones(9)),
        ("hidden", "weights", torch.ones(1)),
        ("gradient", "norm", torch.tensor(1.0)),
        ("gradient", "hidden", torch.ones(ROWS, LENGTH, WIDTH)),
        ("gradient", "mask", torch.ones(ROWS, LENGTH, dtype=torch.bool)),
        ("gradient", "routers", torch.ones(0)),
        ("gradient", "routers", torch.ones(4)),
        ("coefficient", "gradient", torch.ones(ROWS, LENGTH, WIDTH)),
        ("coefficient", "norm", torch.tensor(1.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_nobody_asked_for_are_refused(
    kind: str, name: str, tensor: Tensor, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    clip = kind == "coefficient"
    expected = undisturbed(clip=clip)
    found = train(trunk_of(tiny_models, clip=clip), {kind: with_more(name, tensor)}, clip)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


COEFFICIENTS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda value: value * math.nan,
    "inf": lambda value: value + math.inf,
    "-inf": lambda value: value - math.inf,
    "1e30": lambda value: value + 1e30,
    "larger than honest": lambda value: value * 1.01,
    "negative": lambda value: -value,
    "two": lambda value: torch.stack([value, value]),
    "a list of one": lambda value: value[None],
    "none at all": lambda value: value[None][:0],
    "an integer": lambda value: value.long(),
    "text": lambda value: "1.0",
}


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_a_coefficient_that_cannot_be_is_refused_and_changes_nothing(
    kind: str, tiny_models: dict[str, Path], undisturbed: Undisturbed
) -> None:
    expected = undisturbed(clip=True)
    spoils = {"coefficient": with_tensor("coefficient", COEFFICIENTS[kind])}
    found = train(trunk_of(tiny_models, clip=True), spoils, clip=True)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
