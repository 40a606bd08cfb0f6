"""`python -m fedsplit.report`: writes a run, or a comparison of several, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import prepare, quieten
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.reporting.content import Passage
from fedsplit.reporting.groups import groups_of, notices
from fedsplit.reporting.page import REPORT, check_free, write_report
from fedsplit.reporting.run_record import read_run
from fedsplit.reporting.several import comparison
from fedsplit.settings.command_line import Parser

TOKENS = 60
"""Tokens that the model writes by default after a prompt."""

MOST_TOKENS = 1000


@dataclass(frozen=True)
class Job:
    """A report to write.

    Attributes:
        runs: Folders of the runs.
        out: The page; None for its usual place.
        baseline: Folder of a run to compare with; None for none.
        markdown: File for the comparison as Markdown; None for no such file.
        latex: File for the comparison as LaTeX; None for no such file.
        title: Title of the page; empty for the usual one.
        prompt: Beginning of a text that the model goes on with; empty for no text.
        tokens: Number of tokens that the model writes.
    """

    runs: Sequence[Path]
    out: Path | None
    baseline: Path | None
    markdown: Path | None
    latex: Path | None
    title: str
    prompt: str
    tokens: int


def check(job: Job) -> None:
    """Checks everything that can be wrong before anything is written.

    Raises:
        InputError: A folder is none of a run, a file cannot be written, or there is no model to write a text.
    """
    collector = ErrorCollector()
    for folder in [*job.runs, *([job.baseline] if job.baseline else [])]:
        with collector.collecting():
            read_run(folder)
    # The page of a single run lies in the run's folder, where `write_report` checks the place.
    default = Path(REPORT) if len(job.runs) > 1 else None
    out = job.out or default
    if out is not None:
        with collector.collecting():
            check_free(out)
    # Unlike a report, a table has no mark by which an earlier one is known: nothing that is there is replaced.
    for flag, file in (("markdown", job.markdown), ("latex", job.latex)):
        with collector.collecting():
            _check_table(flag, file)
    with collector.collecting():
        if not 1 <= job.tokens <= MOST_TOKENS:
            raise SettingError("tokens", job.tokens, f"a whole number from 1 to {MOST_TOKENS}")
    collector.check()
    if job.prompt:
        _check_prompt(job)


def _check_table(flag: str, file: Path | None) -> None:
    """Checks the file of a table.

    Raises:
        SettingError: The file is there already, or its folder is not.
    """
    if file is None:
        return
    if file.exists():
        raise SettingError(flag, f"{file} (there already)", "a new file")
    if not file.parent.is_dir():
        raise SettingError(flag, file, "a file in a folder that is there")


def _check_prompt(job: Job) -> None:
    """Checks that there is one run with one adapter to write a text with.

    Raises:
        InputError: There is not.
    """
    from fedsplit.results.finished import open_run

    if len(job.runs) != 1:
        raise InputError("prompt: a text is written for a single run")
    run = open_run(job.runs[0])
    run.check_shared()
    run.adapter()
    if run.config.data.format == "classification":
        raise InputError(f"prompt: {job.runs[0]} trained a classifier, which writes no text")


def report(job: Job) -> list[str]:
    """Writes a report, and returns the lines to show."""
    passages: list[Passage] = []
    if job.prompt:
        from fedsplit.results.sample import sample

        before, after = sample(job.runs[0], job.prompt, job.tokens)
        passages = [
            Passage("Written by the base model", before),
            Passage("Written with the run's adapter, from the same beginning", after),
        ]
    page = write_report(job.runs, job.out, job.baseline, passages, job.title)
    lines = [f"{page}: {page.stat().st_size / 1000:.0f} kB, opens in a browser"]

    runs = [read_run(folder) for folder in job.runs]
    lines += [f"note: {notice}" for notice in notices(runs)]
    table = comparison(groups_of(runs))
    for file, content in ((job.markdown, table.markdown()), (job.latex, table.latex())):
        if file is not None:
            file.write_text(content + "\n", encoding="utf-8")
            lines.append(f"{file}: the comparison as a table")
    return lines


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.report",
        description="Writes what runs have left as one HTML page, which opens offline: losses, data, traffic, time, "
        "adapters, memory, settings and versions. Several runs are compared: those that differ in their seeds alone "
        "count as repetitions. Runs may be unfinished.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {REPORT} in the run's folder; of several runs, in the working directory)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="run to compare the losses with, such as one without a split or without aggregation",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the comparison as Markdown, too")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write the comparison as LaTeX, too")
    parser.add_argument("--title", default="", help="title of the page")
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="show how the base model goes on after this text, and how the run's model does; loads the model",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"tokens to write after the prompt (default: {TOKENS})"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        call = make_parser().read(argv)
        collector = ErrorCollector()
        collector.extend(call.errors)
        collector.check()
        flags = call.flags
        # Only a prompt needs a model.
        if flags.prompt:
            prepare()
        quieten(offline=False)
        job = Job(
            flags.runs,
            flags.out,
            flags.baseline,
            flags.markdown,
            flags.latex,
            flags.title,
            flags.prompt,
            flags.tokens,
        )
        check(job)
        print(*report(job), sep="\n")

    return exit_code(work, argv)
