"""Base weights in 4 and 8 bits: the split is the quantised whole, and what comes out is an ordinary adapter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS, VOCABULARY, without_dropout
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedsplit.adaptation import folding, lora
from fedsplit.adaptation.injection import make_config
from fedsplit.commands import simulate
from fedsplit.errors import SettingError
from fedsplit.federation.strategy import check_strategy, load_strategy
from fedsplit.lowrank import LowRank
from fedsplit.model import quantization
from fedsplit.model.devices import TYPES
from fedsplit.model.quantization import check_quantization, dequantize, is_quantized, quantize
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit, quantize_unsplit
from fedsplit.results.finished import open_run
from fedsplit.results.measuring import evaluate, held_out_loss
from fedsplit.results.merging import merge
from fedsplit.results.whole import open_held
from fedsplit.scores import pooled
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings

KINDS = ("bottom", "trunk", "top")
SETTINGS = LoraSettings(rank=(3,), alpha=5.0, dropout=0.0)

needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional extra, is not installed"
)

NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
"""The sixteen values of the type, from the paper's appendix (2305.14314)."""


@pytest.mark.parametrize(
    ("text", "bits"),
    [("", {}), ("trunk:4", {"trunk": 4}), ("top:8,bottom:4", {"bottom": 4, "top": 8})],
)
def test_bits_are_read_by_part(text: str, bits: dict[str, int]) -> None:
    assert build({"quantization": text}).bits == bits


@pytest.mark.parametrize("text", ["trunk", "trunk:2", "head:4", "trunk:4,trunk:8", "trunk:4,", "trunk:04", "4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="PART:BITS"):
        build({"quantization": text})


def test_without_the_library_the_run_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["--quantization", "trunk:4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fedsplit: quantization: trunk:4 is not possible; allowed: none without bitsandbytes, which")
    assert said.endswith("pip install 'fedsplit[quantized]'\n") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_device_without_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(bits: int, dtype: torch.dtype, device: torch.device) -> None:
        if bits == 8:
            raise NotImplementedError("there is no kernel for int8\nand more")

    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quantization, "_try", without)
    check_quantization(build({"quantization": "trunk:4"}))
    with pytest.raises(SettingError) as caught:
        check_quantization(build({"quantization": "trunk:4,top:8"}))
    assert str(caught.value).startswith("quantization: top:8 is not possible")
    assert str(caught.value).endswith("(cpu: there is no kernel for int8)")


@pytest.mark.parametrize(
    ("strategy", "values", "refused"),
    [
        ("flora", {"quantization": "bottom:4"}, "none of bottom under the strategy flora"),
        ("fedex", {"quantization": "trunk:4,top:8", "trunk.schedule": "copies"}, "none of trunk, top under"),
        ("flora", {"quantization": "trunk:4"}, ""),
        ("flora", {"quantization": "top:4", "share": "bottom,trunk"}, ""),
        ("fedavg", {"quantization": "bottom:4,trunk:4,top:4"}, ""),
    ],
)
def test_nothing_is_folded_into_quantised_weights(strategy: str, values: dict[str, object], refused: str) -> None:
    """Under a schedule with one trunk for all, no strategy sees the trunk's adapter."""
    config, rule = build({"strategy": strategy, **values}), load_strategy(strategy, {}, {"seed": 0, "clients": 8})
    if refused:
        with pytest.raises(SettingError, match=refused):
            check_strategy(rule, config)
    else:
        check_strategy(rule, config)


@needed
def test_four_bits_are_the_papers() -> None:
    """Every weight becomes the nearest value of the type, times its block's largest, which is rounded itself."""
    layer = nn.Linear(128, 6, bias=False).requires_grad_(False)
    found = dequantize(quantize(layer, 4, torch.float32)).flatten()
    blocks = layer.weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = table[(blocks / largest)[..., None].sub(table).abs().argmin(-1)] * largest
    assert torch.allclose(found, nearest.flatten(), atol=0.02 * float(largest.max()))
    assert (found - nearest.flatten()).norm() < 0.01 * nearest.norm()


@needed
def test_eight_bits_are_rows_of_whole_numbers() -> None:
    layer = nn.Linear(40, 6, bias=False).requires_grad_(False)
    found = dequantize(quantize(layer, 8, torch.float32))
    largest = layer.weight.abs().amax(1, keepdim=True)
    expected = (layer.weight / largest * 127).round() * largest / 127
    # What lies between two whole numbers may go either way, and the library halves the precision of the largest value.
    assert torch.allclose(found, expected, atol=1.1 * float(largest.max()) / 127)
    assert (found - expected).norm() < 0.003 * expected.norm()


def load(path: Path, bits: dict[str, int], dtype: str = "fp32", kernels: str = "library"):
    parts = load_parts(path, (1, 2), KINDS, TYPES[dtype], kernels, bits=bits)
    for part in parts:
        lora.add(part, SETTINGS, 0)
        without_dropout(part)
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return parts


def batch() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(3))


@needed
def test_only_projections_in_blocks_of_that_part_are_quantised(model_path: Path) -> None:
    parts, plain = load(model_path, {"bottom": 4, "top": 8}), load(model_path, {})
    for part, before in zip(parts, plain, strict=True):
        found = {name for name, module in part.named_modules() if is_quantized(module)}
        targets = {name for name, _ in before.named_modules() if name.endswith("base_layer")}
        assert found == (targets if part.kind != "trunk" else set())
        assert lora.count(part) == lora.count(before)
        assert lora.read(part).layers == lora.read(before).layers
    assert sum(p.nbytes for p in parts[0].parameters()) < sum(p.nbytes for p in plain[0].parameters())


