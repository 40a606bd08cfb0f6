"""AdaLoRA on the parts: on its own layers each is PEFT's, step by step; the parts' regularisation is the whole's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, VOCABULARY, without_dropout
from local_federation import federate
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import exported, make_config
from fedsplit.adaptation.rank_allocation import RankAllocation, adapted_layers, begin, regularisation
from fedsplit.adaptation.rank_budget import RankBudget
from fedsplit.adaptation.run_adapters import adapt, adopt, bare_parts
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.commands.adapters import open_run, summary
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch
from fedsplit.errors import SettingError
from fedsplit.federation.messages import Answer, Request, Train
from fedsplit.model.derivation import family_of
from fedsplit.model.parts import ranges
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.optimization.optim import make_optimizer
from fedsplit.results.measuring import held_out_loss
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings
from fedsplit.trunk.copies import Start
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec
from strategies.fedavg import FedAvg

KINDS = ("bottom", "trunk", "top")
ROUNDS, STEPS, BLOCKS = 5, 2, 3
COURSE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.75}
"""Of ten steps: two before, the last allocation after the seventh, one in two between."""


def config_of(path: Path, cut: str = "1:2", options: Mapping[str, object] | None = None, **values: object) -> Config:
    """A run's settings, without dropout, with what the optimiser remembers kept over rounds."""
    own: dict[str, object] = {"lora.method": "adalora", "lora.options": {**COURSE, **(options or {})}}
    own |= {"lora.dropout": 0.0, "model": str(path), "cut": cut, "kernels": "library", "seed": 5, "clients": 1}
    own |= {"rounds": ROUNDS, "train.steps": STEPS, "train.lr": 5e-3, "train.batch_size": 2}
    own |= {"train.optimizer_state": "keep"}
    return build(own | {name.replace("__", "."): value for name, value in values.items()})


def parts_of(config: Config, kinds: tuple[Any, ...] = KINDS) -> list[Any]:
    """Parts with their adapters."""
    parts = load_parts(config.model_path, config.bounds, kinds, kernels=config.kernels)
    for part in parts:
        adapt(part, config)
    return parts


def client_of(config: Config) -> tuple[Client, LocalTrunk]:
    """A client and its trunk in one process, without the base's dropout."""
    bottom, top = parts_of(config, ("bottom", "top"))
    trunk = LocalTrunk(config)
    for part in (bottom, trunk.server.part, top):
        without_dropout(part)
    blocks = Sequences.packed(torch.randint(1, VOCABULARY, (7, 9), generator=torch.Generator().manual_seed(1)))
    link = Link(trunk, make_codec("raw"), SCHEDULES[config.trunk.schedule], incarnation="first")
    shard = Shard("ann", blocks, blocks[:1])
    return Client(0, shard, bottom, top, link, config.train, config.seed, config.rounds), trunk


def unsplit(config: Config, blocks: range, start: Mapping[str, Tensor]) -> Any:
    """The unsplit model under PEFT's AdaLoRA on some of its blocks, with that start.

    PEFT takes the mean of its regularisation over these alone; its weight makes up for it.
    """
    base = load_unsplit(config.model_path)
    family = family_of(base.config)
    options = json.loads(config.lora.options)
    options["orth_reg_weight"] = options["orth_reg_weight"] * len(blocks) / BLOCKS
    adapted = AdaLoraConfig(
        **options,
        total_step=config.rounds * config.train.steps,
        lora_alpha=config.lora.alpha,
        target_modules=list(family.targets),
        layers_to_transform=list(blocks),
        layers_pattern=family.blocks,
        fan_in_fan_out=family.transposed,
        task_type="CAUSAL_LM",
    )
    whole = get_peft_model(base, adapted).eval()
    for name, parameter in trained(whole).items():
        parameter.data = start[name].clone()
    return whole


