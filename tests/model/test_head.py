"""A head that learns, by an adapter or whole: equal to plain PEFT, tied or not, in steps, federations and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, VOCABULARY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.adaptation import adapter_files, folding, lora
from fedsplit.adaptation.injection import make_config
from fedsplit.adaptation.run_adapters import adapt
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import batch
from fedsplit.errors import InputError
from fedsplit.lowrank import LowRank
from fedsplit.model.derivation import family_of
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.optimization.optim import make_optimizer
from fedsplit.results.combining import combine
from fedsplit.results.finished import Adapter, find_adapter, open_run
from fedsplit.results.measuring import evaluate, held_out_loss
from fedsplit.results.merging import merge, unmerge
from fedsplit.results.whole import attach, detach, open_base
from fedsplit.seeds import derive_seed
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings

KINDS = ("bottom", "trunk", "top")
CUTS = [(1, 2), (0, BLOCKS)]
HEADS = ("lora", "full")
TIED = {"gpt2": True, "llama": False, "gemma2": True}
"""Whether the head shares the embedding's weight; the last one's embedding is scaled, and its logits capped."""
IDS = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
SETTINGS = LoraSettings(rank=(3,), alpha=5.0, dropout=0.0)


def parts_of(path: Path, cut: tuple[int, int], head: str, kernels: str = "library", dtype: torch.dtype = torch.float32):
    """The parts with adapters, none of them zero."""
    parts = load_parts(path, cut, KINDS, dtype, kernels)
    for part in parts:
        lora.add(part, SETTINGS, 0, head)
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return parts


def whole_of(path: Path, head: str, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The unsplit model under plain PEFT with the same adapters, and what trains of it by our names."""
    base = load_unsplit(path)
    config = make_config(SETTINGS, family_of(base.config), head=head)
    whole = get_peft_model(base, config).eval()
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {n.replace(".modules_to_save", ""): p for n, p in names.items() if p.requires_grad}
    assert trained.keys() == given.keys()
    for name, parameter in trained.items():
        parameter.data = given[name].clone()
    return whole, trained


def labels_and_mask(padded: bool) -> tuple[Tensor, Tensor | None]:
    if not padded:
        return IDS, None
    mask = torch.ones_like(IDS)
    mask[0, 8:], mask[1, :2] = 0, 0
    return IDS.masked_fill(mask == 0, -100), mask


