"""Checks the flags of `python -m fedsplit.generate`, and returns the texts to write as a `Job`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.results.finished import Adapter, open_run
from fedsplit.settings.choices import KERNELS
from fedsplit.settings.config import Config
from fedsplit.settings.validators import DEVICE, Validator, at_least, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedsplit.generation.sampling import Sampling


NEW_TOKENS = 64
"""Default of `--max-new-tokens`, if the model has positions for as many."""


@dataclass(frozen=True)
class Job:
    """The texts to write, with all inputs checked.

    Attributes:
        config: Settings of the run.
        adapter: Adapter to write with.
        client: Number of the client to play.
        tokenizer: Tokenizer of transformers.
        heads: Beginning of each text on the screen: its prompt.
        tokens: Token ids of each prompt.
        most: Largest number of new tokens of each text.
        stops: Token ids that end a text.
        sampling: Options for the choice of tokens.
        batch_size: Number of texts written at once.
    """

    config: Config
    adapter: Adapter
    client: int
    tokenizer: PreTrainedTokenizerBase
    heads: list[str]
    tokens: list[list[int]]
    most: int
    stops: list[int]
    sampling: Sampling
    batch_size: int


def _wrong_value(name: str, value: float | str, allowed: Validator) -> Iterator[SettingError]:
    """Yields an error if the value of a flag is not allowed."""
    if not allowed.test(value):
        words = allowed.words.replace("a number", "a whole number") if isinstance(value, int) else allowed.words
        yield SettingError(name, value, words)


def _wrong_values(flags: argparse.Namespace) -> Iterator[SettingError]:
    """Yields an error for each flag that is out of its range, and for each flag for drawing without a temperature."""
    temperature = Validator("0, which takes the likeliest token, or a number from 0.01 to 100", _is_temperature)
    yield from _wrong_value("temperature", flags.temperature, temperature)
    yield from _wrong_value("batch_size", flags.batch_size, at_least(1))
    if flags.max_new_tokens is not None:
        yield from _wrong_value("max_new_tokens", flags.max_new_tokens, at_least(1))
    if flags.kernels:
        yield from _wrong_value("kernels", flags.kernels, one_of(KERNELS))
    if flags.trunk_device:
        yield from _wrong_value("trunk.device", flags.trunk_device, DEVICE)

    probability = Validator("a number above 0, up to 1", lambda value: 0 < value <= 1)
    ranges = {"top_k": at_least(1), "top_p": probability, "seed": at_least(0, 2**32 - 1)}
    for name, allowed in ranges.items():
        value = getattr(flags, name)
        if value is None:
            continue
        if not allowed.test(value):
            yield from _wrong_value(name, value, allowed)
        elif not flags.temperature:
            yield SettingError(name, value, "none without --temperature, since then nothing is drawn")


def _is_temperature(value: float) -> bool:
    return value == 0 or 0.01 <= value <= 100


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """Returns all prompts: those of `--prompt`, then the lines of the file `--prompts`.

    Raises:
        SettingError: A prompt is empty, or the file cannot be read or is empty.
        InputError: There is no prompt.
    """
    prompts = list(flags.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise SettingError("prompt", "nothing", "a text that is not empty")
    if flags.prompts:
        try:
            lines = Path(flags.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError("prompts", flags.prompts, f"a text file, a prompt a line ({error})") from None
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise SettingError("prompts", f"{flags.prompts} (nothing in it)", "a text file, a prompt a line")
    if not prompts:
        raise InputError("no prompt is given: say --prompt TEXT, or --prompts FILE; see --help")
    return prompts


def tokenise(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: bool, model: str) -> list[list[int]]:
    """Returns the token ids of each prompt, with special tokens at the beginning alone.

    Args:
        tokenizer: Tokenizer of transformers.
        prompts: The prompts.
        chat: If true, each prompt is put into the chat template, as a user's message.
        model: Name of the model, for messages.

    Raises:
        InputError: The tokenizer has no chat template, or a prompt cannot be encoded.
    """
    from fedsplit.model.vocabulary import TextTokenizer, is_text, render

    if chat and not tokenizer.chat_template:
        raise InputError(f"chat: the tokenizer of {model} has no template for a conversation")
    for number, prompt in enumerate(prompts, 1):
        if not is_text(prompt):
            raise SettingError("prompt", f"number {number} (it has bytes that are no UTF-8)", "a text in UTF-8")

    text_tokenizer = TextTokenizer(tokenizer)
    if chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        tokens = text_tokenizer.encode_verbatim([render(tokenizer, messages, prompt=True) for messages in chats])
    else:
        tokens = text_tokenizer.encode_prompt(prompts)
    for number, ids in enumerate(tokens, 1):
        if not ids:
            raise SettingError("prompt", f"number {number} (no tokens)", "a text that the tokenizer knows something of")
    return tokens


def _new_tokens(tokens: Sequence[Sequence[int]], requested: int | None, positions: int, taken: int = 0) -> int:
    """Returns the largest number of new tokens of each text.

    Args:
        tokens: Token ids of each prompt.
        requested: Value of `--max-new-tokens`; None if it is not given.
        positions: Number of positions of the model.
        taken: Number of positions taken by virtual tokens or a prefix.

    Raises:
        SettingError: The longest prompt leaves no position, or not as many as requested.
    """
    lengths = list(map(len, tokens))
    longest = max(lengths)
    room = positions - taken
    model = f"{positions} positions" + (f", of which {taken} are taken by what was trained" if taken else "")
    if longest >= room:
        found = f"number {lengths.index(longest) + 1} ({longest} tokens)"
        raise SettingError("prompt", found, f"up to {room - 1} tokens, since the model has {model}")
    if requested is None:
        return min(NEW_TOKENS, room - longest)
    if longest + requested > room:
        allowed = f"1 to {room - longest}, with a prompt of {longest} tokens and {model}"
        raise SettingError("max_new_tokens", requested, allowed)
    return requested


def check(flags: argparse.Namespace) -> Job:
    """Checks all inputs before a model is loaded or a process is started, the cheapest first.

    Raises:
        InputError: An input is wrong. Wrong flags, prompts and a wrong run are reported together.
    """
    collector = ErrorCollector()
    collector.extend(_wrong_values(flags))
    with collector.collecting():
        prompts = read_prompts(flags)
    with collector.collecting():
        run = open_run(Path(flags.run))
    collector.check()

    model_name = flags.model or run.config.model
    config = replace(run.config, model=model_name, kernels=flags.kernels or run.config.kernels)
    if flags.client is None:
        run.check_shared()
    adapter = replace(run.adapter(flags.client), model=model_name)
    if config.data.format == "classification":
        raise InputError(f"the run in {run.path} sorts texts into classes: its model has no head that writes")

    from fedsplit.model.devices import check_devices
    from fedsplit.model.families import read_facts
    from fedsplit.model.quantization import check_quantization
    from fedsplit.model.sources import config_folder, weights_folder

    trunk_device = flags.trunk_device or config.device_of("trunk")
    config = replace(config, device="cpu", trunk=replace(config.trunk, device=trunk_device))
    check_devices(config)
    check_quantization(config)
    model = config_folder(config.model)
    facts = read_facts(model)

    from fedsplit.adaptation.run_adapters import check_made_by
    from fedsplit.generation.sampling import Sampling
    from fedsplit.model.checkpoint_reader import check_checkpoint
    from fedsplit.model.token_ids import check_largest, end_tokens
    from fedsplit.model.vocabulary import load_tokenizer
    from fedsplit.results.fitting import read_fitting

    tokenizer = load_tokenizer(model)
    tokens = tokenise(tokenizer, prompts, flags.chat, config.model)
    most = _new_tokens(tokens, flags.max_new_tokens, facts.positions, config.prompt.positions)
    check_largest(model, config.model, max(max(ids) for ids in tokens))
    check_checkpoint(weights_folder(config), config.dtype)
    read_fitting(adapter)
    check_made_by(adapter.folder, config, facts.family)
    return Job(
        config,
        adapter,
        client=flags.client or 0,
        tokenizer=tokenizer,
        heads=[f"{prompt}\n" if flags.chat else prompt for prompt in prompts],
        tokens=tokens,
        most=most,
        stops=end_tokens(model),
        sampling=Sampling(flags.temperature, flags.top_k or 0, flags.top_p or 1.0, flags.seed or 0),
        batch_size=flags.batch_size,
    )
