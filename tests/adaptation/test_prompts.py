"""Prompt tuning, p-tuning and prefix tuning: equal to plain PEFT on the unsplit model, step by step and in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_command
from conftest import BLOCKS, VOCABULARY, without_dropout
from local_federation import federate
from peft import (
    PeftModel,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import strategies
from fedsplit.adaptation import lora, prompts
from fedsplit.adaptation.run_adapters import adapt
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.commands import adapter_tables, run_checks
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.messages import Train
from fedsplit.federation.strategy import check_strategy, load_strategy, traits_of
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.optimization.optim import make_optimizer
from fedsplit.results.combining import combine
from fedsplit.results.finished import find_adapter, open_run
from fedsplit.results.fitting import read_fitting
from fedsplit.results.measuring import evaluate, held_out_loss
from fedsplit.results.merging import merge
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.settings.sections import PromptSettings
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey

KINDS = ("bottom", "trunk", "top")
TOKENS = 3
CUTS = [(0, 1), (0, BLOCKS), (1, 2), (2, BLOCKS)]
SETTINGS = {
    "prompt": PromptSettings(kind="prompt", tokens=TOKENS),
    "ptuning": PromptSettings(kind="ptuning", tokens=TOKENS, hidden=20),
    "lstm": PromptSettings(kind="ptuning", tokens=TOKENS, encoder="lstm", layers=1),
    "prefix": PromptSettings(kind="prefix", tokens=TOKENS),
    "projected": PromptSettings(kind="prefix", tokens=TOKENS, projection=True, hidden=12),
}
PLAIN: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "ptuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=20, encoder_reparameterization_type="MLP"
    ),
    "lstm": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=1,
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=12
    ),
}
"""As a user of PEFT writes them; PEFT reads the sizes off the model."""


def parts_of(path: Path, cut: tuple[int, int], settings: PromptSettings, kernels: str = "library", seed: int = 0):
    parts = load_parts(path, cut, KINDS, kernels=kernels)
    for part in parts:
        prompts.add(part, settings, seed, path)
        part.eval()
    return parts


class Beside(nn.Module):
    """Several prefix encoders as one: each makes the past of some blocks."""

    def __init__(self, made: dict[str, nn.Module]) -> None:
        super().__init__()
        self.made = nn.ModuleDict(made)

    @property
    def embedding(self) -> nn.Module:
        """PEFT looks at its device."""
        return next(iter(self.made.values())).embedding

    def forward(self, places: Tensor) -> Tensor:
        return torch.cat([encoder(places) for encoder in self.made.values()], -1)


def plain_peft(path: Path, name: str, given: dict[str, Tensor]) -> tuple[Any, Callable[[], dict[str, Tensor]]]:
    """The unsplit model under plain PEFT with the same virtual tokens, and what tells its gradients by our names."""
    whole = get_peft_model(load_unsplit(path), PLAIN[name]()).eval()
    encoder = whole.prompt_encoder["default"]
    if name == "prefix":
        order = [f"prompt_encoder.{block}.embedding.weight" for block in range(BLOCKS)]
        weight = encoder.embedding.weight
        weight.data = torch.cat([given[n] for n in order], 1)
        return whole, lambda: dict(zip(order, weight.grad.chunk(BLOCKS, 1), strict=True))
    short = {n: n.removeprefix("prompt_encoder.").removeprefix("trunk.") for n in given}
    if any(n.startswith(("bottom.", "top.")) for n in short.values()):
        width, made = encoder.embedding.weight.shape[1], {}
        short = {n: n.replace("prompt_encoder.", "made.") for n in given}
        for part in KINDS:
            own = {n.partition(f".{part}.")[2]: t for n, t in given.items() if f".{part}." in n}
            layers = own["transform.2.weight"].shape[0] // (2 * width)
            made[part] = PrefixEncoder(replace(whole.peft_config["default"], num_layers=layers))
        whole.prompt_encoder["default"] = encoder = Beside(made)
    encoder.load_state_dict({short[n]: t for n, t in given.items()})
    named = dict(encoder.named_parameters())
    return whole, lambda: {n: named[short[n]].grad for n in given}


def batch_of(padding: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, mask and labels of three sequences."""
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
    if padding == "none":
        return ids, None, ids
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 1, 0)):
        if length:
            mask[row, :length] = 0 if padding == "left" else 1
            mask[row, -length:] = 0 if padding == "right" else mask[row, -length:]
    return ids, mask, ids.masked_fill(mask == 0, -100)


