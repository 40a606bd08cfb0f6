"""A trunk in this process: the trunk itself, in the caller's thread, with time that passes only where it must."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.local import LocalTrunk
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import UnknownStep
from fedsplit.wire.transport import TrunkLost

RAW = make_codec("raw")


@pytest.fixture
def config(tiny_models: dict[str, Path]) -> Config:
    return config_of(tiny_models)


def config_of(tiny_models: dict[str, Path], **values: Any) -> Config:
    given = {name.replace("__", "."): value for name, value in values.items()}
    return build({"model": str(tiny_models["gpt2"]), "cut": "1:2", "lora.rank": 2, **given})


def packet(client: int, what: str = "hidden", step: int = 0) -> Packet:
    tensor = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(client + len(what)))
    return Packet(StepKey(1, client, step, run="run"), {what: RAW.encode(tensor)}, incarnation="first")


def test_it_gives_what_the_server_gives_to_the_bit(config: Config) -> None:
    trunk, server = LocalTrunk(config, "run"), LocalTrunk(config, "run").server
    for step in range(2):
        for what in ("hidden", "gradient"):
            one = packet(0, what, step)
            expected = (server.forward if what == "hidden" else server.backward)(one)
            assert torch.equal(RAW.decode(trunk.send(one)().tensors[what]), RAW.decode(expected.tensors[what]))
    assert all(torch.equal(t, server.adapters.read().tensors[n]) for n, t in trunk.read().tensors.items())
    assert trunk.status().traffic == server.traffic and trunk.status().incarnation == "first"


def test_nothing_is_computed_before_it_is_waited_for(config: Config) -> None:
    trunk = LocalTrunk(config, "run")
    answer = trunk.send(packet(0))
    assert trunk.status().pending == 0
    assert answer() is answer()
    assert trunk.status().pending == 1


def test_what_the_trunk_raises_is_raised_at_the_caller(config: Config) -> None:
    trunk = LocalTrunk(config, "run")
    refused = trunk.send(packet(0, "gradient"))
    for _ in range(2):
        with pytest.raises(UnknownStep, match="client 0"):
            refused()
    with pytest.raises(KeyError):
        trunk.write({})


def test_time_passes_only_when_nothing_else_can_be_done(tiny_models: dict[str, Path]) -> None:
    """The others are waited for until the deadline, which comes at once."""
    trunk = LocalTrunk(config_of(tiny_models, trunk__schedule="batched", trunk__deadline=50.0), "run")
    together = [trunk.send(packet(client)) for client in (0, 1)]
    assert all(answer().tensors for answer in together) and trunk._clock() == 0.0
    assert trunk.send(packet(0, "gradient"))().tensors
    assert trunk._clock() == 50.0


def test_a_wait_that_would_be_for_ever_is_an_error(tiny_models: dict[str, Path]) -> None:
    trunk = LocalTrunk(config_of(tiny_models, trunk__schedule="batched"), "run")
    trunk.begin([0, 1])
    with pytest.raises(RuntimeError, match=r"client 0.*waits for another client"):
        trunk.send(packet(0))()


def test_a_trunk_that_was_closed_is_lost(config: Config) -> None:
    trunk = LocalTrunk(config, "run")
    answer = trunk.send(packet(0))
    trunk.close()
    for gone in (trunk.status, lambda: trunk.send(packet(0)), answer):
        with pytest.raises(TrunkLost, match="closed"):
            gone()


def test_observers_see_packets(config: Config) -> None:
    seen: list[Any] = []

    class Watch:
        def before(self, packet: Packet) -> None:
            seen.append(packet)

        def after(self, packet: Packet, answer: Any) -> None:
            seen.append(answer)

    trunk = LocalTrunk(config, "run", observers=[Watch()])
    answer = trunk.send(packet(0))()
    assert [seen[0].key, seen[1]] == [packet(0).key, answer]


def test_several_threads_share_a_trunk(tiny_models: dict[str, Path]) -> None:
    """A batch waits for a thread that is late, and is computed once, whichever thread does it."""
    config = config_of(tiny_models, trunk__schedule="batched", trunk__deadline=60.0)
    trunk = LocalTrunk(config, "run", callers=2)
    trunk.begin([0, 1])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: trunk.send(packet(0))())
        with pytest.raises(TimeoutError):
            first.result(timeout=0.2)  # the batch is not complete
        second = threads.submit(lambda: trunk.send(packet(1))())
        answers = [future.result(timeout=60) for future in (first, second)]
    assert [answer.key.client for answer in answers] == [0, 1]
    assert trunk.end_round([]).forwards == 1


def test_a_thread_that_waits_sees_the_end_of_the_trunk(tiny_models: dict[str, Path]) -> None:
    trunk = LocalTrunk(config_of(tiny_models, trunk__schedule="batched"), "run", callers=2)
    trunk.begin([0, 1])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: trunk.send(packet(0))())
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        trunk.close()
        with pytest.raises(TrunkLost):
            waiting.result(timeout=60)
