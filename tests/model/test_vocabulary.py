"""A model's tokenizer, from whichever files it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from family_tokenizers import KINDS, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from fedsplit.commands import generation_job
from fedsplit.corpora.partition import all_text, make_partition
from fedsplit.corpora.sequences import Sequences
from fedsplit.errors import SettingError
from fedsplit.model import vocabulary
from fedsplit.model.vocabulary import has_vocabulary, load_tokenizer, open_tokenizer
from fedsplit.settings.config import BUNDLED_MODEL
from fedsplit.settings.sections import DataSettings

TEXT = "Fellow citizens: naïve café, 你好 \n\t 🦅 <|endoftext|> 1946"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The bundled tokenizer as vocab.json and merges.txt, as GPT-2's first checkpoints have it."""
    model = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    return tmp_path


def test_older_files_give_the_same_tokens(older: Path) -> None:
    assert not (older / "tokenizer.json").exists()
    assert open_tokenizer(older).encode([TEXT]) == open_tokenizer(BUNDLED_MODEL).encode([TEXT])


def test_the_ready_file_goes_first(older: Path) -> None:
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    (older / "vocab.json").write_text("{}")
    (older / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(open_tokenizer(older).library) == 1024


def test_a_folder_without_any_is_refused_and_never_given_an_empty_one(tmp_path: Path) -> None:
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert not has_vocabulary(tmp_path)
    with pytest.raises(SettingError, match=r"no tokenizer in it\) is not possible; allowed: a folder with a tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SettingError, match=r"^model: ") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


CLASSES = {"llama": "LlamaTokenizer", "gemma2": "GemmaTokenizer"}


@pytest.mark.parametrize("family", CLASSES)
def test_a_tokenizer_model_alone_gives_the_tokens_of_sentencepiece(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pieces = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join([TEXT, "the people of the states, and the peace of the world"] * 9))
    facts = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "character_coverage": 1.0}
    if family == "gemma2":  # these leave texts as they are
        facts |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1}
        facts |= {"bos_id": 2, "unk_id": 3, "normalization_rule_name": "identity"}
    trainer = pieces.SentencePieceTrainer
    trainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), minloglevel=9, **facts)
    shutil.copy(tiny_models[family] / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": CLASSES[family]}))
    text = "the peace of the states: naïve 🦅 1946"
    expected = pieces.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert len(expected) > 10
    assert open_tokenizer(tmp_path).encode_verbatim([text]) == [expected]
    assert load_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("read", [open_tokenizer, load_tokenizer])
def test_a_tokenizer_model_without_its_library_says_what_to_install(
    read: Callable[[Path], object], tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that transformers would name is another one."""
    shutil.copy(tiny_models["llama"] / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"torn")
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    words = r"^model: .* \(its tokenizer.model cannot be read; .* pip install 'fedsplit\[sentencepiece\]'\) is not"
    with pytest.raises(SettingError, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


PROSE = "a question, its answer: yes or no? <|turn|> the peace\n\nof  the world 1 + 1 = 2"


def rows_of(sequences: Sequences) -> list[list[int]]:
    """The tokens of each sequence, without padding."""
    lengths = sequences.lengths if sequences.lengths is not None else [sequences.ids.shape[1]] * len(sequences)
    return [ids[:length] for ids, length in zip(sequences.ids.tolist(), map(int, lengths), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_generation_see_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Those of transformers' own tokenizer, of every family: with what it begins a text, and one end token."""
    end = write_tokenizer(tmp_path, kind)
    texts = [PROSE, "hello to the others", "yes"]
    file, data = tmp_path / "texts.jsonl", DataSettings(packing="false")
    file.write_text("\n".join(json.dumps({"text": text, "owner": "ann"}) for text in texts))
    library = AutoTokenizer.from_pretrained(tmp_path)
    theirs = [library(text)["input_ids"] for text in texts]
    expected = [ids if ids[-1] == end else [*ids, end] for ids in theirs]
    (shard,) = make_partition(str(file), "natural", 1, 500, 0, tmp_path, end, data).shards
    assert sorted(rows_of(shard.train) + rows_of(shard.held_out)) == sorted(expected)
    assert rows_of(all_text(str(file), 500, tmp_path, end, data)["ann"]) == expected
    read = generation_job.tokenise(load_tokenizer(tmp_path), texts, False, "")
    assert [[*ids, end] for ids in read] == expected
    stream = [token for ids in expected for token in ids]
    assert rows_of(all_text(str(file), len(stream), tmp_path, end)["ann"]) == [stream]


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_goes_on_where_generation_would(kind: str, tmp_path: Path) -> None:
    """Its prompt is what generate reads, and decoded both halves are the text, with nothing put between."""
    end = write_tokenizer(tmp_path, kind)
    pairs = [
        ("a question, its answer:", "yes or no"),
        ("1 + 1 = ", "2"),
        ("hello", " to the others"),
        ("", "the peace"),
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "completion": said}) for prompt, said in pairs))
    found = all_text(str(file), 500, tmp_path, end)["pairs"]
    library = load_tokenizer(tmp_path)
    prompts = open_tokenizer(tmp_path).encode_prompt([prompt for prompt, _ in pairs])
    assert prompts[:3] == generation_job.tokenise(library, [prompt for prompt, _ in pairs[:3]], False, "")
    for (prompt, said), before, ids, labels in zip(pairs, prompts, rows_of(found), found.labels.tolist(), strict=True):
        assert ids[: len(before)] == before and ids[-1] == end
        assert labels[: len(ids)] == [-100] * len(before) + ids[len(before) :]
        whole = library.decode(ids[:-1], skip_special_tokens=True)
        assert whole.removeprefix(" ") == prompt + said
        assert ids.count(end) == 1 + before.count(end)


