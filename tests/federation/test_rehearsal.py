"""A trial round: every strategy of ours passes, and what would break in round 1 is refused before it."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import Bulyan
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping as AdaptiveDP
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as ClientSideDP
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as ServerSideDP
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedProx as FlowerFedProx
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.adaptation import lora
from fedsplit.adaptation.run_adapters import adapt, bare_parts, outline
from fedsplit.errors import SettingError
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.rehearsal import rehearse
from fedsplit.federation.strategy import load_strategy
from fedsplit.model.facts import read_facts
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.stages import GradientStage
from strategies import STRATEGIES
from strategies.fedavg import FedAvg


@pytest.fixture(autouse=True)
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command that has just begun: no run has a name yet, and Flower's engine has set nothing."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


@pytest.fixture
def config(tiny_models: dict[str, Path]) -> Config:
    return build({"model": str(tiny_models["gpt2"]), "cut": "1:2", "clients": 5, "strategy": "mine.py:Mine"})


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_of_ours_plays_the_round(name: str, config: Config) -> None:
    before = torch.get_rng_state()
    rehearse(lambda: load_strategy(name, {}, strategy_defaults(config)), config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "values",
    [{"lora.method": "pissa"}, {"prompt.kind": "prompt"}, {"prompt.kind": "ptuning"}, {"prompt.kind": "prefix"}],
    ids=str,
)
def test_every_kind_of_adapter_is_rehearsed(values: dict[str, Any], tiny_models: dict[str, Path]) -> None:
    class Breaks(FedAvg):
        def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
            raise RuntimeError("no luck")

    config = build({"model": str(tiny_models["gpt2"]), "cut": "1:2", "clients": 2, "strategy": "fedavg", **values})
    before = torch.get_rng_state()
    rehearse(FedAvg, config)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SettingError, match=r"^strategy: fedavg .*no luck \(.*\), on a trial before the first one"):
        rehearse(Breaks, config)


def test_all_clients_answer_and_random_numbers_stay(config: Config) -> None:
    class Draws(FedAvg):
        def __init__(self) -> None:
            self.lock = threading.Lock()  # cannot be copied

        def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
            assert [update.client for update in updates] == [0, 1, 2, 3, 4]
            random.random(), np.random.rand()
            return super().aggregate(state, adapters, updates)

    before = random.getstate(), np.random.get_state()[1].tolist()
    rehearse(Draws, config)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert TaskIdentity._run_id is None


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"lora.rank": "2,3", "lm_head": "lora"}),
        ("llama", {"lora.rank": "2,3", "lm_head": "lora"}),
        ("mixtral", {"lora.rank": "2,3", "lm_head": "lora"}),
        ("gpt2", {"lora.method": "pissa"}),
        ("llama", {"lora.method": "olora", "lora.rslora": True}),
        ("gpt2", {"prompt.kind": "prompt", "prompt.init": "vocab"}),
        ("gpt2", {"prompt.kind": "ptuning", "prompt.encoder": "lstm"}),
        ("llama", {"prompt.kind": "prefix", "prompt.init": "zero"}),
        ("llama", {"prompt.kind": "prefix", "prompt.projection": True}),
    ],
    ids=str,
)
def test_the_outline_is_what_the_parts_will_have(
    family: str, values: dict[str, Any], tiny_models: dict[str, Path]
) -> None:
    config = build({"model": str(tiny_models[family]), "cut": "1:2", **values})
    parts = bare_parts(config, ["bottom", "top"])
    for part in parts:
        adapt(part, config)
    real, outlined = lora.read(*parts), outline(config, ["bottom", "top"])
    assert outlined.layers == real.layers
    assert {n: t.shape for n, t in outlined.tensors.items()} == {n: t.shape for n, t in real.tensors.items()}


class Typo(FedAvg):
    def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
        return state, adaptors  # type: ignore[name-defined]  # noqa: F821


class Exits(FedAvg):
    def init(self, adapters: Any) -> Any:
        raise SystemExit(3)


class Arrays(FedAvg):
    def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
        return state, adapters.with_tensors({n: t.numpy() for n, t in adapters.tensors.items()})


class Forever(FlowerFedAvg):
    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        while len(list(grid.get_node_ids())) < 99:
            pass


class Sleeps(Forever):
    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        while len(list(grid.get_node_ids())) < 99:
            time.sleep(0.6)


class Looks(FlowerFedAvg):
    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        assert len({len(list(grid.get_node_ids())) for _ in range(20)}) == 1
        return super().configure_train(server_round, arrays, config, grid)


class Rate(FlowerFedAvg):
    def configure_train(self, server_round: Any, arrays: Any, config: Any, grid: Any) -> Any:
        config["lr"] = 0.5
        return super().configure_train(server_round, arrays, config, grid)


DP = ("clipping_norm", "sensitivity", "epsilon", "delta")
NODES = {"min_available_nodes": 5, "min_train_nodes": 1, "fraction_evaluate": 0.0}


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Typo(), "NameError: name 'adaptors' is not defined .test_rehearsal.py"),
        (Exits(), "Exits failed in round 1: SystemExit: 3"),
        (Arrays(), "sent .* as ndarray, not as a tensor"),
        (Forever(**NODES), "waits for more nodes than the 5 that there are"),
        (Sleeps(**NODES), "waits for more nodes than the 5 that there are"),
        (Rate(**NODES), "Rate sends clients the setting lr, .* the half of it that works at the client is missing"),
        (FlowerFedAvg(**NODES, arrayrecord_key="weights"), "sends clients config, weights; they read the records"),
        (ClientSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5), "DifferentialPrivacyClientSideFixedClipping sends clients"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_play_a_round_is_refused(strategy: Any, words: str, config: Config) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        rehearse(lambda: strategy, config)
    assert caught.value.setting == "strategy"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "strategy",
    [
        FlowerFedAvg(**NODES),
        FlowerFedProx(**NODES, proximal_mu=0.1),
        ServerSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5),
        Bulyan(**NODES, num_malicious_nodes=0),
        Looks(**NODES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_flowers_strategies_without_a_half_at_the_client_are_taken(strategy: Any, config: Config) -> None:
    rehearse(lambda: strategy, config)


def with_mods(config: Config, *mods: str, **settings: Any) -> Config:
    return from_document(as_document(config) | {"mods": list(mods)} | settings)


def test_strategies_with_a_half_at_the_client_are_taken_with_their_mod(config: Config) -> None:
    rehearse(lambda: ClientSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5), with_mods(config, "fixedclipping_mod"))
    rehearse(lambda: AdaptiveDP(FlowerFedAvg(**NODES), 0.1, 5), with_mods(config, "adaptiveclipping_mod"))
    local = with_mods(config, "LocalDpMod", mod_options={f"LocalDpMod.{name}": 1.0 for name in DP})
    rehearse(lambda: FlowerFedAvg(**NODES), local)
    rehearse(lambda: load_strategy("fedavg", {}, strategy_defaults(local)), local)


@pytest.mark.parametrize(
    ("strategy", "mods", "setting", "words"),
    [
        (
            ClientSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5),
            ["message_size_mod"],
            "mods",
            "no mod .* reads clipping_norm",
        ),
        (FlowerFedAvg(**NODES), ["fixedclipping_mod"], "mods", "requires the key 'clipping_norm'"),
        (AdaptiveDP(FlowerFedAvg(**NODES), 0.1, 5), ["fixedclipping_mod"], "strategy", "'norm_bit'. not found"),
    ],
    ids=["size", "nothing", "wrong"],
)
def test_what_does_not_fit_the_mods_is_refused(
    strategy: Any, mods: list[str], setting: str, words: str, config: Config
) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        rehearse(lambda: strategy, with_mods(config, *mods))
    assert caught.value.setting == setting


def test_a_control_variate_does_not_pass_by_a_mod(config: Config) -> None:
    """It tells of the client's text as adapters do, and would leave the client without clipping and noise."""
    local = with_mods(config, "LocalDpMod", mod_options={f"LocalDpMod.{name}": 1.0 for name in DP})
    with pytest.raises(SettingError, match="LocalDpMod expects exactly one ArrayRecord, but found 2"):
        rehearse(lambda: load_strategy("scaffold", {}, strategy_defaults(local)), local)


