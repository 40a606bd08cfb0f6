"""The contract of all codecs. A new codec joins with one line in `CONTRACTS`: a chain, and the bound of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fedsplit.settings.chains import parse_chain
from fedsplit.settings.choices import CODECS
from fedsplit.wire.codecs import Codec, Role, copy_of_state, make_codec
from fedsplit.wire.encoded import Encoded, MalformedPacket, check_encoded
from fedsplit.wire.packets import StepKey

Bound = Callable[[Tensor], Tensor]
"""Returns the largest possible error of each value (rows, width) of a tensor in float32."""


def relative(share: float, least: float = 0.0) -> Bound:
    """Error as a share of the value, or as a share of the row's largest magnitude for small values."""
    return lambda x: torch.maximum(x.abs() * share, largest(x, None) * least + 2.0**-126)


def grouped(share: float, size: int | None = 64) -> Bound:
    """Error as a share of the largest magnitude of the group."""
    return lambda x: largest(x, size) * share + 2.0**-126


def largest(x: Tensor, size: int | None) -> Tensor:
    """Largest magnitude of each value's group."""
    groups = x.split(size or max(1, x.shape[1]), 1)
    return torch.cat([group.abs().amax(1, keepdim=True).expand_as(group) for group in groups], 1)


def whole(x: Tensor) -> Tensor:
    """Error of any size up to the tensor's norm: what does not cross, and what a small rank cannot hold."""
    return (x.double().norm() * 1.01).float().expand_as(x)


UP = 1 + 2.0**-7  # a scale is rounded up to bfloat16
CONTRACTS: dict[str, Bound] = {
    "raw": torch.zeros_like,
    "bf16": relative(2**-8),
    "fp16": lambda x: torch.maximum(x.abs() * 2**-11, x.abs().max() * 2**-39 + 2.0**-126),
    "fp8_e4m3": relative(2**-4, UP * 2**-10 / 448),
    "fp8_e5m2": relative(2**-3, UP * 2**-17 / 57344),
    "int8": grouped(UP * 0.5001 / 127),
    "int8s": grouped(UP * 1.0001 / 127),
    "int4": grouped(UP * 0.5001 / 7),
    "int4s": grouped(UP * 1.0001 / 7),
    "integers:1": grouped(UP * 0.5001),
    "integers:3": grouped(UP * 0.5001 / 3),
    "nf4": grouped(UP * 0.1520),
    "mxfp8": grouped(2**-3, 32),
    "mxfp4": grouped(2**-2, 32),
    "zstd": torch.zeros_like,
    "topk:0.3": whole,
    "lowrank:2": whole,
    "delta": relative(2**-22),  # the sum of prediction and difference is rounded
    "int8,zstd:1": grouped(UP * 0.5001 / 127),
    "topk:0.2,int8,zstd": whole,
    "lowrank:3,bf16": whole,
    "delta:0.05,int4s,zstd": grouped(UP * 1.0001 / 7),
    "delta:0.05,integers:2,zstd": grouped(UP * 0.5001 / 2),
    "delta,topk:0.5,int8": whole,
    "delta,lowrank:2,int8,zstd": whole,
}

EVERY = pytest.mark.parametrize("chain", CONTRACTS)
SHAPES = [(2, 3, 70), (4, 64), (1,), (), (3, 1), (0, 5), (2, 0, 3)]


def codec_for(chain: str) -> Codec:
    return make_codec(chain, seed=1, cache=10**6)


def role_of(
    step: int = 0,
    kind: Literal["activation", "gradient"] = "gradient",
    direction: Literal["up", "down"] = "up",
    round: int = 1,
    examples: tuple[int, ...] = (),
    **facts: Any,
) -> Role:
    return Role(kind, direction, StepKey(round, 0, step), examples=examples, **facts)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(codec: Codec, tensor: Tensor, role: Role) -> Tensor:
    """Encodes and decodes a tensor, as one side does for its own state."""
    encoded = codec.encode(tensor, role)
    check_encoded("hidden", encoded)
    # Arrays out of Ray's store are read-only.
    arrived = {name: np.frombuffer(array.tobytes(), array.dtype) for name, array in encoded.arrays.items()}
    shaped = {name: array.reshape(encoded.arrays[name].shape) for name, array in arrived.items()}
    return codec.decode(Encoded(shaped, encoded.header), role)


def same(one: Encoded, two: Encoded) -> bool:
    facts = one.header == two.header and one.arrays.keys() == two.arrays.keys()
    return facts and all(one.arrays[name].tobytes() == two.arrays[name].tobytes() for name in one.arrays)


