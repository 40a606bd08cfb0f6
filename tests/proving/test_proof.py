"""The proof that a model's type is cut exactly: true of what works, and refused for what is broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from fedsplit.adaptation import lora
from fedsplit.errors import SettingError
from fedsplit.model import kernels, parts
from fedsplit.model.caches import PartCache
from fedsplit.model.parts import Top
from fedsplit.proving import proof as proof_module
from fedsplit.proving.proof import Proof, cuts_of, prove, require
from fedsplit.settings.config import Config
from fedsplit.settings.sections import TrunkSettings


@pytest.mark.parametrize("name", CONFIGS)
def test_known_types_are_proved_at_every_place(name: str) -> None:
    proof = prove(CONFIGS[name]())
    assert proof.generates, proof.faults
    for check in ("logits", "padding left", "padding right", "loss", "gradients", "cache"):
        assert proof.equal[check] == len(proof.cuts)
    assert proof.equal["export"] == proof.equal["kernels"] == proof.equal["causality"] == 1
    assert ("balance" in proof.equal) == (name in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_model_that_trains_the_loss_of_its_routers_is_proved(name: str) -> None:
    config = CONFIGS[name]()
    config.output_router_logits = True
    proof = prove(config)
    assert proof.generates and "balance" in proof.equal, proof.faults


@pytest.mark.parametrize("wrong", ["raises", "differs"])
def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        return kernels.lora_linear(*args, **options) * 1.001

    monkeypatch.setattr(lora, "lora_linear", broken)
    proof = prove(CONFIGS["llama"]())
    assert proof.faults.keys() == {"kernels"} and not proof.trains


def test_a_type_that_trains_a_loss_of_its_routers_is_proved_too() -> None:
    config = CONFIGS["mixtral"]()
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    proof = prove(config)
    assert proof.generates and proof.equal["balance"] == len(proof.cuts), proof.faults


def test_every_place_is_a_low_and_a_high_bound() -> None:
    for blocks in (1, 2, 4, 7):
        cuts = cuts_of(blocks)
        assert {low for low, _ in cuts} == {*range(blocks)}
        assert {high for _, high in cuts} == {*range(1, blocks + 1)}


class _Between(LlamaModel):
    """A decoder whose code has `between`, a change of hidden states before each block and after the last."""

    def between(self, hidden: Tensor, number: int) -> Tensor:
        return hidden

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **options: Any):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        handles = []
        for number, block in enumerate(self.layers):
            change = self._changing(number)
            handles.append(block.register_forward_pre_hook(change, prepend=True))
        try:
            return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **options)
        finally:
            for handle in handles:
                handle.remove()

    def _changing(self, number: int) -> Any:
        return lambda _block, inputs: (self.between(inputs[0], number), *inputs[1:])


class _ScaledEmbedding(LlamaModel):
    """Multiplies the embedding before the first block."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **options: Any):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds * 3.0, **options)


class _NumberedBlocks(_Between):
    """Reads the number of a block."""

    def between(self, hidden: Tensor, number: int) -> Tensor:
        return hidden * (1.0 + number)


class _NormElsewhere(_Between):
    """Normalises in the middle."""

    def between(self, hidden: Tensor, number: int) -> Tensor:
        is_middle = number == len(self.layers) // 2
        return nn.functional.layer_norm(hidden, hidden.shape[-1:]) if is_middle else hidden


