"""Codecs: made by name, with a role and a memory; and one with state of its own, through client and trunk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY
from local_federation import federate
from safetensors.torch import load_file
from top_k import TopK
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard
from fedsplit.model.split import load_parts
from fedsplit.settings.choices import CODECS, CodecEntry
from fedsplit.settings.documents import build
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.by_role import ByRole
from fedsplit.wire.codecs import Codec, CodecMemory, Role, make_codec
from fedsplit.wire.encoded import Encoded, MalformedPacket
from fedsplit.wire.packets import Packet, StepKey
from strategies.fedavg import FedAvg


def role_of(step: int, round: int = 1, client: int = 0, training: bool = True, **key: int) -> Role:
    return Role("gradient", "up", StepKey(round, client, step, **key), training)


@pytest.fixture
def top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the codec: the one line that a codec needs beside its file."""
    monkeypatch.setitem(CODECS, "top-k", CodecEntry("top_k:TopK"))


def train(path: Path, codec: str, steps: int) -> tuple[LocalTrunk, list[Packet], dict[str, Tensor]]:
    """Trains one client for a round; returns the trunk, all packets that crossed, and the client's adapters."""
    values = {"model": str(path), "cut": "1:2", "lora.rank": 2, "lora.dropout": 0.0, "train.lr": 0.02}
    config = build({**values, "train.steps": steps, "train.batch_size": 2, "wire.codec": codec})
    crossed: list[Packet] = []

    class Watch:
        def before(self, packet: Packet) -> None:
            crossed.append(packet)

        def after(self, packet: Packet, answer: object) -> None:
            assert isinstance(answer, Packet), answer
            crossed.append(answer)

    bottom, top = load_parts(path, (1, 2), ["bottom", "top"])
    trunk = LocalTrunk(config, observers=[Watch()])
    for part in (bottom, top):
        lora.add(part, config.lora, config.seed)
    rows = Sequences.packed(torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1)))
    link = Link(trunk, make_codec(config.wire.codec), SCHEDULES["shared"], incarnation="first")
    client = Client(0, Shard("ann", rows, rows), bottom, top, link, config.train, config.seed)
    given = lora.read(bottom, top).tensors
    return trunk, crossed, dict(client.train(given, 1).adapters.tensors)


def test_every_codec_is_made_anew_each_time() -> None:
    for name, entry in CODECS.items():
        text = f"{name}:1" if entry.parameter and entry.default is None else name
        assert isinstance(make_codec(text), Codec)
        assert make_codec(text) is not make_codec(text)
    with pytest.raises(ValueError, match="zip is no chain of codecs"):
        make_codec("zip")


def test_a_stateful_codec_trains_client_and_trunk(tiny_models: dict[str, Path], top_k: None) -> None:
    """A file and a line: settings, client and trunk know it, and its own bytes are counted."""
    trunk, crossed, adapters = train(tiny_models["gpt2"], "top-k", steps=3)
    sent = [packet.tensors["gradient"] for packet in crossed if "gradient" in packet.tensors]
    size = 2 * 6 * 32
    assert [encoded.nbytes for encoded in sent] == [math.ceil(size / 10) * (4 + 4)] * 6
    traffic = trunk.status().traffic
    assert traffic.gradient.up == traffic.gradient.down == sum(encoded.nbytes for encoded in sent) // 2
    assert traffic.activation.up == 3 * size * 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapters.values())


def test_what_error_feedback_held_back_crosses_in_the_next_step() -> None:
    """Two steps together send what was to be sent, but for the last residual."""
    sender, receiver, total = TopK(), TopK(), torch.zeros(20)
    gradients = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    for step, gradient in enumerate(gradients):
        total += receiver.decode(sender.encode(gradient, role_of(step)), role_of(step))
    held_back = gradients.sum(0) - total
    last = sender._residuals.before(role_of(40))
    assert last is not None and torch.allclose(held_back, last, atol=1e-4)
    assert float(held_back.norm()) < float(gradients.sum(0).norm())


def test_a_step_that_is_encoded_again_is_the_same_and_changes_nothing() -> None:
    """An answer may be lost, and a packet sent again."""
    once, twice = TopK(), TopK()
    for step in range(3):
        gradient = torch.randn(30, generator=torch.Generator().manual_seed(step))
        first = once.encode(gradient, role_of(step))
        for _ in range(2):
            again = twice.encode(gradient, role_of(step))
            assert all(np.array_equal(first.arrays[name], again.arrays[name]) for name in first.arrays)


def test_a_memory_is_of_one_stream_and_of_one_attempt_at_a_round() -> None:
    memory = CodecMemory[str]()
    memory.set_after(role_of(0), "one")
    assert memory.before(role_of(1)) == "one"
    assert memory.before(role_of(0)) is None
    for other in (
        role_of(1, client=1),
        role_of(1, micro=1),
        role_of(1, round=2),
        role_of(1, attempt=1),
        role_of(1, batch=1),
        role_of(1, training=False),
        Role("activation", "up", StepKey(1, 0, 1)),
        Role("gradient", "down", StepKey(1, 0, 1)),
    ):
        assert memory.before(other) is None, other
    memory.set_after(role_of(1, training=False), "of an evaluation")
    assert memory.before(role_of(2)) == "one"
    memory.set_after(role_of(1), "two")
    assert (memory.before(role_of(1)), memory.before(role_of(2))) == ("one", "two")
    memory.set_after(role_of(0, client=1, batch=2, micro=3), "other")
    states = memory.states()
    assert states == {0: {"gradient/up/0/0": "two"}, 1: {"gradient/up/2/3": "other"}}
    memory.restore(states)
    assert memory.before(role_of(0, round=2)) == "two"
    memory.set_after(role_of(0, round=2), "three")
    assert memory.before(role_of(1, round=2)) == "three"
    assert memory.before(role_of(0, round=2, attempt=1)) == "two"  # the round, or this client's part in it, once more
    assert memory.states()[0] == {"gradient/up/0/0": "three"}
    assert memory.before(role_of(0, client=1, batch=2, micro=3)) == "other"
    memory.restore({})
    assert memory.before(role_of(2)) is None


