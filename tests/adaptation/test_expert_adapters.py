"""Adapters on experts and routers: plain PEFT's on the unsplit model, from the first gradient to the merged file."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS
from local_federation import federate
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from test_routers import EXPERTS, ask_for_balance, parts_of, through_split, unsplit
from test_simulate import TINY, adapter, command

from fedsplit.adaptation import adapter_files, lora
from fedsplit.commands import model_checks, run_checks
from fedsplit.commands.adapters import compare, summary
from fedsplit.engines import planning
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.aggregation_error import measure
from fedsplit.federation.strategy import load_strategy
from fedsplit.model.facts import read_facts
from fedsplit.model.parts import ranges
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.combining import combine
from fedsplit.results.finished import find_adapter, open_run
from fedsplit.results.measuring import held_out_loss
from fedsplit.results.merging import merge, unmerge
from fedsplit.settings.documents import build, from_document
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters, ClientUpdate, Layer

TARGETS = ("q_proj", "gate_up_proj", "down_proj", "gate")
SETTINGS = LoraSettings(rank=(2,), alpha=3.0, dropout=0.0, targets=TARGETS)
IDS = torch.arange(1, 19).reshape(2, 9)


@pytest.mark.parametrize("targets", [TARGETS, ("down_proj", "v_proj")])
@pytest.mark.parametrize("family", EXPERTS)
def test_loss_and_gradients_are_plain_pefts_to_the_bit(
    family: str, targets: tuple[str, ...], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """With the auxiliary loss, behind a wire; in float32 and bfloat16."""
    path = ask_for_balance(tiny_models[family], tmp_path)
    settings = LoraSettings(rank=(2,), alpha=3.0, dropout=0.0, targets=targets, rslora=len(targets) > 2)
    for cut, dtype in (((1, 2), torch.bfloat16), ((2, 3), torch.float32)):
        expected = unsplit(path, "left", dtype, settings)
        found, _ = through_split(path, cut, "left", dtype, settings=settings)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name}, cut {cut}"
    assert any("experts" in name and tensor.any() for name, tensor in expected.items())


@pytest.mark.parametrize("family", EXPERTS)
def test_peft_opens_what_is_saved_and_so_do_we(tmp_path: Path, family: str, tiny_models: dict[str, Path]) -> None:
    path = tiny_models[family]
    parts = bottom, trunk, top = parts_of(path, (1, 2), settings=SETTINGS)
    expected, whole = top.logits(trunk(bottom(IDS))), lora.read(*parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        adapter_files.save(tmp_path / "adapter", whole, SETTINGS, bottom.family, "base")
        opened = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / "adapter"))
    assert torch.equal(opened(input_ids=IDS).logits, expected)
    read = adapter_files.load(tmp_path / "adapter")
    assert read.layers == whole.layers
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in whole.tensors.items())
    for part in parts:
        adapter_files.save(
            tmp_path / part.kind, lora.read(part), SETTINGS, part.family, "base", ranges(BLOCKS, (1, 2))[part.kind]
        )
        alone = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / part.kind))
        written = {n.replace(".default", "") for n, _ in alone.named_parameters() if "lora_" in n}
        assert written == {f"base_model.model.{name}" for name in lora.parameters(part)}


@pytest.mark.parametrize("family", EXPERTS)
def test_changes_are_what_peft_adds_to_the_weights(family: str, tiny_models: dict[str, Path]) -> None:
    (trunk,) = parts_of(tiny_models[family], (0, 3), settings=SETTINGS)[1:2]
    read, seen = lora.read(trunk), 0
    for name, module in trunk.named_modules():
        if isinstance(module, ParamWrapper):
            own = read.changes(trunk.unsplit_name(name))
            dense = torch.stack([change.up @ change.down for change in own]).float()
            torch.testing.assert_close(dense.squeeze(0), module.get_delta_weight("default"))
            full = load_unsplit(tiny_models[family]).get_parameter(read.weight_name(trunk.unsplit_name(name)))
            assert dense.squeeze(0).shape == full.shape
            seen += 1
    assert seen == (9 if family == "mixtral" else 6)
    assert {layer.rpartition(".")[2] for layer in read.complete} == {"q_proj", "gate"}
    assert len(read.stacked) == seen * 2 // 3
    with pytest.raises(ValueError, match="stacks the weights of several experts"):
        read.change(read.stacked[0])


def test_only_blocks_with_experts_get_such_adapters(tiny_models: dict[str, Path]) -> None:
    settings = LoraSettings(dropout=0.0, targets=("gate_up_proj", "gate"))
    counts = [len(lora.read(part).layers) for part in parts_of(tiny_models["qwen3_moe"], (1, 2), settings=settings)]
    assert counts == [2, 0, 2]


def test_the_aggregation_error_is_that_of_dense_matrices() -> None:
    """Three experts, two clients."""

    def stacked(seed: int) -> Adapters:
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(6, 5, generator=generator), torch.randn(4, 6, generator=generator)
        return Adapters({"l.lora_A.weight": a, "l.lora_B.weight": b}, {"l": Layer(3.0, False, False, 3, "down_proj")})

    def dense(one: Adapters) -> torch.Tensor:
        a, b = (one.tensors[f"l.lora_{factor}.weight"].double() for factor in "AB")
        each = [b.reshape(4, 2, 3)[:, :, e] @ a.reshape(3, 2, 5)[e] for e in range(3)]
        return torch.stack(each) * 3.0 / 2

    one, two, result = (stacked(seed) for seed in range(3))
    wanted = (dense(one) + 3 * dense(two)) / 4
    found = measure([ClientUpdate(0, one, 1), ClientUpdate(1, two, 3)], result)
    assert found.overall == pytest.approx(float((dense(result) - wanted).norm() / wanted.norm()))
    assert found.layers == {"l": pytest.approx(found.overall)}
    assert result.rank("l") == 2


def test_a_federation_with_adapters_on_experts(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """What it left has the loss that it reported; merged, unmerged and compared it is the same adapter."""
    settings = {"lora__targets": list(TARGETS), "router_aux_loss": 0.1, "kernels": "library"}
    run = finished_run("qwen3_moe", **settings)
    reported = json.loads((run / "summary.json").read_text())["eval_loss"]
    base = load_unsplit(tiny_models["qwen3_moe"])
    opened = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    assert held_out_loss(opened, run) == pytest.approx(reported["after"], abs=1e-5)
    assert abs(reported["after"] - reported["before"]) > 1e-3
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    assert all(2 < event["router_aux_loss"] < 4 for event in trained)
    aggregated = [event for event in events if event["event"] == "aggregate"]
    assert any("experts" in layer for event in aggregated for layer in event["layers"])
    moved = adapter_files.load(run / "adapter")
    assert all(moved.tensors[f"{layer}.lora_B.weight"].any() for layer in moved.stacked)

    merge(find_adapter(run), tmp_path / "merged")
    with torch.no_grad():
        expected, merged = opened(input_ids=IDS).logits, load_unsplit(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    unmerge(tmp_path / "merged", tmp_path / "base")
    fresh = load_unsplit(tiny_models["qwen3_moe"])
    for name, parameter in load_unsplit(tmp_path / "base").named_parameters():
        torch.testing.assert_close(parameter, fresh.get_parameter(name), rtol=0, atol=1e-6)

    lines = compare(open_run(run), open_run(run))
    (line,) = (line for line in lines if line.startswith("model.layers.2.mlp.experts.base_layer"))
    assert line.split()[-2:] == ["0.0000", "1.0000"]
    assert summary(open_run(run))[0].endswith("ranks 2")
    with pytest.raises(InputError, match="adapters on the experts' stacked weights cannot be combined"):
        combine([find_adapter(run)] * 2, [0.5, 0.5], "cat", tmp_path / "both")


REFUSED = [
    (
        "gpt2",
        {"router_aux_loss": -0.5},
        "router_aux_loss: -0.5 is not possible; allowed: a number of at least 0, or -1",
    ),
    ("gpt2", {"router_aux_loss": 0.1}, "router_aux_loss: 0.1 is not possible; allowed: 0 for a model without"),
    ("llama", {"lora.targets": "gate_up_proj"}, "lora.targets: gate_up_proj is not possible"),
    ("mixtral", {"lora.targets": "w1"}, "lora.targets: w1 is not .*: q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_pr"),
    ("mixtral", {"lora.targets": "gate"}, "lora.dropout: 0.1 is not possible; allowed: 0 with adapters on gate"),
    (
        "qwen3_moe",
        {"lora.targets": "gate,down_proj", "lora.dropout": 0},
        "lora.targets: gate,down_proj is not .*: other targets, too, under the cut 1:2, which leaves the trunk no",
    ),
    ("mixtral", {"lora.targets": "down_proj", "lora.dropout": 0, "strategy": "flora"}, "under the strategy flora"),
    (
        "mixtral",
        {"lora.targets": "down_proj,gate", "lora.dropout": 0, "lora.method": "pissa"},
        "lora.targets: down_proj is not possible; allowed: targets that are one matrix each with the method pissa",
    ),
]


@pytest.mark.parametrize(("family", "values", "message"), REFUSED)
def test_what_cannot_be_had_is_refused(
    family: str, values: dict[str, object], message: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    plain = {"model": str(tiny_models[family]), "cut": "1:2", "train.max_length": 16, "out": str(tmp_path / "run")}
    with pytest.raises(SettingError, match=message):
        run_checks.check(build(plain | values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("strategy", "values"), [("fedex", {"lora__rslora": True}), ("flora", {"lora__rank": [1, 3]})])
def test_a_router_of_another_rank_than_the_rest_is_opened(
    strategy: str, values: dict[str, object], finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT looks its rank up by the parameter's name, and that of a module's adapter by the module's."""
    settings = {"lora__targets": ["q_proj", "gate"], "lora__dropout": 0.0, **values}
    run = open_run(finished_run("mixtral", strategy, **settings))
    model = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(run.adapter().folder))
    expected = run.summary["eval_loss"]["after"]
    assert held_out_loss(model, run.path) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="cannot be combined, nor on routers"):
        combine([run.adapter()] * 2, [0.5, 0.5], "cat", tmp_path / "both")
    merge(run.adapter(), tmp_path / "merged")
    assert held_out_loss(load_unsplit(tmp_path / "merged"), run.path) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "ffa", "fedsa", "scaffold", "median", "multikrum", "krum", "flora"])