def run_parts(parts: Any, ids: Tensor, mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits of the parts, with virtual positions before masks and labels as a client puts them."""
    bottom, trunk, top = parts
    mask = None if mask is None else nn.functional.pad(mask, (bottom.virtual, 0), value=1)
    labels = nn.functional.pad(labels, (bottom.virtual, 0), value=-100)
    hidden = trunk(bottom(ids, mask), mask)
    assert hidden.shape[1] == ids.shape[1] + bottom.virtual
    return top(hidden, labels, mask), top.logits(hidden, mask)


def compare(path: Path, cut: tuple[int, int], name: str, kernels: str = "library") -> None:
    parts = parts_of(path, cut, SETTINGS[name], kernels)
    parameters = {n: p for part in parts for n, p in lora.parameters(part).items()}
    whole, gradients = plain_peft(path, name, {n: p.detach().clone() for n, p in parameters.items()})
    for padding in ("none", "left", "right"):
        ids, mask, labels = batch_of(padding)
        for module in (*parts, whole):
            module.zero_grad()
        reference = whole(input_ids=ids, attention_mask=mask, labels=labels)
        reference.loss.backward()
        loss, logits = run_parts(parts, ids, mask, labels)
        loss.backward()
        values = {n: (parameters[n].grad, theirs) for n, theirs in gradients().items()}
        assert values.keys() == parameters.keys()
        values |= {"loss": (loss.detach(), reference.loss), "logits": (logits, reference.logits)}
        for key, (mine, theirs) in values.items():
            assert mine is not None and mine.abs().max() > 0, key
            if kernels == "library":
                assert torch.equal(mine, theirs), f"{key}, cut {cut}, padding {padding}"
            else:
                assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), f"{key}, cut {cut}, padding {padding}"


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix"])
def test_split_equals_plain_peft_bit_for_bit(model_path: Path, name: str) -> None:
    """Loss, logits and gradients at several cuts, some of them with parts that have no blocks."""
    for cut in CUTS:
        compare(model_path, cut, name)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "opt", "gpt_neox", "phi3", "mixtral"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_other_families_too(tiny_models: dict[str, Path], family: str, name: str) -> None:
    """Scaled embeddings, sliding windows, positions that follow the mask."""
    for cut in ((1, 2), (0, BLOCKS))[: 1 + (family == "opt")]:
        compare(tiny_models[family], cut, name)


@pytest.mark.parametrize("name", ["lstm", "projected"])
def test_other_encoders(tiny_models: dict[str, Path], name: str) -> None:
    """With projection every part has an encoder; where one part has all blocks, that is PEFT's own."""
    for cut in ((0, BLOCKS), (1, 2)):
        compare(tiny_models["llama"], cut, name)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_fused_kernels_are_plain_peft_to_rounding(model_path: Path, name: str) -> None:
    compare(model_path, (1, 2), name, kernels="fused")


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_computes_in_bf16_from_float32_tokens(tiny_models: dict[str, Path], name: str) -> None:
    ids, mask, labels = batch_of("left")
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = load_parts(tiny_models["llama"], (1, 2), KINDS, dtype, "fused")
        for part in parts:
            prompts.add(part, SETTINGS[name], 0, tiny_models["llama"])
        assert {t.dtype for t in lora.read(*parts).tensors.values()} == {torch.float32}
        loss, logits = run_parts(parts, ids, mask, labels)
        loss.backward()
        assert logits.dtype == dtype
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_start_depends_on_seed_and_name_alone(tiny_models: dict[str, Path], name: str) -> None:
    path, starts = tiny_models["llama"], []
    for seed, cut in ((0, (1, 2)), (0, (1, 2) if name == "projected" else (0, BLOCKS)), (1, (1, 2))):
        torch.manual_seed(sum(cut))
        state = torch.random.get_rng_state()
        starts.append(lora.read(*parts_of(path, cut, SETTINGS[name], seed=seed)).tensors)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(tensor, starts[1][n]) for n, tensor in starts[0].items())
    assert not any(torch.equal(tensor, starts[2][n]) for n, tensor in starts[0].items())


