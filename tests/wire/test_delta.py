"""Delta coding: what has moved crosses, and errors do not grow."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.delta import Delta
from fedsplit.wire.encoded import MalformedPacket
from fedsplit.wire.packets import StepKey


def role_of(step: int, *examples: int) -> Role:
    return Role("activation", "up", StepKey(1, 0, step), examples=examples)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_token_below_the_threshold_stays_as_it_was() -> None:
    sender, receiver = Delta(0.1, 10**6), Delta(0.1, 10**6)
    first = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    second = torch.tensor([[[3.0, 4.5], [3.0, 4.6]]])  # by 0.5 of 5.4, and by 0.6 of 5.5
    for step, tensor in enumerate((first, second)):
        sent = sender.encode(tensor, role_of(step, 7))
        decoded = receiver.decode(sent, role_of(step, 7))
    assert sent.array("moved.values").tolist() == [[0.0, pytest.approx(0.6, abs=1e-6)]]
    assert torch.allclose(decoded, torch.tensor([[[3.0, 4.0], [3.0, 4.6]]]))


def test_the_error_falls_from_epoch_to_epoch_for_an_example_that_stays() -> None:
    """Without the cached error in the next difference, the error would be that of int4 for ever."""
    sender, receiver = (make_codec("delta,int4", cache=10**6) for _ in range(2))
    tensor = normal(1, 4, 64)
    errors = []
    for step in range(4):
        decoded = receiver.decode(sender.encode(tensor, role_of(step, 3)), role_of(step, 3))
        errors.append(float((decoded - tensor).norm()))
    assert all(later < earlier / 5 for earlier, later in itertools.pairwise(errors))


def test_what_has_not_moved_costs_next_to_nothing() -> None:
    sender = make_codec("delta:0.05,int8", cache=10**6)
    tensor = normal(2, 8, 64)
    whole = sender.encode(tensor, role_of(0, 1, 2)).nbytes
    assert sender.encode(tensor * 1.01, role_of(1, 2, 1)).nbytes == whole  # the examples have changed places
    assert sender.encode(tensor * 1.01, role_of(2, 2, 1)).nbytes == 2 + 2  # a bit a token, a byte an example


def test_an_example_that_has_changed_altogether_crosses_whole() -> None:
    sender = Delta(0.0, 10**6)
    sender.encode(normal(1, 3, 8), role_of(0, 1))
    sent = sender.encode(normal(1, 3, 8, seed=1), role_of(1, 1))
    assert sent.array("examples").tolist() == [0]
    assert torch.equal(torch.from_numpy(sent.array("moved.values")), normal(3, 8, seed=1))


def test_a_new_example_is_predicted_by_a_typical_token_of_the_example_before() -> None:
    """The median of each dimension over the tokens of example 2: 100 and 1. The first token does not matter."""
    sender, receiver = Delta(0.0, 10**6), Delta(0.0, 10**6)
    first = torch.tensor([[[0.0, 0.0]] * 3, [[9e5, 7.0], [100.0, 1.0], [99.0, -3.0]]])
    receiver.decode(sender.encode(first, role_of(0, 1, 2)), role_of(0, 1, 2))
    second = torch.tensor([[[101.0, 3.0], [100.0, 1.0]]])  # of another length
    sent = sender.encode(second, role_of(1, 3))
    assert sent.array("examples").tolist() == [2]
    assert sent.array("moved.values").tolist() == [[1.0, 2.0]]
    assert torch.equal(receiver.decode(sent, role_of(1, 3)), second)


def test_a_large_dimension_of_all_tokens_does_not_spoil_its_group_for_new_examples() -> None:
    sender, plain = make_codec("delta,int4", cache=10**6), make_codec("int4")
    tensors = [normal(1, 16, 64, seed=seed) for seed in range(2)]
    for tensor in tensors:
        tensor[..., 5] += 300
    sender.encode(tensors[0], role_of(0, 1))
    sent = sender.encode(tensors[1], role_of(1, 2))
    receiver = make_codec("delta,int4", cache=10**6)
    receiver.decode(make_codec("delta,int4", cache=10**6).encode(tensors[0], role_of(0, 1)), role_of(0, 1))
    error = (receiver.decode(sent, role_of(1, 2)) - tensors[1]).norm()
    alone = (plain.decode(plain.encode(tensors[1], role_of(1)), role_of(1)) - tensors[1]).norm()
    assert float(error) < float(alone) / 3


def test_an_example_of_another_length_is_not_predicted_by_itself() -> None:
    sender = Delta(0.0, 10**6)
    sender.encode(normal(1, 3, 8) + 5, role_of(0, 1))
    assert sender.encode(normal(1, 4, 8) + 5, role_of(1, 1)).array("examples").tolist() == [2]


def test_a_receiver_that_has_lost_a_row_takes_no_typical_token_for_it() -> None:
    sender, receiver = Delta(0.0, 10**6), Delta(0.0, 10**6)
    for codec in (sender, receiver):
        codec.encode(normal(1, 3, 8) + 5, role_of(0, 2))
    sender.encode(normal(1, 3, 8) + 5, role_of(1, 1))
    sent = sender.encode(normal(1, 3, 8) + 5, role_of(2, 1))
    with pytest.raises(MalformedPacket, match="not in the cache of this side"):
        receiver.decode(sent, role_of(2, 1))


def test_a_receiver_without_the_example_refuses_the_difference() -> None:
    """Both sides keep the same rows; if one of them lost a row, wrong values must not pass for right ones."""
    sender = Delta(0.0, 10**6)
    sender.encode(normal(1, 3, 8), role_of(0, 1))
    sent = sender.encode(normal(1, 3, 8) * 1.1, role_of(1, 1))
    with pytest.raises(MalformedPacket, match="not in the cache of this side"):
        Delta(0.0, 10**6).decode(sent, role_of(1, 1))


def test_numbers_that_do_not_fit_the_tensor_are_refused() -> None:
    with pytest.raises(MalformedPacket, match="2 numbers of examples"):
        Delta(0.0, 10**6).encode(normal(1, 3, 8), role_of(0, 1, 2))


def test_squares_beyond_float32_hide_nothing() -> None:
    sender, receiver = Delta(0.1, 10**6), Delta(0.1, 10**6)
    for step, tensor in enumerate((normal(1, 2, 8) * 1e25, normal(1, 2, 8) * 2e25)):
        decoded = receiver.decode(sender.encode(tensor, role_of(step, 1)), role_of(step, 1))
        assert torch.allclose(decoded, tensor)
