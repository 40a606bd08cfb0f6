"""Settings: one list, three sources, clear refusals."""

from __future__ import annotations

import dataclasses

import pytest

from fedsplit.config import Config, as_document, build, from_document
from fedsplit.schedules import SCHEDULES
from fedsplit.wire import make_codec


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
