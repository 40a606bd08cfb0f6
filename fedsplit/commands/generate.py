"""`python -m fedsplit.generate`: writes text with the model of a finished run, through the split.

The command plays one client, which holds bottom and top. The trunk runs in a separate process, as in training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import prepare, quieten
from fedsplit.errors import InputError, SettingError
from fedsplit.results.finished import Adapter, open_run
from fedsplit.settings.choices import KERNELS
from fedsplit.settings.config import Config
from fedsplit.settings.flags import Parser
from fedsplit.settings.validators import DEVICE, Validator, at_least, one_of

if TYPE_CHECKING:
    from fedsplit.generation.decoding import ClientHalf, Throughput
    from fedsplit.generation.sampling import Sampling
    from fedsplit.trunk.port import TrunkPort
    from fedsplit.trunk.status import Bytes, Traffic

NEW_TOKENS = 64
"""Default of `--max-new-tokens`, if the model has positions for as many."""


class GenerationFailed(Exception):
    """The trunk refused a step."""


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
    tokenizer: Any
    heads: list[str]
    tokens: list[list[int]]
    most: int
    stops: list[int]
    sampling: Sampling
    batch_size: int


def _checked(name: str, value: Any, allowed: Validator) -> Any:
    """Returns a value if it is allowed; raises a SettingError otherwise."""
    if not allowed.test(value):
        words = allowed.words.replace("a number", "a whole number") if isinstance(value, int) else allowed.words
        raise SettingError(name, value, words)
    return value


def _check_values(flags: argparse.Namespace) -> None:
    """Checks the ranges of the flags.

    Raises:
        SettingError: A value is out of its range, or a flag for drawing is given without a temperature.
    """
    temperature = Validator("0, which takes the likeliest token, or a number from 0.01 to 100", _is_temperature)
    _checked("temperature", flags.temperature, temperature)
    _checked("batch_size", flags.batch_size, at_least(1))
    if flags.max_new_tokens is not None:
        _checked("max_new_tokens", flags.max_new_tokens, at_least(1))
    if flags.kernels:
        _checked("kernels", flags.kernels, one_of(KERNELS))

    probability = Validator("a number above 0, up to 1", lambda value: 0 < value <= 1)
    ranges = {"top_k": at_least(1), "top_p": probability, "seed": at_least(0, 2**32 - 1)}
    for name, allowed in ranges.items():
        value = getattr(flags, name)
        if value is None:
            continue
        _checked(name, value, allowed)
        if not flags.temperature:
            raise SettingError(name, value, "none without --temperature, since then nothing is drawn")


def _is_temperature(value: float) -> bool:
    return value == 0 or 0.01 <= value <= 100


def _read_prompts(flags: argparse.Namespace) -> list[str]:
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


def _trunk_device(flags: argparse.Namespace, config: Config) -> str:
    """Returns the device of the trunk: the one of `--trunk.device`, else the run's. The client uses the CPU.

    Raises:
        SettingError: There is no device of that name.
    """
    name: str = flags.trunk_device or config.device_of("trunk")
    return str(_checked("trunk.device", name, DEVICE))


def _tokenise(tokenizer: Any, prompts: Sequence[str], chat: bool, model: str) -> list[list[int]]:
    """Returns the token ids of each prompt, with special tokens at the beginning alone.

    Args:
        tokenizer: Tokenizer of transformers.
        prompts: The prompts.
        chat: Whether to put each prompt into the chat template, as a user's message.
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
        InputError: An input is wrong.
    """
    _check_values(flags)
    prompts = _read_prompts(flags)
    run = open_run(Path(flags.run))
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

    config = replace(config, device="cpu", trunk=replace(config.trunk, device=_trunk_device(flags, config)))
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
    tokens = _tokenise(tokenizer, prompts, flags.chat, config.model)
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


def _load_client_parts(job: Job) -> list[Any]:
    """Loads bottom and top with their adapters, in as many bits as in the run."""
    from fedsplit.adaptation import run_adapters

    parts = run_adapters.bare_parts(job.config, ["bottom", "top"])
    run_adapters.adopt(job.adapter.folder, job.config, *parts)
    return parts


@contextlib.contextmanager
def _split(job: Job) -> Iterator[tuple[ClientHalf, TrunkPort]]:
    """Starts the trunk and loads the client's half at the same time; stops the trunk when the context ends."""
    import torch

    from fedsplit.client.link import Link
    from fedsplit.engines.planning import plan
    from fedsplit.generation.decoding import ClientHalf
    from fedsplit.trunk import cluster
    from fedsplit.trunk.actor import start_trunk
    from fedsplit.trunk.doors import check_memory
    from fedsplit.trunk.schedules import SCHEDULES
    from fedsplit.wire.codecs import make_codec

    config = job.config
    shares = plan(replace(config, clients=1, deterministic=False))
    torch.set_num_threads(shares.client_threads)
    name = f"trunk-{os.getpid()}-{time.time_ns()}"
    with cluster.running(workers=1):
        trunk = start_trunk(config, name, shares.trunk_threads, adapter=job.adapter.folder.absolute())
        bottom, top = _load_client_parts(job)
        check_memory(config, trunk)
        incarnation = trunk.status().incarnation
        link = Link(trunk, make_codec(config.wire.codec), SCHEDULES[config.trunk.schedule], name, incarnation)
        yield ClientHalf(job.client, bottom, top, link), trunk


