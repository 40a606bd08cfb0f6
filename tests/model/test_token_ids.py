"""Which tokens end a text, and ids that the embedding has no row for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import VOCABULARY, with_added_token, write_image_model

from fedsplit.errors import SettingError
from fedsplit.model.facts import read_facts, read_pad
from fedsplit.model.token_ids import check_largest, embedding_rows, end_token, end_tokens
from fedsplit.model.unsplit import load_unsplit

SILENT = object()
"""Stands for a file, or a word in it, that is not there."""


def write_says(model: Path, folder: Path, generation: object, config: object, tokenizer: object = SILENT) -> Path:
    """Copies a model whose files name these end tokens.

    Args:
        model: The model.
        folder: Where to.
        generation: What generation_config.json says; there is no such file where silent.
        config: What config.json says.
        tokenizer: The end token of the tokenizer, as text.
    """
    shutil.copytree(model, folder)
    (folder / "generation_config.json").unlink()
    if generation is not SILENT:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    document = json.loads((folder / "config.json").read_text())
    del document["eos_token_id"]
    said = {} if config is SILENT else {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(document | said))
    if tokenizer is not SILENT:
        words = {"tokenizer_class": "TokenizersBackend", "eos_token": tokenizer}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (SILENT, 3, [3]),
        (SILENT, [3, 4], [3, 4]),
        (5, 3, [5]),
        ([5, 6], 3, [5, 6]),
        ([5, 6], None, [5, 6]),
        (0, None, [0]),
        ([6, 5], SILENT, [6, 5]),
    ],
)
def test_end_tokens_are_those_at_which_the_library_stops(
    generation: object, config: object, expected: list[int], tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = write_says(tiny_models["llama"], tmp_path / "model", generation, config, tokenizer="!")
    theirs = load_unsplit(folder).generation_config.eos_token_id
    assert end_tokens(folder) == expected == (theirs if isinstance(theirs, list) else [theirs])
    assert end_token(folder) == read_facts(folder).end == expected[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("generation", "config"), [(SILENT, None), (None, None), (SILENT, SILENT), ([], None)])
def test_where_no_file_names_one_the_tokenizers_end_token_counts(
    family: str, generation: object, config: object, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """And never the default of config.json's class, which is beyond a small vocabulary."""
    folder = write_says(tiny_models[family], tmp_path / "model", generation, config, tokenizer="!")
    assert end_tokens(folder) == [ord("!") - 32]
    assert read_facts(folder).end == ord("!") - 32


def test_a_model_without_an_end_token_cannot_be_trained(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """It can still write."""
    folder = write_says(tiny_models["llama"], tmp_path / "model", SILENT, None)
    assert end_tokens(folder) == []
    words = r"no eos_token_id in generation_config\.json or config\.json, and no end token in its tokenizer"
    with pytest.raises(SettingError, match=words):
        read_facts(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SettingError, match=words):
        end_token(folder)


@pytest.mark.parametrize("said", [-1, "</s>", 1.5, True, [1, None], [1, "x"], {}])
def test_what_is_no_token_id_is_refused_with_the_file_that_says_it(
    said: object, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    for name, generation, config in (("generation_config", said, 1), ("config", SILENT, said)):
        folder = write_says(tiny_models["llama"], tmp_path / name, generation, config)
        with pytest.raises(SettingError, match=rf"\(its {name}\.json has the eos_token_id .*allowed: "):
            end_tokens(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_refused_by_name(text: str, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = write_says(tiny_models["llama"], tmp_path / "model", SILENT, 1)
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingError, match=r"its generation_config\.json cannot be read"):
        end_tokens(folder)


def test_ids_beyond_the_embedding_are_refused_with_token_and_sizes(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = write_says(tiny_models["llama"], tmp_path / "model", SILENT, VOCABULARY + 1)
    check_largest(folder, "tiny", VOCABULARY - 1)
    with pytest.raises(SettingError, match=r"^model: tiny \(its texts have token 97, its embedding has 97 rows\)"):
        check_largest(folder, "tiny", VOCABULARY)
    with pytest.raises(SettingError, match=r"token 98 \(eos_token_id\), its embedding has 97 rows.*ids 0 to 96"):
        check_largest(folder, "tiny", VOCABULARY + 1)
    folder = with_added_token(folder, tmp_path / "added", "<|user|>")
    with pytest.raises(SettingError, match=r"token 97 \(<\|user\|>\), its embedding has 97 rows"):
        check_largest(folder, "tiny", VOCABULARY)


def test_the_embeddings_size_follows_from_the_class_where_config_json_is_silent(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = write_says(tiny_models["llama"], tmp_path / "model", SILENT, 1)
    document = json.loads((folder / "config.json").read_text())
    del document["vocab_size"]
    (folder / "config.json").write_text(json.dumps(document))
    check_largest(folder, "tiny", 31999)
    with pytest.raises(SettingError, match="has 32000 rows"):
        check_largest(folder, "tiny", 32000)


def test_of_a_model_of_images_the_ids_are_those_of_its_text_model(tmp_path: Path) -> None:
    write_image_model(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    document = json.loads((tmp_path / "config.json").read_text())
    document.pop("eos_token_id", None)
    document |= {"vocab_size": 5, "text_config": document["text_config"] | {"eos_token_id": 7, "pad_token_id": 9}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert (embedding_rows(tmp_path), end_token(tmp_path), read_pad(tmp_path, end=7)) == (VOCABULARY, 7, 9)
    del document["text_config"]["vocab_size"]  # then the library's default holds
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert embedding_rows(tmp_path) == 262_208