def trained(whole: Any) -> dict[str, torch.nn.Parameter]:
    """What trains in it, by the names in the file."""
    named = ((exported(name.removeprefix("base_model.model.")), p) for name, p in whole.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def remembered(whole: Any) -> dict[str, Tensor]:
    """What PEFT's allocator knows, by our names."""
    allocator, pattern = whole.base_model.rankallocator, whole.peft_config["default"].rank_pattern or {}
    found = {f"{exported(name)}#importance": value for name, value in allocator.exp_avg_ipt.items()}
    found |= {f"{exported(name)}#uncertainty": value for name, value in allocator.exp_avg_unc.items()}
    return found | {f"{exported(name)}#kept": torch.tensor(mask) for name, mask in pattern.items()}


def ranks(tensors: Mapping[str, Tensor]) -> int:
    """Ranks that are left in some layers."""
    return sum(int((tensor != 0).sum()) for name, tensor in tensors.items() if name.endswith(".lora_E"))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "cut", "schedule", "blocks"),
    [
        pytest.param("gpt2", "0:3", "shared", range(3), id="trunk"),
        pytest.param("llama", "2:3", "frozen", range(2), id="bottom"),
        pytest.param("gpt2", "0:1", "frozen", range(1, 3), id="top"),
        pytest.param("llama", "0:3", "shared", range(3), id="trunk-llama", marks=pytest.mark.slow),
        pytest.param("gpt2", "2:3", "frozen", range(2), id="bottom-gpt2", marks=pytest.mark.slow),
        pytest.param("llama", "0:1", "frozen", range(1, 3), id="top-llama", marks=pytest.mark.slow),
        pytest.param("llama", "0:3", "copies", range(3), id="copy", marks=pytest.mark.slow),
    ],
)
def test_a_part_is_pefts_adalora_on_its_layers(
    family: str, cut: str, schedule: str, blocks: range, tiny_models: dict[str, Path]
) -> None:
    """To the bit, over a whole schedule and five rounds: weights, importance, its uncertainty, and ranks."""
    config = config_of(tiny_models[family], cut, trunk__schedule=schedule)
    client, trunk = client_of(config)
    tensors, moments = lora.read(client.bottom, client.top).tensors, {}
    start = {**tensors, **trunk.read().tensors}
    whole = unsplit(config, blocks, start)
    parameters = trained(whole)
    optimizer = make_optimizer(parameters.values(), config.train)
    masked = []
    for round in range(1, ROUNDS + 1):
        if schedule == "copies":
            trunk.assign({0: Start(trunk.read().tensors)})
        update = client.train(tensors, round, moments=moments)
        tensors, moments = update.adapters.tensors, update.moments
        trunk.end_round([0])
        if schedule == "copies":
            trunk.write(trunk.copies([0])[0].adapters.tensors)
        for step in range((round - 1) * STEPS, round * STEPS):
            ids = batch(client.shard.train, step, config.train.batch_size, derive_seed(config.seed, "client", 0)).ids
            whole(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            whole.base_model.update_and_allocate(step + 1)
            optimizer.zero_grad()
            masked.append(ranks(parameters))
        found = {**tensors, **trunk.read().tensors}
        assert all(torch.equal(found[name], parameter) for name, parameter in parameters.items()), round
        told = {**moments, **{name.removeprefix("0/"): value for name, value in trunk.moments().items()}}
        known = {name: value for name, value in told.items() if "#" in name}
        assert same(known, remembered(whole)), round
    layers = len(parameters) // 3
    assert masked[0] == masked[1] == 4 * layers and masked[3] < 4 * layers and masked[6:] == [2 * layers] * 4


@pytest.mark.parametrize("cut", ["0:1", "0:3", "1:2", "2:3"])
def test_the_parts_regularisation_is_the_whole_models(cut: str, model_path: Path) -> None:
    """Each factor's gradient is to the bit what autograd makes of PEFT's own expression over all layers."""
    config = config_of(model_path, cut, {"orth_reg_weight": 0.3})
    parts = parts_of(config)
    for name, parameter in ((n, p) for part in parts for n, p in lora.parameters(part).items()):
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter.data = torch.randn(parameter.shape, generator=generator)
    whole = unsplit(config, range(BLOCKS), lora.read(*parts).tensors)
    model = whole.base_model.model
    silent = SimpleNamespace(
        named_parameters=model.named_parameters, forward=lambda: SimpleNamespace(loss=torch.zeros(()))
    )
    asked = {"peft_config": whole.peft_config, "trainable_adapter_name": "default"}
    AdaLoraModel.forward(SimpleNamespace(model=silent, **asked)).loss.backward()
    expected = {name: p.grad for name, p in trained(whole).items() if p.grad is not None}
    found: dict[str, Tensor] = {}
    for part in parts:
        found |= regularisation(lora.parameters(part), part.rank_budget) if part.rank_budget else {}
    assert same(found, expected) and len(found) == 2 * adapted_layers(config, parts[0].family)
    halves = [regularisation(lora.parameters(part), part.rank_budget, 0.5) for part in parts]
    assert all(torch.equal(gradient * 2, expected[name]) for half in halves for name, gradient in half.items())


def test_the_regularisation_by_hand() -> None:
    """Q = (2, 0) of one rank: |4 - 1| = 3, by its first value 2 * 2; of orthonormal columns nothing is asked."""
    budget = RankBudget(orth_reg_weight=0.5, layers=3)
    factors = {"l.lora_A": torch.tensor([[2.0, 0.0]]), "l.lora_B": torch.eye(3)[:, :1], "l.lora_E": torch.ones(1, 1)}
    found = regularisation(factors, budget)
    assert found.keys() == {"l.lora_A", "l.lora_B"}
    assert found["l.lora_A"].tolist() == [[pytest.approx(0.5 / 6 * 4), 0.0]] and not found["l.lora_B"].any()
    assert regularisation(factors, RankBudget(orth_reg_weight=0.0)) == {}


@pytest.mark.parametrize(
    ("accumulation", "micro_batches", "clip"),
    [(2, 2, 0.01), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2, 0.0), (2, 1, 0.01)))],
)
def test_a_step_in_parts_is_the_same_step(
    accumulation: int, micro_batches: int, clip: float, tiny_models: dict[str, Path]
) -> None:
    """Against plain PEFT with torch's clipping: the regularisation counts once a step, and in the norm."""
    how = {"train__accumulation": accumulation, "train__micro_batches": micro_batches, "train__clip": clip}
    how |= {"train__optimizer": "sgd", "train__momentum": 0.5, "train__lr": 2.0}  # AdamW would hide a wrong size
    config = config_of(
        tiny_models["llama"], "0:3", rounds=1, train__steps=10, train__batch_size=4 // accumulation, **how
    )
    client, trunk = client_of(config)
    start = trunk.read().tensors
    whole = unsplit(config, range(BLOCKS), start)
    parameters = trained(whole)
    optimizer = make_optimizer(parameters.values(), config.train)
    client.train({}, 1)
    for step in range(10):
        ids = batch(client.shard.train, step, 4, derive_seed(config.seed, "client", 0)).ids
        whole(input_ids=ids, labels=ids).loss.backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(parameters.values(), clip) > clip
        optimizer.step()
        whole.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    found = trunk.read().tensors
    for name, parameter in parameters.items():
        assert (found[name] - parameter).abs().max() <= 1e-5, name
    assert max(float((found[name] - start[name]).abs().max()) for name in parameters) > 1e-2
    assert ranks(found) == ranks(parameters) < ranks({n: torch.ones_like(t) for n, t in start.items()})


