"""A configuration to plain values and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedsplit.errors import SettingError
from fedsplit.settings.choices import PROMPTED
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build, from_document


def test_the_folder_of_a_run_is_not_part_of_its_document() -> None:
    config = dataclasses.replace(Config(), out="here")
    assert from_document(as_document(config)) == Config()


def test_fields_are_read_from_text_or_file_and_kept_as_text(tmp_path: Path) -> None:
    """So that config.toml, and a resume, do not depend on the file."""
    (tmp_path / "fields.json").write_text('{\n "b": [1],\n "a": true}')
    for given in (str(tmp_path / "fields.json"), '{"b": [1], "a": true}', {"a": True, "b": [1]}):
        config = build({"lora.options": given})
        assert config.lora.options == '{"a": true, "b": [1]}'
        assert from_document(as_document(config)) == config
    assert build({"lora.options": "{}"}).lora.options == build({}).lora.options == ""


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_kind_of_prompt_may_be_asked_for_as_a_kind_of_adapter(kind: str) -> None:
    """What is kept is `prompt.kind` alone, so that the run can be done again and gone on with."""
    config = build({"lora.method": kind, "prompt.tokens": 5})
    assert config == build({"prompt.kind": kind, "prompt.tokens": 5})
    assert (config.lora, config.prompt.kind) == (Config().lora, kind)
    assert from_document(as_document(config)) == config


@pytest.mark.parametrize("kind", PROMPTED)
def test_both_at_once_may_say_the_same(kind: str) -> None:
    """LoRA by its name is the default, and means beside a kind of prompt what it means without."""
    for method in (kind, "lora"):
        assert build({"lora.method": method, "prompt.kind": kind}) == build({"prompt.kind": kind})


@pytest.mark.parametrize(("method", "kind"), [("prompt", "prefix"), ("prefix", "ptuning"), ("ptuning", "prompt")])
def test_two_kinds_of_prompts_are_one_too_many(method: str, kind: str) -> None:
    with pytest.raises(SettingError, match=f"^prompt.kind: {kind} is not .*; allowed: {method} with --peft {method}$"):
        build({"prompt.kind": kind, "lora.method": method})


@pytest.mark.parametrize("given", ["nowhere.json", "{", "[1]", '{"a": NaN}', "3", 3])
def test_what_is_no_object_of_fields_is_refused(given: object) -> None:
    with pytest.raises(SettingError, match=r"^lora.options: .* allowed: a JSON object of fields, or a .json file"):
        build({"lora.options": given})