@pytest.mark.parametrize("kernels", ["library", "fused"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", TIED)
def test_the_split_equals_plain_peft(tiny_models: dict[str, Path], family: str, head: str, kernels: str) -> None:
    """To the bit with the library's code, to rounding with ours; with a top that is a head alone, too."""
    for cut in CUTS if kernels == "library" else CUTS[:1]:
        parts = parts_of(tiny_models[family], cut, head, kernels)
        whole, trained = whole_of(tiny_models[family], head, lora.read(*parts).tensors)
        mine = {n: p for part in parts for n, p in lora.parameters(part).items()}
        for padded in (False, True):
            labels, mask = labels_and_mask(padded)
            for module in (*parts, whole):
                module.zero_grad()
            reference = whole(input_ids=IDS, attention_mask=mask, labels=labels)
            reference.loss.backward()
            bottom, trunk, top = parts
            loss = top(trunk(bottom(IDS, mask), mask), labels, mask)
            loss.backward()
            values = {n: (mine[n].grad, p.grad) for n, p in trained.items()} | {"loss": (loss, reference.loss)}
            for name, (one, two) in values.items():
                assert one is not None and one.abs().max() > 0, name
                if kernels == "library":
                    assert torch.equal(one, two), (name, cut, padded)
                else:
                    assert (one - two).norm() <= 1e-5 * two.norm(), (name, cut, padded)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bf16_is_close_and_what_trains_is_float32(tiny_models: dict[str, Path], family: str, head: str) -> None:
    found = []
    for dtype, kernels in ((torch.float32, "fused"), (torch.bfloat16, "fused"), (torch.bfloat16, "library")):
        bottom, trunk, top = parts = parts_of(tiny_models[family], (1, 2), head, kernels, dtype)
        loss = top(trunk(bottom(IDS)), IDS)
        loss.backward()
        assert {p.dtype for part in parts for p in lora.parameters(part).values()} == {torch.float32}
        gradients = [p.grad for p in lora.parameters(top).values()]
        found.append((float(loss.detach()), torch.cat([g.flatten() for g in gradients])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=0.02)
        assert torch.nn.functional.cosine_similarity(gradient, found[0][1], 0) > 0.98


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", TIED)
def test_an_embedding_that_was_tied_stays_as_it_is(tiny_models: dict[str, Path], family: str, head: str) -> None:
    """Whatever is trained, written or folded at the top."""
    bottom, trunk, top = parts_of(tiny_models[family], (1, 2), head)
    words = getattr(bottom.decoder, bottom.family.embedding).weight
    before, shared = words.detach().clone(), top.lm_head.weight if head == "full" else top.lm_head.base_layer.weight
    assert (shared is words) == (TIED[family] and head == "lora")
    optimizer = make_optimizer(lora.parameters(top).values(), build({"train.lr": 0.1}).train)
    top(trunk(bottom(IDS)), IDS).backward()
    optimizer.step()
    lora.write({n: t + 0.05 for n, t in lora.read(top).tensors.items()}, top)
    if head == "lora":
        logits = top.logits(trunk(bottom(IDS)))
        change = LowRank(torch.randn(VOCABULARY, 2), torch.randn(2, 32))
        folding.fold(top, {HEAD: change})
        assert not torch.allclose(top.logits(trunk(bottom(IDS))), logits)
        assert torch.allclose(top.lm_head.base_layer.weight, shared.detach() + change.up @ change.down, atol=1e-5)
    assert torch.equal(words, before) and not words.requires_grad


def test_counts_and_names_are_plain_pefts(tiny_models: dict[str, Path]) -> None:
    for family, tied in TIED.items():
        for head in HEADS:
            parts = parts_of(tiny_models[family], (1, 2), head)
            read = lora.read(*parts)
            whole, trained = whole_of(tiny_models[family], head, dict(read.tensors))
            counts = [lora.count(parts[0]), lora.count(parts[1]), lora.count(parts[2], elsewhere=[parts[0]])]
            trainable = sum(count["trainable"] for count in counts)
            assert trainable == whole.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained.values())
            replaced = VOCABULARY * 32 if head == "full" and not tied else 0  # PEFT keeps the old one, too
            assert sum(count["total"] for count in counts) == whole.get_nb_trainable_parameters()[1] - replaced
            assert (HEAD in read.layers) == (head == "lora") and (HEAD_WEIGHT in read.tensors) == (head == "full")
            assert head == "full" or not read.layers[HEAD].transposed
            assert not any(HEAD in name for name in lora.read(*parts[:2]).tensors)


@pytest.mark.parametrize("head", HEADS)
def test_one_client_follows_plain_peft(model_path: Path, head: str) -> None:
    """Eight steps of AdamW, the trunk's among them, with the library's code."""
    from conftest import without_dropout

    from fedsplit.client.client import Client
    from fedsplit.client.link import Link
    from fedsplit.corpora.shards import Shard
    from fedsplit.trunk.local import LocalTrunk
    from fedsplit.trunk.schedules import SCHEDULES
    from fedsplit.wire.codecs import make_codec

    values: dict[str, object] = {"model": str(model_path), "cut": "1:2", "lm_head": head, "kernels": "library"}
    values |= {"lora.rank": 3, "lora.alpha": 5.0, "lora.dropout": 0.0}
    config = build(values | {"train.steps": 8, "train.batch_size": 3, "train.lr": 5e-3})
    bottom, top = load_parts(model_path, (1, 2), ["bottom", "top"])
    trunk = LocalTrunk(config)
    for part in (bottom, top):
        adapt(part, config)
    for part in (bottom, trunk.server.part, top):
        without_dropout(part)
    ids = torch.randint(1, VOCABULARY, (10, 8), generator=torch.Generator().manual_seed(1))
    link = Link(trunk, make_codec("raw"), SCHEDULES["shared"], incarnation="first")
    shard = Shard("ann", Sequences.packed(ids), Sequences.packed(torch.zeros(1, 8, dtype=torch.long)))
    client = Client(0, shard, bottom, top, link, config.train, 0)
    given = lora.read(bottom, top).tensors
    start = {**given, **trunk.server.adapters.read().tensors}
    update = client.train(given, round=1)
    federated = {**update.adapters.tensors, **trunk.server.adapters.read().tensors}
    whole, trained = whole_of(model_path, head, start)
    optimizer = make_optimizer(trained.values(), config.train)
    for step in range(8):
        rows = batch(ids, step, 3, derive_seed(0, "client", 0))
        whole(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trained.items():
        assert (federated[name] - parameter).abs().max() <= 1e-5, name
        assert (start[name] - parameter).abs().max() > 1e-3, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_opens_what_is_saved_whole_and_by_part(
    tmp_path: Path, tiny_models: dict[str, Path], family: str, head: str
) -> None:
    path = tiny_models[family]
    bottom, trunk, top = parts = parts_of(path, (1, 2), head)
    with torch.no_grad():
        expected = top.logits(trunk(bottom(IDS)))
    adapter_files.save(tmp_path / "whole", lora.read(*parts), SETTINGS, top.family, str(path), head=head)
    opened = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / "whole")).eval()
    assert torch.equal(opened(input_ids=IDS).logits, expected)
    words = opened.get_base_model().get_input_embeddings().weight
    assert torch.equal(words, load_unsplit(path).get_input_embeddings().weight)
    read = adapter_files.load(tmp_path / "whole")
    assert all(torch.equal(t, read.tensors[n]) for n, t in lora.read(*parts).tensors.items())
    assert read.layers == lora.read(*parts).layers
    for part in parts:
        own = head if part.kind == "top" else "frozen"
        adapter_files.save(
            tmp_path / part.kind, lora.read(part), SETTINGS, top.family, str(path), part.blocks, head=own
        )
        alone = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / part.kind))
        found = {n for n, p in alone.named_parameters() if "lora_" in n or "modules_to_save" in n}
        assert len(found) == len(lora.parameters(part))


