"""Encodes rows of a table as tokens and labels: text, completion, chat, instruction, classification and preference.

`read_rows` turns rows into tokens, one or more sequences a row. `fedsplit.corpora.packing` cuts or packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsplit.corpora.chats import check_answers, check_chat, read_answer, read_chat
from fedsplit.corpora.classes import numbers_of
from fedsplit.corpora.data_table import Table
from fedsplit.corpora.instructions import (
    CONVERSATIONS,
    as_messages,
    chat_of,
    is_alpaca,
    is_instructions,
    prompt_of,
)
from fedsplit.corpora.sequences import Row
from fedsplit.errors import SettingError
from fedsplit.model.kernels import IGNORED
from fedsplit.model.vocabulary import TextTokenizer, is_text, open_tokenizer
from fedsplit.settings.choices import PAIRS
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
    # Before the column of texts, since Alpaca's column of this name has prompt and answer in one.
    if is_alpaca(table.columns, data):
        return "instruction"
    if data.text in table.columns:
        return "text"
    if data.messages in table.columns or CONVERSATIONS in table.columns:
        return "chat"
    if data.chosen in table.columns and data.rejected in table.columns:
        return PAIRS
    if data.prompt in table.columns and data.completion in table.columns:
        return "completion"
    if is_instructions(table.columns, data):
        return "instruction"
    pairs = [
        (data.prompt, data.completion),
        (data.chosen, data.rejected),
        (data.instruction, data.output),
    ]
    two = ", or ".join(f"'{first}' and '{second}'" for first, second in pairs)
    needed = f"a data set with a column '{data.text}', '{data.messages}', '{CONVERSATIONS}', or {two}"
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
    # Before the texts are encoded, which takes long: a missing owner is reported at once.
    keys = _keys(table, reading)
    readers = {
        "text": _text,
        "completion": _completion,
        "chat": _chat,
        "instruction": _instruction,
        "classification": _classified,
        PAIRS: _preference,
    }
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
    # Only the default column may be missing. A column that the settings name must be there.
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
            # One object for tokens and labels, which `stack` then stores once.
            tokens.append((number, ended, ended))
    return tokens


def _classified(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns texts with the tokenizer's special tokens at both ends. The last token predicts the class."""
    encoded = _encoded(table, reading, tokenizer.encode)
    return [(number, ids, ids) for number, ids in encoded.items()]


def _completion(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns prompts followed by completions with the end token; only the completion is predicted."""
    prompts = _complete_column(table, "data.prompt", reading.data.prompt)
    completions = _complete_column(table, "data.completion", reading.data.completion)
    return _continued(prompts, completions, reading, tokenizer)


def _instruction(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns instructions followed by answers; only the answer, with what ends it, is predicted.

    A chat template writes them as a chat of two turns. Without one, Alpaca's prompt comes before the answer.
    """
    data = reading.data
    instructions = _complete_column(table, "data.instruction", data.instruction)
    outputs = _complete_column(table, "data.output", data.output)
    given = _texts(table, "data.input", data.input) if data.input in table.columns else {}
    inputs = [given.get(number, "") for number in range(len(table))]
    if not _has_template(tokenizer):
        prompts = [prompt_of(*task) for task in zip(instructions, inputs, strict=True)]
        return _continued(prompts, outputs, reading, tokenizer)

    tokens: Tokens = []
    for number, row in enumerate(zip(instructions, inputs, outputs, strict=True)):
        try:
            tokens.append((number, *read_answer(tokenizer, chat_of(*row))))
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
    return tokens


def _continued(
    prompts: Sequence[str], completions: Sequence[str], reading: Reading, tokenizer: TextTokenizer
) -> Tokens:
    """Returns prompts followed by completions with the end token, in order. Nothing of a prompt is predicted.

    No space is put between prompt and completion.
    """
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


def _preference(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns two sequences for each row: prompt and chosen text, then prompt and rejected text.

    Texts are read as prompts and completions are, and lists of messages by the chat template.
    """
    data = reading.data
    chosen = table.column("data.chosen", data.chosen)
    if len(chosen) and isinstance(chosen[0], list):
        return _preferred_chats(table, reading, tokenizer)
    prompts = _complete_column(table, "data.prompt", data.prompt)
    answers = [_complete_column(table, f"data.{name}", getattr(data, name)) for name in ("chosen", "rejected")]
    both = [_continued(prompts, completions, reading, tokenizer) for completions in answers]
    # Chosen and rejected texts in turn, as objectives over pairs expect them.
    return [sequence for pair in zip(*both, strict=True) for sequence in pair]


def _preferred_chats(table: Table, reading: Reading, tokenizer: TextTokenizer) -> Tokens:
    """Returns two sequences for each row of chats: the same messages with the chosen and with the rejected answer."""
    data = reading.data
    _check_template(tokenizer, reading)
    chosen = table.column("data.chosen", data.chosen)
    rejected = table.column("data.rejected", data.rejected)
    prompts = table.columns.get(data.prompt, [None] * len(table))
    tokens: Tokens = []
    for number, row in enumerate(zip(prompts, chosen, rejected, strict=True)):
        try:
            tokens += [(number, *read_answer(tokenizer, chat)) for chat in check_answers(*row)]
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
    return tokens


def _has_template(tokenizer: TextTokenizer) -> bool:
    """Returns True if the model's tokenizer can write chats."""
    return bool(getattr(tokenizer.library, "chat_template", None))


def _check_template(tokenizer: TextTokenizer, reading: Reading) -> None:
    """Checks that the model's tokenizer can write chats.

    Raises:
        SettingError: The tokenizer has no chat template.
    """
    if not _has_template(tokenizer):
        of_pairs = " with lists of messages" if reading.format == PAIRS else ""
        needed = f"a model whose tokenizer has a chat template, which --data.format {reading.format}{of_pairs} needs"
        raise SettingError("model", reading.model_path, needed)


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
    name = reading.data.messages
    if name not in table.columns and CONVERSATIONS in table.columns:
        name = CONVERSATIONS
    chats = table.column("data.messages", name)
    _check_template(tokenizer, reading)

    tokens: Tokens = []
    for number, chat in enumerate(chats):
        try:
            sequences = read_chat(tokenizer, check_chat(as_messages(chat)))
        except ValueError as error:
            raise SettingError("dataset", f"{table.dataset} (row {number + 1})", str(error)) from None
        tokens += [(number, ids, labels) for ids, labels in sequences]
    return tokens
