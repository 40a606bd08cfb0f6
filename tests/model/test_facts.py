"""What is known of a checkpoint before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import BLOCKS
from transformers import GraniteMoeConfig, MambaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig

from fedsplit.commands.model_checks import check_experts
from fedsplit.errors import SettingError
from fedsplit.model.facts import NO_LIMIT, read_facts, read_pad
from fedsplit.model.miniature import miniature
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.documents import build


def test_facts_are_those_of_the_library(any_model_path: Path) -> None:
    facts, config = read_facts(any_model_path), load_unsplit(any_model_path).config
    assert (facts.blocks, facts.positions) == (config.num_hidden_layers, config.max_position_embeddings)
    assert (facts.end, facts.width) == (config.eos_token_id, config.hidden_size)


def test_the_bundled_model_is_known() -> None:
    assert read_facts(BUNDLED_MODEL).blocks == 6


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("opt", {"layerdrop": 0.1}, "layerdrop 0.1 in config.json is not possible; allowed: 0"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention true in config.json is not .*: false"),
        ("gemma3_text", {"use_bidirectional_attention": True}, r'attention true .* is not .*: false or "vision";'),
        ("llama", {"is_causal": False}, "is_causal false in config.json is not possible; allowed: true"),
        ("llama", {"model_type": "bert"}, "type bert, which is an encoder: its tokens attend to later tokens"),
        ("llama", {"model_type": "t5"}, "type t5, which is an encoder with a decoder"),
        ("llama", {"model_type": "vit"}, "type vit, of which transformers has no causal language model"),
        ("llama", {"model_type": "nonesuch"}, r"model: .*nonesuch"),
        ("llama", {"num_hidden_layers": 0}, "no possible num_hidden_layers"),
        ("llama", {"num_hidden_layers": 10**10}, r"has 10000000000 blocks\) is not possible; allowed: up to 2000"),
        ("llama", {"max_position_embeddings": 0}, "no possible max_position_embeddings"),
        (
            "llama",
            {"transformers_weights": "other.safetensors"},
            r'has the transformers_weights "other\.safetensors"\)',
        ),
        ("mixtral", {"router_aux_loss_coef": -1}, "field 'router_aux_loss_coef'"),
        ("mixtral", {"num_local_experts": None}, "field 'num_local_experts'"),
    ],
)
def test_what_would_not_be_split_exactly_is_refused(
    tmp_path: Path, tiny_models: dict[str, Path], family: str, setting: dict[str, object], message: str
) -> None:
    document = json.loads((tiny_models[family] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_facts(tmp_path).blocks == BLOCKS
    (tmp_path / "config.json").write_text(json.dumps(document | setting))
    with pytest.raises(SettingError, match=message):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("family", "says", "experts", "routed", "coefficient"),
    [
        ("llama", {"output_router_logits": True}, 0, (), 0.0),
        ("mixtral", {}, 4, (0, 1, 2), 0.0),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.02}, 4, (0, 1, 2), 0.02),
        ("qwen3_moe", {"output_router_logits": True}, 4, (0, 2), 0.001),
        ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, 4, (1,), 0.0),
        ("qwen3_moe", {"num_local_experts": 0, "output_router_logits": True}, 0, (), 0.0),
    ],
)
def test_what_is_known_of_experts(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    family: str,
    says: dict[str, object],
    experts: int,
    routed: tuple[int, ...],
    coefficient: float,
) -> None:
    document = json.loads((tiny_models[family] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(document | says))
    facts = read_facts(tmp_path)
    assert (facts.experts, facts.routed, facts.router_aux_loss) == (experts, routed, coefficient)
    assert (facts.coefficient(-1), facts.coefficient(0.5), facts.coefficient(0)) == (coefficient, 0.5, 0)


def test_where_config_json_is_silent_the_librarys_defaults_hold(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for family, library in (("mixtral", MixtralConfig()), ("qwen3_moe", Qwen3MoeConfig())):
        document = json.loads((tiny_models[family] / "config.json").read_text()) | {"output_router_logits": True}
        for key in ("num_local_experts", "num_experts", "router_aux_loss_coef", "decoder_sparse_step"):
            document.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(document))
        facts = read_facts(tmp_path)
        assert (facts.experts, facts.router_aux_loss) == (library.num_experts, library.router_aux_loss_coef)


def test_a_model_without_positions_has_no_limit(tmp_path: Path) -> None:
    miniature(MambaConfig()).save_pretrained(tmp_path)
    assert read_facts(tmp_path).positions == NO_LIMIT


@pytest.mark.parametrize("document", ["", "{}", '{"model_type": "t5"}', '{"model_type": "gpt2"}', "[]"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(document)
    with pytest.raises(SettingError, match=r"^model: "):
        read_facts(tmp_path)


def test_attention_within_images_is_no_matter_of_texts(tmp_path: Path) -> None:
    """The published Gemma 4 models say so."""
    miniature(Gemma4UnifiedTextConfig(use_bidirectional_attention="vision")).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["use_bidirectional_attention"] == "vision"
    assert read_facts(tmp_path).blocks == 4


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path, model_path: Path) -> None:
    document = json.loads((model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(
        SettingError,
        match=r"weights are quantised already, by gptq.* allowed: weights in fp32, bf16, fp16, fp8, or",
    ):
        read_facts(tmp_path)


def test_padding_is_what_the_model_says_or_else_the_end_token(tmp_path: Path) -> None:
    for said, pad in (({"pad_token_id": 5}, 5), ({}, 2), ({"pad_token_id": None}, 2), ({"pad_token_id": -1}, 2)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, **said}))
        assert read_pad(tmp_path, end=2) == pad
    (tmp_path / "config.json").write_text('{"pad_token_id": 9, "vocab_size": 9}')
    assert read_pad(tmp_path, end=2) == 2


def test_a_loss_of_routers_that_parts_cannot_compute_is_not_dropped_silently(tmp_path: Path) -> None:
    miniature(GraniteMoeConfig(output_router_logits=True)).save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    assert facts.loses_balance
    with pytest.raises(SettingError, match=r"router_aux_loss: -1.* allowed: 0 for this type"):
        check_experts(build({}), facts)
    check_experts(build({"router_aux_loss": 0.0}), facts)
    miniature(GraniteMoeConfig()).save_pretrained(tmp_path)
    assert not read_facts(tmp_path).loses_balance