def finished(finished_run: Callable[..., Path], head: str, model="gpt2", strategy="fedavg", **more: object) -> Path:
    return finished_run(model, strategy, lm_head=head, **more)


@pytest.mark.parametrize(
    ("head", "model", "strategy"),
    [
        ("lora", "gpt2", "fedavg"),
        ("lora", "gpt2", "fedex"),
        pytest.param("lora", "llama", "flora", marks=pytest.mark.slow),
        ("full", "gpt2", "fedavg"),
        pytest.param("full", "llama", "median", marks=pytest.mark.slow),
        pytest.param("full", "gpt2", "flora", marks=pytest.mark.slow),
        pytest.param("full", "gemma2", "ffa", marks=pytest.mark.slow),
    ],
)
def test_a_federation_reports_what_plain_peft_measures(
    finished_run: Callable[..., Path], head: str, model: str, strategy: str
) -> None:
    path = finished(finished_run, head, model, strategy)
    run, losses = open_run(path), json.loads((path / "summary.json").read_text())["eval_loss"]
    assert losses["after"] < losses["before"]
    opened = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(path / "adapter"))
    assert held_out_loss(opened, path) == pytest.approx(losses["after"], abs=1e-5)
    whole = load_file(path / "adapter" / "adapter_model.safetensors")
    top = load_file(path / "top_lora" / "adapter_model.safetensors")
    assert all(torch.equal(t, whole[n]) for n, t in top.items()) and any(HEAD in n for n in top)
    ends = {**top, **load_file(path / "bottom_lora" / "adapter_model.safetensors")}
    if strategy in ("fedavg", "median"):  # the head crosses once a round and client, and is counted
        sent, factors = run.summary["bytes"]["adapter_up"], 3 * 2 * sum(tensor.nbytes for tensor in ends.values())
        assert factors < sent <= factors + 3 * 2 * len(ends) * 256


