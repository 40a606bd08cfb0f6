"""FedDyn, Ditto and MOON, written as a user writes them, against the papers' algorithms on the unsplit model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from local_federation import federate as federate_with
from safetensors.torch import load_file
from test_client import unsplit
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import batch
from fedsplit.federation.aggregation import sampled, strategy_defaults
from fedsplit.federation.client_order import groups_of
from fedsplit.federation.strategy import load_strategy
from fedsplit.model.split import load_parts
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.state.client_store import ClientStore

FILE = Path(__file__).with_name("own_stages.py")
RATE = 0.5

Tensors = dict[str, Tensor]


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    """Plain SGD, no dropout, the library's own code."""
    values = {"model": str(tiny_models["llama"]), "clients": 3, "rounds": 3, "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "lora.dropout": 0.0, "train.max_length": 16, "train.steps": 3}
    values |= {"train.batch_size": 2, "train.lr": RATE, "train.optimizer": "sgd", "kernels": "library"}
    return build(values | {"trunk.schedule": "copies", "strategy": f"{FILE}:FedDyn"}, {"alpha": 0.3})


def federate(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """Runs a federation; the adapter of the unsplit model that it leaves."""
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    federate_with(config, out, strategy, monkeypatch)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in adapter.items()}


def start_of(config: Config) -> Tensors:
    """The adapter that training starts from, of all three parts."""
    parts = load_parts(config.model_path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    return {name: tensor for part in parts for name, tensor in lora.read(part).tensors.items()}


@dataclass(frozen=True)
class Contrast:
    """MOON's term: the adapters of the models that representations are compared with, and its settings."""

    near: Tensors
    far: Tensors
    mu: float
    temperature: float


class Reference:
    """The unsplit model's gradients, on the rows that a client of a run sees."""

    def __init__(self, config: Config) -> None:
        self.start, self.shards = start_of(config), shards_of(config)
        self._config, (self._whole, self._parameters) = config, unsplit(config.model_path, self.start)

    def gradients(
        self, theta: Mapping[str, Tensor], client: int, round: int, step: int, contrast: Contrast | None = None
    ) -> Tensors:
        settings = self._config.train
        done = (round - 1) * settings.steps + step
        sequences = settings.batch_size * settings.accumulation
        rows = batch(self.shards[client].train, done, sequences, derive_seed(0, "client", client))
        if contrast is not None:
            with torch.no_grad():
                near, far = (self._run(point, rows)[1] for point in (contrast.near, contrast.far))
        loss, z = self._run(theta, rows)
        if contrast is not None:
            to_near, to_far = (torch.cosine_similarity(z, other) / contrast.temperature for other in (near, far))
            loss = loss - contrast.mu * (to_near.exp() / (to_near.exp() + to_far.exp())).log().mean()
        loss.backward()
        return {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}

    def _run(self, theta: Mapping[str, Tensor], rows: Sequences) -> tuple[Tensor, Tensor]:
        """Loss, and mean last hidden state (B, D) of each sequence; no sequence of these tests is padded."""
        for name, parameter in self._parameters.items():
            parameter.data, parameter.grad = theta[name].clone(), None
        out = self._whole(input_ids=rows.ids, labels=rows.labels, output_hidden_states=True)
        return out.loss, out.hidden_states[-1].mean(1)


def feddyn(config: Config, alpha: float) -> Tensors:
    """Algorithm 1 of 2111.04263, with the clients that the run samples."""
    reference = Reference(config)
    theta = reference.start
    zeros = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    h, h_of = zeros, {client: zeros for client in range(config.clients)}
    for round in range(1, config.rounds + 1):
        ends = []
        for client in sampled(config, round):
            local = theta
            for step in range(config.train.steps):
                found = reference.gradients(local, client, round, step)
                local = {
                    name: local[name] - RATE * (found[name] - h_of[client][name] + alpha * (local[name] - theta[name]))
                    for name in theta
                }
            h_of[client] = {name: h_of[client][name] - alpha * (local[name] - theta[name]) for name in theta}
            ends.append(local)
        h = {name: h[name] - alpha / config.clients * sum(end[name] - theta[name] for end in ends) for name in theta}
        theta = {name: sum(end[name] for end in ends) / len(ends) - h[name] / alpha for name in theta}
    return theta


@pytest.mark.parametrize("fraction", [1.0, 0.7])
def test_feddyn_is_the_papers(config: Config, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three parts; a client that rests keeps its state for the round after."""
    config = replace(config, fraction=fraction)
    found, expected = federate(config, tmp_path, monkeypatch), feddyn(config, alpha=0.3)
    plain = federate(replace(config, strategy="fedavg", strategy_options={}), tmp_path / "plain", monkeypatch)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-5), name
    assert max(float((plain[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1e-3


def test_a_run_with_a_stage_goes_on_to_the_bit(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State at the clients and at their copies of the trunk comes back."""
    straight = federate(config, tmp_path / "straight", monkeypatch)
    federate(replace(config, rounds=2), tmp_path / "stopped", monkeypatch)
    stopped = federate(replace(config, resume=str(tmp_path / "stopped")), tmp_path / "stopped", monkeypatch)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())


def kept_of(out: Path, client: int, round: int) -> Mapping[str, Tensor]:
    """The state that the stage of a client has on the client's disk."""
    return ClientStore(out / "clients", client).load(round).stage


def test_dittos_personal_models_are_the_papers(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a trunk that does not learn. Adapter, round by round: v_k follows its own gradient and the global model."""
    config = replace(
        config,
        strategy=f"{FILE}:Ditto",
        strategy_options={"rate": 0.2, "pull": 0.5},
        trunk=replace(config.trunk, schedule="frozen"),
    )
    federate(config, tmp_path, monkeypatch)
    reference = Reference(config)
    learns = kept_of(tmp_path, 0, config.rounds).keys()
    assert learns and learns < reference.start.keys()

    theta, own = reference.start, {client: reference.start for client in range(config.clients)}
    for round in range(1, config.rounds + 1):
        ends = []
        for client in range(config.clients):
            local, v = theta, own[client]
            for step in range(config.train.steps):
                found, at_v = (reference.gradients(point, client, round, step) for point in (local, v))
                local = {n: t - RATE * found[n] if n in learns else t for n, t in local.items()}
                v = {n: t - 0.2 * (at_v[n] + 0.5 * (t - theta[n])) if n in learns else t for n, t in v.items()}
            own[client] = v
            ends.append(local)
        theta = {name: sum(end[name] for end in ends) / len(ends) for name in theta}
    for client in range(config.clients):
        for name, tensor in kept_of(tmp_path, client, config.rounds).items():
            assert torch.allclose(tensor, own[client][name], atol=2e-5), name
            assert float((tensor - theta[name]).abs().max()) > 1e-5, name


@pytest.mark.parametrize(
    ("schedule", "clip"), [("shared", 0.0), ("shared", 0.05), ("batched", 0.0), ("accumulate", 0.05)]
)
def test_dittos_global_model_is_fedavgs_to_the_bit(
    config: Config, schedule: str, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the trunk learns, and answers twice as many steps: it learns nothing from the personal ones."""
    config = replace(
        config,
        trunk=replace(config.trunk, schedule=schedule, every=2),
        train=replace(config.train, clip=clip, accumulation=2),
    )
    plain = replace(config, strategy="fedavg", strategy_options={})
    ditto = replace(config, strategy=f"{FILE}:Ditto", strategy_options={})
    one, two = (federate(how, tmp_path / name, monkeypatch) for name, how in (("plain", plain), ("ditto", ditto)))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    losses = [evaluated(tmp_path / name) for name in ("plain", "ditto")]
    assert losses[0][0] == losses[1][0]  # nobody has trained
    assert losses[0][-1] != losses[1][-1]  # each client is measured with its personal model


def evaluated(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "evaluate"]


def moon(config: Config, of_client: set[str], mu: float, temperature: float) -> Tensors:
    """Algorithm 1 of 2103.10257, with the clients that the run samples and the trunk that all of them use.

    Args:
        config: The run's configuration.
        of_client: Names of the tensors that lie in bottom and top.
        mu: Weight of the term.
        temperature: Temperature of the term.
    """
    reference = Reference(config)
    theta = {name: reference.start[name] for name in of_client}
    trunk = {name: tensor for name, tensor in reference.start.items() if name not in of_client}
    previous = {client: theta for client in range(config.clients)}
    for round in range(1, config.rounds + 1):
        ends = []
        for client in groups_of(config, round, sampled(config, round), lambda _: 1)[0]:
            local = theta
            for step in range(config.train.steps):
                contrast = Contrast({**theta, **trunk}, {**previous[client], **trunk}, mu, temperature)
                found = reference.gradients({**local, **trunk}, client, round, step, contrast)
                local = {name: tensor - config.train.lr * found[name] for name, tensor in local.items()}
                if config.trunk.schedule == "shared":
                    trunk = {name: tensor - config.train.lr * found[name] for name, tensor in trunk.items()}
            previous[client] = local
            ends.append(local)
        theta = {name: sum(end[name] for end in ends) / len(ends) for name in theta}
    return {**theta, **trunk}


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ("frozen", {}),  # the trunk is the same for all models, as their other frozen weights are
        ("frozen", {"accumulation": 2, "micro_batches": 2}),
        ("shared", {}),  # the trunk learns from the term, too: here client by client
    ],
)
def test_moon_is_the_papers(
    config: Config, schedule: str, parts: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        config,
        strategy=f"{FILE}:Moon",
        strategy_options={"mu": 0.5, "temperature": 0.3},
        trunk=replace(config.trunk, schedule=schedule),
        train=replace(config.train, lr=0.1, **parts),
    )
    found = federate(config, tmp_path, monkeypatch)
    of_client = set(kept_of(tmp_path, 0, config.rounds))
    expected = moon(config, of_client, mu=0.5, temperature=0.3)
    plain = federate(replace(config, strategy="fedavg", strategy_options={}), tmp_path / "plain", monkeypatch)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=2e-5), name
    assert of_client and of_client < expected.keys()
    assert max(float((plain[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1e-3
