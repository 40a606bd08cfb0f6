"""Encodes rows of a table as tokens and labels, for four formats: text, completion, chat and classification.

`read_rows` turns rows into tokens, one or more sequences a row. `fit` then cuts or packs them to a length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsplit.corpora.chats import check_chat, read_chat
from fedsplit.corpora.classes import numbers_of
from fedsplit.corpora.corpus import chop
from fedsplit.corpora.sequences import Row
from fedsplit.corpora.tables import Table
from fedsplit.errors import SettingError
from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, is_text, open_tokenizer
from fedsplit.settings.sections import DataSettings

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Returns the token ids of texts."""

Tokens = list[tuple[int, Sequence[int], Sequence[int]]]
"""Number of the row, from 0, token ids and labels of each sequence. A row may have several sequences."""


@dataclass(frozen=True)
class Reading:
    """The way to read a table.

    Attributes:
        data: The settings.
        format: Format of the rows, one of `fedsplit.settings.choices.FORMATS` except "auto".
        column: Column that the data set is partitioned by; empty for the owner.
        model_path: Folder of the model, for its tokenizer.
        end: Id of the token that ends a text.
        pad: Id of the padding token.
        classes: Names of the classes, under classification.
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
        """True if a sequence may hold several texts."""
        return self.data.packing == "true" or (self.data.packing == "auto" and self.format == "text")


def format_of(table: Table, data: DataSettings) -> str:
    """Returns the format of a table's rows, by the setting `data.format`, or under "auto" by the columns.

    Raises:
        SettingError: The columns fit no format.

    Example:
        >>> format_of(Table("qa.csv", "qa", {"prompt": ["2 + 2 ="], "completion": [" 4"]}), DataSettings())
        'completion'
    """
    if data.format != "auto":
        return data.format
    if data.text in table.columns:
        return "text"
    if data.messages in table.columns:
        return "chat"
    if data.prompt in table.columns and data.completion in table.columns:
        return "completion"
    needed = f"a data set with a column '{data.text}', '{data.messages}', or '{data.prompt}' and '{data.completion}'"
    raise SettingError("dataset", table.dataset, f"{needed} (its columns are {table.listed})")


@dataclass(frozen=True)
class Texts:
    """The rows of a table as tokens.

    Attributes:
        rows: A sequence for each text; several for some chats.
        empty: Number of rows without text, which are left out.
    """

    rows: list[Row]
    empty: int = 0


def read_rows(table: Table, reading: Reading) -> Texts:
    """Encodes every row of a table as tokens and labels. Rows without text are left out.

    Args:
        table: The data set.
        reading: The way to read the table.

    Raises:
        SettingError: A column is missing, a row lacks a value, or no row has text.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> table = Table("qa.csv", "qa", {"prompt": ["2 + 2 ="], "completion": [" 4"]})
        >>> (row,) = read_rows(table, Reading(DataSettings(), "completion", "", BUNDLED_MODEL, end=0)).rows
        >>> row.labels[0], row.labels[-1]  # nothing is predicted in the prompt; the last label is the end token
        (-100, 0)
    """
    keys = _keys(table, reading)
    readers = {"text": _text, "completion": _completion, "chat": _chat, "classification": _classified}
    tokens = readers[reading.format](table, reading, open_tokenizer(reading.model_path))
    if not tokens:
        raise SettingError("dataset", table.dataset, "a data set with at least one text that is not empty")

    rows = [Row(ids, labels, keys[number], source=number) for number, ids, labels in tokens]
    if reading.format == "classification":
        class_numbers = numbers_of(table, reading.data.label, reading.classes)
        rows = _with_classes(rows, class_numbers, reading.classes)
    # Counted by source: a row of the table may have several sequences, or none.
    with_text = {row.source for row in rows}
    return Texts(rows, len(table) - len(with_text))


def _with_classes(rows: Sequence[Row], class_numbers: Sequence[int], classes: Sequence[str]) -> list[Row]:
    """Adds the class to each row: the number to predict, and the name for the data summary."""
    classified = []
    for row in rows:
        number = class_numbers[row.source]
        classified.append(replace(row, target=number, share=classes[number]))
    return classified


def _keys(table: Table, reading: Reading) -> Sequence[str]:
    """Returns the key of each row for the partition: the owner, or the value of the column in `--partition`.

    Raises:
        SettingError: The column is missing, or a row has no value.
    """
    column = reading.column or reading.data.owner
    default = DataSettings().owner
    if not reading.column and column == default and column not in table.columns:
        return [table.name] * len(table)

    values = table.column("partition" if reading.column else "data.owner", column)
    for row, value in enumerate(values, 1):
        if value is None:
            missing = "owner" if column == reading.data.owner else column
            needed = f"rows that all have an owner (row {row} has no {missing})"
            raise SettingError("dataset", table.dataset, needed)
    names = table.classes.get(column)
    return [names[value] if names else str(value) for value in values]


def _texts(table: Table, setting: str, name: str) -> dict[int, str]:
    """Returns the texts of a column by row number. Rows without a value are left out.

    Raises:
        SettingError: The column is missing, or holds a value that is no text.
    """
    texts = {}
    for number, value in enumerate(table.column(setting, name)):
        if value is None:
            continue
        fault = ""
        if not isinstance(value, str):
            fault = _shortened_value(value)
        elif not is_text(value):
            fault = "half a character, which UTF-8 cannot write"
        if fault:
            needed = f"rows whose {name} is a text (row {number + 1} has {fault})"
            raise SettingError("dataset", table.dataset, needed)
        texts[number] = value
    return texts


def _shortened_value(value: object) -> str:
    text = str(value)
    return f"{text[:40]}…" if len(text) > 40 else text


def _encoded(table: Table, reading: Reading, encode: Encode) -> dict[int, list[int]]:
    """Returns the token ids of each text by row number. Texts are stripped, and empty texts left out."""
    texts = {}
    for number, text in _texts(table, "data.text", reading.data.text).items():
        stripped = text.strip()
        if stripped:
            texts[number] = stripped
    encoded = zip(texts, encode(list(texts.values())), strict=True)
    return {number: ids for number, ids in encoded if ids}


def _text(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns texts with the end token; every token is predicted."""
    tokens: Tokens = []
    for number, ids in _encoded(table, reading, tokenizer.encode_prompt).items():
        has_tokens = len(ids) > len(tokenizer.beginning)  # beside the special tokens that the tokenizer adds
        if has_tokens:
            ended = tokenizer.end_text(ids, reading.end)
            tokens.append((number, ended, ended))
    return tokens


