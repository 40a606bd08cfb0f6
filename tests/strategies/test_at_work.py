"""Every strategy in a whole federation: what it reports, sends, remembers and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_federation import federate
from peft import PeftModel
from safetensors.torch import load_file
from test_contract import CASES

from fedsplit.adaptation import lora
from fedsplit.errors import SettingError
from fedsplit.federation.aggregation import sampled
from fedsplit.federation.messages import Evaluate, Reply, Train
from fedsplit.federation.strategy import check_strategy, load_strategy, traits_of
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.measuring import held_out_loss
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.updates import weighted
from strategies.fedavg import FedAvg

EXACT = {"ffa", "rolora", "flora", "fedex", "fedsvd"}
MIXED = [name for name in CASES if traits_of(load_strategy(name, CASES[name].options, {})).mixed_ranks]


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    """GPT-2, whose layers are transposed; a copy of the trunk for each client; alpha is not the rank."""
    values: dict[str, object] = {"clients": 3, "rounds": 2, "model": str(tiny_models["gpt2"]), "cut": "1:2"}
    values |= {"dataset": str(corpus_file), "partition": "natural", "trunk.schedule": "copies"}
    values |= {"lora.rank": 2, "lora.alpha": 3.0, "lora.dropout": 0.0}
    return build(values | {"train.steps": 3, "train.batch_size": 2, "train.max_length": 16, "train.lr": 0.02})


def changed(config: Config, **values: Any) -> Config:
    document = as_document(config)
    for name, value in values.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    return from_document(document)


def make(name: str, config: Config) -> Any:
    return load_strategy(name, CASES[name].options, {"seed": config.seed, "clients": config.clients})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def exported(run: Path, where: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run / where / "adapter_model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_its_adapter_gives_the_reported_loss(
    config: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    federation, lines = federate(config, run, make(name, config), monkeypatch)
    assert federation.summary is not None
    loss = federation.summary["eval_loss"]
    assert loss["after"] < loss["before"] and not any("left out" in line for line in lines.lines)
    errors = [event.get("error") for event in events(run, "aggregate")]
    assert all(error is not None and error < 1e-6 for error in errors) == (name in EXACT)
    if not traits_of(make(name, config)).personal:
        model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(run / "adapter"))
        assert held_out_loss(model, run) == pytest.approx(loss["after"], abs=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_ranks_may_differ(config: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(config, lora={"rank": [1, 4]})
    strategy = make(name, config)
    check_strategy(strategy, config)
    federation, _ = federate(config, tmp_path / "run", strategy, monkeypatch)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] < federation.summary["eval_loss"]["before"]
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(tmp_path / "run" / "adapter"))
    expected = federation.summary["eval_loss"]["after"]
    assert held_out_loss(model, tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    if name in EXACT:
        assert all(event["error"] < 1e-6 for event in events(tmp_path / "run", "aggregate"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXED])
def test_who_cannot_handle_different_ranks_says_so_and_who_can(config: Config, name: str) -> None:
    config = replace(changed(config, lora={"rank": [1, 4]}), strategy=name)
    with pytest.raises(SettingError, match=f"^lora.rank: 1,4 is not possible.* strategy {name}; .*flexlora.*hetlora"):
        check_strategy(make(name, config), config)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_is_exported_is_the_model_to_which_the_mean_change_was_added(
    config: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits against a base model with every Delta W* added densely, by loops, in float64."""
    folds: list[dict[str, dict[str, torch.Tensor]]] = []
    strategy = make(name, config)
    aggregate = strategy.aggregate

    def remember(state, given, updates):
        ordered, shares = weighted(updates)
        ideal = {}
        for update, share in zip(ordered, shares, strict=True):
            for layer, facts in update.adapters.layers.items():
                a, b = (update.adapters.tensors[f"{layer}.lora_{f}.weight"].double() for f in "AB")
                ideal[layer] = ideal.get(layer, 0) + share * facts.alpha / a.shape[0] * (b @ a)
        state, result = aggregate(state, given, updates)
        folded = {layer: change.up.double() @ change.down.double() for layer, change in result.folded.items()}
        folds.append({"ideal": ideal, "folded": folded})
        return state, result

    monkeypatch.setattr(strategy, "aggregate", remember)
    federate(config, tmp_path / "run", strategy, monkeypatch)
    dense = load_unsplit(config.model_path)
    with torch.no_grad():
        for layer, change in folds[-1]["ideal"].items():
            whole = change + sum(fold["folded"].get(layer, 0) for fold in folds[:-1])
            dense.get_submodule(layer).weight += whole.T.float()  # Conv1D
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(tmp_path / "run" / "adapter"))
    ids = torch.arange(40).reshape(2, 20)
    base = load_unsplit(config.model_path)(ids).logits
    wanted, got = dense.eval()(ids).logits, model.eval()(ids).logits
    assert torch.allclose(got, wanted, atol=2e-4 * float(wanted.abs().max()))
    assert float((wanted - base).abs().max()) > 100 * float((got - wanted).abs().max())