def generate(job: Job, show: Callable[[str], object]) -> list[str]:
    """Writes the texts.

    Args:
        job: The texts to write.
        show: Function that shows a piece of text as soon as the piece is known.

    Returns:
        Lines of a table on speed and traffic.

    Raises:
        GenerationFailed: The trunk refused a step.
        TrunkLost: The trunk is gone.
    """
    from fedsplit.generation.decoding import Throughput, depends_on_neighbours
    from fedsplit.wire.steps import RefusedStep

    throughput = Throughput()
    numbers = range(len(job.tokens))
    with _split(job) as (half, trunk):
        size = 1 if depends_on_neighbours(half.bottom) else job.batch_size
        try:
            for start in range(0, len(job.tokens), size):
                _write_batch(job, half, numbers[start : start + size], show, throughput)
        except RefusedStep as error:
            raise GenerationFailed(str(getattr(error, "cause", error))) from None
        traffic = trunk.status().traffic
    return lines(throughput, traffic)


def _write_batch(
    job: Job, half: ClientHalf, numbers: Sequence[int], show: Callable[[str], object], throughput: Throughput
) -> None:
    """Writes the texts of some prompts as one batch, and shows them in order.

    Args:
        job: The texts to write.
        half: The client's half of the model.
        numbers: Numbers of the prompts.
        show: Function that shows a piece of text.
        throughput: Record to which the tokens and seconds are added.
    """
    from fedsplit.generation.decoding import decode
    from fedsplit.generation.sampling import Chooser
    from fedsplit.generation.transcript import Detokeniser, OrderedOutput

    prompts = [job.tokens[number] for number in numbers]
    detokenisers = [Detokeniser(job.tokenizer, prompt) for prompt in prompts]
    output = OrderedOutput([("\n" if number else "") + job.heads[number] for number in numbers], show)
    running = [True] * len(prompts)

    def end(row: int) -> None:
        output.add(row, detokenisers[row].end())
        output.end(row)

    choose = Chooser(job.sampling, numbers)
    with contextlib.closing(decode(half, prompts, job.most, job.stops, choose, throughput)) as steps:
        for tokens in steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    output.add(row, detokenisers[row].add(token))
                if running[row] and (token is None or token in job.stops):
                    running[row] = False
                    end(row)

    for row, runs in enumerate(running):
        if runs:  # its last token is no stop token: the text has as many tokens as it may have
            end(row)


def lines(throughput: Throughput, traffic: Traffic) -> list[str]:
    """Returns the lines of a table on speed and traffic, for prompts and for new tokens.

    Args:
        throughput: Numbers of tokens and seconds.
        traffic: Bytes, as the trunk counted them.
    """
    from fedsplit.report import aligned, size

    def row(name: str, tokens: int, seconds: float, sent: Bytes) -> tuple[str, ...]:
        speed = f"{tokens / seconds:,.0f}" if tokens else "-"
        up = size(sent.up / max(1, tokens))
        down = size(sent.down / max(1, tokens))
        return name, f"{tokens:,}", f"{seconds:.2f}", speed, up, down

    return aligned(
        [
            ("", "tokens", "seconds", "a second", "bytes a token up", "down"),
            row("prompts", throughput.read, throughput.read_seconds, traffic.prompt),
            row("after them", throughput.written, throughput.written_seconds, traffic.token),
        ]
    )


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="python -m fedsplit.generate",
        description="Writes text with the model of a finished run, through the split: one client holds bottom and top, "
        "and the trunk runs in a separate process. Texts are written in batches, padded on the left. Without a "
        "temperature the likeliest token is always taken.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the folder of a finished run")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a text to continue; may be given several times")
    add("--prompts", default="", metavar="FILE", help="a text file with a prompt in each line")
    add("--client", type=int, metavar="N", help="use this client's personal adapter, if clients have any")
    add("--chat", action="store_true", help="send each prompt as a user's message, in the chat template")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"most tokens of a text (default: {NEW_TOKENS}, or all there is room for)",
    )
    add(
        "--temperature", type=float, default=0.0, metavar="X", help="draw tokens, from logits divided by X (default: 0)"
    )
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens (default: all)")
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="draw from the fewest tokens of total probability X (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="seed of the draws (default: 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="number of texts written at once (default: 8)")
    add("--kernels", default="", metavar="NAME", help=f"{' | '.join(KERNELS)} (default: the run's)")
    add(
        "--trunk.device",
        dest="trunk_device",
        default="",
        metavar="NAME",
        help=f"device of the trunk: {DEVICE.words} (default: as in the run); the client uses the CPU",
    )
    add("--model", default="", metavar="DIR", help="folder of the base model, if it was moved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        flags = make_parser().parse_args(argv)
        prepare()
        quieten()
        job = check(flags)
        for line in generate(job, lambda piece: print(piece, end="", flush=True)):
            print(line, file=sys.stderr)

    return exit_code(work)
