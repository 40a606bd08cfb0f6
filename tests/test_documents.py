"""A configuration to plain values and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.documents import as_document, build, from_document


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


@pytest.mark.parametrize("given", ["nowhere.json", "{", "[1]", '{"a": NaN}', "3", 3])
def test_what_is_no_object_of_fields_is_refused(given: object) -> None:
    with pytest.raises(SettingError, match=r"^lora.options: .* allowed: a JSON object of fields, or a .json file"):
        build({"lora.options": given})
