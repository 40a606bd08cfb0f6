"""A trunk that two processes of this machine share: the run of one process, what is refused, and who is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from conftest import write_corpus
from safetensors.torch import load_file

from fedsplit.adaptation import lora, run_adapters
from fedsplit.engines.in_process import federate
from fedsplit.errors import SettingError
from fedsplit.federation.strategy import load_strategy
from fedsplit.model.parts import Trunk
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.shard_group import LocalShards, check_tensor_parallel

RUN: dict[str, object] = {
    "partition": "iid",
    "clients": 2,
    "rounds": 2,
    "cut": "1:3",
    "lora.rank": 2,
    "lora.dropout": 0.1,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.max_length": 16,
    "eval.samples": 2,
    "train.lr": 0.05,
    "train.optimizer": "sgd",
    "deterministic": True,
}


def config_of(model: Path, **more: object) -> Config:
    return build({"model": str(model), "trunk.tensor_parallel": 2, **RUN, **more})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lora.method", "dora", "lora | rslora"),
        ("lora.method", "adalora", "lora | rslora"),
        ("prompt.kind", "prefix", "off"),
        ("prompt.kind", "prompt", "off"),
        ("quantization", "trunk:4", "parts without the trunk"),
        ("dtype", "fp16", "fp32 | bf16"),
        ("trunk.lanes", 2, "0 or 1: all processes compute one thing at a time"),
        ("trunk.devices", "cuda:0,cuda:1", "none"),
        ("trunk.stages", "1:2:3", "none"),
        ("trunk.replicas", 2, "1"),
        ("lora.options", '{"init_lora_weights": "gaussian"}', "none"),
    ],
)
def test_what_does_not_work_is_refused(name: str, value: object, words: str, tiny_models: dict[str, Path]) -> None:
    check_tensor_parallel(config_of(tiny_models["llama"]))
    config = config_of(tiny_models["llama"], **{name: value})
    with pytest.raises(SettingError) as caught:
        check_tensor_parallel(config)
    assert str(caught.value) == f"{name}: {value} is not possible; allowed: {words}, with --trunk.tensor-parallel 2"


@pytest.mark.parametrize("init", [False, True])
def test_the_first_process_knows_the_whole_adapter_without_a_weight(
    init: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(tiny_models["llama"])
    if init:
        (part,) = run_adapters.bare_parts(config, ["trunk"])
        run_adapters.adapt(part, config)
        made = lora.read(part)
        for number, tensor in enumerate(made.tensors.values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        run_adapters.save(tmp_path / "start", made, config, part.family)
        config = config_of(tiny_models["llama"], init_adapter=str(tmp_path / "start"), **{"lora.rank": 3})
    (plain,) = run_adapters.bare_parts(config, ["trunk"])
    run_adapters.adapt(plain, config)
    whole = run_adapters.weightless(config, "trunk")
    assert isinstance(whole, Trunk)
    found, expected = lora.read(whole), lora.read(plain)
    assert found.layers == expected.layers and found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert lora.count(whole) == lora.count(plain)
    assert {parameter.device.type for name, parameter in whole.named_parameters() if ".lora_" not in name} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("fedavg", {"train.micro_batches": 2, "train.clip": 1.0}),
        ("scaffold", {"trunk.schedule": "copies", "kernels": "library"}),
        ("fedex", {"trunk.schedule": "copies"}),
        ("flora", {"trunk.schedule": "copies", "lora.rank": "2,4"}),
    ],
)
def test_a_federation_is_that_of_one_process(
    strategy: str, more: dict[str, object], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    others = psutil.Process().children()  # of fixtures of other modules
    found = []
    for size in (1, 2):
        config = config_of(tiny_models["llama"], dataset=str(corpus), **more, **{"trunk.tensor_parallel": size})
        done = federate(config, tmp_path / str(size), load_strategy(strategy, {}, {"seed": 0, "clients": 2}))
        assert done.summary is not None
        adapter = load_file(tmp_path / str(size) / "adapter" / "adapter_model.safetensors")
        found.append(([*done.summary["eval_loss"].values()], adapter))
    (expected_losses, expected), (losses, adapter) = found
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert losses[1] < losses[0]
    assert adapter.keys() == expected.keys()
    for name, value in expected.items():
        assert float((adapter[name] - value).abs().max()) < 2e-6, name
    assert set(psutil.Process().children()) <= set(others)


def test_processes_end_when_they_are_told_to(tiny_models: dict[str, Path]) -> None:
    """Also while they load."""
    running = LocalShards(config_of(tiny_models["llama"]))
    (process,) = running._processes
    assert process.poll() is None
    running.close()
    assert process.poll() is not None


def test_a_process_ends_with_the_one_that_started_it(tiny_models: dict[str, Path]) -> None:
    running = LocalShards(config_of(tiny_models["llama"]))
    (process,) = running._processes
    assert process.stdin is not None
    process.stdin.close()  # as the end of this process would
    assert process.wait(120) == 0
    running.close()