def test_prompts_start_from_words_and_prefixes_from_zero(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["gpt2"]
    words = load_unsplit(path).get_input_embeddings().weight.detach()
    for text, tokens in (("ab", 5), ("abcdefgh", 3)):
        ids = (load_tokenizer(path)(text)["input_ids"] * 5)[:tokens]
        settings = PromptSettings(kind="prompt", tokens=tokens, init="text", text=text)
        (found,) = lora.read(parts_of(path, (1, 2), settings)[0]).tensors.values()
        assert torch.equal(found, words[ids])
    (found,) = lora.read(parts_of(path, (1, 2), replace(SETTINGS["prompt"], init="vocab"))[0]).tensors.values()
    assert all(any(torch.equal(row, word) for word in words) for row in found)
    for name in ("prefix", "projected"):
        parts = parts_of(path, (1, 2), replace(SETTINGS[name], init="zero"))
        tensors = lora.read(*parts).tensors
        assert not prompts.flattened(tensors, SETTINGS[name], parts[0].config).any()


def test_only_a_partys_own_share_is_on_a_part(tiny_models: dict[str, Path]) -> None:
    for name, owners in (("prompt", [1, 0, 0]), ("prefix", [1, 1, 1]), ("projected", [5, 5, 5])):
        parts = parts_of(tiny_models["llama"], (1, 2), SETTINGS[name])
        assert [len(lora.parameters(part)) for part in parts] == owners
        counted = [lora.count(part)["trainable"] for part in parts]
        assert counted == [sum(p.numel() for p in lora.parameters(part).values()) for part in parts]
    whole = get_peft_model(load_unsplit(tiny_models["llama"]), PLAIN["prefix"]())
    mine = parts_of(tiny_models["llama"], (1, 2), SETTINGS["prefix"])
    assert sum(lora.count(part)["trainable"] for part in mine) == whole.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_encoders_are_where_their_part_is(tiny_models: dict[str, Path], name: str) -> None:
    for part in load_parts(tiny_models["llama"], (1, 2), KINDS):
        prompts.add(part.to("meta"), SETTINGS[name], 0, tiny_models["llama"])
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}


STEPS = 6


def make_client(path: Path, name: str, schedule: str = "shared", **more: object) -> tuple[Client, Any, Config]:
    """A client and its trunk in one process."""
    settings = SETTINGS[name]
    values: dict[str, object] = {"model": str(path), "cut": "1:2", "trunk.schedule": schedule, "kernels": "library"}
    values |= {f"prompt.{n}": v for n, v in vars(settings).items()}
    config = build(values | {"train.steps": STEPS, "train.batch_size": 3, "train.lr": 5e-3} | more)
    bottom, top = load_parts(path, config.bounds, ["bottom", "top"], kernels="library")
    trunk = LocalTrunk(config)
    for part in (bottom, top):
        adapt(part, config)
    for part in (bottom, trunk.server.part, top):
        without_dropout(part)
    ids = torch.randint(1, VOCABULARY, (10, 8), generator=torch.Generator().manual_seed(1))
    shard = Shard("ann", Sequences.packed(ids), Sequences.packed(torch.zeros(1, 8, dtype=torch.long)))
    link = Link(trunk, make_codec("raw"), SCHEDULES[schedule], incarnation="first")
    return Client(0, shard, bottom, top, link, config.train, 0), trunk.server, config


