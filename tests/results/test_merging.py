"""Merged, unmerged and combined adapters, against adapters on their base and against dense arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import torch
from conftest import VOCABULARY
from measured_adapters import base_of, logits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BioGptConfig,
    PhiConfig,
    PretrainedConfig,
)

from fedsplit.errors import InputError
from fedsplit.model.devices import TYPES
from fedsplit.model.facts import read_pad
from fedsplit.model.token_ids import end_tokens
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results import merging, whole
from fedsplit.results.finished import Adapter, find_adapter, open_run
from fedsplit.results.measuring import held_out_loss
from fedsplit.results.merging import merge, unmerge
from fedsplit.results.whole import attach


@pytest.fixture(scope="session")
def narrow_model(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is stored in bf16."""
    folder = tmp_path_factory.mktemp("narrow")
    AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text((tiny_models["llama"] / "tokenizer.json").read_text())
    return folder


@pytest.fixture(params=["gpt2", "llama", "fedex", "mixed", "bf16", "stored in bf16"])
def adapter(request: pytest.FixtureRequest, finished_run: Callable[..., Path], narrow_model: Path) -> Adapter:
    """Those of several runs: GPT-2's layers are transposed, FedEx folds, FLoRA may have different ranks."""
    run = {
        "fedex": lambda: finished_run("gpt2", "fedex"),
        "mixed": lambda: finished_run("llama", "flora", lora__rank=[1, 4]),
        "bf16": lambda: finished_run("gpt2", dtype="bf16"),
        "stored in bf16": lambda: finished_run(str(narrow_model), lora__rslora=True),
    }.get(request.param, lambda: finished_run(request.param))()
    pattern = json.loads((run / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert bool(pattern) == (request.param in ("fedex", "mixed"))
    return find_adapter(run)


def test_a_merged_model_is_the_adapter_on_its_base_and_comes_apart_again(adapter: Adapter, tmp_path: Path) -> None:
    base = base_of(adapter)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    plain, expected = logits(base), logits(PeftModel.from_pretrained(base, str(adapter.folder)))
    merge(adapter, tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, plain, atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("ab")["input_ids"] == AutoTokenizer.from_pretrained(adapter.model_path)("ab")["input_ids"]

    kind = unmerge(tmp_path / "merged", tmp_path / "unmerged")
    narrow = adapter.dtype == "bf16" or "narrow" in adapter.model
    assert kind == ("bfloat16" if narrow else "float32")
    back = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "unmerged").named_parameters())
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    assert back.keys() == before.keys()
    for name, weight in before.items():
        if narrow:
            assert torch.equal(back[name].float(), weight)
        else:
            largest = torch.maximum(weight.abs(), merged[name].abs())
            assert bool(((back[name] - weight).abs() <= largest * 2**-23).all()), name


def test_a_merged_model_in_bf16_is_close(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    adapter = find_adapter(finished_run("gpt2"))
    merge(adapter, tmp_path / "merged", "bf16")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert unmerge(tmp_path / "merged", tmp_path / "unmerged") == "float32"
    base = load_unsplit(adapter.model_path)
    back = load_unsplit(tmp_path / "unmerged")
    for (name, weight), other in zip(base.named_parameters(), back.parameters(), strict=True):
        assert torch.allclose(weight, other, rtol=2**-7, atol=2e-2), name


def test_what_cannot_be_unmerged_is_refused(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    adapter = find_adapter(finished_run("gpt2"))
    with pytest.raises(InputError, match="is no merged model"):
        unmerge(adapter.model_path, tmp_path / "out")
    merge(adapter, tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    torn = bytearray(weights.read_bytes())
    torn[-1] ^= 1
    weights.write_bytes(torn)
    with pytest.raises(InputError, match="its weights are not those that were merged"):
        unmerge(tmp_path / "merged", tmp_path / "out")
    (tmp_path / "merged" / merging.MERGED / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="its merged_adapter is gone"):
        unmerge(tmp_path / "merged", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_crash_leaves_nothing(
    finished_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(merging, "copy_adapter", crash)
    with pytest.raises(OSError, match="no space left"):
        merge(find_adapter(finished_run("gpt2")), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "method", "head"), [("gpt2", "dora", "lora"), ("gemma2", "dora", "lora"), ("llama", "ln_tuning", "full")]
)
def test_a_head_that_trained_beside_another_kind_of_adapter_is_merged(
    family: str, method: str, head: str, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """And the embedding that it was tied to is not: such an adapter has no factors by which it would be known."""
    drops = {} if method == "dora" else {"lora__dropout": 0.1, "lora__rank": 8, "lora__alpha": 16.0}
    adapter = find_adapter(finished_run(family, lora__method=method, lm_head=head, **drops))
    expected = logits(PeftModel.from_pretrained(load_unsplit(adapter.model_path), str(adapter.folder)))
    merge(adapter, tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-5)


KINDS = {
    "gpt2": (
        *("plain", "bias of its layers", "all biases", "whole embedding", "whole norm", "whole ends"),
        *("on the embedding", "dora on the embedding", "on the head", "on the head alone", "on both ends", "tokens"),
        *("tokens alone", "bias of the factors", "pissa", "on all linear layers", "norms"),
    ),
    "llama": (
        *("whole embedding", "whole norm", "on the embedding", "on the head", "tokens", "ranks by layer", "dora"),
        *("rslora", "without a module", "some blocks", "olora", "of no task", "by a pattern", "whole head"),
    ),
    "qwen2": (
        *("all biases", "whole embedding", "whole embedding, tied", "whole ends", "on the embedding", "tokens alone"),
        *("on the embedding, tied", "on the head", "on both ends", "tokens"),
    ),
}


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in KINDS.items() for kind in kinds])
def test_what_peft_alone_made_is_merged_whole(
    family: str, kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The merged model computes what the adapter does beside its base, ties of the head and all."""
    model = tiny_models[family]
    folder = peft_adapters.make(family, kind, model, tmp_path / "adapter")
    expected = logits(peft_adapters.opened(model, folder))
    plain = logits(load_unsplit(model))
    assert merge(find_adapter(folder), tmp_path / "merged") == 0
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, plain, atol=0.1)
    assert load_unsplit(tmp_path / "merged").state_dict().keys() == load_unsplit(model).state_dict().keys()


@pytest.mark.parametrize("kind", ["on the head", "on both ends", "on the embedding"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_without_base_weights_in_the_file_too(
    family: str, kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Then an adapted head is one more layer with factors, among others that are stored the other way round."""
    model = tiny_models[family]
    folder = peft_adapters.make(family, kind, model, tmp_path / "adapter", ends=False)
    expected = logits(peft_adapters.opened(model, folder))
    merge(find_adapter(folder), tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("invoked", "aLoRA does not support"),
        ("replicated", r"PEFT leaves model\.layers\.3\.\S+, which is no weight of the model"),
        ("bias of the factors", "base layer has no bias"),
    ],
)
def test_what_peft_cannot_merge_is_refused(kind: str, words: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = peft_adapters.make("llama", kind, tiny_models["llama"], tmp_path / "adapter")
    with pytest.raises(InputError, match=rf"cannot be merged.*{words}"):
        merge(find_adapter(folder), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_sum_that_peft_gets_wrong_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left tied, the head would be changed with the embedding."""
    monkeypatch.setattr(whole, "_untie", lambda base: False)
    folder = peft_adapters.make("qwen2", "on the embedding", tiny_models["qwen2"], tmp_path / "adapter")
    with pytest.raises(InputError, match="does not compute the same as with the adapter attached"):
        merge(find_adapter(folder), tmp_path / "merged")


def test_what_a_narrow_type_cannot_hold_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = peft_adapters.make("llama", "plain", tiny_models["llama"], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor.mul_(1000)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="has values that are no finite numbers in fp16"):
        merge(find_adapter(folder), tmp_path / "merged", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


CLASSES = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_a_classifier_is_merged_and_comes_apart_again(
    family: str, dtype: str, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Llama's head for tokens is its own: the classifier has none, and yet it comes back."""
    run = Path(shutil.copytree(finished_run(family, dtype=dtype, **CLASSES), tmp_path / "run"))
    adapter = find_adapter(run)
    (run / "data.json").write_text(json.dumps({"classes": ["ants", "bees", "cows", "dogs"]}))
    pad = read_pad(adapter.model_path, 0)
    base = load_unsplit(adapter.model_path, TYPES[dtype], 4, pad).float()
    before = base_of(adapter).state_dict()
    padded, seen = torch.arange(40).reshape(2, 20), torch.ones(2, 20, dtype=torch.long)
    padded[1, 13:], seen[1, 13:] = pad, 0
    expected = PeftModel.from_pretrained(base, str(adapter.folder)).eval()(padded, attention_mask=seen).logits

    assert merge(find_adapter(run), tmp_path / "merged") == 4
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(opened(padded, attention_mask=seen).logits, expected, atol=1e-5)
    assert [*opened.config.id2label.values()] == ["ants", "bees", "cows", "dogs"]
    reported = open_run(run).summary["eval_loss"]["after"]  # of a run in 16 bits, with what these round away
    assert held_out_loss(opened, run) == pytest.approx(reported, abs=1e-5 if dtype == "fp32" else 0.01)

    unmerge(tmp_path / "merged", tmp_path / "unmerged")
    plain, back = (AutoModelForCausalLM.from_pretrained(p) for p in (adapter.model_path, tmp_path / "unmerged"))
    assert back.state_dict().keys() == before.keys()
    for name, weight in before.items():
        assert torch.allclose(back.state_dict()[name].float(), weight, atol=1e-6), name
    assert torch.equal(back.lm_head.weight.float(), before["lm_head.weight"])
    ours, theirs = (model.config.to_diff_dict() for model in (back, plain))
    assert {**ours, "dtype": None} == {**theirs, "dtype": None}


def test_a_classifier_that_comes_apart_again_ends_texts_as_its_base_did(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A folder of some name beside the tokenizer's files is left where it is."""
    shutil.copytree(tiny_models["gpt2"], tmp_path / "ending")
    (tmp_path / "ending" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "ending" / "tokens").mkdir()
    adapter = find_adapter(finished_run(str(tmp_path / "ending"), **CLASSES))
    assert end_tokens(adapter.model_path) == [7, 8]
    merge(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "notes.safetensors").write_bytes(b"not a file that the model is loaded from")
    unmerge(tmp_path / "merged", tmp_path / "unmerged")
    assert end_tokens(tmp_path / "unmerged") == [7, 8]


@pytest.mark.parametrize("method", ["dora", "ln_tuning"])
def test_a_classifier_of_any_kind_of_adapter_is_merged(
    method: str, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT leaves the head of one of them wrapped."""
    plain = {"lora__dropout": 0.1, "lora__rank": 8, "lora__alpha": 16.0} if method == "ln_tuning" else {}
    run = finished_run("gpt2", lora__method=method, **plain, **CLASSES)
    adapter = find_adapter(run)
    base = load_unsplit(adapter.model_path, classes=4, pad=0)
    expected = logits(PeftModel.from_pretrained(base, str(adapter.folder)))
    merge(adapter, tmp_path / "merged")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(opened), expected, atol=1e-5)
    with pytest.raises(InputError, match="does more than to add something to the weights"):
        unmerge(tmp_path / "merged", tmp_path / "unmerged")


def test_a_head_of_other_classes_does_not_fit(finished_run: Callable[..., Path]) -> None:
    adapter = find_adapter(finished_run("gpt2", **CLASSES))
    base = load_unsplit(adapter.model_path, classes=3, pad=0)
    with pytest.raises(InputError, match=r"does not fit the model \(size mismatch for [\w.]*score"):
        attach(base, adapter)


def write_like(model: Path, folder: Path, config: PretrainedConfig) -> str:
    """Saves a random model of a configuration, with the tokenizer of another model."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    for parameter in whole.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    whole.save_pretrained(folder)
    return str(folder)


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "intermediate_size": 64}
OTHER_HEADS = {
    "another name": BioGptConfig(**_SIZES, **_ENDS, tie_word_embeddings=False),
    "another name, tied": BioGptConfig(**_SIZES, **_ENDS),
    "with a bias": PhiConfig(**_SIZES, **_ENDS),
}


@pytest.mark.parametrize("head", OTHER_HEADS)
@pytest.mark.parametrize("settings", [{}, {"lora__method": "ia3"}, CLASSES], ids=["lora", "ia3", "classes"])
def test_heads_of_another_name_or_with_a_bias_are_merged_and_come_back(
    head: str,
    settings: dict[str, Any],
    finished_run: Callable[..., Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    model = write_like(tiny_models["gpt2"], tmp_path / head, OTHER_HEADS[head])
    run = finished_run(model, **settings)
    merge(find_adapter(run), tmp_path / "merged")
    kind = AutoModelForSequenceClassification if settings is CLASSES else AutoModelForCausalLM
    reported = open_run(run).summary["eval_loss"]["after"]
    assert held_out_loss(kind.from_pretrained(tmp_path / "merged").eval(), run) == pytest.approx(reported, abs=1e-5)
    if "lora__method" in settings:  # what PEFT alone can merge cannot be taken apart
        return
    unmerge(tmp_path / "merged", tmp_path / "unmerged")
    plain, back = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, tmp_path / "unmerged"))
    assert plain.keys() == back.keys()
    for name, weight in plain.items():
        assert torch.allclose(back[name], weight, atol=1e-6), name
