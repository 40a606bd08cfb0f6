"""`python -m fedsplit.generate`: text from a finished run's model, which stays cut in three while it writes.

The command plays one client, which holds bottom and top; the trunk is started as in training, in a process of its own.
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

from fedsplit.allowed import DEVICE, KERNELS, Allowed, InputError, SettingError, at_least, one_of
from fedsplit.command import exit_code
from fedsplit.config import Config
from fedsplit.environment import prepare, quieten
from fedsplit.flags import Parser
from fedsplit.results.finished import Adapter, Run, open_run

if TYPE_CHECKING:
    from fedsplit.generation.decoding import Ends, Pace
    from fedsplit.generation.sampling import Sampling
    from fedsplit.trunk.port import TrunkPort
    from fedsplit.trunk.status import Bytes, Traffic

NEW_TOKENS = 64
"""Of each text at most, where nothing else is said and the model has positions for them."""


class GenerationFailed(Exception):
    """The trunk refused to go on."""


@dataclass(frozen=True)
class Job:
    """What is to be written, all of it checked.

    Attributes:
        config: The run's settings.
        adapter: The adapter whose text it is.
        client: Whose bottom and top write it.
        tokenizer: The library's.
        heads: What is shown of each prompt.
        tokens: As the model reads them.
        most: New tokens of each at most.
        stops: Tokens that end a text.
        how: How tokens are chosen.
        batch: Texts at once.
    """

    config: Config
    adapter: Adapter
    client: int
    tokenizer: Any
    heads: list[str]
    tokens: list[list[int]]
    most: int
    stops: list[int]
    how: Sampling
    batch: int


def _checked(name: str, value: Any, allowed: Allowed) -> Any:
    if not allowed.test(value):
        words = allowed.words.replace("a number", "a whole number") if isinstance(value, int) else allowed.words
        raise SettingError(name, value, words)
    return value


def _check_values(asked: argparse.Namespace) -> None:
    """Makes sure that numbers are possible.

    Raises:
        SettingError: One is not.
    """
    warmth = Allowed("0, which takes the likeliest token, or a number from 0.01 to 100", _is_temperature)
    _checked("temperature", asked.temperature, warmth)
    _checked("batch_size", asked.batch_size, at_least(1))
    if asked.max_new_tokens is not None:
        _checked("max_new_tokens", asked.max_new_tokens, at_least(1))
    odds = Allowed("a number above 0, up to 1", lambda v: 0 < v <= 1)
    ranges = {"top_k": at_least(1), "top_p": odds, "seed": at_least(0, 2**32 - 1)}
    for name, allowed in ranges.items():
        if (value := getattr(asked, name)) is not None:
            _checked(name, value, allowed)
            if not asked.temperature:
                raise SettingError(name, value, "none without --temperature, since then nothing is drawn")
    if asked.kernels:
        _checked("kernels", asked.kernels, one_of(KERNELS))


def _is_temperature(value: float) -> bool:
    return value == 0 or 0.01 <= value <= 100


def _read_prompts(asked: argparse.Namespace) -> list[str]:
    """All prompts, those of the file last.

    Raises:
        SettingError: There is none, one is empty, or the file cannot be read.
    """
    prompts = list(asked.prompt)
    if any(not prompt.strip() for prompt in prompts):
        raise SettingError("prompt", "nothing", "a text that is not empty")
    if asked.prompts:
        try:
            lines = Path(asked.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError("prompts", asked.prompts, f"a text file, a prompt a line ({error})") from None
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise SettingError("prompts", f"{asked.prompts} (nothing in it)", "a text file, a prompt a line")
    if not prompts:
        raise InputError("say what to go on from: --prompt TEXT, or --prompts FILE; see --help")
    return prompts


def _adapter(run: Run, client: int | None) -> Adapter:
    """The adapter that writes: the one all share, or the client's own.

    Raises:
        InputError: There is no such client, or it is not said which one, where each has its own.
    """
    if client is None and run.personal:
        numbers = ", ".join(map(str, run.personal))
        raise InputError(f"in this run every client has an adapter of its own: say --client, one of {numbers}")
    return run.adapter(client)


def _trunk_device(asked: argparse.Namespace, config: Config) -> str:
    """What the trunk computes on: what is asked for, or as in the run; the client writes on the CPU.

    Raises:
        SettingError: No device is called so.
    """
    name: str = asked.trunk_device or config.device_of("trunk")
    return str(_checked("trunk.device", name, DEVICE))


def _tokenise(tokenizer: Any, prompts: Sequence[str], chat: bool, model: str) -> list[list[int]]:
    """Prompts as the model reads them, with the special tokens that begin a text and without those that end one.

    Args:
        tokenizer: The library's.
        prompts: The prompts.
        chat: Whether they are put into the template for conversations.
        model: The model's name, for messages.

    Raises:
        InputError: There is no template for a conversation, or a prompt cannot be encoded.
    """
    from fedsplit.model.vocabulary import TextTokenizer, is_text, render

    if chat and not tokenizer.chat_template:
        raise InputError(f"chat: the tokenizer of {model} has no template for a conversation")
    for number, prompt in enumerate(prompts, 1):
        if not is_text(prompt):
            raise SettingError("prompt", f"number {number} (it has bytes that are no UTF-8)", "a text in UTF-8")
    texts = TextTokenizer(tokenizer)
    if chat:
        tokens = texts.encode_verbatim(
            [render(tokenizer, [{"role": "user", "content": p}], prompt=True) for p in prompts]
        )
    else:
        tokens = texts.encode_prompt(prompts)
    for number, found in enumerate(tokens, 1):
        if not found:
            raise SettingError("prompt", f"number {number} (no tokens)", "a text that the tokenizer knows something of")
    return tokens


def _new_tokens(tokens: Sequence[Sequence[int]], asked: int | None, positions: int, taken: int = 0) -> int:
    """How many tokens each text may get.

    Args:
        tokens: The prompts.
        asked: What is asked for, if anything.
        positions: The model's.
        taken: Those that virtual tokens or a prefix take.

    Raises:
        SettingError: A prompt leaves no room, or there is none for so many.
    """
    number, longest = max(enumerate(map(len, tokens), 1), key=lambda found: found[1])
    room = positions - taken
    there = f"{positions} positions" + (f", of which {taken} are taken by what was trained" if taken else "")
    if longest >= room:
        words = f"up to {room - 1} tokens, since the model has {there}"
        raise SettingError("prompt", f"number {number} ({longest} tokens)", words)
    if asked is None:
        return min(NEW_TOKENS, room - longest)
    if longest + asked > room:
        words = f"1 to {room - longest}, with a prompt of {longest} tokens and {there}"
        raise SettingError("max_new_tokens", asked, words)
    return asked


def check(asked: argparse.Namespace) -> Job:
    """Everything that can be found wrong before a model is loaded or a process started; cheapest first.

    Raises:
        InputError: Something was given wrongly.
    """
    _check_values(asked)
    prompts = _read_prompts(asked)
    run = open_run(Path(asked.run))
    config = replace(run.config, model=asked.model or run.config.model, kernels=asked.kernels or run.config.kernels)
    adapter = replace(_adapter(run, asked.client), model=config.model)
    if config.data.format == "classification":
        raise InputError(f"the run in {run.path} sorts texts into classes: its model has no head that writes")

    from fedsplit.model.devices import check_devices
    from fedsplit.model.families import read_facts
    from fedsplit.model.quantization import check_quantization
    from fedsplit.model.sources import config_folder, weights_folder

    config = replace(config, device="cpu", trunk=replace(config.trunk, device=_trunk_device(asked, config)))
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
    tokens = _tokenise(tokenizer, prompts, asked.chat, config.model)
    most = _new_tokens(tokens, asked.max_new_tokens, facts.positions, config.prompt.positions)
    check_largest(model, config.model, max(max(ids) for ids in tokens))
    check_checkpoint(weights_folder(config), config.dtype)
    read_fitting(adapter)
    check_made_by(adapter.folder, config, facts.family)
    how = Sampling(asked.temperature, asked.top_k or 0, asked.top_p or 1.0, asked.seed or 0)
    stops = end_tokens(model)
    client = asked.client or 0
    heads = [f"{prompt}\n" if asked.chat else prompt for prompt in prompts]
    return Job(config, adapter, client, tokenizer, heads, tokens, most, stops, how, asked.batch_size)


def _load_ends(job: Job) -> list[Any]:
    """The client's parts, held in as many bits as in the run, with its adapters."""
    from fedsplit.adaptation import run_adapters

    parts = run_adapters.bare_parts(job.config, ["bottom", "top"])
    run_adapters.adopt(job.adapter.folder, job.config, *parts)
    return parts


