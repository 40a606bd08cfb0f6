"""Every kind of adapter on the parts: the same start at every cut, the same training as on the unsplit model, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, VOCABULARY, without_dropout
from peft import PeftModel, get_peft_model

from fedsplit.adaptation import adapter_files, lora
from fedsplit.adaptation.injection import check_injection, exported, make_config
from fedsplit.adaptation.methods import ADAPTER_METHODS
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard, batch
from fedsplit.errors import InputError, SettingError
from fedsplit.model.derivation import family_of
from fedsplit.model.facts import read_facts
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.optimization.optim import make_optimizer
from fedsplit.results.finished import Adapter
from fedsplit.results.whole import merged
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec

KINDS = ("bottom", "trunk", "top")
STEPS = 2
SMALL = {
    "oft": '{"oft_block_size": 8}',
    "c3a": '{"block_size": 8}',
    "road": '{"group_size": 8}',
    "fourierft": '{"n_frequency": 40}',
    "waveft": '{"n_frequency": 40}',
    "supertuning": '{"sparsity": 0.9}',
    # Of the run's steps those are tried before ranks are taken away; test_rank_allocation.py has the rest.
    "adalora": '{"init_r": 4, "target_r": 2, "tinit": 8, "orth_reg_weight": 0}',
}
"""What suits layers of 16 to 64 numbers; the defaults are for larger ones."""

QUICK = {"llama": {"dora", "oft", "lokr", "shira", "delora"}, "gpt2": {"pissa", "ia3", "vera", "ln_tuning"}}
"""Those that differ most; the others take as long, and are tried with the slow tests."""

EVERYWHERE = [("llama", name) for name in ADAPTER_METHODS] + [
    ("gpt2", n) for n, m in ADAPTER_METHODS.items() if m.transposed
]


def config_of(path: Path, method: str, **values: Any) -> Config:
    """A run's settings with that kind of adapter, without dropout where it has any."""
    kind = ADAPTER_METHODS[method]
    own: dict[str, Any] = {"lora.method": method, "lora.options": SMALL.get(method, "")}
    own |= {"lora.rank": 4} if kind.rank else {}
    own |= {"lora.dropout": 0.0} if kind.dropout else {}
    own |= {"model": str(path), "cut": "1:2", "kernels": "library", "train.steps": STEPS, "train.lr": 5e-3}
    return build(own | {"train.batch_size": 2, "seed": 5} | {name.replace("__", "."): v for name, v in values.items()})


def parts_of(config: Config, cut: tuple[int, int] = (1, 2)) -> list[Any]:
    """The parts with their adapters."""
    parts = load_parts(config.model_path, cut, KINDS, kernels=config.kernels)
    for part in parts:
        lora.add(part, config.lora, config.seed)
    return parts


def client_of(config: Config) -> tuple[Client, LocalTrunk]:
    """A client and its trunk in one process, without the base's dropout."""
    bottom, top = load_parts(config.model_path, config.bounds, ["bottom", "top"], kernels=config.kernels)
    for part in (bottom, top):
        lora.add(part, config.lora, config.seed)
    trunk = LocalTrunk(config)
    for part in (bottom, trunk.server.part, top):
        without_dropout(part)
    generator = torch.Generator().manual_seed(1)
    blocks = Sequences.packed(torch.randint(1, VOCABULARY, (7, 9), generator=generator))
    link = Link(trunk, make_codec("raw"), SCHEDULES["shared"], incarnation="first")
    return Client(0, Shard("ann", blocks, blocks[:1]), bottom, top, link, config.train, config.seed), trunk


def unsplit(config: Config, folder: Path, start: lora.Adapters) -> Any:
    """The unsplit model under PEFT alone, with that start: from a file, or by PEFT's own decomposition."""
    base, family = load_unsplit(config.model_path), read_facts(config.model_path).family
    if ADAPTER_METHODS[config.lora.method].residual:
        return get_peft_model(base, make_config(config.lora, family, seed=config.seed)).eval()
    adapter_files.save(folder, start, config.lora, family, "base", seed=config.seed)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()