def test_every_codec_of_the_table_is_here() -> None:
    links = [link for chain in CONTRACTS for link in parse_chain(chain) or ()]
    assert {link.name for link in links} == set(CODECS)


@EVERY
@settings(max_examples=15, deadline=None)
@given(values=arrays.arrays(np.float32, (3, 70), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_the_error_stays_within_the_bound(chain: str, values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    decoded = through(codec_for(chain), tensor, role_of())
    error = (decoded.double() - tensor.double()).abs()
    assert bool((error <= CONTRACTS[chain](tensor).double()).all())


@EVERY
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-130, 1e-20, 1e30])
def test_values_of_any_size_stay_within_the_bound(chain: str, size: float) -> None:
    tensor = normal(4, 70) * size
    decoded = through(codec_for(chain), tensor, role_of())
    assert bool(((decoded.double() - tensor.double()).abs() <= CONTRACTS[chain](tensor).double()).all())


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_of_every_shape_and_type_return(chain: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for role in (role_of(kind="activation", dtype=dtype), role_of(dtype=torch.float32)):
        tensor = torch.zeros(shape, dtype=dtype)
        decoded = through(codec_for(chain), tensor, role)
        assert decoded.dtype == dtype and decoded.shape == tensor.shape
        assert not decoded.any()


@EVERY
def test_a_gradient_by_float16_hidden_states_arrives_as_float32(chain: str) -> None:
    """Also a gradient far below the smallest number of float16."""
    tensor = normal(2, 3, 70) * 1e-12
    decoded = through(codec_for(chain), tensor, role_of(dtype=torch.float16))
    assert decoded.dtype == torch.float32
    bound = CONTRACTS[chain](tensor.view(6, 70)) + tensor.abs().max() * 2**-10
    assert bool(((decoded - tensor).abs().view(6, 70) <= bound).all()) and bool(decoded.any())


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 69, 139])
def test_what_is_not_finite_never_becomes_finite(chain: str, value: float, place: int) -> None:
    tensor = normal(2, 70)
    tensor.view(-1)[place] = value
    assert not bool(through(codec_for(chain), tensor, role_of()).isfinite().all())
    sender, receiver = codec_for(chain), codec_for(chain)
    for step, sent in enumerate((normal(1, 2, 70), tensor[None])):  # where the receiver knows the example
        role = role_of(step, examples=(3,))
        decoded = receiver.decode(sender.encode(sent, role), role)
    assert not bool(decoded.isfinite().all())


@EVERY
def test_a_view_of_a_larger_tensor_is_encoded_as_its_values_are(chain: str) -> None:
    view = normal(70, 6, 2)[:, :, 0].T
    assert not view.is_contiguous()
    assert same(codec_for(chain).encode(view, role_of()), codec_for(chain).encode(view.contiguous(), role_of()))
    needs_gradient = view.clone().requires_grad_()
    assert not through(codec_for(chain), needs_gradient, role_of()).requires_grad


def epochs(rounds: int = 3) -> list[tuple[Tensor, Role]]:
    """Tensors of some rounds, in which the same examples cross again, a little moved."""
    steps = []
    for round in range(1, rounds + 1):
        for step in range(2):
            examples = (2 * step, 2 * step + 1)
            tensor = normal(2, 3, 70, seed=step) + 0.02 * normal(2, 3, 70, seed=10 * round + step)
            steps.append((tensor, role_of(step, round=round, examples=examples)))
    return steps


@EVERY
def test_a_repeated_step_is_encoded_and_decoded_to_the_same_bits(chain: str) -> None:
    """An answer may be lost, and a packet sent again."""
    once, again, receiver = codec_for(chain), codec_for(chain), codec_for(chain)
    for tensor, role in epochs():
        first = once.encode(tensor, role)
        arrived = receiver.decode(first, role)
        for _ in range(2):
            assert same(first, again.encode(tensor, role))
            assert torch.equal(receiver.decode(first, role), arrived)


@EVERY
def test_evaluations_leave_no_trace(chain: str) -> None:
    once, measured = codec_for(chain), codec_for(chain)
    for tensor, role in epochs():
        evaluation = replace(role, training=False)
        through(measured, tensor * 3, evaluation)
        assert same(once.encode(tensor, role), measured.encode(tensor, role))


