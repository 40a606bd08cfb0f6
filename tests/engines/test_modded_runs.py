"""Whole federations through Flower's client door with mods: strategies with differential privacy at the client."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping as Adaptive
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as Fixed
from flwr.serverapp.strategy import FedAvg
from local_federation import Lines
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.engines import client_app, in_process
from fedsplit.engines.in_process import LocalClients
from fedsplit.federation import records
from fedsplit.federation.clients import FederationFailed, Interrupted
from fedsplit.federation.federation import Federation
from fedsplit.federation.messages import Answer, Request
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build


class Averages(FedAvg):
    """Remembers what the clients sent in each round, the norm of each client's change, and the mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.starts: list[dict[str, np.ndarray]] = []
        self.ends: list[list[dict[str, np.ndarray]]] = []
        self.norms: list[list[float]] = []
        self.means: list[dict[str, np.ndarray]] = []

    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        self.starts.append({name: array.numpy() for name, array in arrays.items()})
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: Any, replies: Any) -> Any:
        replies = list(replies)
        records_of = [reply.content.array_records["arrays"] for reply in replies]
        ends = [{name: array.numpy() for name, array in record.items()} for record in records_of]
        self.ends.append(ends)
        self.norms.append([self._norm(end) for end in ends])
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.means.append({name: array.numpy() for name, array in arrays.items()})
        return arrays, metrics

    def _norm(self, end: dict[str, np.ndarray]) -> float:
        start = self.starts[-1]
        return math.sqrt(sum(float(((values - start[name]) ** 2).sum()) for name, values in end.items()))


class Watched(Fixed):
    """Remembers the aggregate with its noise."""

    def aggregate_train(self, server_round: Any, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.ends = {name: array.numpy() for name, array in arrays.items()}
        return arrays, metrics


def config_of(model: Path, corpus: Path, **settings: Any) -> Config:
    values = {"model": str(model), "dataset": str(corpus), "partition": "natural", "clients": 3, "cut": "1:2"}
    values |= {"rounds": 2, "train.steps": 3, "train.batch_size": 2, "train.max_length": 16, "lora.rank": 4}
    return build(values | {"trunk.schedule": "frozen", "train.optimizer": "sgd", "train.lr": 0.5} | settings)


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    return config_of(tiny_models["gpt2"], corpus_file)


class AppClients(LocalClients):
    """Clients behind Flower's ClientApp and records, in this process."""

    def answer(self, request: Request) -> Answer:
        if self.stop.is_set():
            raise Interrupted
        client_app.service = self._services[0]
        facts = {"partition-id": request.client, "num-partitions": 3}
        with records.named_run():
            message = records.to_message(request, node=request.client + 1)
            reply = client_app.app(message, Context(1, request.client + 1, facts, RecordDict(), {}))
        return records.to_answer(reply, request.client)


def federate(config: Config, out: Path, strategy: Any, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(client_app, "service", client_app.service)  # set back at the end
    monkeypatch.setattr(in_process, "LocalClients", AppClients)
    return in_process.federate(config, out, strategy, Lines())


def averages() -> Averages:
    return Averages(min_available_nodes=3, min_train_nodes=1, fraction_evaluate=0.0)


def adapters_of(out: Path) -> dict[str, Tensor]:
    found = {}
    for part in ("bottom_lora", "top_lora"):
        found |= load_file(out / part / "adapter_model.safetensors")
    return found


@pytest.fixture
def plain(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Averages:
    """The run without mods, in the folder `plain`."""
    strategy = averages()
    federate(config, tmp_path / "plain", strategy, monkeypatch)
    return strategy


def test_every_update_is_clipped_and_the_noise_has_its_deviation(
    config: Config, plain: Averages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.random.seed(7)
    bound = min(min(norms) for norms in plain.norms) / 2
    inner = averages()
    noisy = Watched(inner, noise_multiplier=1.5, clipping_norm=bound, num_sampled_clients=3)
    federate(replace(config, rounds=1, mods=("fixedclipping_mod",)), tmp_path / "run", noisy, monkeypatch)
    assert inner.norms[0] == pytest.approx([bound] * 3, rel=1e-4)

    noise = np.concatenate([(noisy.ends[name] - mean).flatten() for name, mean in inner.means[0].items()])
    assert noise.size > 500
    assert noise.std() == pytest.approx(1.5 * bound / 3, rel=0.15)  # one deviation is one part in 30, or less


def test_a_norm_that_no_update_reaches_leaves_the_run_as_it_was(
    config: Config, plain: Averages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = averages()
    unbounded = Fixed(inner, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=3)
    federate(replace(config, mods=("fixedclipping_mod",)), tmp_path / "run", unbounded, monkeypatch)
    for norms, unclipped in zip(inner.norms, plain.norms, strict=True):
        assert norms == pytest.approx(unclipped, rel=1e-4)
    # Flower's mods compute start + (end - start), which rounds the last bit, and nothing else happens.
    begun = plain.starts[0]
    for client, end in enumerate(inner.ends[0]):
        for name, values in end.items():
            unclipped = plain.ends[0][client][name]
            assert np.array_equal(values, begun[name] + (unclipped - begun[name]))
    ends, expected = adapters_of(tmp_path / "run"), adapters_of(tmp_path / "plain")
    assert all(torch.allclose(tensor, expected[name], rtol=0, atol=1e-6) for name, tensor in ends.items())


def test_a_mod_that_changes_nothing_leaves_the_run_as_it_was_to_the_bit(
    config: Config, plain: Averages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modded = replace(config, mods=("message_size_mod", "arrays_size_mod"))
    federate(modded, tmp_path / "run", averages(), monkeypatch)
    ends, expected = adapters_of(tmp_path / "run"), adapters_of(tmp_path / "plain")
    assert ends.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ends.items())


def test_the_bits_of_adaptive_clipping_reach_the_strategy(
    config: Config, plain: Averages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = min(min(norms) for norms in plain.norms) / 2
    inner = averages()
    strategy = Adaptive(inner, noise_multiplier=0.0, num_sampled_clients=3, initial_clipping_norm=bound)
    federate(replace(config, rounds=1, mods=("adaptiveclipping_mod",)), tmp_path / "run", strategy, monkeypatch)
    assert inner.norms[0] == pytest.approx([bound] * 3, rel=1e-4)
    # All three were clipped: the share is 1, and Flower 1.41 lowers its norm by the rate times the share above a half.
    assert strategy.clipping_norm == pytest.approx(bound * math.exp(-0.2 * (1 - 0.5)))


def test_clients_that_lose_their_mod_are_left_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mod's own words say why."""
    modded = replace(config, mods=("fixedclipping_mod",))
    with pytest.raises(FederationFailed, match="fixedclipping_mod requires the key 'clipping_norm'"):
        federate(modded, tmp_path / "run", averages(), monkeypatch)
