"""Checks the flags of `python -m fedsplit.generate`, and returns the texts to write as a `Job`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.errors import ErrorCollector, InputError, SettingError, UnknownValue
from fedsplit.results.finished import Adapter, Run, open_run
from fedsplit.settings.choices import KERNELS
from fedsplit.settings.config import Config
from fedsplit.settings.drafts import unreadable
from fedsplit.settings.sections import TrunkSettings
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


def _is_temperature(value: float) -> bool:
    return value == 0 or 0.01 <= value <= 100


_VALUES = {
    "temperature": Validator("0, which takes the likeliest token, or a number from 0.01 to 100", _is_temperature),
    "batch_size": at_least(1),
    "max_new_tokens": at_least(1),
    "kernels": one_of(KERNELS),
    "trunk.device": DEVICE,
    "top_k": at_least(1),
    "top_p": Validator("a number above 0, up to 1", lambda value: 0 < value <= 1),
    "seed": at_least(0, 2**32 - 1),
}
"""Validators of the flags with values."""

_DRAWING = ("top_k", "top_p", "seed")
"""Flags that have a meaning only if tokens are drawn."""


def _attribute(name: str) -> str:
    """Returns the attribute of the parsed flags that holds the value of the flag `name`."""
    return name.replace(".", "_")


def _check_value(flags: argparse.Namespace, name: str) -> None:
    """Checks the value of a flag.

    Args:
        flags: The flags.
        name: Name of the flag, one of `_VALUES`.

    Raises:
        SettingError: The value is not allowed, or the flag is for drawing tokens and nothing is drawn.
    """
    value = getattr(flags, _attribute(name))
    is_given = value is not None and value != ""
    if not is_given:
        return
    allowed = _VALUES[name]
    if not allowed.test(value):
        words = allowed.words
        if isinstance(value, int):
            words = words.replace("a number", "a whole number")
        raise SettingError(name, value, words)
    if name in _DRAWING and not flags.temperature:
        raise SettingError(name, value, "none without --temperature, since then nothing is drawn")


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """Returns all prompts: the values of `--prompt`, then the lines of the file `--prompts`.

    Raises:
        SettingError: A prompt is empty, or the file cannot be read or is empty.
        InputError: There is no prompt.
    """
    prompts = list(flags.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise SettingError("prompt", "nothing", "a text that is not empty")
    if flags.prompts:
        try:
            # Not `splitlines`, which also divides at characters within a prompt. utf-8-sig drops the mark that some
            # editors write.
            lines = Path(flags.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError("prompts", flags.prompts, f"a text file, a prompt a line ({error})") from None
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise SettingError("prompts", f"{flags.prompts} (nothing in it)", "a text file, a prompt a line")
    if not prompts:
        raise InputError("no prompt is given: say --prompt TEXT, or --prompts FILE; see --help")
    return prompts


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    chat: bool,
    model: str,
) -> list[list[int]]:
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
        rendered = [render(tokenizer, messages, prompt=True) for messages in chats]
        # Verbatim: the template has written all special tokens.
        tokens = text_tokenizer.encode_verbatim(rendered)
    else:
        tokens = text_tokenizer.encode_prompt(prompts)
    for number, ids in enumerate(tokens, 1):
        if not ids:
            raise SettingError("prompt", f"number {number} (no tokens)", "a text that the tokenizer knows something of")
    return tokens


def _placed(config: Config, device: str) -> TrunkSettings:
    """Returns the trunk's settings with the given device, or with the device or devices of the run."""
    if config.trunk.devices and not device:
        return config.trunk
    # The device of all parts is replaced by the CPU later, so the trunk's device has to be set here.
    device_of_trunk = device or config.device_of("trunk")
    return replace(config.trunk, device=device_of_trunk, devices="")


def _new_tokens(
    tokens: Sequence[Sequence[int]],
    requested: int | None,
    positions: int,
    taken: int = 0,
) -> int:
    """Returns the largest number of new tokens of each text.

    Args:
        tokens: Token ids of each prompt.
        requested: Value of `--max-new-tokens`; None if it is not given.
        positions: Number of positions of the model.
        taken: Number of positions taken by virtual tokens or a prefix.

    Raises:
        SettingError: The longest prompt leaves no position, or not as many as requested.
    """
    lengths = [len(ids) for ids in tokens]
    longest = max(lengths)
    room = positions - taken
    model = f"{positions} positions"
    if taken:
        model += f", of which {taken} are taken by what was trained"
    if longest >= room:
        found = f"number {lengths.index(longest) + 1} ({longest} tokens)"
        raise SettingError("prompt", found, f"up to {room - 1} tokens, since the model has {model}")
    if requested is None:
        return min(NEW_TOKENS, room - longest)
    if longest + requested > room:
        allowed = f"1 to {room - longest}, with a prompt of {longest} tokens and {model}"
        raise SettingError("max_new_tokens", requested, allowed)
    return requested


@dataclass(frozen=True)
class _Texts:
    """Tokenised prompts, as in `Job`."""

    tokenizer: PreTrainedTokenizerBase
    tokens: list[list[int]]
    most: int
    stops: list[int]


