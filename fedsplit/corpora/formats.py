"""Rows of a table to tokens, and what is predicted of them: text, prompt and completion, chat, classification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError
from fedsplit.config import DataSettings
from fedsplit.corpora.classes import numbers_of
from fedsplit.corpora.corpus import chop, encode
from fedsplit.corpora.sequences import Row
from fedsplit.corpora.tables import Table
from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import load_tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What marks the assistant's turns in a chat template that says where they are."""


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        data: The settings.
        format: One of `fedsplit.allowed.FORMATS`, but not "auto".
        column: The column whose values rows are dealt by; empty where whose they are decides.
        model_path: The model's folder, for its tokenizer.
        end: The id of the token that ends a text.
        pad: The id of the token that fills up shorter sequences.
        classes: The names of the classes, under classification.
    """

    data: DataSettings
    format: str
    column: str
    model_path: Path
    end: int
    pad: int = 0
    classes: tuple[str, ...] = ()

    @property
    def packs(self) -> bool:
        """Whether several texts are put into one sequence."""
        return self.data.packing == "true" or (self.data.packing == "auto" and self.format == "text")


def format_of(table: Table, data: DataSettings) -> str:
    """What the rows of a table are; what `auto` stands for.

    Raises:
        SettingError: They are nothing that is known.
    """
    if data.format != "auto":
        return data.format
    if data.text in table.columns:
        return "text"
    if data.messages in table.columns:
        return "chat"
    if data.prompt in table.columns and data.completion in table.columns:
        return "completion"
    words = f"a data set with a column '{data.text}', '{data.messages}', or '{data.prompt}' and '{data.completion}'"
    raise SettingError("dataset", table.dataset, f"{words} (its columns are {table.listed})")


def read_rows(table: Table, reading: Reading) -> list[Row]:
    """Every row of a table as tokens; texts that are empty are left out.

    Raises:
        SettingError: A column is missing, or a row has not what it must have.
    """
    keys = _keys(table, reading)
    read = {"text": _text, "completion": _completion, "chat": _chat, "classification": _alone}[reading.format]
    found = read(table, reading)
    if not found:
        raise SettingError("dataset", table.dataset, "a data set with at least one text that is not empty")
    if reading.format == "classification":
        targets = numbers_of(table, reading.data.label, reading.classes)
        return [Row(ids, ids, keys[n], targets[n], reading.classes[targets[n]]) for n, (ids, _) in found.items()]
    return [Row(ids, labels, keys[number]) for number, (ids, labels) in found.items()]


def _keys(table: Table, reading: Reading) -> Sequence[str]:
    """What each row is dealt by."""
    column, data = reading.column or reading.data.owner, reading.data
    if not reading.column and column == DataSettings().owner and column not in table.columns:
        return [table.name] * len(table)
    values = table.column("partition" if reading.column else "data.owner", column)
    missing = next((number for number, value in enumerate(values, 1) if value is None), None)
    if missing is not None:
        what = "owner" if column == data.owner else column
        raise SettingError("dataset", table.dataset, f"rows that all have an owner (row {missing} has no {what})")
    names = table.classes.get(column)
    return [names[value] if names else str(value) for value in values]


Tokens = Mapping[int, tuple[Sequence[int], Sequence[int]]]
"""Tokens and labels by the number of the row, from 0."""


def _encoded(table: Table, reading: Reading) -> dict[int, list[int]]:
    column = table.column("data.text", reading.data.text)
    texts = {n: text.strip() for n, text in enumerate(column) if isinstance(text, str) and text.strip()}
    return dict(zip(texts, encode(list(texts.values()), reading.model_path), strict=True))


def _text(table: Table, reading: Reading) -> Tokens:
    """Texts with the end token, all of them predicted."""
    ended = {n: [*ids, reading.end] for n, ids in _encoded(table, reading).items()}
    return {n: (ids, ids) for n, ids in ended.items()}


def _alone(table: Table, reading: Reading) -> Tokens:
    """Texts without an end token, whose last token decides their class."""
    return {n: (ids, ids) for n, ids in _encoded(table, reading).items()}


def _completion(table: Table, reading: Reading) -> Tokens:
    """The prompt, of which nothing is predicted, and the completion with the end token; no space is put between."""
    data, halves = reading.data, []
    for setting, name in (("data.prompt", data.prompt), ("data.completion", data.completion)):
        column = table.column(setting, name)
        for number, value in enumerate(column, 1):
            if not isinstance(value, str):
                raise SettingError("dataset", table.dataset, f"rows that all have a {name} (row {number} has no text)")
        halves.append(encode(list(column), reading.model_path))
    return {
        n: ([*prompt, *completion, reading.end], [*[IGNORED] * len(prompt), *completion, reading.end])
        for n, (prompt, completion) in enumerate(zip(*halves, strict=True))
    }


def _chat(table: Table, reading: Reading) -> Tokens:
    """Chats by the tokenizer's template; what the assistant says is predicted, and what ends its turns."""
    chats = table.column("data.messages", reading.data.messages)
    tokenizer = load_tokenizer(reading.model_path)
    if not getattr(tokenizer, "chat_template", None):
        words = "a model whose tokenizer has a chat template, which --data.format chat needs"
        raise SettingError("model", reading.model_path, words)
    found = {}
    for number, chat in enumerate(chats):
        try:
            found[number] = _turns(tokenizer, _checked(chat))
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
    return found