@needed
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_split_is_the_quantised_whole_to_the_bit(model_path: Path, dtype: str) -> None:
    """Loss and gradients against PEFT on the unsplit model with the same layers of bitsandbytes."""
    bits, ids = {"bottom": 8, "trunk": 4, "top": 4}, batch()
    parts = load(model_path, bits, dtype)
    whole = quantize_unsplit(load_unsplit(model_path, TYPES[dtype]), (1, 2), bits)
    whole = get_peft_model(whole, make_config(SETTINGS, parts[0].family)).eval()
    given = lora.read(*parts).tensors
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
    assert trained.keys() == given.keys()
    for name, parameter in trained.items():
        parameter.data = given[name].clone()
    with torch.autocast("cpu", TYPES[dtype], enabled=dtype != "fp32"):
        reference = whole(input_ids=ids, labels=ids).loss
    reference.backward()
    bottom, trunk, top = parts
    loss = top(trunk(bottom(ids)), ids)
    loss.backward()
    assert torch.equal(loss, reference)
    for part in parts:
        for name, parameter in lora.parameters(part).items():
            assert torch.equal(parameter.grad, trained[name].grad), name


@needed
@pytest.mark.parametrize(("bits", "distance"), [(4, 0.7), (8, 0.05)])
def test_how_far_logits_are_from_those_of_the_exact_weights(model_path: Path, bits: int, distance: float) -> None:
    """Of a random model; against the weights as they were, and the decoded ones, whose products 4 bits make exactly."""
    quantised, ids = dict.fromkeys(KINDS, bits), batch()
    whole = load_unsplit(model_path).eval()
    exact = whole(input_ids=ids).logits
    decoded = quantize_unsplit(load_unsplit(model_path).eval(), (1, 2), quantised, dense=True)(input_ids=ids).logits
    found = quantize_unsplit(whole, (1, 2), quantised)(input_ids=ids).logits
    assert 0 < (found - exact).norm() < distance * exact.norm()
    assert (found - decoded).norm() < (1e-5 if bits == 4 else distance) * exact.norm()


@needed
def test_a_change_is_not_folded_into_quantised_weights(tiny_models: dict[str, Path]) -> None:
    (trunk,) = load_parts(tiny_models["llama"], (1, 2), ["trunk"], bits={"trunk": 4})
    lora.add(trunk, SETTINGS, 0)
    layer = "model.layers.1.self_attn.q_proj"
    with pytest.raises(ValueError, match=f"nothing can be folded into {layer}"):
        folding.fold(trunk, {layer: LowRank(torch.ones(32, 1), torch.ones(1, 32))})


@needed
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_quantised_run_is_measured_and_merged(model: str, finished_run: Callable[..., Path], tmp_path: Path) -> None:
    path = finished_run(model, quantization="trunk:4,top:4", rounds=3)
    run = open_run(path)
    losses = run.summary["eval_loss"]
    assert losses["after"] < losses["before"] - 0.1
    found = pooled(result.tuned for result in evaluate(run))
    assert found.loss == pytest.approx(losses["after"], abs=1e-4)
    ordinary = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(path / "adapter"))
    assert held_out_loss(ordinary, path) == pytest.approx(losses["after"], rel=0.1)
    merge(run.adapter(), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert held_out_loss(merged, path) == pytest.approx(losses["after"], abs=1e-4)


@needed
def test_what_is_quantised_in_a_run_fits_no_shorter_model(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    adapter = open_run(finished_run("llama", quantization="trunk:4,top:4", rounds=3)).adapter()
    with pytest.raises(SettingError, match=f"can be cut as that of .* was, 1:{BLOCKS + 1}"):
        open_held(replace(adapter, cut=f"1:{BLOCKS + 1}"))


MEASURE = """
import gc, json, sys
import torch
from fedsplit.trunk.memory import resident_memory, return_free_pages
from fedsplit.model.devices import TYPES
from fedsplit.model.split import load_parts
from pathlib import Path
import bitsandbytes
found = {}
KINDS = ("warm", "fp32", 4), ("4", "bf16", 4), ("8", "bf16", 8), ("16", "bf16", 0), ("32", "fp32", 0)
for name, dtype, number in KINDS:
    gc.collect(); return_free_pages()
    before = resident_memory()
    bits = {"trunk": number} if number else {}
    (part,) = load_parts(Path(sys.argv[1]), (1, 5), ["trunk"], TYPES[dtype], "fused", bits=bits)
    for tensor in part.parameters():
        if not bits:
            tensor.data = tensor.data.clone()  # may be mapped from the file
    gc.collect(); return_free_pages()
    found[name] = resident_memory() - before
    del part, tensor
print(json.dumps(found))
"""


@needed
@pytest.mark.slow
def test_resident_memory_of_a_part(tmp_path: Path) -> None:
    """Of a trunk of 12.8 million weights: about 4.1, 8, 16 and 32 bits a weight."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, weights = json.loads(done.stdout), 4 * (4 * 512**2 + 3 * 512 * 1408)
    for name, bits in (("4", 4.13), ("8", 8), ("16", 16), ("32", 32)):
        assert 8 * found[name] / weights == pytest.approx(bits, rel=0.15, abs=0.8), found