def _classified(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns texts with the tokenizer's special tokens at both ends. The last token predicts the class."""
    encoded = _encoded(table, reading, tokenizer.encode)
    return [(number, ids, ids) for number, ids in encoded.items()]


def _completion(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns prompts followed by completions with the end token; only the completion is predicted.

    No space is put between prompt and completion.
    """
    prompts = _complete_column(table, "data.prompt", reading.data.prompt)
    completions = _complete_column(table, "data.completion", reading.data.completion)
    prompt_ids = tokenizer.encode_prompt(prompts)
    completion_ids = tokenizer.encode_continuation(completions)

    tokens: Tokens = []
    for number, (before, after) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        # Without a prompt, the completion begins the text, and may have a different first token there.
        if not prompts[number]:
            (after,) = tokenizer.encode_verbatim([completions[number]])
        ended = tokenizer.end_text(after, reading.end)
        ids = [*before, *ended]
        labels = [IGNORED] * len(before) + ended
        tokens.append((number, ids, labels))
    return tokens


def _complete_column(table: Table, setting: str, name: str) -> list[str]:
    """Returns the texts of a column.

    Raises:
        SettingError: A row has no text.
    """
    texts = _texts(table, setting, name)
    for number in range(len(table)):
        if number not in texts:
            needed = f"rows that all have a {name} (row {number + 1} has no text)"
            raise SettingError("dataset", table.dataset, needed)
    return [texts[number] for number in range(len(table))]


def _chat(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns chats in the form of the chat template. Only the assistant's turns, with end tokens, are predicted."""
    chats = table.column("data.messages", reading.data.messages)
    if not getattr(tokenizer.library, "chat_template", None):
        needed = "a model whose tokenizer has a chat template, which --data.format chat needs"
        raise SettingError("model", reading.model_path, needed)

    tokens: Tokens = []
    for number, chat in enumerate(chats):
        try:
            sequences = read_chat(tokenizer, check_chat(chat))
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
        tokens += [(number, ids, labels) for ids, labels in sequences]
    return tokens


@dataclass(frozen=True)
class Fitted:
    """Sequences of a limited length.

    Attributes:
        rows: The sequences.
        cut: Number of texts that were too long, and lost their end.
        dropped: Number of texts with nothing left to predict after the cut, which are left out.
    """

    rows: list[Row]
    cut: int = 0
    dropped: int = 0


def joined(parts: Sequence[Fitted]) -> Fitted:
    """Joins several results: all sequences, and the sums of the counts."""
    return Fitted(
        rows=[row for part in parts for row in part.rows],
        cut=sum(part.cut for part in parts),
        dropped=sum(part.dropped for part in parts),
    )


def fit(rows: Sequence[Row], reading: Reading, length: int) -> Fitted:
    """Cuts or packs texts of one owner into sequences of at most `length` tokens.

    Packed text is one stream, cut into full sequences: nothing is padded, and the incomplete last sequence is dropped.
    Packed texts of further formats are put into a sequence whole, as long as there is room. A token attends to all
    earlier tokens of the sequence, even to tokens of earlier texts.

    Args:
        rows: The texts.
        reading: The way to read the table, with the setting `data.packing`.
        length: Largest number of tokens in a sequence.

    Example:
        >>> reading = Reading(DataSettings(), "text", "", Path(), end=0)
        >>> texts = [Row([1, 2, 0], [1, 2, 0], "ann"), Row([3, 4, 0], [3, 4, 0], "ann")]
        >>> [row.ids for row in fit(texts, reading, length=2).rows]
        [[1, 2], [0, 3], [4, 0]]
    """
    if reading.packs and reading.format == "text":
        blocks = chop([row.ids for row in rows], length)
        return Fitted([Row(block, block, rows[0].key) for block in blocks])

    shortened = [_shortened(row, length, reading.pad) for row in rows]
    useful = [row for row in shortened if row.ids and row.predicted]
    return Fitted(
        rows=_packed(useful, length) if reading.packs else useful,
        cut=sum(len(row.ids) > length for row in rows),
        dropped=len(shortened) - len(useful),
    )


def _shortened(row: Row, length: int, pad: int) -> Row:
    """Cuts a text to a length. A classified text also loses padding tokens at its end."""
    end = min(len(row.ids), length)
    if row.target is not None:
        # transformers takes the class from the last token that is no padding token.
        while end and row.ids[end - 1] == pad:
            end -= 1
    if len(row.ids) == end:
        return row
    ids = row.ids[:end]
    labels = ids if row.labels is row.ids else row.labels[:end]  # `stack` stores equal ids and labels once
    return replace(row, ids=ids, labels=labels)


def by_source(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups consecutive sequences that come from one row of the table, such as the turns of a chat.

    Example:
        >>> rows = [Row([1], [1], "ann", source=number) for number in (0, 0, 1)]
        >>> [len(group) for group in by_source(rows)]
        [2, 1]
    """
    groups: list[list[Row]] = []
    for row in rows:
        last_source = groups[-1][0].source if groups else -1
        if row.source >= 0 and row.source == last_source:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _packed(rows: Sequence[Row], length: int) -> list[Row]:
    """Packs whole texts, in their order, into sequences of at most `length` tokens.

    A chat of several sequences follows earlier texts only if the whole chat fits there. Otherwise the chat begins a new
    sequence. So two packed sequences share a chat only if both begin with the chat, and have its number as source.
    """
    packed: list[Row] = []
    for text in by_source(rows):
        tokens = sum(len(row.ids) for row in text)
        fits_behind = bool(packed) and len(packed[-1].ids) + tokens <= length
        current = [packed.pop()] if fits_behind else []
        for row in text:
            if current and len(current[-1].ids) + len(row.ids) <= length:
                current[-1] = _appended(current[-1], row)
            else:
                current.append(row)
        packed += current
    return packed


def _appended(before: Row, row: Row) -> Row:
    """Joins two texts. The first token of the second text is not predicted, as in a sequence without earlier texts."""
    ids = [*before.ids, *row.ids]
    labels = [*before.labels, IGNORED, *row.labels[1:]]
    return replace(before, ids=ids, labels=labels)