def test_copies_of_the_trunks_adapter_are_not_aggregated_unclipped(config: Config) -> None:
    """No mod sees them, and the noise is made for what has been clipped."""
    copies = with_mods(config, "fixedclipping_mod", trunk={"schedule": "copies"})
    with pytest.raises(SettingError, match="no mod sees; --share bottom,top leaves the copies out"):
        rehearse(lambda: ClientSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5), copies)
    alone = with_mods(config, "fixedclipping_mod", trunk={"schedule": "copies"}, share=["bottom", "top"])
    rehearse(lambda: ClientSideDP(FlowerFedAvg(**NODES), 1.0, 1.0, 5), alone)


def test_a_strategys_own_stage_takes_a_step(config: Config) -> None:
    class Staged(FedAvg):
        def stage(self) -> GradientStage:
            return Stage()

    class Stage(GradientStage):
        def __call__(self, gradients: Any, step: Any) -> Any:
            assert step.gradient_at is not None and step.gradient_at(step.parameters).keys() == gradients.keys()
            return {name: gradient.sum() for name, gradient in gradients.items()}

    with pytest.raises(SettingError, match=r"^strategy: .* can play a round \(the stage of the strategy mine.py:Mine"):
        rehearse(Staged, config)
    Stage.__call__ = GradientStage.__call__  # type: ignore[method-assign]
    rehearse(Staged, config)


def test_a_stages_term_of_the_loss_is_tried_on_states_of_the_models_width(config: Config) -> None:
    class Staged(FedAvg):
        def stage(self) -> GradientStage:
            return Stage()

    class Stage(GradientStage):
        def loss_term(self, rows: Any) -> Any:
            there = rows.states_at({})
            width = read_facts(config.model_path).width
            assert there.shape == (*rows.ids.shape, width)
            return lambda states: (states - there).square().mean() if fits else states

    fits = True
    rehearse(Staged, config)
    fits = False
    with pytest.raises(SettingError, match=r"^strategy: .*returned a tensor .* as its term of the loss"):
        rehearse(Staged, config)
