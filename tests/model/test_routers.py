"""The routers' auxiliary loss across the cut: value and gradients are the library's, under every schedule."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS, VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from test_client import make_client
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.corpora.shards import batch
from fedsplit.model.derivation import family_of
from fedsplit.model.routers import RouterLoss, RouterSums, listening
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.seeds import derive_seed
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep

EXPERTS = ("mixtral", "qwen3_moe")
CUTS = [cut for cut in itertools.product(range(BLOCKS + 1), repeat=2) if cut[0] < cut[1]]
COEFFICIENT = 0.5
"""Large, so that a gradient that is missing would show."""

_FEW = {(cut, "left") for cut in CUTS} | {((1, 2), padding) for padding in ("none", "right")}
CASES = [
    pytest.param(cut, padding, marks=[] if (cut, padding) in _FEW else pytest.mark.slow)
    for cut in CUTS
    for padding in ("none", "left", "right")
]


@pytest.fixture(scope="module", params=EXPERTS)
def balanced(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory) -> Path:
    """A model whose config.json asks for the auxiliary loss."""
    return ask_for_balance(tiny_models[request.param], tmp_path_factory.mktemp(f"{request.param}-balanced"))


@pytest.fixture(scope="module")
def mixtral(tiny_models: dict[str, Path], tmp_path_factory) -> Path:
    """Of both, the one that has a router in every block."""
    return ask_for_balance(tiny_models["mixtral"], tmp_path_factory.mktemp("mixtral"))


def ask_for_balance(source: Path, folder: Path) -> Path:
    """A copy of a model whose config.json asks for the auxiliary loss."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    document = json.loads((source / "config.json").read_text())
    document |= {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def _batch(padding: str, rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Tokens, mask and labels."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    if padding == "none":
        return ids, None, ids
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :1] = 0
    mask = mask if padding == "left" else mask.flip(1)
    return ids, mask, ids.masked_fill(mask == 0, -100)


SETTINGS = LoraSettings(rank=(3,), alpha=5.0, dropout=0.0)


def _fill(parameters: dict[str, torch.nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def parts_of(
    path: Path,
    cut: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    settings: LoraSettings = SETTINGS,
):
    """The parts with adapters, none of them zero."""
    parts = load_parts(path, cut, ("bottom", "trunk", "top"), dtype, kernels)
    for part in parts:
        lora.add(part, settings, seed=0)
        _fill(lora.parameters(part))
    return parts


def whole_of(path: Path, dtype: torch.dtype = torch.float32, settings: LoraSettings = SETTINGS):
    """The unsplit model under PEFT, and what trains in it by exported name."""
    base = load_unsplit(path, dtype)
    whole = get_peft_model(base, make_config(settings, family_of(base.config))).eval()
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {n: p for n, p in names.items() if p.requires_grad}
    _fill(trained)
    return whole, trained


@functools.cache
def unsplit(
    path: Path, padding: str, dtype: torch.dtype = torch.float32, settings: LoraSettings = SETTINGS
) -> dict[str, torch.Tensor]:
    """The loss of the whole model, and the gradient of every adapter parameter."""
    ids, mask, labels = _batch(padding)
    whole, trained = whole_of(path, dtype, settings)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = whole(input_ids=ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.aux_loss > 2
    return {"loss": outputs.loss.detach(), **{name: parameter.grad for name, parameter in trained.items()}}


class Direct:
    """A trunk in this process, without anybody in front."""

    def __init__(self, server: TrunkServer) -> None:
        self.server, self.sent = server, []

    def send(self, packet: Packet):
        self.sent.append(packet)
        answer = (self.server.backward if "gradient" in packet.tensors else self.server.forward)(packet)
        return lambda: answer

    def leave(self, client: int) -> None:
        self.server.leave(client)


def _server(trunk, schedule: str = "accumulate", **how) -> TrunkServer:
    """Its gradients are kept in `_sums` until the barrier."""
    return TrunkServer(trunk, make_codec("raw"), schedule, TrainSettings(), seed=0, **how)


def _step(parts, link: Link, padding: str) -> torch.Tensor:
    bottom, _, top = parts
    ids, mask, _ = _batch(padding)
    settings = TrainSettings(micro_batches=1)
    client = Client(0, None, bottom, top, link, settings, 0, routers=RouterLoss(COEFFICIENT))  # type: ignore[arg-type]
    loss = client.step(ids, StepKey(1, 0, 0), mask)
    assert client.routers.mean(1) > 2
    return loss


def through_split(
    path: Path,
    cut: tuple[int, int],
    padding: str,
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    settings: LoraSettings = SETTINGS,
    codec: str = "raw",
    **how: object,
):
    """The same as `unsplit` of a client's step, and the trunk."""
    parts = parts_of(path, cut, dtype, kernels, settings)
    server = _server(parts[1], **how)
    link = Link(Direct(server), make_codec(codec), SCHEDULES["accumulate"])
    loss = _step(parts, link, padding)
    found = {name: p.grad for part in (parts[0], parts[2]) for name, p in lora.parameters(part).items()}
    return {"loss": loss, **found, **server.adapters._sums[0].gradients}, server


@pytest.mark.parametrize(("cut", "padding"), CASES)
def test_loss_and_gradients_are_the_unsplit_models_to_the_bit(balanced: Path, cut, padding: str) -> None:
    """Behind a wire that loses nothing; each party goes on adding where the one before it stopped."""
    expected, (found, _) = unsplit(balanced, padding), through_split(balanced, cut, padding)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_without_the_gradient_by_the_sums_it_would_show(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that reaches the trunk is its own routers', too, and not a little."""
    expected = unsplit(mixtral, "none")
    monkeypatch.setattr(RouterSums, "as_leaf", lambda sums, takes: replace(sums, probabilities=sums.probabilities * 1))
    parts = parts_of(mixtral, (1, 2))
    server = _server(parts[1])
    link = Link(Direct(server), make_codec("raw"), SCHEDULES["accumulate"])
    with pytest.raises(AssertionError):
        _step(parts, link, "none")
    for name, gradient in server.adapters._sums[0].gradients.items():
        assert (gradient - expected[name]).norm() > 0.01 * expected[name].norm(), name


@pytest.mark.parametrize("cut", [(0, 2), (1, 2)])
def test_in_bfloat16_and_with_fused_kernels(balanced: Path, cut) -> None:
    """The library's code to the bit in bfloat16; fused kernels to rounding in float32."""
    expected = unsplit(balanced, "right", torch.bfloat16)
    found, _ = through_split(balanced, cut, "right", torch.bfloat16)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    exact = unsplit(balanced, "right")
    fused, _ = through_split(balanced, cut, "right", kernels="fused")
    for name, tensor in exact.items():
        assert (fused[name] - tensor).norm() <= 2e-5 * tensor.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_whose_norms_learn_carry_float32_as_the_unsplit_model_does(mixtral: Path, dtype: torch.dtype) -> None:
    """No honest client is refused for it, and what comes of it is the unsplit model's but for rounding."""
    settings = LoraSettings(method="ln_tuning")
    bottom, _, _ = parts_of(mixtral, (1, 2), dtype, settings=settings)
    assert bottom(_batch("none")[0]).dtype == torch.float32
    found, _ = through_split(mixtral, (1, 2), "none", dtype, settings=settings)
    expected = unsplit(mixtral, "none", dtype, settings)
    assert abs(found["loss"] - expected["loss"]) < 0.01 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-4, name


def test_sums_cross_unrounded_whatever_the_codec(mixtral: Path) -> None:
    """Under bf16 on the wire the sums have float32's digits, and what they cost is in the ledger."""
    experts, tokens = 4, 3 * 9
    _, server = through_split(mixtral, (1, 2), "none", codec="bf16")
    # Up hidden states and sums, down the same; up two gradients, down one.
    assert server.traffic.activation.up == tokens * 32 * 2 + (2 * experts + 1) * 4
    assert server.traffic.gradient.up == tokens * 32 * 2 + experts * 4
    assert server.traffic.gradient.down == tokens * 32 * 4


def test_micro_batches_are_the_librarys_accumulation(mixtral: Path) -> None:
    """The mean over micro-batches of the library's loss of each, weighted by what they predict."""
    ids, mask, labels = _batch("left", 4, 8)
    whole, trained = whole_of(mixtral)
    predicted = (labels[:, 1:] != -100).sum()
    losses = []
    for rows in (slice(0, 2), slice(2, 4)):
        share = (labels[rows, 1:] != -100).sum() / predicted
        loss = whole(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss * share
        loss.backward()
        losses.append(loss.detach())
    parts = parts_of(mixtral, (1, 2))
    server = _server(parts[1])
    bottom, _, top = parts
    link = Link(Direct(server), make_codec("raw"), SCHEDULES["accumulate"])
    settings = TrainSettings(micro_batches=2)
    client = Client(0, None, bottom, top, link, settings, 0, routers=RouterLoss(COEFFICIENT))  # type: ignore[arg-type]
    loss = client.step(ids, StepKey(1, 0, 0), mask)
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    found = {name: p.grad for part in (bottom, top) for name, p in lora.parameters(part).items()}
    found |= server.adapters._sums[0].gradients
    for name, parameter in trained.items():
        assert (found[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name


def test_a_forward_that_is_computed_again_has_the_same_sums(mixtral: Path) -> None:
    """With room for inputs alone, a forward is computed again in the backward, and when it is asked for again."""
    expected, first = through_split(mixtral, (1, 2), "left")
    budget = Budget(10**9, resident=lambda: 0, release=lambda: None)
    budget.room = lambda tokens, kept: "input"  # type: ignore[method-assign]
    found, server = through_split(mixtral, (1, 2), "left", budget=budget)
    assert server.counts.recomputed == 1 and first.counts.recomputed == 0
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    parts = parts_of(mixtral, (1, 2))
    again = _server(parts[1], budget=budget)
    packet = _packet(0, 5, 4)
    one, two = again.forward(packet), again.forward(packet)
    assert torch.equal(EXACT.decode(one.tensors["routers"]), EXACT.decode(two.tensors["routers"]))


def _packet(client: int, length: int, experts: int, padded: bool = False) -> Packet:
    generator = torch.Generator().manual_seed(client)
    tensors = {"hidden": EXACT.encode(torch.randn(2, length, 32, generator=generator))}
    if padded:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, :2] = False
        tensors["mask"] = EXACT.encode(mask)
    tensors["routers"] = EXACT.encode(torch.rand(2 * experts + 1, generator=generator))
    return Packet(StepKey(1, client, 0), tensors)


def test_steps_that_are_computed_as_one_have_each_their_own_sums(mixtral: Path) -> None:
    """Three clients of different lengths, one of them padded: sums and gradients as if each were alone."""
    packets = [_packet(client, length, 4, padded=client == 1) for client, length in enumerate((5, 7, 6))]
    gradients = []
    for packet in packets:
        generator = torch.Generator().manual_seed(50 + packet.key.client)
        like = EXACT.decode(packet.tensors["hidden"])
        tensors = {"gradient": torch.randn(like.shape, generator=generator), "routers": torch.rand(4) * 9}
        gradients.append(replace(packet, tensors={name: EXACT.encode(tensor) for name, tensor in tensors.items()}))

    def run(together: bool, order: list[int]):
        server = _server(parts_of(mixtral, (1, 2))[1], "batched")
        learned: dict[str, torch.Tensor] = {}
        server.adapters.learn = lambda *_, gradients, **rest: learned.update(  # type: ignore[method-assign]
            {name: learned.get(name, 0) + gradient for name, gradient in gradients.items()}
        )
        chosen = [[packets[n] for n in order]] if together else [[packets[n]] for n in order]
        answers = {a.key.client: a for group in chosen for a in server.forward_together(group)}
        back = [[gradients[n] for n in order]] if together else [[gradients[n]] for n in order]
        returned = {a.key.client: a for group in back for a in server.backward_together(group)}
        sums = {client: EXACT.decode(answer.tensors["routers"]) for client, answer in answers.items()}
        return sums, {c: EXACT.decode(a.tensors["gradient"]) for c, a in returned.items()}, learned

    joined, alone = run(True, [0, 1, 2]), run(False, [0, 1, 2])
    for mine, theirs in zip(joined, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (mine[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("hidden", torch.zeros(8), r"sent \(8,\) as sums of routers, not 9 finite numbers"),
        ("hidden", torch.full((9,), torch.nan), "as sums of routers, not 9 finite numbers"),
        ("gradient", torch.zeros(9), "not 4 finite numbers"),
        ("gradient", torch.full((4,), torch.inf), "not 4 finite numbers"),
    ],
)
def test_spoilt_sums_are_refused(mixtral: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    server, packet = _server(parts_of(mixtral, (1, 2))[1]), _packet(0, 5, 4)
    if name == "gradient":
        server.forward(packet)
        packet = replace(packet, tensors={"gradient": packet.tensors["hidden"]})
    spoilt = replace(packet, tensors={**packet.tensors, "routers": EXACT.encode(tensor)})
    with pytest.raises(SpoiledStep, match=message):
        (server.backward if name == "gradient" else server.forward)(spoilt)
    if name == "gradient":
        assert server.backward(packet).tensors


def test_a_model_without_routers_takes_no_sums(tiny_models: dict[str, Path]) -> None:
    server = _server(parts_of(tiny_models["llama"], (1, 2))[1])
    with pytest.raises(SpoiledStep, match="sent something of routers, which the model does not have"):
        server.forward(_packet(0, 5, 4))


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_training_follows_plain_fine_tuning(mixtral: Path, schedule: str) -> None:
    """Five optimiser steps; what does not learn under the schedule does not in the unsplit model either."""
    client, server, start = make_client(mixtral, schedule, steps=5)
    client = replace(client, routers=RouterLoss(COEFFICIENT))
    whole_start = {**start, **server.adapters.read().tensors}
    update = client.train(start, round=1)
    server.end_round([0])
    copies = server.adapters.copies()
    trunk = copies[0].adapters if copies else server.adapters.read()
    found = {**update.adapters.tensors, **trunk.tensors}

    base = load_unsplit(mixtral)
    settings = LoraSettings(rank=(2,), dropout=0.0)
    whole = get_peft_model(base, make_config(settings, family_of(base.config))).eval()
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    learning = {"forward-only": ("model.layers.2.",), "frozen": ("model.layers.0.", "model.layers.2.")}
    learns = learning.get(schedule, ("model.layers.",))
    trained = {n: p for n, p in names.items() if p.requires_grad and n.startswith(learns)}
    for name, tensor in whole_start.items():
        names[name].data = tensor.clone()
    optimizers = [torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.0, fused=True)]
    if schedule == "accumulate":  # the trunk steps once, at the end of the round, with the sum
        middle = {n: p for n, p in trained.items() if n.startswith("model.layers.1.")}
        outer = [p for n, p in trained.items() if n not in middle]
        optimizers = [torch.optim.AdamW(ps, lr=5e-3, weight_decay=0.0, fused=True) for ps in (outer, middle.values())]
    losses, auxiliary = [], []
    for step in range(5):
        ids = batch(client.shard.train, step, 3, derive_seed(0, "client", 0)).ids
        outputs = whole(input_ids=ids, labels=ids)
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        auxiliary.append(outputs.aux_loss.item())
        optimizers[0].step()
        optimizers[0].zero_grad()
    for optimizer in optimizers[1:]:
        optimizer.step()
    assert update.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert update.router_loss == pytest.approx(sum(auxiliary) / 5, rel=1e-5)
    for name, tensor in found.items():
        assert (tensor - names[name]).abs().max() <= 1e-5, name
        # Of a trunk that steps only once A has no gradient: B is zero until then.
        assert name not in trained or "lora_A" in name or (whole_start[name] - names[name]).abs().max() > 1e-4, name


def test_no_auxiliary_loss_nothing_heard_and_nothing_sent(tiny_models: dict[str, Path]) -> None:
    client, server, start = make_client(tiny_models["mixtral"], "shared", steps=1)
    update = client.train(start, round=1)
    assert update.router_loss is None
    tokens = 3 * 8 * 32 * 4
    assert server.traffic.activation.up == server.traffic.gradient.up == tokens
    assert not any(router._forward_hooks for router in client.bottom.routers)


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_the_loss_is_the_librarys_however_layers_are_dealt_out(
    seed: int, layers: int, experts: int, tokens: int, padded: bool, data: st.DataObject
) -> None:
    """Value and gradient to the bit, whatever the number of parties and wherever their cuts."""
    generator, chosen = torch.Generator().manual_seed(seed), data.draw(st.integers(1, experts))
    logits = [torch.randn(tokens, experts, generator=generator).requires_grad_() for _ in range(layers)]
    mask = (torch.rand(tokens, generator=generator) < 0.6).long() if padded else None
    if mask is not None:
        mask[0] = 1
    expected = load_balancing_loss_func(tuple(logits), experts, chosen, mask)
    wanted = torch.autograd.grad(expected, logits)
    sums, cuts = RouterSums.none(experts), sorted(data.draw(st.lists(st.integers(0, layers), max_size=3)))
    for low, high in itertools.pairwise([0, *cuts, layers]):
        sums = sums.after([torch.softmax(layer, dim=-1) for layer in logits[low:high]], chosen, mask)
        assert torch.equal(RouterSums.unpacked(sums.packed()).packed(), sums.packed())
    assert torch.equal(sums.loss(), expected)
    for found, gradient in zip(torch.autograd.grad(sums.loss(), logits), wanted, strict=True):
        assert torch.equal(found, gradient)


def test_by_hand() -> None:
    """Two tokens, two experts, one chosen: both go to the first, by 3/4 and 1/2 + a little."""
    sums = RouterSums.none(2).after([torch.tensor([[0.75, 0.25], [0.625, 0.375]])], 1)
    assert sums.packed().tolist() == [1.375, 0.625, 2.0, 0.0, 2.0]
    # 2 * (2/2 * 1.375/2 + 0/2 * 0.625/2)
    assert float(sums.loss()) == 1.375
    evenly = RouterSums.none(2).after([torch.tensor([[0.75, 0.25], [0.25, 0.75]])], 1)
    assert float(evenly.loss()) == 1.0
    assert torch.equal(RouterSums.none(2).after([torch.rand(3, 2)], 1, torch.tensor([[0, 0, 0]])).rows, torch.zeros(()))


def test_a_router_is_heard_in_the_order_of_blocks_and_not_afterwards(tiny_models: dict[str, Path]) -> None:
    (bottom,) = load_parts(tiny_models["qwen3_moe"], (2, 3), ["bottom"])
    ids, _, _ = _batch("none")
    with listening(bottom) as heard:
        bottom(ids)
    assert [tuple(layer.shape) for layer in heard] == [(27, 4)]  # the second block is dense
    bottom(ids)
    assert len(heard) == 1
    with pytest.raises(RuntimeError), listening(bottom):
        raise RuntimeError
    assert not any(router._forward_hooks for router in bottom.routers)