@pytest.mark.parametrize("name", ["prompt", "ptuning", "prefix"])
def test_one_client_follows_plain_peft(model_path: Path, name: str) -> None:
    """Six steps of AdamW, through the trunk's versions; equal to the bit where PEFT has the tensors as we have them."""
    client, server, config = make_client(model_path, name)
    given = lora.read(client.bottom, client.top).tensors
    start = {**given, **server.adapters.read().tensors}
    update = client.train(given, round=1)
    trained = {**update.adapters.tensors, **server.adapters.read().tensors}
    assert bool(server.adapters.read().tensors) == (name == "prefix")
    whole, _ = plain_peft(model_path, name, start)
    without_dropout(whole)
    encoder = whole.train().prompt_encoder["default"]
    optimizer = make_optimizer(encoder.parameters(), config.train)
    losses = []
    for step in range(STEPS):
        ids = batch(client.shard.train, step, 3, derive_seed(0, "client", 0)).ids
        loss = whole(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert update.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    mine = prompts.flattened(trained, config.prompt, client.bottom.config)
    theirs = whole.get_prompt_embedding_to_save("default")
    assert (mine - theirs).abs().max() <= 1e-6
    before = prompts.flattened(start, config.prompt, client.bottom.config)
    assert (before - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_micro_batches_are_the_whole_batch_with_padding_too(tiny_models: dict[str, Path], name: str) -> None:
    ids, mask, _ = batch_of("right")
    gradients = []
    for count in (1, 3):
        client, _, _ = make_client(tiny_models["gpt2"], name, "frozen", **{"train.micro_batches": count})
        loss = client.step(ids, StepKey(1, 0, 0), mask)
        found = [p.grad for part in (client.bottom, client.top) for p in lora.parameters(part).values()]
        gradients.append(torch.cat([loss[None], *(g.flatten() for g in found if g is not None)]))
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("schedule", ["shared", "copies", "accumulate", "batched"])
def test_the_trunks_prefixes_learn_in_versions(tiny_models: dict[str, Path], schedule: str) -> None:
    """A step of one client between another's forward and backward changes nothing of that one's gradient."""
    (part,) = load_parts(tiny_models["llama"], (1, 2), ["trunk"])
    prompts.add(part, SETTINGS["prefix"], 0, tiny_models["llama"])
    config = Config().train
    codec = make_codec("raw")
    hidden, gradient = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 2))

    def packet(client: int, **tensors: Tensor) -> Packet:
        return Packet(StepKey(1, client, 0), {n: codec.encode(t) for n, t in tensors.items()})

    answers = []
    for others in (False, True):
        (part,) = load_parts(tiny_models["llama"], (1, 2), ["trunk"])
        prompts.add(part, SETTINGS["prefix"], 0, tiny_models["llama"])
        server = TrunkServer(part, codec, schedule, config, seed=0)
        start = server.adapters.read().tensors
        server.forward(packet(0, hidden=hidden))
        if others:
            server.forward(packet(1, hidden=hidden * 2))
            server.backward(packet(1, gradient=gradient))
        answers.append(codec.decode(server.backward(packet(0, gradient=gradient)).tensors["gradient"]))
        server.end_round([0, 1])
        if schedule == "copies":
            learned = server.adapters.copies()[0].adapters.tensors
        else:
            learned = server.adapters.read().tensors
        assert all(not torch.equal(tensor, learned[n]) for n, tensor in start.items())
    assert torch.equal(*answers)


def test_a_trunk_pads_prefixed_steps_of_several_clients(tiny_models: dict[str, Path]) -> None:
    """Steps of different lengths computed as one are each what it is alone."""
    (part,) = load_parts(tiny_models["gpt2"], (1, 2), ["trunk"])
    prompts.add(part, SETTINGS["prefix"], 0, tiny_models["gpt2"])
    without_dropout(part)
    codec = make_codec("raw")
    steps = [torch.randn(2, length, 32) for length in (7, 4)]
    packets = [Packet(StepKey(1, n, 0), {"hidden": codec.encode(h)}) for n, h in enumerate(steps)]
    together = TrunkServer(part, codec, "batched", Config().train, seed=0).forward_together(packets)
    for one, hidden in zip(together, steps, strict=True):
        torch.testing.assert_close(codec.decode(one.tensors["hidden"]), part(hidden).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_opens_what_is_saved(tmp_path: Path, tiny_models: dict[str, Path], name: str) -> None:
    path, ids = tiny_models["llama"], batch_of("none")[0]
    parts = parts_of(path, (1, 2), SETTINGS[name])
    tensors = lora.read(*parts).tensors
    prompts.save(tmp_path / "whole", tensors, SETTINGS[name], path, str(path))
    opened = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / "whole")).eval()
    with torch.no_grad():
        _, expected = run_parts(parts, ids, None, ids)
        assert torch.allclose(opened(input_ids=ids).logits, expected, atol=1e-6)
    document = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert document["peft_type"] == prompts.PEFT_TYPES[SETTINGS[name].kind] and document["num_virtual_tokens"] == TOKENS
    assert prompts.kind_of(tmp_path / "whole") == SETTINGS[name].kind
    saved = prompts.load(tmp_path / "whole").tensors[prompts.SAVED]
    assert saved.shape[1] == prompts.saved_width(SETTINGS[name].kind, load_unsplit(path).config)
    pieces = []
    for part in parts:
        own = prompts.of_part(tensors, part.kind, part.blocks)
        assert own.keys() == lora.parameters(part).keys()
        prompts.save(tmp_path / part.kind, own, SETTINGS[name], path, str(path), part.blocks)
        pieces.append(load_file(tmp_path / part.kind / "adapter_model.safetensors")[prompts.SAVED])
    assert torch.equal(torch.cat(pieces, 1 if SETTINGS[name].kind == "prefix" else 0), saved)
    if SETTINGS[name].kind != "prefix":  # the trunk's has no virtual token, and changes nothing
        empty = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / "trunk")).eval()
        assert torch.equal(empty(input_ids=ids).logits, load_unsplit(path).eval()(input_ids=ids).logits)