A, B, E = "l.lora_A", "l.lora_B", "l.lora_E"
HALF = {"beta1": 0.5, "beta2": 0.5, "init_r": 2, "target_r": 1}


def layer() -> dict[str, torch.nn.Parameter]:
    """One layer of rank 2, all ones."""
    shapes = {A: (2, 3), B: (3, 2), E: (2, 1)}
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def by_rank(first: float, second: float) -> dict[str, Tensor]:
    """Gradients that matter so much to one rank and to the other."""
    values = torch.tensor([first, second])
    return {A: values[:, None].expand(2, 3), B: values.expand(3, 2), E: values[:, None]}


def left(own: Mapping[str, Tensor]) -> list[bool]:
    return (own[E] != 0).view(-1).tolist()


def test_importance_and_masks_by_hand() -> None:
    """Equations 8 to 12: |w g| smoothed, times how far it is from that, of Λ and in the mean of P and of Q."""
    own = layer()
    allocation = RankAllocation(own, RankBudget(**HALF, tinit=1, rounds=4))
    allocation.allocate(by_rank(2.0, 1.0), 1)
    known = allocation.moments()
    assert known[f"{A}#importance"].tolist() == [[1.0] * 3, [0.5] * 3]
    assert known[f"{A}#uncertainty"].tolist() == [[0.5] * 3, [0.25] * 3]
    assert left(own) == [True, True]
    # Rank 0: 0.5 + 0.5 * 0 and 0.25 + 0.25; rank 1: 0.25 + 0.5 * 3 and 0.125 + 0.5 * 1.25. Two of three steps are left
    # of the descent: 1 + 1 * (2 / 3) ** 3 is a budget of one.
    allocation.allocate(by_rank(0.0, 3.0), 2)
    known = allocation.moments()
    assert known[f"{E}#importance"].tolist() == [[0.5], [1.75]]
    assert known[f"{E}#uncertainty"].tolist() == [[0.5], [0.75]]
    assert left(own) == [False, True] and known[f"{E}#kept"].tolist() == [False, True]
    assert all(parameter.grad is None for parameter in own.values())


