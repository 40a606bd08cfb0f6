"""An adapter that is not whole, not finite or not the model's is refused by name before anything is done with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft_adapters
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit.adaptation import adapter_files
from fedsplit.errors import InputError
from fedsplit.results.finished import Adapter, find_adapter
from fedsplit.results.fitting import classes_in, more_than_factors, read_adapter, read_fitting
from fedsplit.trunk.memory import resident_memory

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture
def adapter(tiny_models: dict[str, Path], tmp_path: Path) -> Adapter:
    """One that PEFT made: LoRA on projections of a llama, with a norm that trained whole."""
    return find_adapter(peft_adapters.make("llama", "whole norm", tiny_models["llama"], tmp_path / "adapter"))


def rewrite(adapter: Adapter, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(adapter.folder / FILE)
    change(tensors)
    save_file(tensors, adapter.folder / FILE)


def test_a_whole_one_is_read_as_it_is(adapter: Adapter) -> None:
    read = read_fitting(adapter)
    filed = load_file(adapter.folder / FILE)
    assert {PREFIX + name: tensor.shape for name, tensor in read.tensors.items()} == {
        name: tensor.shape for name, tensor in filed.items()
    }
    assert read.layers == {} and classes_in(read) == 0
    assert more_than_factors(adapter) == "it has model.layers.0.input_layernorm.weight"


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a layer is gone": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.down_proj" in name],
        r"is not whole: it lacks model\.layers\.1\.mlp\.down_proj\.lora_A\S* and 1 more, which its adapter_config",
    ),
    "a factor is gone": (
        lambda t: t.pop(f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"),
        r"is not whole: it lacks model\.layers\.0\.self_attn\.q_proj\.lora_B",
    ),
    "what trained whole is gone": (lambda t: t.pop(f"{PREFIX}model.norm.weight"), r"it lacks model\.norm\.weight"),
    "a layer more": (
        lambda t: t.update({f"{PREFIX}model.layers.7.mlp.down_proj.lora_A.weight": torch.zeros(4, 64)}),
        r"does not fit the model: it has model\.layers\.7\.mlp\.down_proj\.lora_A\.weight, for which there is no place",
    ),
    "a module that the model has not": (
        lambda t: t.update({f"{PREFIX}model.extra.weight": torch.zeros(2)}),
        r"it has model\.extra\.weight, for which there is no place",
    ),
    "names without PEFT's beginning": (
        lambda t: [t.update({name.removeprefix(PREFIX): t.pop(name)}) for name in list(t) if "norm" not in name],
        r"for which there is no place",
    ),
    "another rank": (
        lambda t: t.update({f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(3, 32)}),
        r"q_proj\.lora_A\.weight is \(3, 32\), its place \(4, 32\)",
    ),
    "a vector for a matrix": (
        lambda t: t.update({f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(32)}),
        r"q_proj\.lora_B\.weight is \(32,\), its place \(32, 4\)",
    ),
    "NaN": (
        lambda t: t[f"{PREFIX}model.norm.weight"].fill_(torch.nan),
        r"holds NaN or infinite values in model\.norm\.weight",
    ),
    "one infinite value": (
        lambda t: t[f"{PREFIX}model.layers.2.mlp.down_proj.lora_B.weight"][3].fill_(torch.inf),
        r"holds NaN or infinite values in model\.layers\.2\.mlp\.down_proj\.lora_B\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_is_named(damage: str, adapter: Adapter) -> None:
    change, words = DAMAGE[damage]
    rewrite(adapter, change)
    with pytest.raises(InputError, match=words) as caught:
        read_fitting(adapter)
    assert str(adapter.folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (FILE, b"torn", r"cannot be read \("),
        (FILE, (1 << 40).to_bytes(8, "little") + b"{}", r"cannot be read \("),
        ("adapter_config.json", b'{"peft_type": "LORA", "r"', r"cannot be read \("),
        ("adapter_config.json", b'{"peft_type": "NONE"}', r"cannot be read \("),
        ("adapter_config.json", b"[]", r"cannot be read \("),
    ],
)
def test_a_damaged_file_is_one_line(adapter: Adapter, name: str, content: bytes, words: str) -> None:
    (adapter.folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_one_line(adapter: Adapter) -> None:
    whole = (adapter.folder / FILE).read_bytes()
    (adapter.folder / FILE).write_bytes(whole[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        read_fitting(adapter)


def test_another_models_is_refused(tiny_models: dict[str, Path], adapter: Adapter) -> None:
    with pytest.raises(InputError, match=r"does not fit the model \(.*not found in the base model"):
        read_fitting(replace(adapter, model=str(tiny_models["gpt2"])))
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    (adapter.folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    with pytest.raises(InputError, match=r"made for the task TOKEN_CLS; allowed: CAUSAL_LM and SEQ_CLS"):
        read_fitting(adapter)


def test_layers_are_transposed_as_the_model_has_them(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT writes what it found at the last layer: of a GPT-2 with an adapted head, the head's."""
    folder = peft_adapters.make("gpt2", "on the head", tiny_models["gpt2"], tmp_path / "adapter", ends=False)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    layers = read_fitting(find_adapter(folder)).layers
    assert {name for name, layer in layers.items() if not layer.transposed} == {"lm_head"}


