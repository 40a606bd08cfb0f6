"""The texts to write: prompts from flags and files, as tokens."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from family_tokenizers import write_tokenizer

from fedsplit.commands import generate, generation_job
from fedsplit.errors import SettingError
from fedsplit.model.vocabulary import load_tokenizer


def test_a_model_that_was_moved_is_read_where_it_lies_now(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_models["gpt2"], tmp_path / "before")
    run = finished_run(str(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "now")
    flags = ["--run", str(run), "--model", str(tmp_path / "now"), "--prompt", "ab"]
    job = generation_job.check(generate.make_parser().read(flags).checked())
    assert job.config.model == job.adapter.model == str(tmp_path / "now")


def test_a_file_of_prompts_has_one_a_line(tmp_path: Path) -> None:
    """A byte order mark is none of the first prompt, and only a line break ends one."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028still one\r\n\r\ntwo\x0c\n".encode())
    asked = argparse.Namespace(prompt=[], prompts=str(tmp_path / "prompts.txt"))
    assert generation_job.read_prompts(asked) == ["one\u2028still one", "two\x0c"]


def test_a_prompt_goes_on_and_has_whole_characters(tmp_path: Path) -> None:
    """A tokenizer may end every text, and a prompt is not over."""
    end = write_tokenizer(tmp_path, "mixtral")
    library = load_tokenizer(tmp_path)
    assert [*generation_job.tokenise(library, ["hello"], False, "")[0], end] == library("hello")["input_ids"]
    with pytest.raises(SettingError, match=r"^prompt: number 2 .* is not possible; allowed: a text in UTF-8$"):
        generation_job.tokenise(library, ["hello", "\udcff"], False, "")
