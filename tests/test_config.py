"""Settings: one list, three sources, clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedsplit.config import Config, SettingError, as_document, build, from_document
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import make_codec


def test_the_folder_of_a_run_is_not_part_of_its_document() -> None:
    config = dataclasses.replace(Config(), out="here")
    assert from_document(as_document(config)) == Config()


def test_the_lists_of_names_are_those_of_the_code() -> None:
    from fedsplit.config import CODECS
    from fedsplit.config import SCHEDULES as NAMES

    assert tuple(SCHEDULES) == NAMES
    assert [make_codec(name).name for name in CODECS] == list(CODECS)


@pytest.mark.parametrize(
    ("text", "size"), [("800MB", 800 * 10**6), ("1.5GB", 1.5e9), ("2GiB", 2 * 2**30), ("3 kB", 3000), ("", None)]
)
def test_memory_is_read_with_its_unit(text: str, size: float | None) -> None:
    assert build({"trunk.memory": text}).trunk.memory_bytes == size


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
