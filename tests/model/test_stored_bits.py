"""Checkpoints whose weights bitsandbytes has quantised, as transformers saves them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.errors import SettingError
from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.facts import read_facts
from fedsplit.model.miniature import miniature
from fedsplit.model.quantization import is_quantized
from fedsplit.model.split import load_parts
from fedsplit.model.stored_bits import STATE, bits_in, packed_weight
from fedsplit.model.unsplit import load_unsplit, quantize_unsplit
from fedsplit.results.whole import open_base
from fedsplit.settings.sections import LoraSettings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional extra, is not installed"
)

KINDS = ("bottom", "trunk", "top")
SETTINGS = LoraSettings(rank=(4,), alpha=8.0, dropout=0.0)
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    **ENDS,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=97, n_positions=32, **NO_DROPOUT, **ENDS),
}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)


def saved(folder: Path, config: PretrainedConfig, how: BitsAndBytesConfig) -> Path:
    """A checkpoint as transformers saves it."""
    torch.manual_seed(0)
    plain, quantised = folder / "plain", folder / "quantised"
    AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how).save_pretrained(quantised)
    return quantised


@pytest.mark.parametrize(
    ("model", "how", "bits"), [("llama", NF4, 4), ("gpt2", FP4, 4), ("llama", INT8, 8), ("gpt2", INT8, 8)]
)
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    tmp_path: Path, model: str, how: BitsAndBytesConfig, bits: int
) -> None:
    """To the bit. In 8 bits transformers' model is in training mode: in evaluation it would round its inputs, too."""
    folder = saved(tmp_path, MODELS[model](), how)
    check_checkpoint(folder)
    assert read_facts(folder).bits == bits
    parts = load_parts(folder, (1, 2), KINDS)
    assert sum(map(is_quantized, parts[1].modules())) == (7 if model == "llama" else 4)
    adapters: dict[str, torch.nn.Parameter] = {}
    for part in parts:
        lora.add(part, SETTINGS, seed=0)
        adapters |= lora.parameters(part)
    config = make_config(SETTINGS, parts[0].family)
    wholes = (AutoModelForCausalLM.from_pretrained(folder).train(), load_unsplit(folder).eval())
    for whole in (get_peft_model(whole, config) for whole in wholes):
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.data = torch.randn(parameter.shape) * 0.1
                adapters[short].data.copy_(parameter.data)
                adapters[short].grad = None
        ids = torch.randint(3, 97, (2, 8))
        bottom, trunk, top = parts
        loss = top(trunk(bottom(ids)), ids)
        loss.backward()
        expected = whole(input_ids=ids, labels=ids).loss
        expected.backward()
        assert torch.equal(loss, expected)
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                assert torch.equal(adapters[short].grad, parameter.grad), name  # type: ignore[arg-type]


def test_a_part_needs_its_own_tensors_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, MODELS["llama"](), NF4)
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".layers.1." in name}
    save_file(tensors, file, metadata={"format": "pt"})
    (trunk,) = load_parts(folder, (1, 2), ["trunk"])
    assert trunk(torch.ones(1, 3, 64)).shape == (1, 3, 64)


def test_projections_that_are_not_quantised_stay_so_in_a_text_model_inside_a_model_of_images(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    skipped = ["lm_head", "vision_tower", "multi_modal_projector", "language_model.layers.1.mlp.down_proj"]
    how = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "plain", quantization_config=how)
    whole.save_pretrained(tmp_path / "quantised")

    bottom, trunk, top = load_parts(tmp_path / "quantised", (1, 2), KINDS)
    assert not is_quantized(trunk.get_submodule("model.layers.0.mlp.down_proj"))
    assert is_quantized(trunk.get_submodule("model.layers.0.mlp.up_proj"))
    ids = torch.tensor([[8, 9, 10]])
    with torch.no_grad():
        logits = top.logits(trunk(bottom(ids)))
        assert torch.equal(logits, load_unsplit(tmp_path / "quantised")(ids).logits)


@pytest.mark.parametrize(("model", "how"), [("gpt2", FP4), ("llama", INT8)])
def test_the_decoded_model_is_the_quantised_one(tmp_path: Path, model: str, how: BitsAndBytesConfig) -> None:
    folder = saved(tmp_path, MODELS[model](), how)
    dense = open_base(folder, "fp32", dense=True)
    assert not hasattr(dense.config, "quantization_config")
    ids = torch.randint(3, 97, (2, 8))
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, load_unsplit(folder)(ids).logits, atol=1e-5)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}


