"""Instruction data as people publish it: Alpaca's columns, and ShareGPT's conversations, as prompts and chats."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fedsplit.settings.sections import DataSettings

CONVERSATIONS = "conversations"
"""Column of ShareGPT's conversations, which is read as the column of messages where there is none of that name."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT by another name than chat templates have."""

KNOWN_ROLES = ("user", "assistant", "system", "tool")
"""Roles that keep their name."""

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Prompt of Alpaca for an instruction with an input (github.com/tatsu-lab/stanford_alpaca, train.py)."""

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""Prompt of Alpaca for an instruction without an input."""


def is_instructions(columns: Collection[str], data: DataSettings) -> bool:
    """Returns True for columns of instructions with answers. The column of inputs may be missing.

    Example:
        >>> is_instructions(["instruction", "output"], DataSettings())
        True
    """
    return data.instruction in columns and data.output in columns


def is_alpaca(columns: Collection[str], data: DataSettings) -> bool:
    """Returns True for all columns of Alpaca.

    A column of texts beside them holds prompt and answer in one, so that the prompt would be predicted, too.
    """
    return is_instructions(columns, data) and data.input in columns


def prompt_of(instruction: str, input: str) -> str:
    r"""Returns the prompt for a model without a chat template: Alpaca's.

    Args:
        instruction: The task.
        input: Context of the task; empty for none.

    Example:
        >>> prompt_of("Add the numbers.", "2, 3")[-67:]
        '\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n2, 3\n\n### Response:'
    """
    # Not by `format` on both at once: an instruction may hold braces.
    template = WITH_INPUT if input else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def chat_of(instruction: str, input: str, output: str) -> list[dict[str, str]]:
    r"""Returns an instruction as a chat for a model with a chat template.

    Example:
        >>> chat_of("Add the numbers.", "2, 3", "5")[0]
        {'role': 'user', 'content': 'Add the numbers.\n\n2, 3'}
    """
    asked = f"{instruction}\n\n{input}" if input else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def as_messages(chat: Any) -> Any:
    """Returns a conversation of ShareGPT as messages with role and content.

    Other values are returned as they are, for `fedsplit.corpora.chats.check_chat` to judge.

    Args:
        chat: A list of turns with `from` and `value`, or anything.

    Raises:
        ValueError: A turn has a role that no chat template knows.

    Example:
        >>> as_messages([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])
        [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    """
    is_conversation = isinstance(chat, list) and all(isinstance(turn, dict) and "from" in turn for turn in chat)
    if not is_conversation:
        return chat
    return [_as_message(turn) for turn in chat]


def _as_message(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn of a conversation as a message. Further keys are kept, such as a name.

    Raises:
        ValueError: No chat template knows the role.
    """
    speaker = turn["from"]
    role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else None
    if role not in KNOWN_ROLES:
        known = " | ".join([*ROLES, *KNOWN_ROLES])
        raise ValueError(f"a conversation whose speakers are {known} (one is {speaker!r})")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": turn.get("value"), **others}
