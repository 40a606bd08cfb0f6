"""`python -m fedsplit.clean`: removes what killed runs left in their folders: clients' text, and unfinished files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.settings.command_line import Parser


def check(run: Path) -> None:
    """Checks that a folder is the folder of a run, so that nothing is removed from any other folder.

    Raises:
        SettingError: The folder belongs to no run.
    """
    has_settings = (run / "config.toml").is_file()
    has_checkpoints = (run / "checkpoints").is_dir()
    if not (has_settings and has_checkpoints):
        raise SettingError("run", run, "the folder of a run, with its config.toml and its checkpoints")


def clean(run: Path) -> list[str]:
    """Removes clients' text and unfinished files from a run's folder. Checkpoints and results stay.

    Args:
        run: The run's folder.

    Returns:
        A line about clients' text and a line about unfinished files, each only if some was removed.

    Raises:
        InputError: The folder belongs to no run, a process is at work in the folder, or the disk refuses to remove.
    """
    check(run)
    from fedsplit.corpora.shards import remove_left
    from fedsplit.durable import NotWritten, tidy, writing
    from fedsplit.state.run_lock import lock

    lines = []
    try:
        # The lock: the files of a run at work are in use, and look the same as what a killed run has left.
        with writing(run), lock(run, setting="run"):
            clients = remove_left(run / "clients")
            drafts = tidy(run)
        if clients:
            lines.append(f"removed the text of {clients} clients from {run / 'clients'}")
        if drafts:
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
        call = make_parser().read(argv)
        collector = ErrorCollector()
        collector.extend(call.errors)
        # All folders are checked before anything is removed from the first folder. `vars`, since reading a refused
        # flag would raise an error.
        for run in vars(call.flags).get("runs") or ():
            with collector.collecting():
                check(run)
        collector.check()

        quieten(offline=True)
        for run in call.flags.runs:
            lines = clean(run) or [f"nothing was left in {run}"]
            print(*lines, sep="\n")

    return exit_code(work, argv)