def trained(whole: Any) -> dict[str, torch.nn.Parameter]:
    """What trains in it, by the names in the file."""
    named = ((exported(name.removeprefix("base_model.model.")), p) for name, p in whole.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, marks=() if m in QUICK[f] else pytest.mark.slow, id=f"{f}-{m}") for f, m in EVERYWHERE],
)
def test_a_client_and_its_trunk_train_as_the_unsplit_model_does(
    family: str, method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """To the bit: start, losses, and adapters after some steps of AdamW; then as a file, and merged."""
    if method == "pvera":
        pytest.skip("draws noise at every step, and each part has a seed of its own")
    config = config_of(tiny_models[family], method)
    client, trunk = client_of(config)
    start = lora.read(client.bottom, client.top) | trunk.read()
    whole = unsplit(config, tmp_path / "start", start)
    parameters = trained(whole)
    assert parameters.keys() == start.tensors.keys()
    assert all(torch.equal(parameter, start.tensors[name]) for name, parameter in parameters.items())

    update = client.train(lora.read(client.bottom, client.top).tensors, round=1)
    optimizer = make_optimizer(parameters.values(), config.train)
    losses = []
    for step in range(STEPS):
        ids = batch(client.shard.train, step, config.train.batch_size, derive_seed(config.seed, "client", 0)).ids
        loss = whole(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    after = update.adapters | trunk.read()
    assert update.loss == float(torch.stack(losses).mean())
    for name, parameter in parameters.items():
        assert torch.equal(after.tensors[name], parameter), name
    moved = sum(not torch.equal(after.tensors[name], tensor) for name, tensor in start.tensors.items())
    assert moved > len(start.tensors) / 2
    assert bool(after.layers) == ADAPTER_METHODS[method].factors

    ids = client.shard.train[:2].ids
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        saved = tmp_path / "after"
        facts = read_facts(config.model_path).family
        if ADAPTER_METHODS[method].residual:
            after = replace(after, folded={layer: start.change(layer).times(-1.0) for layer in start.complete})
        adapter_files.save(saved, after, config.lora, facts, str(config.model_path), seed=config.seed)
        opened = PeftModel.from_pretrained(load_unsplit(config.model_path), str(saved)).eval()
        close = {"rtol": 1e-4, "atol": 1e-4} if ADAPTER_METHODS[method].residual else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, **close)
        found = Adapter(saved, str(config.model_path), "fp32", "one")
        if method == "beft" and family == "llama":  # there is no bias to add to
            with pytest.raises(InputError, match=r"cannot be merged .Base layer has no bias"):
                merged(load_unsplit(config.model_path), found)
            return
        single = merged(load_unsplit(config.model_path), found)
        assert not any("base_layer" in name for name, _ in single.named_modules())
        torch.testing.assert_close(single.eval()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ia3", "ln_tuning"])
def test_what_depends_on_the_family_is_right_for_each(any_model_path: Path, method: str, tmp_path: Path) -> None:
    """Which norms a block has, and which projection takes the MLP's hidden state in; losses and gradients."""
    config = config_of(any_model_path, method)
    bottom, trunk, top = parts = parts_of(config)
    family = read_facts(any_model_path).family
    for part in parts:
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    whole = unsplit(config, tmp_path, lora.read(*parts))
    ids = torch.arange(1, 11)[None]
    loss = top(trunk(bottom(ids)), ids)
    loss.backward()
    expected = whole(input_ids=ids, labels=ids).loss
    expected.backward()
    assert torch.equal(loss, expected)
    gradients = {name: p.grad for part in parts for name, p in lora.parameters(part).items()}
    parameters = trained(whole)
    assert parameters.keys() == gradients.keys()
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in parameters.items())
    ends = family.norms if method == "ln_tuning" else family.targets
    layers = {name.rpartition(".ln_tuning_layers" if method == "ln_tuning" else ".ia3_l")[0] for name in gradients}
    assert {layer.rpartition(".")[2] for layer in layers} == {*ends}
    if method == "ia3":
        narrow = {layer for layer in layers if layer.endswith(family.narrows)}
        assert all((gradients[f"{layer}.ia3_l"].shape[0] == 1) == (layer in narrow) for layer in layers)
    else:
        norms = [name for name, _ in load_parts(any_model_path, (0, 3), ["trunk"])[0].named_modules() if "norm" in name]
        assert family.blocks == "h" or len(norms) - 1 == len(layers)


def test_noise_that_is_drawn_alike_gives_the_unsplit_models_gradients(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """PVeRA draws in training: the parts one after the other draw what the unsplit model does."""
    config = config_of(tiny_models["llama"], "pvera")
    bottom, trunk, top = parts = parts_of(config)
    whole = unsplit(config, tmp_path, lora.read(*parts))
    for module in (*parts, whole):
        module.train()
    ids = torch.arange(1, 9)[None]
    torch.manual_seed(3)
    loss = top(trunk(bottom(ids)), ids)
    loss.backward()
    torch.manual_seed(3)
    expected = whole(input_ids=ids, labels=ids).loss
    expected.backward()
    assert torch.equal(loss, expected)
    gradients = {name: p.grad for part in parts for name, p in lora.parameters(part).items()}
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in trained(whole).items())


@pytest.mark.parametrize("method", ["loha", "shira", "psoft", "olora", "c3a"])
def test_the_start_depends_on_seed_name_and_weight_alone(method: str, tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models["llama"], method)
    torch.manual_seed(11)
    first = lora.read(*parts_of(config, (1, 2))).tensors
    torch.manual_seed(12)
    second = lora.read(*parts_of(config, (0, 3))).tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_part_of_an_adapter_is_an_adapter_of_its_blocks(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """IA3 cannot say which blocks by number: a pattern does; OPT's MLP lies in the block itself."""
    for family, method in (("opt", "ia3"), ("gpt2", "ia3"), ("llama", "loha")):
        config = config_of(tiny_models[family], method)
        _, trunk, _ = parts_of(config)
        facts, saved = read_facts(config.model_path).family, tmp_path / family
        adapter_files.save(saved, lora.read(trunk), config.lora, facts, "base", trunk.blocks, config.seed)
        opened = PeftModel.from_pretrained(load_unsplit(config.model_path), str(saved), is_trainable=True)
        assert trained(opened).keys() == lora.parameters(trunk).keys()


def test_what_scales_an_mlps_input_follows_from_the_family(tiny_models: dict[str, Path]) -> None:
    """(IA)^3 scales what keys and values put out, and what the MLP's last projection takes in (2205.05638)."""
    config = config_of(tiny_models["gpt2"], "ia3")
    bottom, _, _ = parts_of(config)
    shapes = {name.split(".", 3)[-1]: tuple(p.shape) for name, p in lora.parameters(bottom).items()}
    assert shapes["attn.c_proj.ia3_l"] == (32, 1) and shapes["mlp.c_proj.ia3_l"] == (1, 128)
    assert shapes["attn.c_attn.ia3_l"] == (96, 1) and shapes["mlp.c_fc.ia3_l"] == (128, 1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", '{"lora_r": 3}', "^lora.options: lora_r is not possible; allowed: a field of PEFT's LoraConfig"),
        ("c3a", "", "^lora.method: c3a is not possible; allowed: what PEFT takes .The block size should be a factor"),
        ("road", '{"group_size": 5}', "^lora.options: .* allowed: what PEFT takes .*group_size"),
        ("boft", '{"boft_block_size": 5}', "what PEFT takes"),
        ("lora", '{"init_lora_weights": "orthogonal"}', "requires the LoRA rank to be even"),
        ("psoft", '{"psoft_svd": "half"}', "what PEFT takes"),
    ],
)
def test_what_does_not_suit_a_layer_is_found_before_anything_is_loaded(
    method: str, options: str, message: str, tiny_models: dict[str, Path]
) -> None:
    values = {"lora.rank": 3} if ADAPTER_METHODS[method].rank else {}
    config = build(values | {"model": str(tiny_models["llama"]), "lora.method": method, "lora.options": options})
    with pytest.raises(SettingError, match=message) as caught:
        check_injection(config, family_of(CONFIGS["llama"]()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_rank_that_a_decomposition_does_not_have_is_refused(method: str, tiny_models: dict[str, Path]) -> None:
    """PEFT would give such a layer a smaller one than the parties reckon with, and the first round would end in it."""
    values = {"model": str(tiny_models["llama"]), "lora.method": method}
    with pytest.raises(SettingError, match=rf"^lora.rank: 17 .* 1 to 16 with the method {method}, .*k_proj$"):
        check_injection(build(values | {"lora.rank": 17}), family_of(CONFIGS["llama"]()))
    check_injection(build(values | {"lora.rank": 16}), family_of(CONFIGS["llama"]()))


@pytest.mark.slow
def test_what_suits_is_not_refused(tiny_models: dict[str, Path]) -> None:
    for method in ADAPTER_METHODS:
        check_injection(config_of(tiny_models["llama"], method), family_of(CONFIGS["llama"]()))
    for method, kind in ADAPTER_METHODS.items():
        if kind.transposed:  # with all defaults, on the bundled model
            check_injection(build({"lora.method": method}), family_of(CONFIGS["gpt2"]()))


def test_further_fields_reach_peft(tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models["llama"], "lora", lora__options={"init_lora_weights": "gaussian"})
    a = {n: t for n, t in lora.read(*parts_of(config)).tensors.items() if "lora_A" in n}
    assert all(0.15 < float(t.std()) < 0.35 for t in a.values())  # PEFT's deviation is 1 / rank
    assert make_config(config.lora, family_of(CONFIGS["llama"]())).init_lora_weights == "gaussian"