def config_of(decoder: type[LlamaModel]) -> LlamaConfig:
    """The configuration of a type of one's own, which transformers knows afterwards."""
    name = decoder.__name__.strip("_").lower()

    class OwnConfig(LlamaConfig):
        model_type = name

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.post_init()

    AutoConfig.register(name, OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    return OwnConfig()


class _Future(LlamaModel):
    """Attends to later tokens."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **options: Any):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        rows, length, _ = inputs_embeds.shape
        seen = torch.zeros(rows, 1, length, length)
        if attention_mask is not None:
            seen = seen.masked_fill(attention_mask[:, None, None, :length] == 0, torch.finfo(torch.float32).min)
        return super().forward(attention_mask=seen, inputs_embeds=inputs_embeds, **options)


class _SecondStream(_Between):
    """Passes a state from block to block beside the hidden states: the sum of what the blocks have computed."""

    def between(self, hidden: Tensor, number: int) -> Tensor:
        if number == 0:
            return hidden
        self.state = hidden if number == 1 else self.state + hidden
        return self.state


def test_a_type_that_attends_to_later_tokens_is_refused() -> None:
    proof = prove(config_of(_Future))
    assert proof.faults.keys() - {"cache"} == {"causality"} and not proof.trains
    assert "later tokens change logits of earlier tokens by up to" in proof.faults["causality"]


def test_a_type_that_passes_states_from_block_to_block_is_proved_with_all_blocks_in_the_trunk() -> None:
    proof = prove(config_of(_SecondStream))
    assert proof.trains and proof.cuts == ((0, 4),), proof
    assert proof.inner.startswith("logits: cut 0:1: differs from the uncut model by up to")
    assert "with all blocks in the trunk alone" in proof.summary
    require(proof, Config(cut="0:12"), blocks=12)
    with pytest.raises(SettingError, match=r"cut: 1:12 is not possible; allowed: 0:12, all blocks of type"):
        require(proof, Config(cut="1:12"), blocks=12)
    stages = TrunkSettings(stages="0:6:12")
    with pytest.raises(SettingError, match=r"trunk.stages: 0:6:12 is not possible; allowed: none, all blocks"):
        require(proof, Config(cut="0:12", trunk=stages), blocks=12)


def test_a_type_with_shared_keys_and_values_is_proved_where_the_cut_parts_none() -> None:
    kinds = [*["sliding_attention", "full_attention"] * 3, "full_attention"]
    shared = Gemma4UnifiedTextConfig(num_hidden_layers=7, layer_types=kinds, num_kv_shared_layers=3)
    proof = prove(shared)
    assert proof.generates and not proof.inner, proof.faults
    assert proof.cuts == ((0, 1), (1, 2), (2, 7), (0, 7))


def test_a_cut_that_parts_shared_keys_and_values_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the places that are left out of the proof are left out with reason."""
    monkeypatch.setattr(proof_module, "closed_places", lambda config: frozenset())
    kinds = ["sliding_attention", "full_attention"] * 2
    proof = prove(Gemma4UnifiedTextConfig(num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2))
    assert proof.inner, proof


def test_a_type_whose_norm_stands_before_and_after_the_blocks_is_proved() -> None:
    assert prove(CONFIG_MAPPING["nanochat"]()).generates


def test_a_type_that_multiplies_its_embedding_is_cut_exactly() -> None:
    assert prove(config_of(_ScaledEmbedding)).trains


@pytest.mark.parametrize("decoder", [_NumberedBlocks, _NormElsewhere])
def test_a_type_whose_decoder_computes_between_the_blocks_is_refused_where_the_cut_would_change_it(
    decoder: type[LlamaModel],
) -> None:
    proof = prove(config_of(decoder))
    assert "differs from the uncut model by up to" in proof.inner
    with pytest.raises(SettingError, match=r"cut: 1:3 is not possible; allowed: 0:4, .* differs from the uncut model"):
        require(proof, Config(cut="1:3"), blocks=4)


def test_a_type_that_differs_at_every_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Top, "predict", lambda self, hidden: self.lm_head(hidden) * 1.01)
    proof = prove(CONFIGS["llama"]())
    assert not proof.trains and not proof.inner
    with pytest.raises(SettingError, match=r"whose parts are not the model \(logits, cut \d:\d: differs .* --unproved"):
        require(proof, Config(), blocks=4)


def test_without_care_for_scaled_embeddings_such_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GraniteConfig(embedding_multiplier=12.0)
    assert prove(config).trains
    monkeypatch.setattr(parts, "enter", lambda *_: None)
    assert "logits" in prove(config).faults


@pytest.mark.parametrize("config", [CohereConfig(logit_scale=0.25), GraniteConfig(logits_scaling=8.0)])
def test_without_care_for_scaled_logits_such_types_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove(config).trains
    monkeypatch.setattr(Top, "predict", lambda self, hidden: self.lm_head(hidden))
    assert "logits" in prove(config).faults


def test_a_wrong_gradient_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: values are right, and the trunk learns nothing."""
    forward = parts.Trunk.forward

    def without_graph(self: parts.Trunk, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return forward(self, hidden, mask).detach() + hidden * 0

    monkeypatch.setattr(parts.Trunk, "forward", without_graph)
    proof = prove(CONFIGS["llama"]())
    assert "has no gradient" in proof.faults["gradients"] and "logits" not in proof.faults


def test_a_wrong_cache_does_not_keep_a_type_from_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartCache, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    proof = prove(CONFIGS["llama"]())
    assert proof.faults.keys() == {"cache"}
    assert proof.trains and not proof.generates
    require(proof, Config(), blocks=4)
    assert "without caches" in proof.summary


def test_a_proof_does_not_touch_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    prove(CONFIGS["llama"]())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_result_in_one_line() -> None:
    proof = Proof("granite", cuts_of(4), {"logits": 6, "cache": 6}, {}, 1.25)
    assert proof.summary == "granite: cut proved at 5 places (1.2 s)"


@pytest.mark.parametrize(("model_type", "settings"), [("jamba", {}), ("bamba", {"attn_layer_indices": [9, 18]})])
def test_kinds_of_blocks_by_their_numbers_are_proved(model_type: str, settings: dict[str, Any]) -> None:
    """A part counts its blocks from 0, and must know their kinds by the numbers in the unsplit model."""
    proof = prove(CONFIG_MAPPING[model_type](num_hidden_layers=24, **settings))
    assert proof.trains and not proof.inner, proof


def test_a_type_that_rescales_every_few_blocks_is_proved_in_one_piece_alone() -> None:
    assert prove(CONFIG_MAPPING["rwkv"](rescale_every=6)).inner
    assert not prove(CONFIG_MAPPING["rwkv"](rescale_every=0)).inner