def finished(
    finished_run: Callable[..., Path], name: str, model: str = "gpt2", strategy: str = "fedavg", **more: object
):
    changed = {f"prompt__{n}": v for n, v in vars(SETTINGS[name]).items() if v != getattr(PromptSettings(), n)}
    return finished_run(model, strategy, **changed, train__lr=0.1, **more)


@pytest.mark.parametrize(
    ("name", "model", "more"),
    [
        ("prompt", "gpt2", {}),
        pytest.param("prompt", "llama", {"trunk__schedule": "shared", "strategy": "median"}, marks=pytest.mark.slow),
        pytest.param("ptuning", "llama", {"strategy": "trimmed_mean"}, marks=pytest.mark.slow),
        ("prefix", "gpt2", {}),
        pytest.param("prefix", "llama", {"trunk__schedule": "shared", "strategy": "scaffold"}, marks=pytest.mark.slow),
        pytest.param("projected", "gpt2", {"strategy": "krum"}, marks=pytest.mark.slow),
    ],
)
def test_a_federation_reports_what_plain_peft_measures(
    finished_run: Callable[..., Path], name: str, model: str, more: dict[str, Any]
) -> None:
    path = finished(finished_run, name, model, **more)
    run, losses = open_run(path), json.loads((path / "summary.json").read_text())["eval_loss"]
    assert losses["after"] < losses["before"]
    opened = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(path / "adapter"))
    assert held_out_loss(opened, path) == pytest.approx(losses["after"], abs=1e-5)
    parameters = run.summary["parameters"]
    virtual = run.config.prompt.virtual
    assert (parameters["trunk"]["trainable"] == 0) == (parameters["top"]["trainable"] == 0) == bool(virtual)
    steps = 3 * 2 * 3 * 2
    assert run.summary["bytes"]["activation_up"] == steps * (16 + virtual) * 32 * 4
    own = sum(parameters[part]["trainable"] for part in ("bottom", "top")) * 4
    arrays = 5 if name in ("ptuning", "projected") else 1
    sent = run.summary["bytes"]["adapter_up"] / (3 * 2 * (2 if more.get("strategy") == "scaffold" else 1))
    assert own < sent <= own + 2 * arrays * 256 * 2