@EVERY
def test_state_that_is_saved_and_restored_goes_on_to_the_same_bits(chain: str) -> None:
    """Each round begins with new codecs; and an attempt that failed changes nothing."""
    sender, receiver = codec_for(chain), codec_for(chain)
    straight, arrived = [], []
    for tensor, role in epochs():
        if role.key.step == 0:  # as the trunk does between rounds
            sender.restore(sender.state())
            receiver.restore(receiver.state())
        straight.append(sender.encode(tensor, role))
        arrived.append(receiver.decode(straight[-1], role))
    kept: tuple[Any, Any] = ({}, {})
    for number, (tensor, role) in enumerate(epochs()):
        if role.key.step == 0:
            sender, receiver = codec_for(chain), codec_for(chain)
            for codec, state in zip((sender, receiver), kept, strict=True):
                codec.restore(state)
            failed = replace(role, key=replace(role.key, attempt=0))
            receiver.decode(sender.encode(tensor * 2, failed), failed)
        role = replace(role, key=replace(role.key, attempt=1))
        sent = sender.encode(tensor, role)
        assert same(sent, straight[number]), (number, sent.header)
        assert torch.equal(receiver.decode(sent, role), arrived[number])
        kept = tuple({client: copy_of_state(own) for client, own in c.state().items()} for c in (sender, receiver))
    for state in kept:
        assert all(name.startswith("gradient/up/") for own in state.values() for name in own)


def encoded_of(chain: str) -> tuple[Encoded, Role]:
    role = role_of(most=6 * 70)
    return codec_for(chain).encode(normal(2, 3, 70), role), role


@EVERY
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_was_damaged_is_refused_or_becomes_a_tensor_of_no_larger_size(chain: str, data: st.DataObject) -> None:
    encoded, role = encoded_of(chain)
    changed_arrays, header = dict(encoded.arrays), dict(encoded.header)
    name = data.draw(st.sampled_from(sorted(changed_arrays)))
    array = changed_arrays[name]
    match data.draw(st.sampled_from(["missing", "truncated", "bytes", "type", "fact", "no fact"])):
        case "missing":
            del changed_arrays[name]
        case "truncated":
            changed_arrays[name] = array.reshape(-1)[: data.draw(st.integers(0, array.size - 1))]
        case "bytes":
            damaged = bytearray(array.tobytes())
            place = data.draw(st.integers(0, len(damaged) - 1))
            damaged[place] ^= data.draw(st.integers(1, 255))
            changed_arrays[name] = np.frombuffer(bytes(damaged), array.dtype).reshape(array.shape)
        case "type":
            kind = data.draw(st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"]))
            changed_arrays[name] = array.astype(kind)
        case "fact":
            fact = data.draw(st.sampled_from(sorted(header)))
            shapes = st.lists(st.integers(0, 2**40) | st.integers(0, 80), max_size=4).map(tuple)
            header[fact] = data.draw(shapes | st.sampled_from(["float32", "int64", "nn", ""]) | st.integers(-5, 5))
        case "no fact":
            del header[data.draw(st.sampled_from(sorted(header)))]
    damaged_packet = Encoded(changed_arrays, header)
    try:
        check_encoded("hidden", damaged_packet)
        decoded = codec_for(chain).decode(damaged_packet, role)
    except MalformedPacket:
        return
    assert decoded.numel() <= 6 * 70


@EVERY
@pytest.mark.parametrize("shape", [(2**40, 2**20), (2, 3, 71), (421,)], ids=str)
def test_no_tensor_larger_than_the_role_allows_is_made(chain: str, shape: tuple[int, ...]) -> None:
    encoded, role = encoded_of(chain)
    if "shape" in encoded.header:
        with pytest.raises(MalformedPacket):
            codec_for(chain).decode(Encoded(encoded.arrays, {**encoded.header, "shape": shape}), role)


@pytest.mark.parametrize("chain", ["int8s", "int4s"])
def test_stochastic_rounding_is_right_on_average(chain: str) -> None:
    tensor = normal(1, 64)
    codec = codec_for(chain)
    torch.manual_seed(5)
    generator_before = torch.random.get_rng_state()
    mean = torch.stack([through(codec, tensor, role_of(step)) for step in range(1000)]).mean(0)
    assert torch.equal(torch.random.get_rng_state(), generator_before)
    scale = float(tensor.abs().max()) / (127 if chain == "int8s" else 7)
    # Five standard errors; the deviation of one rounding is at most half a scale.
    assert float((mean - tensor).abs().max()) < 5 * 0.5 * scale / math.sqrt(1000)
    other_seed = make_codec(chain, seed=2)
    assert not same(other_seed.encode(tensor, role_of()), codec.encode(tensor, role_of()))
