"""Rows of a table to tokens, and what is predicted of them: text, prompt and completion, chat, classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.allowed import SettingError
from fedsplit.config import DataSettings
from fedsplit.corpora.chats import check_chat, read_chat
from fedsplit.corpora.classes import numbers_of
from fedsplit.corpora.corpus import chop
from fedsplit.corpora.sequences import Row
from fedsplit.corpora.tables import Table
from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, is_text, open_tokenizer

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Texts to their tokens."""


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


@dataclass(frozen=True)
class Texts:
    """What is read of a table.

    Attributes:
        rows: A sequence for each text; a chat may have several.
        empty: Rows that are left out, since there is no text in them.
    """

    rows: list[Row]
    empty: int = 0


def read_rows(table: Table, reading: Reading) -> Texts:
    """Every row of a table as tokens; rows without text are left out.

    Raises:
        SettingError: A column is missing, or a row has not what it must have.
    """
    keys = _keys(table, reading)
    read = {"text": _text, "completion": _completion, "chat": _chat, "classification": _alone}[reading.format]
    found = read(table, reading, open_tokenizer(reading.model_path))
    if not found:
        raise SettingError("dataset", table.dataset, "a data set with at least one text that is not empty")
    rows = [Row(ids, labels, keys[number], source=number) for number, ids, labels in found]
    if reading.format == "classification":
        targets = numbers_of(table, reading.data.label, reading.classes)
        rows = [replace(row, target=targets[row.source], share=reading.classes[targets[row.source]]) for row in rows]
    return Texts(rows, len(table) - len({row.source for row in rows}))


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


Tokens = list[tuple[int, Sequence[int], Sequence[int]]]
"""The number of a row, from 0, with tokens and labels; once for each of its sequences."""


def _texts(table: Table, setting: str, name: str) -> dict[int, str]:
    """The texts of a column by the numbers of their rows; of rows that have none, nothing.

    Raises:
        SettingError: There is no such column, or something in it is no text.
    """
    found = {}
    for number, value in enumerate(table.column(setting, name)):
        if value is None:
            continue
        if not isinstance(value, str):
            words = f"rows whose {name} is a text (row {number + 1} has {_shown(value)})"
            raise SettingError("dataset", table.dataset, words)
        if not is_text(value):
            words = f"rows whose {name} is a text (row {number + 1} has half a character, which UTF-8 cannot write)"
            raise SettingError("dataset", table.dataset, words)
        found[number] = value
    return found


def _shown(value: Any) -> str:
    words = str(value)
    return f"{words[:40]}…" if len(words) > 40 else words


def _encoded(table: Table, reading: Reading, encode: Encode) -> dict[int, list[int]]:
    """Tokens of the texts without the white space around them, by the numbers of their rows."""
    texts = {n: text.strip() for n, text in _texts(table, "data.text", reading.data.text).items() if text.strip()}
    encoded = zip(texts, encode(list(texts.values())), strict=True)
    return {number: ids for number, ids in encoded if ids}


def _text(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Texts with the end token, all of them predicted."""
    encoded = _encoded(table, reading, tokenizer.encode_prompt)
    written = {n: ids for n, ids in encoded.items() if len(ids) > len(tokenizer.beginning)}
    ended = {n: tokenizer.end_text(ids, reading.end) for n, ids in written.items()}
    return [(n, ids, ids) for n, ids in ended.items()]


def _alone(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Texts as the tokenizer begins and ends them, whose last token decides their class."""
    return [(n, ids, ids) for n, ids in _encoded(table, reading, tokenizer.encode).items()]


def _completion(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """The prompt, of which nothing is predicted, and the completion with the end token; no space is put between."""
    data, halves = reading.data, []
    for setting, name in (("data.prompt", data.prompt), ("data.completion", data.completion)):
        texts = _texts(table, setting, name)
        missing = next((number for number in range(len(table)) if number not in texts), None)
        if missing is not None:
            words = f"rows that all have a {name} (row {missing + 1} has no text)"
            raise SettingError("dataset", table.dataset, words)
        halves.append([texts[number] for number in range(len(table))])
    prompts, completions = tokenizer.encode_prompt(halves[0]), tokenizer.encode_continuation(halves[1])
    found: Tokens = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not halves[0][number]:  # then the completion is the beginning of the text
            (completion,) = tokenizer.encode_verbatim([halves[1][number]])
        ended = tokenizer.end_text(completion, reading.end)
        found.append((number, [*prompt, *ended], [*[IGNORED] * len(prompt), *ended]))
    return found


def _chat(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Chats by the tokenizer's template; what the assistant says is predicted, and what ends its turns."""
    chats = table.column("data.messages", reading.data.messages)
    if not getattr(tokenizer.library, "chat_template", None):
        words = "a model whose tokenizer has a chat template, which --data.format chat needs"
        raise SettingError("model", reading.model_path, words)
    found: Tokens = []
    for number, chat in enumerate(chats):
        try:
            found += [(number, ids, labels) for ids, labels in read_chat(tokenizer, check_chat(chat))]
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
    return found


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


def by_source(rows: Sequence[Row]) -> list[list[Row]]:
    """Sequences in their order, those of one row of the table together, such as the turns of a chat."""
    found: list[list[Row]] = []
    for row in rows:
        if found and row.source >= 0 and row.source == found[-1][0].source:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _together(rows: Sequence[Row], length: int) -> list[Row]:
    """Puts whole texts one after the other, in their order, into full sequences.

    A chat of several sequences goes behind earlier texts only if all of it fits there. Otherwise it begins a sequence.
    So two packed sequences share a chat only if both begin with it, and they have its number as their source.
    """
    full: list[Row] = []
    for text in by_source(rows):
        fits = bool(full) and len(full[-1].ids) + sum(len(row.ids) for row in text) <= length
        packed = [full.pop()] if fits else []
        for row in text:
            if packed and len(packed[-1].ids) + len(row.ids) <= length:
                packed[-1] = _behind(packed[-1], row)
            else:
                packed.append(row)
        full += packed
    return full


def _behind(before: Row, row: Row) -> Row:
    """Joins two texts. The second one's first token is predicted neither here nor where that text stands alone."""
    return replace(before, ids=[*before.ids, *row.ids], labels=[*before.labels, IGNORED, *row.labels[1:]])
