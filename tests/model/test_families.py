"""What is known of a checkpoint before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import BLOCKS, CONFIGS
from transformers import MixtralConfig, Qwen3MoeConfig

from fedsplit.errors import SettingError
from fedsplit.model.families import FAMILIES, family_of, read_facts, read_pad
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.config import BUNDLED_MODEL


def test_facts_are_those_of_the_library(any_model_path: Path) -> None:
    facts, config = read_facts(any_model_path), load_unsplit(any_model_path).config
    assert (facts.blocks, facts.positions) == (config.num_hidden_layers, config.max_position_embeddings)
    assert (facts.end, facts.width) == (config.eos_token_id, config.hidden_size)


def test_every_record_names_what_is_there(tiny_models: dict[str, Path]) -> None:
    assert FAMILIES.keys() == CONFIGS.keys()
    for name, family in FAMILIES.items():
        whole = load_unsplit(tiny_models[name])
        decoder = whole.get_submodule(family.decoder)
        named = (family.blocks, family.embedding, family.norm, family.positions, family.dropout, family.rotary)
        assert all(hasattr(decoder, attribute) for attribute in named if attribute)
        last_names = {module.rpartition(".")[2] for module, _ in decoder.named_modules()}
        assert set(family.targets) <= last_names
        routed = whole.get_submodule(f"{family.decoder}.{family.blocks}.0")
        assert all(routed.get_parameter(path).ndim in (2, 3) for path in family.parameters.values())
        assert not family.router or routed.get_submodule(family.router)


def test_the_bundled_model_is_known() -> None:
    assert read_facts(BUNDLED_MODEL).blocks == 6


def test_an_unknown_family_is_refused_with_the_list() -> None:
    words = r"of type bert is not possible; .* gpt2 \| llama \| mistral .*record in fedsplit/model/families.py.*decoder"
    with pytest.raises(SettingError, match=words):
        family_of("bert")


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 in config.json is not .*hidden_size, 32"),
        ("opt", {"layerdrop": 0.1}, "layerdrop 0.1 in config.json is not possible; allowed: 0"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention true in config.json is not .*: false"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention true .* is not .*: false"),
        ("llama", {"is_causal": False}, "is_causal false in config.json is not possible; allowed: true"),
        ("gemma3_text", {"model_type": "gemma3", "text_config": {}}, "type gemma3, whose text model is nested in it"),
        (
            "llama",
            {"transformers_weights": "other.safetensors"},
            r'has the transformers_weights "other\.safetensors"\)',
        ),
        ("mixtral", {"router_aux_loss_coef": -1}, "no possible router_aux_loss_coef"),
        ("mixtral", {"num_local_experts": None}, "no possible num_local_experts"),
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


@pytest.mark.parametrize("document", ["", "{}", '{"model_type": "t5"}', '{"model_type": "gpt2"}', "[]"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(document)
    with pytest.raises(SettingError, match=r"^model: "):
        read_facts(tmp_path)


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path, model_path: Path) -> None:
    document = json.loads((model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SettingError, match=r"its weights are quantised already.* allowed: weights in fp32"):
        read_facts(tmp_path)


def test_padding_is_what_the_model_says_or_else_the_end_token(tmp_path: Path) -> None:
    for said, pad in (({"pad_token_id": 5}, 5), ({}, 2), ({"pad_token_id": None}, 2), ({"pad_token_id": -1}, 2)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, **said}))
        assert read_pad(tmp_path, end=2) == pad
    (tmp_path / "config.json").write_text('{"pad_token_id": 9, "vocab_size": 9}')
    assert read_pad(tmp_path, end=2) == 2