@contextlib.contextmanager
def _split(job: Job) -> Iterator[tuple[Ends, TrunkPort]]:
    """Starts the trunk, loads what the client has meanwhile, and stops the trunk at the end, however it ends."""
    import torch

    from fedsplit.client.link import Link
    from fedsplit.engines.planning import plan
    from fedsplit.generation.decoding import Ends
    from fedsplit.trunk import cluster
    from fedsplit.trunk.actor import start_trunk
    from fedsplit.trunk.doors import check_memory
    from fedsplit.trunk.schedules import SCHEDULES
    from fedsplit.wire.codecs import make_codec

    config, folder = job.config, job.adapter.folder.absolute()
    shares = plan(replace(config, clients=1, deterministic=False))
    torch.set_num_threads(shares.client_threads)
    name = f"trunk-{os.getpid()}-{time.time_ns()}"
    with cluster.running(workers=1):
        trunk = start_trunk(config, name, shares.trunk_threads, adapter=folder)
        bottom, top = _load_ends(job)
        check_memory(config, trunk)
        incarnation = trunk.status().incarnation
        link = Link(trunk, make_codec(config.wire.codec), SCHEDULES[config.trunk.schedule], name, incarnation)
        yield Ends(job.client, bottom, top, link), trunk


def generate(job: Job, show: Callable[[str], object]) -> list[str]:
    """Writes the texts.

    Args:
        job: What to write.
        show: Is given every piece of text as it is known.

    Returns:
        Lines on how fast it went and what crossed.

    Raises:
        GenerationFailed, TrunkLost: The trunk refused to go on, or is gone.
    """
    from fedsplit.generation.decoding import Pace, depends_on_neighbours
    from fedsplit.wire.steps import RefusedStep

    pace = Pace()
    with _split(job) as (ends, trunk):
        size = 1 if depends_on_neighbours(ends.bottom) else job.batch
        numbers = range(len(job.tokens))
        try:
            for start in range(0, len(job.tokens), size):
                _write(job, ends, numbers[start : start + size], show, pace)
        except RefusedStep as error:
            raise GenerationFailed(str(getattr(error, "cause", error))) from None
        traffic = trunk.status().traffic
    return lines(pace, traffic)


