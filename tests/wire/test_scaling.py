"""Gradients in float16: what would be lost is kept, what would overflow is not, and nobody sees the scale."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, without_dropout
from hypothesis import given
from hypothesis import strategies as st
from local_federation import federate
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.commands import simulate
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard
from fedsplit.federation.strategy import load_strategy
from fedsplit.model.devices import TYPES
from fedsplit.model.split import load_parts
from fedsplit.settings.documents import build
from fedsplit.settings.flags import parse
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.scaling import Overflow, backward, gradients, scale_to
from fedsplit.wire.steps import SpoiledStep

RAW = make_codec("raw")
HALF = torch.float16


@given(st.floats(2.0**-120, 2.0**120, width=32), st.integers(-3, 15))
def test_the_largest_element_comes_just_below(largest: float, power: int) -> None:
    scale = scale_to(2.0**power, torch.tensor([0.0, -largest, largest / 2]))
    assert math.frexp(scale)[0] == 0.5
    assert 2.0 ** (power - 1) <= scale * largest < 2.0**power or scale in (2.0**-126, 2.0**126)


def test_nothing_is_scaled_by_nothing() -> None:
    for values in ([], [0.0], [math.inf, 1.0], [math.nan]):
        assert scale_to(16.0, torch.tensor(values)) == 1


def chain(factors: list[float]) -> tuple[Tensor, Tensor, float]:
    """A leaf in float16 times some numbers, one after the other."""
    leaf = torch.tensor([1.0, 0.5, -0.25], dtype=HALF, requires_grad=True)
    output = leaf
    for factor in factors:
        output = output * factor
    return leaf, output, math.prod(factors)


def test_small_gradients_are_not_lost() -> None:
    leaf, output, slope = chain([2.0**-10, 2.0**-4])
    start = torch.tensor([3e-6, 1e-7, 2e-6])
    (plain,) = torch.autograd.grad(output, [leaf], start.to(HALF), retain_graph=True)
    assert not plain.any()
    (found,) = gradients(output, [leaf], start)
    assert found is not None and found.dtype == torch.float32
    assert (found - start * slope).norm() <= 2**-10 * (start * slope).norm()


def test_what_overflows_is_computed_again_with_less() -> None:
    leaf, output, slope = chain([2.0**-12, 2.0**14, 2.0**-4, 2.0**5])
    start = torch.tensor([1.0, 2.0, 3.0])
    (plain,) = torch.autograd.grad(output, [leaf], start.to(HALF) * 2**13, retain_graph=True)
    assert torch.isinf(plain).any()
    (found,) = gradients(output, [leaf], start * 2**20)
    assert found is not None and torch.equal(found, start * 2**20 * slope)


def test_what_overflows_on_the_way_up_is_refused() -> None:
    leaf, output, _ = chain([2.0**15, 2.0**4])
    with pytest.raises(Overflow, match="exceed 65504"):
        gradients(output, [leaf], torch.ones(3))


def test_gradients_are_added_to_those_that_are_there() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    for dtype in (torch.float32, HALF):
        weight.grad = None
        for _ in range(2):
            entry = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
            back = backward((entry * weight.to(dtype)).float().sum(), [weight], entry)
            assert back is not None and torch.equal(back, weight)
        assert weight.grad is not None and torch.equal(weight.grad, torch.tensor([1.0, 0.5]))
    assert backward(entry.detach().float().sum(), [weight.detach()], entry.detach()) is None


def make_client(path: Path, dtype: str, kernels: str, **values: object) -> tuple[Client, TrunkServer]:
    given = {"model": str(path), "cut": "1:2", "lora.rank": 2, "lora.dropout": 0.0, "dtype": dtype, "kernels": kernels}
    given |= {"train.batch_size": 3, "train.optimizer": "sgd", "train.lr": 1.0, "train.steps": 1}
    config = build(given | values)
    parts = load_parts(path, (1, 2), ["bottom", "top"], TYPES[dtype], kernels)
    trunk = LocalTrunk(config)
    for part in parts:
        lora.add(part, config.lora, 0)
    for part in (*parts, trunk.server.part):
        without_dropout(part)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (9, 8), generator=generator)
    shard = Shard("ann", Sequences.packed(ids), Sequences.packed(torch.zeros(1, 8, dtype=torch.long)))
    link = Link(trunk, RAW, SCHEDULES[config.trunk.schedule], incarnation="first")
    client = Client(0, shard, *parts, link, config.train, 0)
    start = lora.read(trunk.server.part).tensors
    generator.manual_seed(2)
    trunk.server.adapters.write({n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in start.items()})
    return client, trunk.server


def changes(path: Path, dtype: str, kernels: str, **values: object) -> Tensor:
    """What a step of plain SGD changes of all three parts, as one vector: the gradient."""
    client, server = make_client(path, dtype, kernels, **values)
    generator, given = torch.Generator().manual_seed(3), lora.read(client.bottom, client.top).tensors
    given = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in given.items()}
    before = {**given, **server.adapters.read().tensors}
    update = client.train(given, 1)
    server.end_round([0])
    copies = server.adapters.copies()
    trunk = copies[0].adapters if copies else server.adapters.read()
    after = {**update.adapters.tensors, **trunk.tensors}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])


@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_a_step_follows_float32_closer_than_bf16_does(model_path: Path, kernels: str) -> None:
    exact, half, brain = (changes(model_path, dtype, kernels) for dtype in ("fp32", "fp16", "bf16"))
    assert (half - exact).norm() <= 0.02 * exact.norm()
    assert 5 * (half - exact).norm() < (brain - exact).norm()


@pytest.mark.parametrize(
    "values",
    [
        {"train.micro_batches": 3},
        {"trunk.schedule": "accumulate", "train.micro_batches": 2},
        {"trunk.schedule": "batched"},
        {"trunk.schedule": "copies", "train.micro_batches": 3},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_no_schedule_sees_the_scale(tiny_models: dict[str, Path], values: dict[str, object]) -> None:
    exact, half = (changes(tiny_models["gpt2"], dtype, "fused", **values) for dtype in ("fp32", "fp16"))
    assert (half - exact).norm() <= 0.02 * exact.norm()


def server_of(path: Path, dtype: str) -> TrunkServer:
    (part,) = load_parts(path, (1, 2), ["trunk"], TYPES[dtype])
    lora.add(part, LoraSettings(rank=(2,), dropout=0.0), seed=0)
    without_dropout(part)
    for number, parameter in enumerate(lora.parameters(part).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2
    return TrunkServer(part, RAW, "batched", TrainSettings(lr=1.0, optimizer="sgd"), seed=5)


def packet(client: int, what: str, dtype: torch.dtype, size: float = 1.0) -> Packet:
    tensor = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(client)) * size
    key = StepKey(1, client, 0)
    gradient = Role("gradient", "up", key, dtype=dtype)
    encoded = RAW.encode(tensor.to(dtype)) if what == "hidden" else RAW.encode(tensor, gradient)
    return Packet(key, {what: encoded})


def test_gradients_of_different_sizes_meet_in_one_batch(model_path: Path) -> None:
    """One client's is a millionth of the other's, and below what float16 knows; each gets its own back."""
    sizes, returned, learned = (1e-2, 1e-8), {}, {}
    for name in ("fp32", "fp16"):
        server, dtype = server_of(model_path, name), TYPES[name]
        before = server.adapters.read().tensors
        server.forward_together([packet(client, "hidden", dtype) for client in (0, 1)])
        answers = server.backward_together([packet(c, "gradient", dtype, size) for c, size in enumerate(sizes)])
        assert answers[0].nbytes == 2 * 5 * 32 * dtype.itemsize
        returned[name] = [RAW.decode(answer.tensors["gradient"]) for answer in answers]
        after = server.adapters.read().tensors
        learned[name] = torch.cat([(after[n] - before[n]).flatten() for n in sorted(before)])
    for exact, half in zip(returned["fp32"], returned["fp16"], strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() <= 0.02 * exact.norm()
    assert (learned["fp16"] - learned["fp32"]).norm() <= 0.02 * learned["fp32"].norm()


def test_a_trunk_that_overflows_says_so_and_learns_nothing(model_path: Path) -> None:
    server = server_of(model_path, "fp16")
    before = server.adapters.read().tensors
    huge = Packet(StepKey(1, 0, 0), {"hidden": RAW.encode(torch.full((1, 3, 32), 6e4, dtype=HALF))})
    server.adapters.write({name: tensor * 1e4 for name, tensor in before.items()})
    with pytest.raises(SpoiledStep, match="exceed 65504"):
        server.forward(huge)
    assert len(server.steps) == 0 and server.counts.steps == 0


def test_the_codec_that_would_round_float16_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["--dtype", "fp16", "--wire.codec", "bf16"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedsplit: wire.codec: bf16 is not possible; allowed: raw with --dtype fp16")
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_in_float16_goes_on_to_the_bit(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """A scale that were remembered from step to step would have to be saved."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("llama", dtype="fp16"), run)
    wanted = {name: (run / name).read_bytes() for name in ("adapter/adapter_model.safetensors", "summary.json")}
    for path in (run / "checkpoints" / "round-0002", run / "adapter"):
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    config = parse(["--resume", str(run), "--rounds", "2"])
    assert config.dtype == "fp16"
    with pytest.MonkeyPatch.context() as patch:
        federation, _ = federate(config, run, load_strategy("fedavg", {}, {}), patch)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == wanted["adapter/adapter_model.safetensors"]
    assert federation.summary is not None
    assert federation.summary["eval_loss"] == json.loads(wanted["summary.json"])["eval_loss"]
