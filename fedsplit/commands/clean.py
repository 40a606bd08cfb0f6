"""`python -m fedsplit.clean`: removes what killed runs left in their folders: clients' text, and unfinished files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.settings.flags import Parser


def check(run: Path) -> None:
    """Makes sure that a folder is a run's, so that nothing is removed from any other folder.

    Raises:
        SettingError: The folder is not a run's.
    """
    if not ((run / "config.toml").is_file() and (run / "checkpoints").is_dir()):
        raise SettingError("run", run, "the folder of a run, with its config.toml and its checkpoints")


def clean(run: Path) -> list[str]:
    """Removes clients' text and unfinished files from a run's folder. Checkpoints and results stay.

    Args:
        run: The run's folder.

    Returns:
        A line for each kind of thing that was removed; empty where nothing was left.

    Raises:
        InputError: The folder is not a run's, a process is at work in it, or nothing can be removed from it.
    """
    check(run)
    from fedsplit.corpora.shards import remove_left
    from fedsplit.durable import NotWritten, tidy, writing
    from fedsplit.state.run_lock import lock

    lines = []
    try:
        with writing(run), lock(run, setting="run"):
            if clients := remove_left(run / "clients"):
                lines.append(f"removed the text of {clients} clients from {run / 'clients'}")
            if drafts := tidy(run):
                lines.append(f"removed {len(drafts)} unfinished files and folders from {run}")
    except NotWritten as error:
        raise InputError(str(error)) from error
    return lines


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.clean",
        description="Removes what a run that was killed left in its folder: the text of its clients, and files that "
        "were not finished. Checkpoints and results stay. --resume removes the same before it goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run that is not at work")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        flags = make_parser().parse_args(argv)
        collector = ErrorCollector()
        for run in flags.runs:  # all of them, before anything is removed
            with collector.collecting():
                check(run)
        collector.check()
        quieten(offline=True)
        for run in flags.runs:
            print(*(clean(run) or [f"nothing was left in {run}"]), sep="\n")

    return exit_code(work, argv)