def _write(
    job: Job,
    ends: Ends,
    numbers: Sequence[int],
    show: Callable[[str], object],
    pace: Pace,
) -> None:
    """Writes some of the texts as one batch, and shows them one after the other."""
    from fedsplit.generation.decoding import decode
    from fedsplit.generation.sampling import Chooser
    from fedsplit.generation.transcript import InTurn, Words

    prompts = [job.tokens[number] for number in numbers]
    words = [Words(job.tokenizer, prompt) for prompt in prompts]
    shown = InTurn([("\n" if number else "") + job.heads[number] for number in numbers], show)
    running = [True] * len(prompts)
    with contextlib.closing(decode(ends, prompts, job.most, job.stops, Chooser(job.how, numbers), pace)) as steps:
        for tokens in steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    shown.add(row, words[row].add(token))
                if running[row] and (token is None or token in job.stops):
                    running[row] = False
                    shown.add(row, words[row].end())
                    shown.end(row)
    for row in (row for row, runs in enumerate(running) if runs):
        shown.add(row, words[row].end())
        shown.end(row)


def lines(pace: Pace, traffic: Traffic) -> list[str]:
    """How fast it went, of prompts and of what followed, and what crossed.

    Args:
        pace: What was done.
        traffic: Bytes that the trunk has counted.
    """
    from fedsplit.report import aligned, size

    def a_token(crossed: Bytes, count: int) -> tuple[str, str]:
        return size(crossed.up / max(1, count)), size(crossed.down / max(1, count))

    def speed(count: int, seconds: float) -> tuple[str, str, str]:
        return f"{count:,}", f"{seconds:.2f}", f"{count / seconds:,.0f}" if count else "-"

    rows = [
        ("", "tokens", "seconds", "a second", "bytes a token up", "down"),
        ("prompts", *speed(pace.read, pace.read_seconds), *a_token(traffic.prompt, pace.read)),
        ("after them", *speed(pace.written, pace.written_seconds), *a_token(traffic.token, pace.written)),
    ]
    return aligned(rows)


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.generate",
        description="Text from a finished run's model, generated through the split: one client with bottom and top, "
        "and the trunk in a process of its own. Texts are written in batches, padded on the left; the likeliest token "
        "is taken always, unless a temperature is given.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the folder of a finished run")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to go on from; may be given several times")
    add("--prompts", default="", metavar="FILE", help="a text file, a prompt a line")
    add("--client", type=int, metavar="N", help="the client whose own adapter is to be used, where clients have any")
    add("--chat", action="store_true", help="a prompt is what a user says, in the tokenizer's template")
    add("--max-new-tokens", type=int, metavar="N", help=f"tokens at most (default: {NEW_TOKENS}, or what is left)")
    add(
        "--temperature", type=float, default=0.0, metavar="X", help="draw tokens, from logits divided by X (default: 0)"
    )
    add("--top-k", type=int, metavar="N", help="draw among the N likeliest (default: all)")
    add("--top-p", type=float, metavar="X", help="draw among the fewest likeliest of probability X (default: 1)")
    add("--seed", type=int, metavar="N", help="decides what is drawn (default: 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts that are written at once (default: 8)")
    add("--kernels", default="", metavar="NAME", help=f"{' | '.join(KERNELS)} (default: the run's)")
    add(
        "--trunk.device",
        dest="trunk_device",
        default="",
        metavar="NAME",
        help=f"what the trunk computes on: {DEVICE.words} (default: as in the run); the client is on the CPU",
    )
    add("--model", default="", metavar="DIR", help="where the base model lies now, if it was moved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where it ended well, 1 where it broke, 2 where it was asked for wrongly, 130 on Ctrl-C."""

    def work() -> None:
        asked = make_parser().parse_args(argv)
        prepare()
        quieten()
        job = check(asked)
        for line in generate(job, lambda piece: print(piece, end="", flush=True)):
            print(line, file=sys.stderr)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