MARKS = "<s></s> <|user|> hello <|endoftext|>\n<|im_end|>[INST]<eos> <new> yes<new>\tno <|turn|> "
"""Special tokens of several families within a text, and one that a test adds."""


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_with_special_tokens_are_encoded_as_by_transformers(kind: str, split: bool, tmp_path: Path) -> None:
    """And those with added tokens, on a tokenizer that a caller has let pad and truncate before."""
    write_tokenizer(tmp_path, kind)
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts | {"split_special_tokens": split}))
    tokenizer, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for library in (tokenizer.library, theirs):
        library.add_tokens([AddedToken("<new>", lstrip=True)])
    texts = [MARKS, PROSE, TEXT, " a", "", *(f"text {number}" for number in range(40))]
    assert tokenizer._is_plain
    tokenizer.library.pad_token = tokenizer.library.eos_token
    tokenizer.library(texts, padding=True, truncation=True, max_length=3)
    tokenizer.library.backend_tokenizer.encode_special_tokens = not split
    assert tokenizer.encode(texts) == [theirs(text)["input_ids"] for text in texts]
    assert tokenizer.encode_verbatim(texts) == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_class_of_transformers_that_changes_texts_is_heard(tmp_path: Path) -> None:
    """CodeLlama's knows gaps in a text."""
    write_tokenizer(tmp_path, "llama")
    class_name = {"tokenizer_class": "CodeLlamaTokenizer"}
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts | class_name))
    tokenizer = open_tokenizer(tmp_path)
    text = "the people <FILL_ME> the world"
    assert not tokenizer._is_plain
    assert tokenizer.encode([text]) == AutoTokenizer.from_pretrained(tmp_path)([text])["input_ids"]


def test_classes_are_told_by_a_text_as_the_tokenizer_ends_it(tmp_path: Path) -> None:
    end = write_tokenizer(tmp_path, "mixtral")
    (tmp_path / "texts.csv").write_text("text,label\nyes,good\nno,bad\n")
    found = all_text(str(tmp_path / "texts.csv"), 99, tmp_path, 0, DataSettings(format="classification"))["texts"]
    assert rows_of(found) == AutoTokenizer.from_pretrained(tmp_path)(["yes", "no"])["input_ids"]
    assert found.ids[0, -1] == end and found.labels.tolist() == [1, 0]


def test_a_text_that_the_tokenizer_refuses_gets_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    texts = open_tokenizer(tmp_path)
    assert texts.encode_prompt(["ab"]) == texts.encode_continuation(["ab"]) == [[0, 1]]
    with pytest.raises(SettingError, match=r"^model: .*\(WordLevel error.*a model whose tokenizer takes every"):
        texts.encode(["abc"])