def test_what_is_done_after_a_run(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = finished(finished_run, "prompt")
    run = open_run(path)
    results = evaluate(run)
    total = sum(r.tuned.tokens for r in results)
    assert sum(r.tuned.nats for r in results) / total == pytest.approx(run.summary["eval_loss"]["after"], abs=1e-5)
    assert total == sum(r.base.tokens for r in results)
    assert "ranks none" in adapter_tables.summary(run)[0]
    assert adapter_tables.compare(run, open_run(finished(finished_run, "prefix")))[-1].endswith("no common measure")
    for work in (
        lambda: merge(run.adapter(), tmp_path / "m"),
        lambda: combine([run.adapter()] * 2, [1, 1], "cat", tmp_path),
    ):
        with pytest.raises(InputError, match="virtual tokens or prefixes, which change no weight"):
            work()
    adapter = find_adapter(finished(finished_run, "prefix"))
    with pytest.raises(InputError, match=r"does not fit the model \(prompt_embeddings is \(\d+, 192\), its place"):
        read_fitting(replace(adapter, model=str(tiny_models["qwen3"])))


@pytest.mark.slow
def test_prompts_that_stay_with_their_clients(finished_run: Callable[..., Path]) -> None:
    path = finished(finished_run, "prompt", share="trunk,top")
    run = open_run(path)
    assert run.personal == [0, 1, 2]
    results = evaluate(run)
    loss = sum(r.tuned.nats for r in results) / sum(r.tuned.tokens for r in results)
    assert loss == pytest.approx(run.summary["eval_loss"]["after"], abs=1e-5)
    own = [load_file(run.adapter(n).folder / "adapter_model.safetensors")[prompts.SAVED] for n in (0, 1)]
    assert not torch.equal(*own)


@pytest.mark.parametrize("name", ["ptuning", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    finished_run: Callable[..., Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders, which no exported adapter holds, are in the checkpoint."""
    straight = finished(finished_run, name)
    config, trained = open_run(straight).config, 0
    rule = lambda: load_strategy("fedavg", {}, {})  # noqa: E731

    def crash(message, reply):
        nonlocal trained
        trained += isinstance(message, Train)
        if trained > 4:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(config, tmp_path / "run", rule(), monkeypatch, crash)
    federate(replace(config, resume=str(tmp_path / "run")), tmp_path / "run", rule(), monkeypatch)
    one, two = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (straight, tmp_path / "run"))
    assert torch.equal(one[prompts.SAVED], two[prompts.SAVED])


def test_strategies_that_need_factors_are_refused_by_name() -> None:
    config = build({"prompt.kind": "prompt"})
    for name in strategies.STRATEGIES:
        strategy = load_strategy(name, {}, {})
        if traits_of(strategy).factors:
            with pytest.raises(
                SettingError, match=r"^strategy: .* is not possible; .*fedavg, .*no pairs of factors A and B"
            ):
                check_strategy(strategy, replace(config, strategy=name))
        else:
            check_strategy(strategy, replace(config, strategy=name))
        check_strategy(strategy, replace(Config(), strategy=name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 4}, "prompt.tokens: 4 is not possible; allowed: its default, except with --prompt.kind prompt"),
        ({"kind": "prompt", "encoder": "lstm"}, "prompt.encoder: lstm .*except with --prompt.kind ptuning"),
        ({"kind": "prompt", "init": "zero"}, r"prompt.init: zero .*random \| vocab \| text with"),
        ({"kind": "prompt", "init": "text"}, "prompt.text: nothing is not possible"),
        ({"kind": "prompt", "text": "hello"}, "prompt.text: hello is not possible"),
        ({"kind": "ptuning", "layers": 3}, "prompt.layers: 3 .*--prompt.encoder lstm"),
        ({"kind": "ptuning", "encoder": "lstm", "layers": 1, "dropout": 0.5}, "prompt.dropout: 0.5 "),
        ({"kind": "prefix", "hidden": 9}, "prompt.hidden: 9 .*--prompt.projection"),
        ({"kind": "prefix", "tokens": 250}, "prompt.tokens: 250 .*at most the model's 256 positions together"),
        ({"kind": "prompt", "lora.rank": 4}, "lora.rank: .*there are no LoRA adapters"),
        ({"lora.method": "prompt", "lora.rank": 4}, "lora.rank: .*there are no LoRA adapters"),
        ({"kind": "prompt", "lora.method": "dora"}, "lora.method: dora .*there are no LoRA adapters"),
        ({"lora.method": "prefix", "strategy": "flora"}, "strategy: flora is not possible"),
        ({"kind": "prompt", "lm_head": "full"}, "lm_head: full is not possible; allowed: frozen"),
        ({"kind": "prompt", "trunk.schedule": "forward-only"}, "trunk.schedule: forward-only .*returns gradients"),
        ({"kind": "prefix", "trunk.schedule": "forward-only", "cut": "0:6"}, "cut: 0:6 "),
        ({"kind": "ptuning", "strategy": "flora"}, "strategy: flora is not possible"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    values: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    top = {n: v for n, v in values.items() if "." in n or n in ("cut", "lm_head", "strategy")}
    config = build(top | {f"prompt.{n}": v for n, v in values.items() if n not in top})
    with pytest.raises(SettingError, match=f"^{message}"):
        run_checks.check(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_prefixes_on_all_three_parts(tmp_path: Path) -> None:
    """With the trunk in a process of its own, under a memory budget; then resumed for one more round."""
    argv = ["--prompt.kind", "prefix", "--prompt.tokens", "4", "--clients", "2", "--rounds", "1", "--train.steps", "2"]
    argv += ["--max-length", "32", "--batch-size", "2", "--eval.samples", "4", "--lr", "0.05", "--trunk.memory", "2GB"]
    for more in ([*argv, "--out", "run"], ["--resume", "run", "--rounds", "2"]):
        done = warm_command.command("fedsplit.simulate", *more, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = [summary["parameters"][part]["trainable"] for part in KINDS]
    assert trained == [4 * 2 * 128 * blocks for blocks in (1, 4, 1)]
    opened = PeftModel.from_pretrained(load_unsplit(Config().model_path), str(tmp_path / "run" / "adapter"))
    assert held_out_loss(opened, tmp_path / "run") == pytest.approx(summary["eval_loss"]["after"], abs=1e-5)