def test_strategies_that_average_factors_take_experts(strategy: str, tiny_models: dict[str, Path]) -> None:
    """And those that measure B A, where they are asked to measure factors; the router is one matrix to any."""
    facts, options = read_facts(tiny_models["mixtral"]), {"on": "factors"} if "krum" in strategy else {}
    values = {"lora.targets": "gate" if strategy == "flora" else "gate_up_proj,gate", "strategy": strategy}
    model_checks.check_stacked(load_strategy(strategy, options, {}), build(values), facts)


@pytest.mark.parametrize(
    "strategy", ["flora", "fedex", "flexlora", "hetlora", "lora_fair", "fedsvd", "fedrot", "krum", "geometric_median"]
)
def test_strategies_that_compute_with_products_do_not(strategy: str, tiny_models: dict[str, Path]) -> None:
    facts, config = read_facts(tiny_models["mixtral"]), build({"lora.targets": "down_proj", "strategy": strategy})
    with pytest.raises(SettingError, match=f"lora.targets: down_proj is not .* under the strategy {strategy}, which"):
        model_checks.check_stacked(load_strategy(strategy, {}, {}), config, facts)


def test_micro_batches_are_not_planned_where_they_would_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_cores", lambda: 8)
    values = {"clients": 1}
    assert planning.plan(build(values)).micro_batches == 2
    assert planning.plan(build({**values, "router_aux_loss": 0.1})).micro_batches == 1
    assert planning.plan(build({**values, "router_aux_loss": 0.1, "train.micro_batches": 4})).micro_batches == 4


@pytest.mark.slow
def test_from_the_command_line_and_resumed(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose config.json asks for the loss is balanced; a run that goes on ends as one that did not stop."""
    model = ask_for_balance(tiny_models["mixtral"], tmp_path)
    argv = ["--model", str(model), "--cut", "1:2", "--lora.targets", ",".join(TARGETS), "--lora.dropout", "0"]
    argv += ["--clients", "2", "--trunk.schedule", "copies", "--threads", "1", "--trunk.threads", "1"]
    done = command(*TINY, *argv, "--out", "stopped", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = tomllib.loads((tmp_path / "stopped" / "config.toml").read_text())
    assert (document["router_aux_loss"], document["train"]["micro_batches"]) == (0.5, 1)
    done = command("--resume", "stopped", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    straight = from_document(document | {"rounds": 2, "router_aux_loss": -1.0})
    federate(straight, tmp_path / "straight", load_strategy("fedavg", {}, {}), monkeypatch)
    one, two = (adapter(tmp_path / name) for name in ("straight", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any("experts" in name for name in one)