def test_a_head_alone_learns_where_nothing_else_can(finished_run: Callable[..., Path]) -> None:
    run = open_run(finished(finished_run, "full", cut="0:3", trunk__schedule="forward-only"))
    assert run.summary["eval_loss"]["after"] < run.summary["eval_loss"]["before"]
    assert [run.summary["parameters"][part]["trainable"] for part in KINDS] == [0, 0, VOCABULARY * 32]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merged_head_is_the_adapter_on_its_base_and_comes_apart_again(
    tmp_path: Path, tiny_models: dict[str, Path], family: str, head: str
) -> None:
    path = tiny_models[family]
    parts = parts_of(path, (1, 2), head)
    adapter_files.save(tmp_path / "own", lora.read(*parts), SETTINGS, parts[0].family, str(path), head=head)
    adapter = Adapter(tmp_path / "own", str(path), "fp32", "own")
    base = load_unsplit(path).eval()
    plain = base(input_ids=IDS).logits
    expected = PeftModel.from_pretrained(load_unsplit(path), str(tmp_path / "own")).eval()(input_ids=IDS).logits
    merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=2e-5)
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    unmerge(tmp_path / "merged", tmp_path / "apart")
    apart = AutoModelForCausalLM.from_pretrained(tmp_path / "apart").eval()
    assert torch.allclose(apart(input_ids=IDS).logits, plain, atol=1e-4)
    assert (apart.lm_head.weight is apart.get_input_embeddings().weight) == TIED[family]
    assert torch.allclose(apart.lm_head.weight, base.lm_head.weight, atol=1e-6)


def test_heads_are_combined_where_they_have_factors(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (find_adapter(finished(finished_run, "lora", strategy=name)) for name in ("fedavg", "fedex"))
    combine([one, two], [0.7, 0.3], "cat", tmp_path / "both")
    read = [adapter_files.load(folder) for folder in (one.folder, two.folder, tmp_path / "both")]
    assert HEAD in read[2].complete and read[2].layers[HEAD].transposed is False
    for layer in read[2].complete:
        dense = [change.up @ change.down for change in (adapters.change(layer) for adapters in read)]
        assert torch.allclose(dense[2], 0.7 * dense[0] + 0.3 * dense[1], atol=1e-6), layer
        assert read[2].layers[layer].transposed == read[0].layers[layer].transposed
    whole = find_adapter(finished(finished_run, "full"))
    with pytest.raises(InputError, match="holds a whole head, which PEFT cannot combine"):
        combine([whole, whole], [1.0, 1.0], "cat", tmp_path / "none")


@pytest.mark.parametrize("head", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_adapter_of_the_head_comes_and_goes(finished_run: Callable[..., Path], head: str) -> None:
    """Each client's own in turn, on one base."""
    run = open_run(finished(finished_run, head, strategy="fedsa", share="bottom,trunk"))
    base = open_base(run.config.model_path, "fp32")
    before = base(IDS).logits
    for client in (0, 1):
        model = attach(base, run.adapter(client))
        assert not torch.allclose(model(IDS).logits, before, atol=1e-3)
        base = detach(model)
        assert torch.equal(base(IDS).logits, before)
    results = evaluate(run)
    loss = sum(r.tuned.nats for r in results) / sum(r.tuned.tokens for r in results)
    assert loss == pytest.approx(run.summary["eval_loss"]["after"], abs=1e-5)
    small = replace(run.adapter(0), folder=run.adapter(0).folder)
    base.lm_head = torch.nn.Linear(32, 5, bias=False)
    with pytest.raises(InputError, match=r"does not fit the model \(size mismatch for [\w.]*lm_head"):
        attach(base, small)