def check(flags: argparse.Namespace, errors: Iterable[InputError] = ()) -> Job:
    """Checks all inputs before a model is loaded or a process is started, the cheapest first.

    Args:
        flags: The flags. Reading the value of a wrong flag raises `UnknownValue`.
        errors: Errors of the wrong flags.

    Raises:
        InputError: An input is wrong. All errors that are found without reading weights are reported together.
    """
    collector = ErrorCollector()
    collector.extend(errors)
    wrong = []
    for name in _VALUES:
        try:
            _check_value(flags, name)
        except SettingError as error:
            collector.extend(error.errors)
            wrong.append(_attribute(name))
        except UnknownValue:
            continue  # the parser has refused the value, and `errors` has the error
    # A later check that reads a wrong flag ends with `UnknownValue`, and the other checks still run.
    flags = unreadable(flags, wrong)

    prompts: list[str] = []
    with collector.collecting():
        prompts = read_prompts(flags)
    with collector.collecting():
        run = open_run(Path(flags.run))
        job = _job_of(run, flags, prompts)
    collector.check()

    _check_weights(job)  # last, since all values of the weights are read
    return job


def _job_of(run: Run, flags: argparse.Namespace, prompts: Sequence[str]) -> Job:
    """Checks the inputs that depend on the run, without reading weights.

    Args:
        run: The run.
        flags: The flags.
        prompts: The prompts; empty if they are wrong.

    Raises:
        InputError: An input does not fit the run. All errors are reported together.
    """
    collector = ErrorCollector()
    with collector.collecting():
        if flags.client is None:
            run.check_shared()
        adapter = run.adapter(flags.client)
    with collector.collecting():
        if run.config.data.format == "classification":
            raise InputError(f"the run in {run.path} sorts texts into classes: its model has no head that writes")
    with collector.collecting():
        config = _config_of(run, flags)
    with collector.collecting():
        texts = _texts_of(run.config, flags, prompts)
    collector.check()
    # A text continues the prompt. An answer in a chat begins a new line.
    end_of_head = "\n" if flags.chat else ""
    return Job(
        config,
        replace(adapter, model=config.model),
        client=flags.client or 0,  # without personal adapters, all clients write the same
        tokenizer=texts.tokenizer,
        heads=[prompt + end_of_head for prompt in prompts],
        tokens=texts.tokens,
        most=texts.most,
        stops=texts.stops,
        sampling=_sampling(flags),
        batch_size=flags.batch_size,
    )


def _config_of(run: Run, flags: argparse.Namespace) -> Config:
    """Returns the settings of a run for generation: the client computes on the CPU.

    Raises:
        SettingError: The machine lacks a device, or cannot quantise the base weights.
    """
    from fedsplit.model.devices import check_devices
    from fedsplit.model.quantization import check_quantization

    config = replace(
        run.config,
        model=flags.model or run.config.model,
        kernels=flags.kernels or run.config.kernels,
        device="cpu",
        trunk=_placed(run.config, flags.trunk_device),
    )
    check_devices(config)
    check_quantization(config)
    return config


def _texts_of(config: Config, flags: argparse.Namespace, prompts: Sequence[str]) -> _Texts:
    """Returns the prompts as tokens.

    Args:
        config: Settings of the run.
        flags: The flags.
        prompts: The prompts; empty if they are wrong.

    Raises:
        InputError: The model cannot be found, or a prompt is not possible with it.
        UnknownValue: The prompts are wrong.
    """
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder
    from fedsplit.model.token_ids import check_largest, end_tokens
    from fedsplit.model.vocabulary import load_tokenizer

    model = flags.model or config.model
    folder = config_folder(model)
    facts = read_facts(folder)  # before the prompts: a missing model is an error of its own
    if not prompts:
        raise UnknownValue("prompt")
    tokenizer = load_tokenizer(folder)
    tokens = tokenise(tokenizer, prompts, flags.chat, model)
    most = _new_tokens(tokens, flags.max_new_tokens, facts.positions, config.prompt.positions)
    largest = max(max(ids) for ids in tokens)
    check_largest(folder, model, largest)
    return _Texts(tokenizer, tokens, most, stops=end_tokens(folder))


def _sampling(flags: argparse.Namespace) -> Sampling:
    """Returns the options for the choice of tokens."""
    from fedsplit.generation.sampling import Sampling

    # The flags have no defaults of their own, so that `_check_value` sees which are given.
    top_k = flags.top_k or 0
    top_p = flags.top_p or 1.0
    seed = flags.seed or 0
    return Sampling(flags.temperature, top_k, top_p, seed)


def _check_weights(job: Job) -> None:
    """Checks the weights of the model and of the adapter.

    Raises:
        InputError: The weights cannot be read, or do not fit.
    """
    from fedsplit.adaptation.run_adapters import check_made_by
    from fedsplit.model.checkpoint_reader import check_checkpoint
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder, weights_folder
    from fedsplit.results.fitting import read_fitting

    check_checkpoint(weights_folder(job.config), job.config.dtype)
    read_fitting(job.adapter)
    check_made_by(job.adapter.folder, job.config, read_facts(config_folder(job.config.model)).family)