@pytest.mark.parametrize(
    "name", ["fedavg", "rolora", "fedsa", "flora", "fedex", "hetlora", "fedadam", "scaffold", "fedbuff", "fedsvd"]
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    config: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rounds with half of the clients, against two rounds, a crash in the third, and the rest."""
    config = changed(config, rounds=4, fraction=0.6)
    options = {**CASES[name].options, **({"decay": 0.5, "gamma": 0.5} if name == "hetlora" else {})}
    defaults = {"seed": config.seed, "clients": config.clients}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    federate(config, straight, load_strategy(name, options, defaults), monkeypatch)
    trained = 0

    def crash(message, reply):
        nonlocal trained
        trained += isinstance(message, Train) and isinstance(reply, Reply)
        if trained > 5:  # two clients a round
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(config, stopped, load_strategy(name, options, defaults), monkeypatch, crash)
    done = sorted(path.name for path in (stopped / "checkpoints").glob("round-*"))
    assert done and done != [f"round-{round:04d}" for round in range(1, 5)]
    again = replace(config, resume=str(stopped))
    federate(again, stopped, load_strategy(name, options, defaults), monkeypatch)
    one, two = exported(straight), exported(stopped)
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items()) and one.keys() == two.keys()
    before, after = (json.loads((run / "summary.json").read_text()) for run in (straight, stopped))
    assert before["tokens"] == after["tokens"] and before["eval_loss"] == after["eval_loss"]
    assert [event["error"] for event in events(straight, "aggregate") if "error" in event] == [
        event["error"] for event in events(stopped, "aggregate") if "error" in event
    ]
    for where in straight.glob("personal/*"):
        mine = exported(straight, f"personal/{where.name}")
        assert all(torch.equal(t, exported(stopped, f"personal/{where.name}")[key]) for key, t in mine.items())


def sent(config: Config, name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    federation, _ = federate(config, run, make(name, config), monkeypatch)
    assert federation.summary is not None
    return federation.summary["bytes"]["adapter_up"], federation.summary["bytes"]["adapter_down"]


def test_bytes_are_those_that_the_algorithm_needs(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds; against FedAvg: one factor of two, twice for control variates, nothing down but the stack."""
    config = changed(config, rounds=3, trunk={"schedule": "frozen"})
    bytes_of = {
        name: sent(config, name, tmp_path / name, monkeypatch)
        for name in ("fedavg", "ffa", "rolora", "fedsa", "flora", "fedex", "scaffold", "fedprox")
    }
    up, down = bytes_of["fedavg"]
    sizes = {factor: 0 for factor in "AB"}
    parts = load_parts(config.model_path, config.bounds, ["bottom", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
        for key, tensor in lora.parameters(part).items():
            sizes["A" if "lora_A" in key else "B"] += tensor.nbytes
    for name, (sent_up, sent_down) in bytes_of.items():
        rounds = [event["adapter_bytes"] for event in events(tmp_path / name, "evaluate")]
        assert len(rounds) == 4 and rounds[0] == {"up": 0, "down": 0}
        assert (sum(r["up"] for r in rounds), sum(r["down"] for r in rounds)) == (sent_up, sent_down)
    close = lambda size: pytest.approx(size, rel=0.35)  # noqa: E731  # each array has a header of up to 200 bytes
    both = sizes["A"] + sizes["B"]
    assert up == close(3 * 3 * both) and down == close(2 * 3 * both)
    assert bytes_of["fedprox"] == (up, down)
    assert bytes_of["ffa"] == (close(3 * 3 * sizes["B"]), close(2 * 3 * sizes["B"]))
    # B, A, B up; down the factor that the round before has changed.
    rolora = 2 * sizes["B"] + sizes["A"], sizes["B"] + sizes["A"]
    assert bytes_of["rolora"] == (close(3 * rolora[0]), close(3 * rolora[1]))
    assert bytes_of["fedsa"] == (close(3 * 3 * sizes["A"]), close(2 * 3 * sizes["A"]))
    assert bytes_of["flora"][0] == up
    ranks = [sum(event["residual_rank"].values()) for event in events(tmp_path / "flora", "aggregate")]
    assert all(rank == 8 * 3 * 2 for rank in ranks)  # eight layers, of three clients' ranks
    assert bytes_of["flora"][1] == close(3 * 3 * 3 * both)  # all stacks, to all three, after all three rounds
    assert bytes_of["fedex"][1] > down + 3 * 3 * 1.5 * both
    assert bytes_of["scaffold"][0] == close(2 * up)


def test_what_is_personal_stays_and_is_exported_for_each(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedSA: A is everybody's, B each client's own; the mean of their own losses is what was reported."""
    config = changed(config, rounds=3)
    run = tmp_path / "run"
    federation, _ = federate(config, run, make("fedsa", config), monkeypatch)
    assert federation.summary is not None
    whole = [exported(run, f"personal/{client:04d}") for client in range(3)]
    for key, tensor in whole[0].items():
        alike = all(torch.equal(tensor, other[key]) for other in whole[1:])
        assert alike == ("lora_A" in key), key
    last = events(run, "evaluate")[-1]["clients"]
    for client, name in enumerate(("ann", "bob", "cid")):
        model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(run / "personal" / f"{client:04d}"))
        assert held_out_loss(model, run, [client]) == pytest.approx(last[name], abs=1e-5)


@pytest.mark.parametrize("alone", ["top", "trunk"])
def test_a_part_that_is_not_shared_is_each_clients_own(
    config: Config, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, share=[part for part in ("bottom", "trunk", "top") if part != alone])
    run = tmp_path / "run"
    federate(config, run, make("fedavg", config), monkeypatch)
    block = {"top": ".2.", "trunk": ".1."}[alone]
    one, two = (exported(run, f"personal/{client:04d}") for client in (0, 1))
    assert all(torch.equal(tensor, two[key]) == (block not in key) for key, tensor in one.items())
    shared = exported(run)
    assert all(torch.equal(tensor, one[key]) for key, tensor in shared.items() if block not in key)


def test_only_who_is_sampled_trains_and_all_are_owed_the_fold(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, rounds=4, fraction=0.34)
    run = tmp_path / "run"
    federation, _ = federate(config, run, make("flora", config), monkeypatch)
    trained = [list(event["clients"]) for event in events(run, "train")]
    assert all(len(clients) == 1 for clients in trained) and len({*map(tuple, trained)}) > 1
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(run / "adapter"))
    assert federation.summary is not None
    assert held_out_loss(model, run) == pytest.approx(federation.summary["eval_loss"]["after"], abs=1e-5)


@pytest.mark.parametrize("weights", ["examples", "tokens", "equal"])
def test_what_clients_count_by(config: Config, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    strategy = make("fedavg", config)
    aggregate = strategy.aggregate
    monkeypatch.setattr(
        strategy,
        "aggregate",
        lambda s, a, updates: (
            seen.append([(u.weight, u.examples, u.tokens) for u in updates]),
            aggregate(s, a, updates),
        )[1],
    )
    federate(changed(config, rounds=1, weights=weights), tmp_path / "run", strategy, monkeypatch)
    column = {"examples": 1, "tokens": 2}
    for weight, *counts in seen[0]:
        assert weight == (1.0 if weights == "equal" else counts[column[weights] - 1])


def test_a_round_that_was_given_up_leaves_nothing_in_the_base_weights(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between folding and the checkpoint; the round is then made again, with another result."""
    config, run = changed(config, rounds=3), tmp_path / "run"
    trained = 0

    def crash(message, reply):
        nonlocal trained
        trained += isinstance(message, Evaluate)
        if trained > 3 * 2 + 1:  # in the evaluation that ends the second round: clients have folded already
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(config, run, make("flora", config), monkeypatch, crash)
    assert (run / "clients" / "folds" / "round-0002.safetensors").exists()
    assert not (run / "checkpoints" / "round-0002").exists()
    other = load_strategy("flora", {}, {"seed": 77})  # draws other factors, as a run that is not deterministic would
    federation, _ = federate(replace(config, resume=str(run)), run, other, monkeypatch)
    assert federation.summary is not None
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(run / "adapter"))
    assert held_out_loss(model, run) == pytest.approx(federation.summary["eval_loss"]["after"], abs=1e-5)


def test_a_round_in_which_all_rest_is_skipped(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Resting(FedAvg):
        def broadcast(self, state, adapters, client):
            return None

    federation, _ = federate(config, tmp_path / "run", Resting(), monkeypatch)
    assert federation.summary is not None
    assert federation.summary["eval_loss"]["after"] == federation.summary["eval_loss"]["before"]
    assert federation.summary["tokens"] == 0


def test_a_late_change_arrives_in_a_round_whose_clients_all_rest(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of three clients trains in a round, delay 2: one that is sampled twice in a row rests the second time."""
    seed = next(n for n in range(99) if sampled(c := changed(config, fraction=0.3, seed=n), 1) == sampled(c, 2))
    config, run = changed(config, fraction=0.3, seed=seed), tmp_path / "run"
    federate(config, run, load_strategy("fedbuff", {"delays": "2"}, {"clients": 3}), monkeypatch)
    start, first, second = (measured["loss"] for measured in events(run, "evaluate"))
    assert start == first != second


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("scaffold", "dora"),
        ("fedavg", "ia3"),
        pytest.param("krum", "dora", marks=pytest.mark.slow),
        pytest.param("fedadam", "ia3", marks=pytest.mark.slow),
        pytest.param("fedbuff", "ia3", marks=pytest.mark.slow),
    ],
)
def test_adapters_without_factors_are_aggregated_name_by_name(
    config: Config, name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no aggregation error is told, since there is no change of the weights that is a sum."""
    own = {"method": method} if method == "dora" else {"method": method, "rank": 8, "alpha": 16.0, "dropout": 0.1}
    config = changed(config, lora=own)
    strategy = make(name, config)
    check_strategy(strategy, config)
    federation, lines = federate(config, tmp_path / "run", strategy, monkeypatch)
    assert federation.summary is not None
    loss = federation.summary["eval_loss"]
    assert loss["after"] < loss["before"] and not any("left out" in line for line in lines.lines)
    assert federation.summary["aggregation_error"] is None and not any("error" in line for line in lines.lines)
    model = PeftModel.from_pretrained(load_unsplit(config.model_path), str(tmp_path / "run" / "adapter"))
    assert held_out_loss(model, tmp_path / "run") == pytest.approx(loss["after"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("dora", "scaffold"), ("pissa", "fedex")])
def test_a_run_with_other_adapters_goes_on_to_the_bit(
    config: Config, method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, lora={"method": method}, rounds=3)
    federate(config, tmp_path / "straight", make(name, config), monkeypatch)
    stopped = tmp_path / "stopped"
    federate(replace(config, rounds=1), stopped, make(name, config), monkeypatch)
    federate(replace(config, resume=str(stopped)), stopped, make(name, config), monkeypatch)
    one, two = exported(tmp_path / "straight"), exported(stopped)
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[key]) for key, tensor in one.items())
