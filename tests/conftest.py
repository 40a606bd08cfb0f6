"""Tiny random models, and what several tests need of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fedsplit.proving.kept import proof_of
from fedsplit.settings.config import BUNDLED_MODEL

# Tests run in several processes: more threads than cores make each of them several times slower.
torch.set_num_threads(1)

# A slow machine is no failure.
settings.register_profile("fedsplit", deadline=None)
settings.load_profile("fedsplit")

# Flower's messages name the run they belong to; its engine sets this.
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

VOCABULARY = 97
BLOCKS = 3

WINDOW = 5
"""Of the families that have sliding windows; shorter than the sequences in tests."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA = {**_GROUPED, **_MIXED, "head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0}

CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        # Depends on the number of the block in the whole model: a part that counts from 0 would be found out.
        scale_attn_by_inverse_layer_idx=True,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
    ),
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_GROUPED, **_MIXED, use_sliding_window=True, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_GROUPED, **_MIXED, use_sliding_window=True, head_dim=12, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=1.5),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GEMMA,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
    "phi3": lambda: Phi3Config(
        **_GROUPED,
        sliding_window=WINDOW,
        tie_word_embeddings=False,
        resid_pdrop=0.1,
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 8,
        },
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_SIZES,
        intermediate_size=64,
        hidden_dropout=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5},
    ),
    "opt": lambda: OPTConfig(**_SIZES, word_embed_proj_dim=32, ffn_dim=64, dropout=0.1, layerdrop=0.0),
    "mixtral": lambda: MixtralConfig(
        **_GROUPED, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_GROUPED,
        head_dim=12,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],  # by the number in the whole model
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}
"""Grouped queries, tied heads, windows, types by layer, caps and experts, where the family has them."""


def write_model(folder: Path, family: str) -> Path:
    """Saves a tiny random model and a tokenizer of characters."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():  # the library's initialisation is so small that wrong wiring would hardly show
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            elif family != "gpt2" or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    characters = {chr(32 + number): number for number in range(VOCABULARY - 1)} | {"\n": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    return folder


def write_image_model(folder: Path, **options: Any) -> PreTrainedModel:
    """Saves a tiny random Gemma 3 of images and text, with a tokenizer of characters, and returns it.

    Args:
        folder: Where to.
        options: Options of `save_pretrained`.
    """
    write_model(folder, "gemma3_text")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    # The library caps the logits of the text model alone, and no Gemma 3 has a cap.
    text = {**CONFIGS["gemma3_text"]().to_dict(), "final_logit_softcapping": None}
    sizes = {**vision, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=sizes, mm_tokens_per_image=4))
    whole.save_pretrained(folder, **options)
    return whole.eval()


def with_added_token(model: Path, folder: Path, content: str) -> Path:
    """Copies a model whose tokenizer knows one token more than its embedding has rows."""
    shutil.copytree(model, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"] = [{"id": VOCABULARY, "content": content, **flags}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(autouse=True)
def _environment_is_restored() -> Iterator[None]:
    """Undoes what a run in this process sets for a Ray of its own: the next test's Ray would ask for a token, too."""
    environment, before = os.environ, dict(os.environ)
    yield
    if environment != before:
        environment.clear()
        environment.update(before)


@pytest.fixture(scope="session", autouse=True)
def _bundled_model_is_proved() -> None:
    """Proves the bundled model, so that no command that a test watches says that it has just done so."""
    proof_of(BUNDLED_MODEL)


@pytest.fixture(autouse=True)
def _runs_draw_no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the runs of tests the second that a report takes; `draws_reports` is the mark of those that want one."""
    if request.node.get_closest_marker("draws_reports") is None:
        monkeypatch.setattr("fedsplit.reporting.page.try_report", lambda folder: "")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family, written when it is asked for."""

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_model(tmp_path_factory.mktemp(family), family)
            return self[family]

    return Models()


@pytest.fixture(params=["gpt2", "llama"])
def model_path(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """The folders of the two families that differ most, for what does not depend on the family."""
    return tiny_models[request.param]


@pytest.fixture(params=list(CONFIGS))
def any_model_path(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """Each family's folder in turn."""
    return tiny_models[request.param]


def write_corpus(path: Path) -> Path:
    """Writes a small corpus of three owners."""
    rows = [
        {"text": f"{owner} wrote text number {number}. " * 6, "owner": owner}
        for owner in ("ann", "bob", "cid")
        for number in range(5)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A small corpus of three owners."""
    return write_corpus(tmp_path / "corpus.jsonl")


@pytest.fixture(scope="session")
def finished_run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes finished runs of a model, a strategy and other settings; each only once."""
    from finished_runs import Runs

    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))


def without_dropout(part: torch.nn.Module) -> None:
    """Switches off the base model's own dropout; the adapters' is a setting."""
    for name, module in part.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in name:
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as it is, planned for processes, but played in this one, a client at a time."""
    from fedsplit.engines import in_process, session

    def running(config: Any, plan: Any, *rest: Any) -> Any:
        return in_process.running(config, replace(plan, workers=1), *rest)

    monkeypatch.setattr(session, "engine_named", lambda name: running)