def _checked(chat: Any) -> list[dict[str, Any]]:
    """A chat, if it is one.

    Raises:
        ValueError: It is none, or the assistant says nothing in it.
    """
    turns = chat if isinstance(chat, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a list of messages with role and content")
    if not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
        raise ValueError("a list of messages whose role and content are texts")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("a chat in which the assistant says something")
    return turns


def _turns(tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens of a chat and labels on what the assistant says.

    Raises:
        ValueError: The template refuses the chat, or does not tell where the assistant's turns are.
    """
    try:
        if _GENERATION.search(str(tokenizer.get_chat_template())):
            made = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            ids, said = list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]
        else:
            text, spans = _spans(tokenizer, chat)
            made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(made["input_ids"])
            said = [any(low <= start < high for low, high in spans) for start, _ in made["offset_mapping"]]
    except Exception as error:  # noqa: BLE001  # a template may raise what it likes: jinja2's errors, and its own
        raise ValueError(f"a chat that the template takes ({' '.join(str(error).split())[:200]})") from None
    return ids, [token if wanted else IGNORED for token, wanted in zip(ids, said, strict=True)]


def _spans(tokenizer: Any, chat: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, and from where to where the assistant speaks: what its turns add to what came before.

    Raises:
        ValueError: The text of the first turns is no beginning of the whole one.
    """

    def render(turns: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))

    whole, spans = render(chat), []
    for number, turn in enumerate(chat):
        if turn["role"] == "assistant":
            before, after = render(chat[:number], True) if number else "", render(chat[: number + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError("its template writes earlier turns anew, so that they cannot be told apart")
            spans.append((len(before), len(after)))
    return whole, spans


@dataclass(frozen=True)
class Fitted:
    """Rows of at most so many tokens.

    Attributes:
        rows: The sequences.
        cut: Texts that lost their end, since they were longer.
        dropped: Texts of which nothing is predicted then, which are left out.
    """

    rows: list[Row]
    cut: int = 0
    dropped: int = 0


def joined(parts: Sequence[Fitted]) -> Fitted:
    """Several as one."""
    rows = [row for part in parts for row in part.rows]
    return Fitted(rows, sum(part.cut for part in parts), sum(part.dropped for part in parts))


def fit(rows: Sequence[Row], reading: Reading, length: int) -> Fitted:
    """Texts of one owner to sequences.

    Text that is packed is one stream, cut into full sequences, so that nothing is padded and its rest is dropped. Of
    other formats whole texts are put into a sequence as long as they fit. Either way a token sees all that is before
    it in its sequence, of earlier texts, too.

    Args:
        rows: The texts.
        reading: Whether they are packed.
        length: Tokens of a sequence at most.
    """
    if reading.packs and reading.format == "text":
        blocks = chop([row.ids for row in rows], length)
        return Fitted([Row(block, block, rows[0].key) for block in blocks])
    fitting = [_shortened(row, length, reading.pad) for row in rows]
    kept = [row for row in fitting if row.ids and row.predicted]
    cut = sum(len(row.ids) > length for row in rows)
    return Fitted(_together(kept, length) if reading.packs else kept, cut, len(fitting) - len(kept))


def _shortened(row: Row, length: int, pad: int) -> Row:
    """A text without what is too much; one that has a class also without padding tokens at its end.

    The library takes the last token that is no padding token for the one that decides.
    """
    end = min(len(row.ids), length)
    while row.target is not None and end and row.ids[end - 1] == pad:
        end -= 1
    if len(row.ids) == end:
        return row
    ids = row.ids[:end]
    return replace(row, ids=ids, labels=ids if row.labels is row.ids else row.labels[:end])


def _together(rows: Sequence[Row], length: int) -> list[Row]:
    """Whole texts put one after the other, in their order, into as few sequences as that takes."""
    full: list[Row] = []
    for row in rows:
        if full and len(full[-1].ids) + len(row.ids) <= length:
            last = full[-1]  # what comes first in a text is predicted neither here nor where it stands alone
            full[-1] = replace(last, ids=[*last.ids, *row.ids], labels=[*last.labels, IGNORED, *row.labels[1:]])
        else:
            full.append(row)
    return full
