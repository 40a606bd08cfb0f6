"""The loop over rounds: learning, repeatability, failures, the summary and the adapter that comes out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from local_federation import federate
from peft import PeftModel
from safetensors.torch import load_file
from test_client import FEATURES, STEPS, central, fine_tune
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.link import Link, PendingStep
from fedsplit.corpora.partition import shards_of
from fedsplit.engines import in_process
from fedsplit.errors import SettingError
from fedsplit.events.event_types import ClientFailed
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.clients import FederationFailed, Interrupted
from fedsplit.federation.messages import ADAPTERS, Answer, Evaluate, Failure, Introduce, Reply, Request, Train
from fedsplit.federation.replies import LARGEST_CHANGE
from fedsplit.federation.resumption import check_resumable
from fedsplit.federation.strategy import broadcast, load_strategy, traits_of
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.measuring import held_out_loss
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.trunk import local, port
from fedsplit.updates import Assignment
from fedsplit.wire.packets import StepKey
from strategies.fedavg import FedAvg
from strategies.flora import FLoRA as Flora


@pytest.fixture
def each_config(model_path: Path, corpus_file: Path) -> Config:
    """For what depends on the family."""
    return three_clients(model_path, corpus_file)


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    return three_clients(tiny_models["gpt2"], corpus_file)


def three_clients(model: Path, corpus: Path) -> Config:
    values = {
        "clients": 3,
        "rounds": 2,
        "model": str(model),
        "cut": "1:2",
        "dataset": str(corpus),
        "partition": "natural",
        "lora.rank": 2,
        "train.steps": 4,
        "train.batch_size": 2,
        "train.max_length": 16,
        "train.lr": 0.02,
    }
    return build(values)


ROUNDS = ("round-0001", "round-0002")


OUT_OF_LUCK = Failure(1, "RuntimeError", "RuntimeError: out of luck")


def bob_fails(request: Request, answer: Answer) -> Answer:
    """Has client 1 fail in every round of training."""
    return OUT_OF_LUCK if isinstance(request, Train) and request.client == 1 else answer


def with_metrics(answer: Answer, changes: Mapping[str, object]) -> Reply:
    """Returns a reply with other metrics; None takes one away."""
    assert isinstance(answer, Reply)
    metrics = {**answer.metrics, **changes}
    return replace(answer, metrics={name: value for name, value in metrics.items() if value is not None})


def with_adapters(answer: Answer, change: Callable[[Tensor], Tensor]) -> Reply:
    """Returns a reply with every adapter tensor changed."""
    assert isinstance(answer, Reply)
    changed = {name: change(tensor) for name, tensor in answer.tensors[ADAPTERS].items()}
    return replace(answer, tensors={**answer.tensors, ADAPTERS: changed})


def final_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_the_federation_learns_and_its_adapter_gives_the_reported_loss(
    each_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    federation, lines = federate(each_config, out, FedAvg(), monkeypatch)
    summary = json.loads((out / "summary.json").read_text())
    assert summary == federation.summary
    assert summary["eval_loss"]["after"] < summary["eval_loss"]["before"] - 0.1
    assert len(lines.lines) == 4
    assert lines.lines[0].startswith("fedavg aggregates ")
    assert "all clients train the trunk" in lines.lines[0]
    assert all(len(line) <= 80 for line in lines.lines[1:])
    base = load_unsplit(each_config.model_path)
    assert held_out_loss(base, out) == pytest.approx(summary["eval_loss"]["before"], abs=1e-5)
    model = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert held_out_loss(model, out) == pytest.approx(summary["eval_loss"]["after"], abs=1e-5)


def test_the_same_seed_gives_the_same_adapters_to_the_bit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        federate(config, tmp_path / name, FedAvg(), monkeypatch)
    one, two = final_adapter(tmp_path / "one"), final_adapter(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_packing_is_padding_where_a_text_fills_a_sequence(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of fifteen characters and the end token, in sequences of sixteen: the same run to the bit."""
    rows = [{"text": f"{owner} said {n:06}", "owner": owner} for owner in ("ann", "bob", "cid") for n in range(8)]
    (tmp_path / "full.jsonl").write_text("\n".join(map(json.dumps, rows)))
    document = as_document(config) | {"dataset": str(tmp_path / "full.jsonl")}
    for packing in ("true", "false"):
        how = from_document(document | {"data": {"packing": packing}})
        federate(how, tmp_path / packing, FedAvg(), monkeypatch)
    packed, padded = final_adapter(tmp_path / "true"), final_adapter(tmp_path / "false")
    assert all(torch.equal(tensor, padded[name]) for name, tensor in packed.items())
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("true", "false"))
    assert one["eval_loss"] == two["eval_loss"] and one["tokens"] == two["tokens"] and one["bytes"] == two["bytes"]


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_run_that_tells_classes_goes_on_to_the_bit(
    strategy: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head comes back, and the accuracy before the first round; dealt out unevenly by label."""
    values = {"clients": 2, "rounds": 2, "model": str(tiny_models["gpt2"]), "cut": "1:2", "dataset": "synthetic"}
    values |= {"data.format": "classification", "partition": "dirichlet:5", "trunk.schedule": "copies"}
    values |= {"lora.rank": 2, "train.max_length": 16, "train.steps": 3, "train.lr": 0.01}
    config = build(values)
    rule = load_strategy(strategy, {}, strategy_defaults(config))
    federate(config, tmp_path / "straight", rule, monkeypatch)
    federate(replace(config, rounds=1), tmp_path / "stopped", rule, monkeypatch)
    federate(replace(config, resume=str(tmp_path / "stopped")), tmp_path / "stopped", rule, monkeypatch)
    straight, stopped = final_adapter(tmp_path / "straight"), final_adapter(tmp_path / "stopped")
    assert "base_model.model.score.weight" in straight
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "stopped"))
    assert one["accuracy"] == two["accuracy"] and one["eval_loss"] == two["eval_loss"]


def test_a_run_of_one_client_is_plain_peft_fine_tuning(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps of the whole loop, messages and strategy included, against the unsplit model's training."""
    path = tiny_models["llama"]
    values = {"clients": 1, "rounds": 1, "model": str(path), "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "lora.dropout": 0.0, "train.max_length": 16}
    values |= {"kernels": "library"}  # AdamW makes any rounding of a small gradient a whole step
    config = build(values | {"train.steps": STEPS, "train.batch_size": 3, "train.lr": 5e-3})
    parts = load_parts(path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    start = lora.read(*parts).tensors
    plain = fine_tune(path, start, shards_of(config)[0].train, config.train)
    federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    federated = final_adapter(tmp_path / "run")
    assert len(federated) == len(plain)
    for name, tensor in plain.items():
        assert (federated[f"base_model.model.{name}"] - tensor).abs().max() <= 1e-5, name
        assert (start[name] - tensor).abs().max() > 1e-3, name


def test_the_ledger_is_what_theory_says(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations and gradients: clients x rounds x steps x B x T x D x 4 bytes; adapters: factors and headers."""
    federation, _ = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert federation.summary is not None
    sent = federation.summary["bytes"]
    step = 3 * 2 * 4 * 2 * 16 * 32 * 4
    assert all(sent[f"{what}_{way}"] == step for what in ("activation", "gradient") for way in ("up", "down"))
    places = [tmp_path / "run" / f"{part}_lora" / "adapter_model.safetensors" for part in ("bottom", "top")]
    ends = {**load_file(places[0]), **load_file(places[1])}
    factors = 3 * 2 * sum(tensor.nbytes for tensor in ends.values())
    assert sent["adapter_up"] == 2 * sent["adapter_down"]  # what the first round starts from follows from the seed
    assert factors < sent["adapter_up"] <= factors + 3 * 2 * len(ends) * 256
    assert federation.summary["tokens"] == 3 * 2 * 4 * 2 * 16


@pytest.mark.parametrize("schedule", ["frozen", "forward-only"])
def test_parts_that_do_not_learn_are_counted_and_kept_as_they_are(
    config: Config, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_document(as_document(config) | {"trunk": {"schedule": schedule}})
    federation, _ = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert federation.summary is not None
    trained = {part: counts["trainable"] > 0 for part, counts in federation.summary["parameters"].items()}
    assert trained == {"bottom": schedule == "frozen", "trunk": False, "top": True}
    first, last = (
        load_file(tmp_path / "run" / place / "adapter_model.safetensors")
        for place in ("checkpoints/round-0001", "trunk_lora")
    )
    assert all(torch.equal(tensor, first[name]) for name, tensor in last.items())


@pytest.mark.parametrize("schedule", ["batched", "accumulate", "copies"])
def test_every_schedule_learns_and_its_adapter_gives_the_reported_loss(
    config: Config, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_document(as_document(config) | {"trunk": {"schedule": schedule}})
    federation, _ = federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] < federation.summary["eval_loss"]["before"]
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(tmp_path / "run" / "adapter"))
    assert held_out_loss(model, tmp_path / "run") == pytest.approx(federation.summary["eval_loss"]["after"], abs=1e-5)
    rounds = (tmp_path / "run" / "checkpoints" / name / "adapter_model.safetensors" for name in ROUNDS)
    one, two = (load_file(path) for path in rounds)
    assert any(not torch.equal(tensor, two[name]) for name, tensor in one.items() if ".1." in name)  # the trunk's


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_the_bits_cross_with_half_the_precision(
    config: Config, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes by half, a loss that is close, and an adapter in float32."""
    wide, _ = federate(config, tmp_path / "wide", FedAvg(), monkeypatch)
    narrow, _ = federate(from_document(as_document(config) | {"dtype": dtype}), tmp_path / "n", FedAvg(), monkeypatch)
    assert wide.summary is not None
    assert narrow.summary is not None
    for what in ("activation_up", "activation_down", "gradient_up", "gradient_down"):
        assert narrow.summary["bytes"][what] * 2 == wide.summary["bytes"][what]
    assert {tensor.dtype for tensor in final_adapter(tmp_path / "n").values()} == {torch.float32}
    assert narrow.summary["eval_loss"]["before"] == pytest.approx(wide.summary["eval_loss"]["before"], rel=0.01)
    assert narrow.summary["eval_loss"]["after"] < narrow.summary["eval_loss"]["before"] - 0.1


@pytest.mark.parametrize("strategy", ["ours", "flower's"])
def test_copies_are_federated_averaging_of_the_whole_model(
    tiny_models: dict[str, Path], corpus_file: Path, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SplitFed v1: three clients, one round, against three plain PEFT runs of the unsplit model and their mean."""
    path = tiny_models["llama"]
    values = {"clients": 3, "rounds": 1, "model": str(path), "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "lora.dropout": 0.0, "train.max_length": 16}
    values |= {"train.steps": STEPS, "train.batch_size": 3, "train.lr": 5e-3, "trunk.schedule": "copies"}
    values |= {"kernels": "library"}
    config = build(values)
    parts = load_parts(path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    start, shards = lora.read(*parts).tensors, shards_of(config)
    plain = [fine_tune(path, start, shards[client].train, config.train, client) for client in range(3)]
    flower = load_strategy("flwr.serverapp.strategy:FedAvg", {}, strategy_defaults(config))
    monkeypatch.setattr(
        "flwr.serverapp.strategy.fedavg.sample_nodes",
        lambda grid, least, size: (grid.get_node_ids()[:size], grid.get_node_ids()),
    )
    federation, _ = federate(config, tmp_path / "run", FedAvg() if strategy == "ours" else flower, monkeypatch)
    federated = final_adapter(tmp_path / "run")
    for name in start:
        mean = torch.stack([adapter[name] for adapter in plain]).mean(0)
        assert (federated[f"base_model.model.{name}"] - mean).abs().max() <= 2e-5, name
    assert federation.summary is not None
    places = [tmp_path / "run" / f"{part}_lora" / "adapter_model.safetensors" for part in ("bottom", "top")]
    ends = {**load_file(places[0]), **load_file(places[1])}
    factors = 3 * sum(tensor.nbytes for tensor in ends.values())  # the trunk's copies never cross
    assert factors < federation.summary["bytes"]["adapter_up"] <= factors + 3 * len(ends) * 256


def test_what_the_round_made_a_client_lose_is_reported(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client and no aggregation to speak of: nothing can come between its own steps and the round's end."""
    alone = from_document(as_document(config) | {"clients": 1})
    federate(alone, tmp_path / "alone", FedAvg(), monkeypatch)
    federation, _ = federate(config, tmp_path / "three", FedAvg(), monkeypatch)
    for run, clients in (("alone", 1), ("three", 3)):
        events = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        lost = [event["forgotten"] for event in events if event["event"] == "evaluate"]
        assert [len(one) for one in lost] == [0, clients, clients]
        assert all(abs(value) < 1e-6 for value in lost[1].values()) == (run == "alone")
    assert federation.summary is not None
    assert federation.summary["forgotten"] == pytest.approx(sum(lost[2].values()) / 3)


def test_clients_begin_in_an_order_that_the_seed_decides(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.federation import client_service

    begun: list[tuple[int, int]] = []
    train = client_service.Client.train

    def remember(self, given, round, *more):
        begun.append((round, self.number))
        return train(self, given, round, *more)

    monkeypatch.setattr(client_service.Client, "train", remember)
    orders = {}
    for name, values in {"a": {}, "b": {}, "c": {"seed": 5}, "cyclic": {"trunk": {"order": "cyclic"}}}.items():
        begun.clear()
        document = as_document(config) | {"rounds": 4} | values
        federate(from_document(document), tmp_path / name, FedAvg(), monkeypatch)
        orders[name] = list(begun)
    assert orders["a"] == orders["b"] != orders["c"]
    assert orders["cyclic"] == [(round, client) for round in range(1, 5) for client in range(3)]
    assert sorted(orders["a"]) == orders["cyclic"] != orders["a"]


def test_deterministic_groups_are_announced_to_the_trunk(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.trunk.dispatch import Dispatcher

    groups: list[list[int]] = []
    begin = Dispatcher.begin
    monkeypatch.setattr(Dispatcher, "begin", lambda self, group: (groups.append(list(group)), begin(self, group)))
    for name, trunk in {"shared": {"order": "cyclic"}, "copies": {"schedule": "copies"}}.items():
        document = as_document(config) | {"deterministic": True, "trunk": trunk}
        federate(from_document(document), tmp_path / name, FedAvg(), monkeypatch)
    assert groups == [[0], [1], [2]] * 2  # copies need no groups


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum"])
def test_a_ready_made_flower_strategy_runs_unchanged(
    config: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eta": 0.01} if name == "FedAdam" else {}
    flower = load_strategy(f"flwr.serverapp.strategy:{name}", options, strategy_defaults(config))
    monkeypatch.setattr(
        "flwr.serverapp.strategy.fedavg.sample_nodes",
        lambda grid, least, size: (grid.get_node_ids()[:size], grid.get_node_ids()),
    )
    federation, _ = federate(config, tmp_path / name, flower, monkeypatch)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] < federation.summary["eval_loss"]["before"]
    if name == "FedAvg":
        # A trunk that does not learn: else the order in which nodes are served would matter, too.
        frozen = from_document(as_document(config) | {"trunk": {"schedule": "frozen"}})
        federate(frozen, tmp_path / "ours", FedAvg(), monkeypatch)
        federate(frozen, tmp_path / "theirs", flower, monkeypatch)
        ours, theirs = final_adapter(tmp_path / "ours"), final_adapter(tmp_path / "theirs")
        assert all(torch.allclose(tensor, theirs[key], atol=1e-6) for key, tensor in ours.items())


def test_a_client_that_fails_is_named_and_left_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch, bob_fails)
    assert lines.lines.count("bob failed and is left out: RuntimeError: out of luck") == 2
    assert federation.summary is not None
    assert federation.summary["tokens"] == 2 * 2 * 4 * 2 * 16


def fails(*kinds: type[Request], client: int, answer: Answer = OUT_OF_LUCK) -> Callable[[Request, Answer], Answer]:
    """Returns a spoiler by which a client fails at requests of some kinds."""

    def spoil(request: Request, honest: Answer) -> Answer:
        return replace(answer, client=client) if isinstance(request, kinds) and request.client == client else honest

    return spoil


@pytest.mark.parametrize("client", [0, 1])
@pytest.mark.parametrize("answer", [OUT_OF_LUCK, Reply(1, about="{")], ids=["failed", "malformed"])
def test_a_client_without_an_introduction_is_left_out_as_one_that_fails_in_every_round(
    answer: Answer, client: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, trunk=replace(config.trunk, schedule="copies"))
    introduces_badly = fails(Introduce, client=client, answer=answer)
    federation, lines = federate(config, tmp_path / "absent", FedAvg(), monkeypatch, introduces_badly)
    failing, _ = federate(config, tmp_path / "failing", FedAvg(), monkeypatch, fails(Train, Evaluate, client=client))
    absent, failed = final_adapter(tmp_path / "absent"), final_adapter(tmp_path / "failing")
    assert all(torch.equal(tensor, failed[name]) for name, tensor in absent.items())
    assert federation.summary is not None and failing.summary is not None
    assert federation.summary["client_rounds"] == failing.summary["client_rounds"] == {"asked": 6, "failed": 2}

    reported = [event for event in lines.events if isinstance(event, ClientFailed) and event.phase == "loading"]
    assert [event.client for event in reported] == [client]
    words = "out of luck" if answer is OUT_OF_LUCK else "introduced itself in a wrong form"
    assert words in reported[0].reason
    assert lines.lines.count(f"client {client} is left out of the whole run: {reported[0].reason}") == 1


def test_clients_without_an_introduction_count_for_the_quorum(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, quorum=1.0, max_failures=1)
    with pytest.raises(FederationFailed, match="2 of 3 clients have sent an update that can be used, 3 are needed"):
        federate(config, tmp_path / "run", FedAvg(), monkeypatch, fails(Introduce, client=1))


def test_a_run_without_any_introduction_ends_with_the_reason(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(request: Request, answer: Answer) -> Answer:
        return replace(OUT_OF_LUCK, client=request.client)

    with pytest.raises(FederationFailed, match=r"^no client could introduce itself: RuntimeError: out of luck$"):
        federate(config, tmp_path / "run", FedAvg(), monkeypatch, spoil)


def test_a_run_without_any_answer_ends_with_the_reason(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(request: Request, answer: Answer) -> Answer:
        return replace(OUT_OF_LUCK, client=request.client) if isinstance(request, Train) else answer

    with pytest.raises(FederationFailed, match="no client answered: RuntimeError: out of luck"):
        federate(config, tmp_path / "run", FedAvg(), monkeypatch, spoil)


def test_an_update_that_is_not_finite_is_refused_by_name(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(request: Request, answer: Answer) -> Answer:
        if not (isinstance(request, Train) and request.client == 2):
            return answer
        return with_adapters(answer, lambda tensor: tensor * math.nan)

    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch, spoil)
    refused = [line for line in lines.lines if "client 2 (cid) sent NaN or infinite values in " in line]
    assert len(refused) == 2 and all(line.endswith("; it is left out") for line in refused)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] < federation.summary["eval_loss"]["before"]


LIES: list[dict[str, object]] = [{"num-examples": 10**6}, {"client": 0}, {"loss": 1e308}]
"""One of each kind; `tests/federation/test_replies.py` has them all."""


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_who_says_what_cannot_be_is_left_out_as_if_it_had_failed(
    lie: dict[str, object], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a schedule that is deterministic, to the bit: the liar of node 1's own number, whatever it says."""
    config = replace(config, rounds=1, trunk=replace(config.trunk, schedule="copies"))

    def lies(request: Request, answer: Answer) -> Answer:
        return with_metrics(answer, lie) if isinstance(request, Train) and request.client == 1 else answer

    _, lines = federate(config, tmp_path / "lies", FedAvg(), monkeypatch, lies)
    assert sum(line.startswith("client 1 (bob) s") and "left out" in line for line in lines.lines) == 1
    federate(config, tmp_path / "fails", FedAvg(), monkeypatch, bob_fails)
    one, two = final_adapter(tmp_path / "lies"), final_adapter(tmp_path / "fails")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_under_epochs_too_no_client_counts_more_than_it_has(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in a second round, whose passes begin anew."""

    def lies(request: Request, answer: Answer) -> Answer:
        if not (isinstance(request, Train) and request.client == 1):
            return answer
        return with_metrics(answer, {"num-examples": 10**15})

    config = replace(config, train=replace(config.train, epochs=1, batch_size=3))
    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch, lies)
    left_out = [line for line in lines.lines if "left out" in line]
    assert len(left_out) == 2 and all(line.startswith("client 1 (bob) sent 10000") for line in left_out)
    assert federation.summary is not None


@pytest.mark.parametrize("size", [1e30, 1e7])
def test_an_update_that_is_too_large_is_a_failure_of_its_client_alone(
    size: float, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round with it is, to the bit, the one in which that client failed."""
    config = replace(config, rounds=1, trunk=replace(config.trunk, schedule="copies"))

    def spoils(request: Request, answer: Answer) -> Answer:
        if not (isinstance(request, Train) and request.client == 1):
            return answer
        return with_adapters(answer, lambda tensor: torch.full_like(tensor, size))

    _, lines = federate(config, tmp_path / "spoils", FedAvg(), monkeypatch, spoils)
    (left_out,) = [line for line in lines.lines if "left out" in line]
    assert left_out.startswith("client 1 (bob) sent adapters that changed by a norm of ")
    federate(config, tmp_path / "fails", FedAvg(), monkeypatch, bob_fails)
    one, two = final_adapter(tmp_path / "spoils"), final_adapter(tmp_path / "fails")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_the_largest_update_that_is_used_every_client_can_still_measure(
    family: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody honest is blamed for what it made of the model."""
    torch.manual_seed(0)

    def spoils(request: Request, answer: Answer) -> Answer:
        if not (isinstance(request, Train) and request.client == 1):
            return answer
        assert isinstance(answer, Reply)
        values = sum(tensor.numel() for tensor in answer.tensors[ADAPTERS].values())
        each = 0.9 * LARGEST_CHANGE / math.sqrt(values)
        return with_adapters(answer, lambda tensor: tensor + each * torch.randn_like(tensor).sign())

    config = replace(three_clients(tiny_models[family], corpus_file), rounds=1)
    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch, spoils)
    assert not [line for line in lines.lines if "left out" in line]
    assert federation.summary is not None and math.isfinite(federation.summary["eval_loss"]["after"])


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"num-examples": 0}, "measured 0 tokens"),
        ({"num-examples": 10**15, "nats": 0.0}, "sent 1000000000000000 as its number of tokens"),
    ],
    ids=str,
)
def test_who_measured_what_cannot_be_is_left_out(
    lie: dict[str, float], words: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lies(request: Request, answer: Answer) -> Answer:
        return with_metrics(answer, lie) if isinstance(request, Evaluate) and request.client == 1 else answer

    config = replace(config, rounds=1)
    federation, lines = federate(config, tmp_path / "run", FedAvg(), monkeypatch, lies)
    refused = [line for line in lines.lines if line.startswith(f"client 1 (bob) {words}")]
    assert len(refused) == 2 and federation.summary is not None  # before the first round, and after it
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [list(e["clients"]) for e in events if e["event"] == "evaluate"] == [["ann", "cid"]] * 2


def spoils_a_step(value: float | None):
    """How bob sends: at the last step of the first round, a value in place of his hidden states; or he fails there."""
    plain = Link.send

    def send(self: Link, hidden: torch.Tensor, key: StepKey, *args, **how) -> PendingStep:
        if (key.client, key.step, key.round) == (1, 3, 1) and how.get("training", True):
            if value is None:
                raise RuntimeError("out of luck")
            hidden = torch.full_like(hidden, value)
        return plain(self, hidden, key, *args, **how)

    return send


@pytest.mark.parametrize(
    ("value", "trunk"),
    [(math.nan, {"schedule": "accumulate"}), (math.inf, {"schedule": "copies"}), (1e30, {"schedule": "shared"})],
    ids=str,
)
def test_hidden_states_that_are_not_finite_are_a_failure_of_their_client_alone(
    trunk: dict[str, str], value: float, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run with such a client is, to the bit, the one in which it failed at that step; what is saved is finite."""
    config = from_document(as_document(config) | {"trunk": trunk, "deterministic": True})
    said = "client 1, step 3.0, attempt 0 sent hidden states that are NaN, infinite or too large"
    for name, sent, words in (("spoils", value, said), ("fails", None, "out of luck")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "send", spoils_a_step(sent))
            _, lines = federate(config, tmp_path / name, FedAvg(), monkeypatch)
        failed = [line for line in lines.lines if line.startswith("bob failed and is left out")]
        assert len(failed) == 1 and words in failed[0]
        assert sent is None or "--train.lr (0.02) is too large" in failed[0]
    for file in ("checkpoints/round-0001/state.safetensors", "checkpoints/round-0002/state.safetensors"):
        one, two = load_file(tmp_path / "spoils" / file), load_file(tmp_path / "fails" / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) and torch.isfinite(tensor).all() for name, tensor in one.items())


def test_what_is_not_finite_is_not_saved(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it came from: the round before it is still there to go on from."""

    class BrokenTrunk(local.LocalTrunk):
        saved = 0

        def control(self, message: port.Control[Any]) -> Any:
            reply = super().control(message)
            if not isinstance(message, port.ReadMoments):
                return reply
            self.saved += 1  # before the first round, and at the end of each
            return {name: moment * (math.inf if self.saved == 3 else 1) for name, moment in reply.items()}

    monkeypatch.setattr(local, "LocalTrunk", BrokenTrunk)
    with pytest.raises(FederationFailed, match="round 2 left NaN or infinite values in"):
        federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*")] == ["round-0001"]


def test_stopping_ends_the_run_at_the_next_look(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(in_process.Federation):
        def _meet(self, parties):
            self.stop.set()
            return super()._meet(parties)

    monkeypatch.setattr(in_process, "Federation", Stopped)
    with pytest.raises(Interrupted):
        federate(config, tmp_path / "run", FedAvg(), monkeypatch)


def test_events_are_logged_by_round_and_client(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    each = ("train", "aggregate", "evaluate", "cost")
    expected = [("evaluate", 0), ("cost", 0), *((event, round) for round in (1, 2) for event in each)]
    assert [(event["event"], event["round"]) for event in events] == expected
    assert all(list(e["clients"]) == ["ann", "bob", "cid"] for e in events if "clients" in e)
    assert events[-2]["perplexity"] == pytest.approx(math.exp(events[-2]["loss"]))


def test_fewer_evaluations_by_fewer_clients_change_no_adapter(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last round is measured in any case, and a round without a measurement has no loss on the screen."""
    config = replace(config, rounds=3)
    federate(config, tmp_path / "all", FedAvg(), monkeypatch)
    sparse = replace(config, eval=replace(config.eval, every=2, fraction=0.4))
    federation, sink = federate(sparse, tmp_path / "few", FedAvg(), monkeypatch)
    whole, few = final_adapter(tmp_path / "all"), final_adapter(tmp_path / "few")
    assert all(torch.equal(tensor, few[name]) for name, tensor in whole.items())

    events = [json.loads(line) for line in (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()]
    measured = [event for event in events if event["event"] == "evaluate"]
    assert [event["round"] for event in measured] == [0, 2, 3]
    assert len({tuple(event["clients"]) for event in measured}) == 1 and len(measured[0]["clients"]) == 1
    assert federation.summary is not None
    assert (federation.summary["eval_round"], federation.summary["eval_clients"]) == (3, 1)
    lines = [line for line in sink.lines if line.startswith("round ")]
    assert ["held-out loss" in line for line in lines] == [True, False, True, True]


class Killed(Exception):
    """The end of a process."""


def killed_in(round: int):
    """What kills a federation as its first client of a round answers."""

    def spoil(request: Request, answer: Answer) -> Answer:
        if isinstance(request, Train) and request.round == round:
            raise Killed
        return answer

    return spoil


@pytest.mark.parametrize("trunk", [{}, {"schedule": "copies"}, {"schedule": "accumulate", "every": 1}])
def test_a_run_of_one_client_with_all_features_is_plain_fine_tuning(
    tiny_models: dict[str, Path], corpus_file: Path, trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule, warm-up, accumulation, clipping and a kept state over three rounds of the whole loop."""
    path = tiny_models["llama"]
    values = {"clients": 1, "rounds": 3, "model": str(path), "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "lora.dropout": 0.0, "train.max_length": 16}
    values |= {"kernels": "library", "train.steps": 4, "train.batch_size": 3, "train.lr": 5e-3}
    values |= {f"train.{name}": value for name, value in FEATURES.items()}
    config = build(values | {f"trunk.{name}": value for name, value in trunk.items()})
    parts = load_parts(path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    start = lora.read(*parts).tensors
    plain = central(path, start, shards_of(config)[0].train, config.train, 3)
    federate(config, tmp_path / "run", FedAvg(), monkeypatch)
    federated = final_adapter(tmp_path / "run")
    for name, tensor in plain.items():
        assert (federated[f"base_model.model.{name}"] - tensor).abs().max() <= 1e-5, name
        assert (start[name] - tensor).abs().max() > 1e-3, name


@pytest.mark.parametrize("schedule", ["shared", "copies"])
def test_a_run_that_was_stopped_goes_on_to_the_bit_with_what_optimisers_remember(
    config: Config, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = as_document(config) | {"rounds": 3, "trunk": {"schedule": schedule}, "fraction": 0.67}
    config = from_document(document | {"train": document["train"] | FEATURES})
    out = tmp_path / "stopped"
    federate(config, tmp_path / "straight", FedAvg(), monkeypatch)
    with pytest.raises(Killed):
        federate(config, out, FedAvg(), monkeypatch, killed_in(3))
    federate(replace(config, resume=str(out)), out, FedAvg(), monkeypatch)
    straight, stopped = final_adapter(tmp_path / "straight"), final_adapter(out)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())
    forgetful = replace(config, train=replace(config.train, optimizer_state="reset"))
    federate(forgetful, tmp_path / "reset", FedAvg(), monkeypatch)
    reset = final_adapter(tmp_path / "reset")
    assert any(not torch.equal(tensor, reset[name]) for name, tensor in straight.items())


class Worse:
    """A strategy that spoils what another one makes from a round on."""

    def __init__(self, around, since: int, done: int = 0) -> None:
        self.around, self.since, self.done = around, since, done
        self.init, self.broadcast, self.traits = around.init, partial(broadcast, around), traits_of(around)

    def aggregate(self, state, adapters, updates):
        self.done += 1
        state, made = self.around.aggregate(state, adapters, updates)
        if self.done < self.since:
            return state, made
        spoilt = {name: tensor * 30 for name, tensor in made.tensors.items()}
        return state, replace(made, tensors=spoilt, folded={n: c.times(30.0) for n, c in made.folded.items()})


@pytest.mark.parametrize("case", ["personal", "folded"])
def test_the_best_round_is_what_a_run_leaves_that_stops_early(
    config: Config, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoilt from round 3 on, and killed in round 4: what is left is round 2, and its loss is the one reported."""
    values = as_document(config) | {"rounds": 9, "patience": 2, "keep_best": True, "trunk": {"schedule": "copies"}}
    config, around = from_document(values), Flora
    if case == "personal":
        config, around = replace(config, share=("bottom", "trunk")), FedAvg
    out = tmp_path / "run"
    with pytest.raises(Killed):
        federate(config, out, Worse(around(), 3), monkeypatch, killed_in(4))
    going = replace(config, resume=str(out))
    federation, lines = federate(going, out, Worse(around(), 3, done=3), monkeypatch)
    summary = json.loads((out / "summary.json").read_text())
    assert summary == federation.summary
    assert {name: summary[f"{name}_round"] for name in ("last", "best", "adapter")} == {
        "last": 4,
        "best": 2,
        "adapter": 2,
    }
    assert summary["ended"] == "2 rounds in a row have not bettered the held-out loss"
    assert lines.lines[-1].startswith(f"ends after round 4: {summary['ended']}; the best round was 2")
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {event["round"]: event for event in events if event["event"] == "evaluate"}
    assert summary["eval_loss"]["after"] == losses[2]["loss"] < min(losses[3]["loss"], losses[4]["loss"])
    lost = [sum(losses[round]["forgotten"].values()) / 3 for round in (2, 4)]
    assert summary["forgotten"] == pytest.approx(lost[0], rel=1e-12) and abs(lost[0] - lost[1]) > 1e-6
    errors = {event["round"]: event["error"] for event in events if event["event"] == "aggregate"}
    assert summary["aggregation_error"] == errors[2] != errors[4]
    best = load_file(out / "checkpoints" / "round-0002" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in final_adapter(out).items())
    parts = [load_file(out / f"{part}_lora" / "adapter_model.safetensors") for part in PARTS]
    assert {name: best[name] for part in parts for name in part}.keys() == best.keys()
    assert all(torch.equal(tensor, best[name]) for part in parts for name, tensor in part.items())
    names = sorted(losses[2]["clients"])
    if case == "folded":
        model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(out / "adapter"))
        assert held_out_loss(model, out) == pytest.approx(losses[2]["loss"], abs=1e-5)
    for client, name in enumerate(names if case == "personal" else []):
        model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(out / "personal" / f"{client:04d}"))
        assert held_out_loss(model, out, [client]) == pytest.approx(losses[2]["clients"][name], abs=1e-5)
    with pytest.raises(SettingError, match=r"^patience: 2 is not possible; allowed: more than 2, the rounds in a row"):
        check_resumable(out, replace(config, rounds=9, patience=2))
    check_resumable(out, replace(config, rounds=9, patience=3))
    check_resumable(out, replace(config, rounds=9, patience=0))


def test_a_round_in_which_all_rest_has_no_aggregation_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the round before is not its own."""

    class Tired(FedAvg):
        done = False

        def broadcast(self, state, adapters, client):
            return None if self.done else Assignment(adapters.with_rank(client.rank))

        def aggregate(self, state, adapters, updates):
            self.done = True
            return super().aggregate(state, adapters, updates)

    federation, _ = federate(config, tmp_path / "run", Tired(), monkeypatch)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["error"] > 0 for event in events if event["event"] == "aggregate"] == [True]
    assert federation.summary is not None and federation.summary["aggregation_error"] is None


class Late(FedAvg):
    """A strategy under which clients train or rest as told, and only the last of these rounds changes the adapters."""

    traits = replace(FedAvg.traits, idles=True)

    def __init__(self, trains: list[bool]) -> None:
        self.trains, self.round = trains, 0

    def broadcast(self, state, adapters, client):
        return Assignment(adapters.with_rank(client.rank)) if self.trains[self.round] else None

    def aggregate(self, state, adapters, updates):
        self.round += 1
        if self.round < len(self.trains):
            return state, adapters.with_tensors(adapters.tensors)
        spoilt = {name: tensor + 3 for name, tensor in adapters.tensors.items()}
        return state, adapters.with_tensors(spoilt)


@pytest.mark.parametrize(
    ("schedule", "trains", "last"),
    [
        ("copies", [True, False, False, False, True], 5),
        ("copies", [True, True, True, True, True], 5),  # their changes are under way
        ("frozen", [True, True, False, False, True], 5),
        ("shared", [True, False, False, False, True], 5),
    ],
)
def test_patience_does_not_run_out_before_anything_has_changed(
    schedule: str, trains: list[bool], last: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = replace(config.trunk, schedule=schedule)
    train = replace(config.train, steps=1)
    config = replace(config, rounds=last, patience=2, trunk=trunk, train=train)
    federation, _ = federate(config, tmp_path / "run", Late(trains), monkeypatch)
    assert federation.summary is not None and federation.summary["last_round"] == last
    assert federation._job.folder.read_facts(last)["course"]["waited"] <= 1


def test_patience_runs_out_where_every_round_changes_the_trunk(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the strategy keeps all that clients send."""
    config = replace(config, rounds=9, patience=2, min_delta=100.0)
    federation, _ = federate(config, tmp_path / "run", Late([True] * 9), monkeypatch)
    assert federation.summary is not None and federation.summary["last_round"] == 3


def test_the_accuracy_of_the_best_round_is_reported(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the adapters that are left, and not of the last round."""
    values = {"clients": 2, "rounds": 2, "model": str(tiny_models["gpt2"]), "cut": "1:2", "dataset": "synthetic"}
    values |= {"data.format": "classification", "keep_best": True, "trunk.schedule": "copies"}
    values |= {"lora.rank": 2, "train.max_length": 16, "train.steps": 3, "train.lr": 0.01}
    federate(build(values), tmp_path / "run", Worse(FedAvg(), 2), monkeypatch)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [event["accuracy"] for event in events if event["event"] == "evaluate"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_round"] == 1 and accuracies[1] != accuracies[2]
    assert summary["accuracy"] == {"before": accuracies[0], "after": accuracies[1]}


def test_a_run_with_several_ranks_goes_on_to_the_bit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk's first step in its second life is of a client with a smaller rank than the part was made with."""
    lora_settings = replace(config.lora, rank=(2, 4))
    config = replace(config, rounds=2, lora=lora_settings, trunk=replace(config.trunk, schedule="copies"))
    rule = load_strategy("hetlora", {}, strategy_defaults(config))
    federate(config, tmp_path / "straight", rule, monkeypatch)
    federate(replace(config, rounds=1), tmp_path / "stopped", rule, monkeypatch)
    federate(replace(config, resume=str(tmp_path / "stopped")), tmp_path / "stopped", rule, monkeypatch)
    straight, stopped = final_adapter(tmp_path / "straight"), final_adapter(tmp_path / "stopped")
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())


def test_a_run_killed_after_its_last_round_is_summed_up(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no round left to do, and leaves what it would have left; clients' own adapters, too."""
    config, out = replace(config, rounds=1, share=("bottom", "trunk")), tmp_path / "run"
    first, _ = federate(config, out, FedAvg(), monkeypatch)
    left = {path: path.read_bytes() for path in out.glob("personal/*/*.safetensors")}
    for name in ("adapter", "personal"):
        shutil.rmtree(out / name)
    (out / "summary.json").unlink()
    check_resumable(out, config)
    again, _ = federate(replace(config, resume=str(out)), out, FedAvg(), monkeypatch)
    assert first.summary is not None and again.summary is not None
    assert again.summary["eval_loss"] == first.summary["eval_loss"] and (out / "adapter").is_dir()
    assert left and all(path.read_bytes() == content for path, content in left.items())
    with pytest.raises(SettingError, match=r"^rounds: 1 is not possible; allowed: more than 1"):
        check_resumable(out, config)


def test_a_run_killed_before_it_was_summed_up_is_summed_up(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience has run out: it trains no more, and says so."""
    config, out = replace(config, rounds=9, patience=1, min_delta=100.0), tmp_path / "run"
    first, _ = federate(config, out, FedAvg(), monkeypatch)
    assert first.summary is not None and first.summary["last_round"] == 2
    (out / "summary.json").unlink()
    check_resumable(out, config)
    again, lines = federate(replace(config, resume=str(out)), out, FedAvg(), monkeypatch)
    assert again.summary is not None
    for name in ("eval_loss", "last_round", "best_round", "ended", "tokens"):
        assert again.summary[name] == first.summary[name], name
    assert len(lines.lines) == 3
