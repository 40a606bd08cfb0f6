"""`python -m fedsplit.generate`: writes text with the model of a finished run, through the split.

The command plays one client, which holds bottom and top. The trunk runs in a separate process, as in training.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedsplit.commands.exit_codes import exit_code
from fedsplit.commands.generation_job import NEW_TOKENS, Job, check
from fedsplit.environment import prepare, quieten
from fedsplit.settings.choices import KERNELS
from fedsplit.settings.command_line import Parser
from fedsplit.settings.validators import DEVICE

if TYPE_CHECKING:
    from fedsplit.generation.decoding import ClientHalf, Throughput
    from fedsplit.model.parts import Bottom, Top
    from fedsplit.trunk.port import TrunkPort
    from fedsplit.trunk.status import Bytes, Traffic


class GenerationFailed(Exception):
    """No text can be written, since the trunk refused a step."""


def _load_client_parts(job: Job) -> tuple[Bottom, Top]:
    """Loads bottom and top with their adapters, in as many bits as in the run."""
    from fedsplit.adaptation import run_adapters

    bottom, top = run_adapters.bare_parts(job.config, ["bottom", "top"])
    run_adapters.adopt(job.adapter.folder, job.config, bottom, top)
    return bottom, top


@contextlib.contextmanager
def _split(job: Job) -> Iterator[tuple[ClientHalf, TrunkPort]]:
    """Starts the trunk and loads the client's half at the same time. At the end of the context the trunk stops."""
    import torch

    from fedsplit.client.link import Link
    from fedsplit.engines.planning import plan
    from fedsplit.generation.decoding import ClientHalf
    from fedsplit.model.sources import config_folder
    from fedsplit.proving.kept import proof_of
    from fedsplit.trunk import cluster
    from fedsplit.trunk.actor import ActorSetup
    from fedsplit.trunk.doors import check_memory
    from fedsplit.trunk.ray_trunks import start_trunks
    from fedsplit.trunk.schedules import SCHEDULES
    from fedsplit.wire.by_role import codec_of

    # A single client generates, so that one trunk on this machine is enough.
    one_trunk = replace(job.config.trunk, stages="", replicas=1, sync="round")
    config = replace(job.config, trunk=one_trunk)
    # Nothing is trained, so that no plan has to keep results equal over numbers of processes.
    shares = plan(replace(config, clients=1, deterministic=False))
    torch.set_num_threads(shares.client_threads)

    name = f"trunk-{os.getpid()}-{time.time_ns()}"  # unlike the names of all other calls, also in one cluster
    with cluster.running(workers=1):
        # `start_trunks` returns before the trunk has loaded its blocks. The client loads its parts meanwhile.
        setup = ActorSetup(threads=shares.trunk_threads, adapter=job.adapter.folder.absolute())
        trunk = start_trunks(config, name, setup)
        bottom, top = _load_client_parts(job)
        check_memory(config, trunk)

        codec = codec_of(config.wire, config.seed)
        schedule = SCHEDULES[config.trunk.schedule]
        incarnation = trunk.status().incarnation
        link = Link(trunk, codec, schedule, name, incarnation)
        caches = proof_of(config_folder(config.model)).generates
        yield ClientHalf(job.client, bottom, top, link, caches), trunk


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
        # If a text depends on the other texts of the batch, each text is written alone.
        is_alone = depends_on_neighbours(half.bottom) or not half.caches
        size = 1 if is_alone else job.batch_size
        try:
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                _write_batch(job, half, batch, show, throughput)
        except RefusedStep as error:
            # Through Ray, the trunk's error comes wrapped in another one, as its cause.
            raise GenerationFailed(str(getattr(error, "cause", error))) from None
        traffic = trunk.status().traffic
    return lines(throughput, traffic)


def _write_batch(
    job: Job,
    half: ClientHalf,
    numbers: Sequence[int],
    show: Callable[[str], object],
    throughput: Throughput,
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
    heads = []
    for number in numbers:
        separator = "\n" if number > 0 else ""
        heads.append(separator + job.heads[number])
    output = OrderedOutput(heads, show)
    # A text that has ended gets no more tokens, while others of its batch go on.
    running = [True] * len(prompts)

    def end(row: int) -> None:
        output.add(row, detokenisers[row].end())
        output.end(row)

    choose = Chooser(job.sampling, numbers)
    # Closing ends the session at the trunk, also after an error.
    with contextlib.closing(decode(half, prompts, job.most, job.stops, choose, throughput)) as steps:
        for tokens in steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    output.add(row, detokenisers[row].add(token))
                is_over = token is None or token in job.stops
                if running[row] and is_over:
                    running[row] = False
                    end(row)

    # The remaining texts have the largest number of tokens, and no stop token at the end.
    for row, is_running in enumerate(running):
        if is_running:
            end(row)


def lines(throughput: Throughput, traffic: Traffic) -> list[str]:
    """Returns the lines of a table on speed and traffic, for prompts and for new tokens.

    Args:
        throughput: Numbers of tokens and seconds.
        traffic: Bytes, as the trunk counted them.
    """
    from fedsplit.formatting import aligned

    head = ("", "tokens", "seconds", "a second", "bytes a token up", "down")
    prompts = _speed_row("prompts", throughput.read, throughput.read_seconds, traffic.prompt)
    new_tokens = _speed_row("after them", throughput.written, throughput.written_seconds, traffic.token)
    return aligned([head, prompts, new_tokens])


def _speed_row(name: str, tokens: int, seconds: float, sent: Bytes) -> tuple[str, ...]:
    """Returns a row about some tokens.

    Args:
        name: First cell of the row.
        tokens: Number of tokens.
        seconds: Time for all tokens.
        sent: Bytes for all tokens, up to the trunk and down to the client.
    """
    from fedsplit.formatting import size

    speed = f"{tokens / seconds:,.0f}" if tokens else "-"
    up = size(sent.up / max(1, tokens))
    down = size(sent.down / max(1, tokens))
    return name, f"{tokens:,}", f"{seconds:.2f}", speed, up, down


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
        call = make_parser().read(argv)
        prepare()
        quieten()
        job = check(call.flags, call.errors)

        from fedsplit.events.screen import make_screen

        screen = make_screen(errors=True)

        def show(piece: str) -> None:
            screen.close()  # the text is what moves from here on
            print(piece, end="", flush=True)

        with screen:
            screen.phase("loading the parts", 0, 0)
            speed = generate(job, show)
        # Texts go to stdout and the table to stderr, so that a pipe gets the texts alone.
        print(*speed, sep="\n", file=sys.stderr)

    return exit_code(work, argv)