@pytest.mark.parametrize("kind", ["oft", "boft", "shira", "vera", "delora", "adalora"])
def test_other_kinds_of_adapter_are_checked_too(kind: str, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """Two of them look at the values of weights as they start."""
    options = {"oft": '{"oft_block_size": 8}', "boft": '{"boft_block_size": 4}'}.get(kind, "")
    plain = {"lora__rank": 8, "lora__alpha": 16.0, "lora__dropout": 0.1}  # the defaults, for kinds that have no such
    run = finished_run("llama", lora__method=kind, lora__options=options, **plain)
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    adapter = replace(find_adapter(run), folder=folder)
    assert read_fitting(adapter).layers == {}
    name = sorted(load_file(folder / FILE))[0]
    rewrite(adapter, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match="is not whole: it lacks"):
        read_fitting(adapter)


def test_experts_have_ranks_and_alphas_of_their_own(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT looks both up under the name of the parameter."""
    from peft import LoraConfig, get_peft_model

    from fedsplit.model.unsplit import load_unsplit

    where = "mlp.experts.gate_up_proj"
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={where: 2},
        alpha_pattern={where: 12},
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(load_unsplit(tiny_models["mixtral"]), config)
    tuned.save_pretrained(tmp_path)
    read = adapter_files.load(tmp_path)
    found = {read.weight_name(name): (read.rank(name), read.layers[name].alpha) for name in read.stacked}
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == (2, 12.0)
    assert found["model.layers.0.mlp.experts.down_proj"] == (4, 6.0)
    for name, module in tuned.named_modules():
        if (stacked := name.removeprefix(PREFIX)) in read.stacked:
            assert module.scaling["default"] == read.layers[stacked].scaling(read.rank(stacked))


def mutated(draw: st.DrawFn, content: bytes, near: int) -> bytes:
    """Changes, leaves out, doubles or adds some bytes, most of them near the beginning."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(near, len(changed))) | st.integers(0, len(changed)))
        end = min(len(changed), place + draw(st.integers(0, 12)))
        changed[place:end] = draw(st.sampled_from([b"", bytes(changed[place:end]) * 2]) | st.binary(max_size=12))
    return bytes(changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("peft_type", "task_type", "r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "x"),
        *("alpha_pattern", "layers_to_transform", "use_dora", "bias", "base_model_name_or_path", "fan_in_fan_out"),
    ]
)


def read_or_refused(adapter: Adapter) -> None:
    """Reads an adapter, or has it refused in one line by an error of ours."""
    try:
        read = read_fitting(adapter)
    except InputError as refused:
        assert "\n" not in str(refused) and len(str(refused)) < 1500
    else:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in read.tensors.values())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_bytes_an_adapter_has_it_is_read_or_refused(adapter: Adapter, data: st.DataObject) -> None:
    whole = {name: (adapter.folder / name).read_bytes() for name in (FILE, "adapter_config.json")}
    name = data.draw(st.sampled_from(sorted(whole)))
    try:
        (adapter.folder / name).write_bytes(data.draw(st.composite(mutated)(whole[name], 3000)))
        read_or_refused(adapter)
    finally:
        (adapter.folder / name).write_bytes(whole[name])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=FIELDS, value=JSON)
def test_whatever_an_adapters_configuration_says_it_is_read_or_refused(
    adapter: Adapter, field: str, value: object
) -> None:
    file = adapter.folder / "adapter_config.json"
    whole = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(whole), field: value}))
        read_or_refused(adapter)
    finally:
        file.write_text(whole)


CLAIMS: dict[str, bytes] = {
    "a header of all memory": (2**60).to_bytes(8, "little") + b"{}",
    "a header beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "nothing": b"",
    "a tensor beyond the file": b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
    "a shape that overflows": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "a negative shape": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "deep": b"[" * 10**5,
}


@pytest.mark.parametrize("kind", CLAIMS)
def test_what_an_adapters_file_claims_takes_no_memory(kind: str, adapter: Adapter) -> None:
    content = CLAIMS[kind]
    if content[:1] in (b"{", b"["):
        content = len(content).to_bytes(8, "little") + content
    (adapter.folder / FILE).write_bytes(content)
    before = resident_memory()
    with pytest.raises(InputError) as refused:
        read_fitting(adapter)
    assert "\n" not in str(refused.value)
    assert resident_memory() - before < 2**28