def packed(**changes: object) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight (4, 64) in 4 bits, with changed settings."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64]} | changes
    statistics = {
        "absmax": torch.ones(4),
        "quant_map": torch.zeros(16),
        f"{STATE}nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
    }
    return torch.zeros(128, 1, dtype=torch.uint8), statistics


def test_what_does_not_belong_together_is_refused() -> None:
    """The library's kernels would read beyond the tensors."""
    assert packed_weight(*packed()).shape == (4, 64)
    data, statistics = packed()
    wrong = [
        (data[:64], statistics),
        (data, statistics | {"absmax": torch.ones(3)}),
        (data, statistics | {"absmax": torch.ones(4, dtype=torch.uint8)}),
        (data, statistics | {"quant_map": torch.zeros(15)}),
        (data, statistics | {"absmax": torch.tensor([1.0, 1.0, 1.0, torch.inf])}),
        (data, {"absmax": statistics["absmax"]}),
        (data, statistics | {"nested_absmax": torch.ones(1)}),
        packed(shape=[4, 128]),
        packed(shape=[4]),
        packed(shape=[-4, -64]),
        packed(blocksize=1),
        packed(dtype="__doc__"),
        packed(quant_type="fp4"),
        (torch.zeros(3, 4, dtype=torch.int8), {"SCB": torch.ones(2)}),
        (torch.zeros(3, 4), {"SCB": torch.ones(3)}),
        (torch.zeros(3, 4, dtype=torch.int8), {"SCB": torch.ones(3), "weight_format": torch.tensor(2)}),
    ]
    for weight, beside in wrong:
        with pytest.raises(ValueError, match="it"):
            packed_weight(weight, beside)


def test_a_damaged_checkpoint_is_refused_before_the_run(tmp_path: Path) -> None:
    folder = saved(tmp_path, MODELS["llama"](), NF4)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight.absmax"
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"up_proj.weight in model.safetensors: its absmax does not belong"):
        check_checkpoint(folder)
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(SettingError, match="it lacks statistics"):
        check_checkpoint(folder)


def test_8_bits_that_are_kept_as_floats_are_no_bits() -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert bits_in(settings) == 8
    assert bits_in(settings | {"llm_int8_has_fp16_weight": True}) == 0


def test_a_projection_whose_weight_is_read_by_other_code_is_refused(tmp_path: Path) -> None:
    """A state-space block multiplies with the weight itself, which is bytes now."""
    folder = saved(tmp_path, miniature(MambaConfig()), NF4)
    with pytest.raises(SettingError, match=r"dt_proj.weight is quantised, and is no projection of a block that comp"):
        check_checkpoint(folder)


def test_what_config_json_says_about_bits_must_be_true(tmp_path: Path) -> None:
    folder = saved(tmp_path, MODELS["llama"](), NF4)
    document = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": settings}))
    with pytest.raises(SettingError, match=r"q_proj.weight is in 4 bits, and config.json says 8"):
        check_checkpoint(folder)
    (tmp_path / "plain" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(SettingError, match=r"config\.json says that its weights are in 8 bits, and none is"):
        check_checkpoint(tmp_path / "plain")


def test_weights_beside_the_quantised_ones_are_in_the_type_of_the_run(tmp_path: Path) -> None:
    """transformers leaves them in the type of the files."""
    torch.manual_seed(0)
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_config(MODELS["llama"](), dtype=torch.bfloat16).save_pretrained(plain)
    quantised = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=NF4)
    quantised.save_pretrained(tmp_path / "quantised")
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_unsplit(tmp_path / "quantised", dtype)
        bottom, trunk, top = load_parts(tmp_path / "quantised", (1, 2), KINDS, dtype)
        assert {parameter.dtype for parameter in whole.parameters()} == {dtype, torch.uint8}
        ids = torch.tensor([[8, 9, 10]])
        with torch.no_grad():
            assert torch.equal(top.logits(trunk(bottom(ids))), whole(ids).logits)


def test_such_a_projection_stays_as_it_is_under_the_setting(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(miniature(MambaConfig())).save_pretrained(tmp_path)
    bits = dict.fromkeys(KINDS, 4)
    bottom, trunk, top = load_parts(tmp_path, (1, 2), KINDS, bits=bits)
    assert not is_quantized(trunk.get_submodule("backbone.layers.0.mixer.dt_proj"))
    assert is_quantized(trunk.get_submodule("backbone.layers.0.mixer.in_proj"))
    whole = quantize_unsplit(load_unsplit(tmp_path), (1, 2), bits)
    ids = torch.tensor([[8, 9, 10]])
    with torch.no_grad():
        logits = top.logits(trunk(bottom(ids)))
        assert torch.allclose(logits, whole(ids, use_cache=False).logits, atol=1e-6)
