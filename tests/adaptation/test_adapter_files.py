"""Files of adapters, as PEFT opens and as fedsplit reads them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from conftest import BLOCKS
from peft import PeftModel

from fedsplit.adaptation import adapter_files, lora
from fedsplit.model.parts import ranges
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.sections import LoraSettings

SETTINGS = LoraSettings(rank=(3,), alpha=6.0, dropout=0.0)


KINDS = ("bottom", "trunk", "top")


def adapted(path: Path, cut: tuple[int, int], settings: LoraSettings = SETTINGS, seed: int = 0):
    parts = load_parts(path, cut, KINDS)
    for part in parts:
        lora.add(part, settings, seed)
    return parts


def test_peft_opens_what_is_saved_whole_and_by_part(tmp_path: Path, any_model_path: Path) -> None:
    parts = adapted(any_model_path, (1, 2))
    for part in parts:
        lora.write({n: torch.randn_like(p) for n, p in lora.parameters(part).items()}, part)
    ids = torch.arange(1, 9)[None]
    bottom, trunk, top = parts
    expected = top.logits(trunk(bottom(ids)))
    family = bottom.family
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter_files.save(tmp_path / "adapter", lora.read(*parts), SETTINGS, family, "base")
        whole = PeftModel.from_pretrained(load_unsplit(any_model_path), str(tmp_path / "adapter"))
        assert torch.equal(whole(input_ids=ids).logits, expected)
        for part in parts:
            blocks = ranges(BLOCKS, (1, 2))[part.kind]
            adapter_files.save(tmp_path / part.kind, lora.read(part), SETTINGS, family, "base", blocks)
            opened = PeftModel.from_pretrained(load_unsplit(any_model_path), str(tmp_path / part.kind))
            written = {n: p for n, p in opened.named_parameters() if "lora_" in n}
            assert len(written) == len(lora.parameters(part))
            for name, parameter in lora.parameters(part).items():
                found = written[f"base_model.model.{name}".replace(".weight", ".default.weight")]
                assert torch.equal(found, parameter)