@pytest.mark.parametrize("counts", [True, False])
def test_the_trunk_keeps_the_state_of_a_client_whose_round_counts(
    tiny_models: dict[str, Path], top_k: None, counts: bool
) -> None:
    trunk, _, _ = train(tiny_models["gpt2"], "top-k", steps=2)
    run_codec = trunk.server.answers.codec
    assert isinstance(run_codec, ByRole)
    codec = run_codec.codecs["gradient", "down"]
    assert isinstance(codec, TopK)
    later = Role("gradient", "down", StepKey(2, 0, 0))
    residual = codec._residuals.before(Role("gradient", "down", StepKey(1, 0, 9)))
    assert residual is not None
    trunk.leave(0)
    trunk.end_round([0] if counts else [])
    found = codec._residuals.before(later)
    moments = trunk.moments()
    assert ("codec/0/gradient/down/0/0" in moments) == counts
    if not counts:
        assert found is None
        return
    assert found is not None and torch.equal(found, residual)
    run_codec.restore({})
    trunk.restore(trunk.read().tensors, moments)
    again = codec._residuals.before(later)
    assert again is not None and torch.equal(again, residual)
    trunk.restore(trunk.read().tensors, {name: value for name, value in moments.items() if "codec" not in name})
    assert codec._residuals.before(later) is None and trunk.moments().keys().isdisjoint({"codec/0/gradient/down/0/0"})


@pytest.mark.parametrize("schedule", ["shared", "copies"])
def test_a_run_resumed_after_each_round_is_the_uninterrupted_one_to_the_bit(
    tiny_models: dict[str, Path],
    corpus_file: Path,
    top_k: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
) -> None:
    """Residuals of both sides go on from round to round; without them the run would be another."""
    values = {"model": str(tiny_models["gpt2"]), "clients": 3, "rounds": 3, "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "train.max_length": 16, "train.steps": 2, "train.lr": 0.05}
    values |= {"train.batch_size": 2, "wire.codec": "top-k", "trunk.schedule": schedule, "fraction": 0.7}
    config = build(values)
    federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    for rounds in (1, 2, 3):
        resume = str(tmp_path / "stopped") if rounds > 1 else ""
        federate(replace(config, rounds=rounds, resume=resume), tmp_path / "stopped", FedAvg(), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(TopK, "state", Codec.state)
        patch.setattr(TopK, "restore", lambda self, states: self._residuals.restore({}))
        federate(config, tmp_path / "forgetful", FedAvg(), monkeypatch)
    straight, stopped, forgetful = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("straight", "stopped", "forgetful")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())
    assert not all(torch.equal(tensor, forgetful[name]) for name, tensor in straight.items())


CHAINS: dict[str, Any] = {
    "wire.codec": "delta:0.02,int8s,zstd",
    "wire.gradient_up": "topk:0.1,int8",
    "wire.gradient_down": "lowrank:2,bf16",
    "train.epochs": 1,
    "train.samples": 3,
}


@pytest.mark.parametrize(
    "how",
    [
        {"train.micro_batches": 2},
        pytest.param({"trunk.schedule": "copies", "fraction": 0.7}, marks=pytest.mark.slow),
        # Less than the rows of a client.
        pytest.param({"trunk.schedule": "batched", "wire.cache": "10kB"}, marks=pytest.mark.slow),
        {"cut": "0:2", "trunk.stages": "0:1:2"},
    ],
    ids=["shared", "copies", "batched", "stages"],
)
def test_a_run_with_chains_resumed_after_each_round_is_the_uninterrupted_one(
    tiny_models: dict[str, Path],
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
) -> None:
    """Caches, residuals and factors of both sides, and the random numbers, go on from round to round."""
    values = {"model": str(tiny_models["gpt2"]), "clients": 2, "rounds": 3, "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "train.max_length": 16, "train.lr": 0.05, "train.batch_size": 2}
    config = build({**values, **CHAINS, **how})
    federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    for rounds in (1, 2, 3):
        resume = str(tmp_path / "stopped") if rounds > 1 else ""
        federate(replace(config, rounds=rounds, resume=resume), tmp_path / "stopped", FedAvg(), monkeypatch)
    straight, stopped = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())
    kept = load_file(next((tmp_path / "stopped").rglob("clients/0000/round-*.safetensors")))
    assert any("activation/up" in name for name in kept)


def test_what_no_encoder_of_it_makes_is_refused() -> None:
    with pytest.raises(MalformedPacket, match="no array 'places'"):
        TopK().decode(Encoded({"values": np.zeros(2)}, {"dtype": "float32", "shape": (2,)}), role_of(0))


def test_the_codec_of_the_documentation_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trunk.md").read_text()
    names: dict[str, Any] = {"Codec": Codec, "Role": Role, "Encoded": Encoded, "Tensor": Tensor, "torch": torch}
    exec("class Half(" + page.partition("class Half(")[2].partition("```")[0], names)
    codec, tensor = names["Half"](), torch.tensor([[0.5, -3.0]])
    encoded = codec.encode(tensor, role_of(0))
    assert encoded.nbytes == 4 and torch.equal(codec.decode(encoded, role_of(0)), tensor)