def test_an_allocator_that_another_life_began_goes_on_to_the_bit() -> None:
    budget = RankBudget(**HALF, tinit=1, tfinal=2, rounds=6)
    straight, stopped = layer(), layer()
    one, two = RankAllocation(straight, budget), RankAllocation(stopped, budget)
    for position, (first, second) in enumerate(
        [(2.0, 1.0), (0.5, 3.0), (1.0, 0.5), (9.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    ):
        for own, allocation in ((straight, one), (stopped, two)):
            own[E].data += 0.25
            allocation.allocate(by_rank(first, second), position + 1)
        two = RankAllocation(stopped, budget, {**two.moments(), "other.lora_E#kept": torch.ones(1).bool()})
        assert same(straight, stopped) and same(two.moments(), one.moments())
    assert ranks(straight) == 1


def test_the_last_allocation_is_made_up_for() -> None:
    """A client that was not drawn in its round; the next step makes it by what is remembered, and not by its own."""
    own, budget = layer(), RankBudget(**HALF, tinit=2, tfinal=2, rounds=6)
    allocation = RankAllocation(own, budget)
    allocation.allocate(by_rank(2.0, 1.0), 1)
    allocation.allocate(by_rank(0.0, 9.0), 5)
    assert left(own) == [True, False]
    own[E].data += 1.0
    allocation.allocate(by_rank(0.0, 9.0), 6)
    assert left(own) == [True, False]
    assert allocation.moments().keys() == {f"{E}#kept"}


def test_who_has_forgotten_begins_with_the_gradient_of_the_step() -> None:
    own, budget = layer(), RankBudget(**HALF, tinit=2, tfinal=2, rounds=6)
    RankAllocation(own, budget).allocate(by_rank(1.0, 2.0), 4)
    assert left(own) == [False, True]


def test_after_the_last_allocation_what_comes_as_zero_stays_so() -> None:
    """The mean of clients' masked values has what any of them left; it is not thinned out again."""
    own, budget = layer(), RankBudget(**HALF, tinit=2, tfinal=2, rounds=6)
    own[E].data[0] = 0.0
    allocation = RankAllocation(own, budget)
    own[E].data += 0.5
    allocation.allocate(by_rank(1.0, 1.0), 5)
    assert left(own) == [False, True]
    untrained = layer()
    untrained[E].data.zero_()
    allocation = RankAllocation(untrained, budget)
    untrained[E].data += 0.5
    allocation.allocate(by_rank(3.0, 1.0), 6)  # else it could never learn
    assert left(untrained) == [True, False]


def test_a_step_too_many_masks_as_the_last_one() -> None:
    """Barriers may come more often than planned; PEFT has forgotten the importance by then."""
    own, budget = layer(), RankBudget(**HALF, tinit=1, rounds=3)
    allocation = RankAllocation(own, budget)
    for position in (1, 2, 3, 3):
        own[E].data += 0.5
        allocation.allocate(by_rank(2.0, 1.0), position)
        assert position == 1 or left(own) == [True, False]


def test_without_a_gradient_or_a_budget_nothing_is_dealt_out() -> None:
    own = layer()
    allocation = RankAllocation(own, RankBudget(**HALF))
    allocation.allocate({}, 1)
    assert left(own) == [True, True] and allocation.moments() == {}
    assert begin(own, None) is None and begin({"lm_head.weight": own[A]}, RankBudget()) is None


def federated(path: Path, corpus: Path, **values: object) -> Config:
    """Three clients, three rounds of three steps."""
    own = {"clients": 3, "rounds": 3, "dataset": str(corpus), "partition": "natural", "train__max_length": 16}
    own |= {"train__steps": 3, "train__lr": 0.02, "lora__alpha": 64.0, "trunk__schedule": "copies"}
    own |= {"eval__samples": 4, "eval__after": 2}
    options = {"tinit": 1, "tfinal": 2, "deltaT": 1, "orth_reg_weight": 0.1}
    return config_of(path, "1:2", options, **{**own, **values})


def result(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "trunk",
    [
        {"schedule": "shared"},
        *(
            pytest.param(trunk, marks=pytest.mark.slow)
            for trunk in (
                {"schedule": "batched"},
                {"schedule": "accumulate", "every": 2},
                {"schedule": "copies"},
                {"schedule": "forward-only"},
            )
        ),
    ],
    ids=lambda trunk: trunk["schedule"],
)
def test_every_schedule_deals_ranks_out_and_its_adapter_opens(
    trunk: dict[str, object], tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Plain PEFT has the loss that was reported, and the parts' logits to the bit; ranks are at the trunk's budget."""
    values = {f"trunk__{name}": value for name, value in trunk.items()}
    config = federated(tiny_models["llama"], corpus_file, rounds=2, **values)
    federation, _ = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] < federation.summary["eval_loss"]["before"]
    folder = tmp_path / "run" / "adapter"
    opened = PeftModel.from_pretrained(load_unsplit(config.model_path), str(folder)).eval()
    assert held_out_loss(opened, tmp_path / "run") == pytest.approx(federation.summary["eval_loss"]["after"], abs=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["total_step"] == 6
    kept = [int(t.count_nonzero()) for n, t in result(tmp_path / "run").items() if n.endswith(".lora_E")]
    assert summary(open_run(tmp_path / "run"))[0].endswith(f"adalora, ranks {min(kept)} to {max(kept)}")

    bottom, middle, top = load_parts(config.model_path, config.bounds, KINDS, kernels="library")
    adopt(folder, config, bottom, middle, top)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        logits = top.eval().logits(middle.eval()(bottom.eval()(ids)))
        assert torch.equal(logits, opened(input_ids=ids).logits)

    left = {kind: ranks(lora.read(part).tensors) for kind, part in zip(KINDS, (bottom, middle, top), strict=True)}
    layers = {kind: len(lora.parameters(part)) // 3 for kind, part in zip(KINDS, (bottom, middle, top), strict=True)}
    if trunk["schedule"] == "forward-only":
        assert left["bottom"] == left["trunk"] == 0
    elif trunk["schedule"] != "copies":  # of which the mean has what any client left
        assert left["trunk"] == 2 * layers["trunk"]
    assert 2 * layers["top"] <= left["top"] <= 4 * layers["top"]


class Killed(Exception):
    """The end of a process."""


def kill_in_round_three(request: Request, answer: Answer) -> Answer:
    if isinstance(request, Train) and request.round == 3:
        raise Killed
    return answer


@pytest.mark.parametrize(
    ("schedule", "state", "tinit", "tfinal"),
    [
        ("shared", "keep", 6, 0),
        pytest.param("copies", "keep", 6, 0, marks=pytest.mark.slow),
        pytest.param("copies", "keep", 1, 5, marks=pytest.mark.slow),
        pytest.param("copies", "reset", 1, 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    schedule: str,
    state: str,
    tinit: int,
    tfinal: int,
    tiny_models: dict[str, Path],
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Two of three clients a round; killed in the third, in which ranks are first dealt out, or no more."""
    how = {"trunk__schedule": schedule, "train__optimizer_state": state, "fraction": 0.67, "train__clip": 0.1}
    how["lora__options"] = {**COURSE, "tinit": tinit, "tfinal": tfinal, "deltaT": 1}
    config = federated(tiny_models["gpt2"], corpus_file, **how)
    out = tmp_path / "stopped"
    federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    with pytest.raises(Killed):
        federate(config, out, FedAvg(), monkeypatch, kill_in_round_three)
    federate(replace(config, resume=str(out)), out, FedAvg(), monkeypatch)
    assert same(result(out), result(tmp_path / "straight"))


def test_a_mean_of_masked_values_has_what_any_client_left(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """After one round that ends with the last allocation: each client at its budget, their mean above it."""
    options = {**COURSE, "tinit": 1, "tfinal": 0, "deltaT": 1}
    config = federated(tiny_models["gpt2"], corpus_file, rounds=1, lora__options=options)
    seen: list[int] = []

    class Watching(FedAvg):
        def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
            seen.extend(ranks(update.adapters.tensors) for update in updates)
            return super().aggregate(state, adapters, updates)

    federate(config, tmp_path / "run", Watching(), monkeypatch)
    layers = len(result(tmp_path / "run")) // 3
    assert seen == [2 * layers] * 3
    assert 2 * layers < ranks(result(tmp_path / "run")) < 4 * layers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_layers_divide_by_does_not_train(dtype: str, tiny_models: dict[str, Path]) -> None:
    """On a base in 16 bits PEFT would train it, and not save it."""
    config = config_of(tiny_models["llama"], dtype=dtype)
    (trunk,) = bare_parts(config, ["trunk"])
    adapt(trunk, config)
    assert {name.rpartition(".")[2] for name in lora.parameters(trunk)} == {"lora_A", "lora_B", "lora_E"}
    counts = [p for name, p in trunk.named_parameters() if "ranknum" in name]
    assert len(counts) == 7 and all(p.dtype == torch.float32 and p.tolist() == [4.0] for p in counts)


def test_experts_and_routers_get_none() -> None:
    """PEFT's configuration has a field for them, which is LoRA's."""
    settings, mixtral = LoraSettings(method="adalora", targets=("q_proj", "gate")), family_of(CONFIGS["mixtral"]())
    with pytest.raises(
        SettingError, match=r"^lora.targets: gate is not possible; .* of the kind adalora, which sit on"
    ):
        make_config(settings, mixtral)
    assert make_config(replace(settings, targets=("q_proj",)), mixtral).target_modules == {"q_proj"}


def test_each_parts_budget_goes_by_its_layers(tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models["gpt2"], "0:2")
    parts = parts_of(config)
    numbers = ranges(BLOCKS, config.bounds)
    assert adapted_layers(config, parts[0].family) == 3 * 4
    for part in parts:
        allocation = begin(lora.parameters(part), part.rank_budget)
        blocks = len(numbers[part.kind])
        assert (allocation is None) == (blocks == 0)
        if allocation is not None:
            assert (allocation._allocator.init_bgt, allocation._allocator.target_bgt) == (
                4 * 4 * blocks,
                2 * 4 * blocks,
            )
