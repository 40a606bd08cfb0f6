"""`fedsplit certificates DIR --clients a,b`: makes a set of certificates for tests of a federation over gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsplit.commands.exit_codes import exit_code
from fedsplit.errors import InputError, SettingError, check_all, shortened
from fedsplit.settings.command_line import Parser

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
"""Names of clients: of folders, of keys in TOML, and of certificates, whose names have at most 64 characters."""

_HOST = re.compile(r"[A-Za-z0-9:](?:[A-Za-z0-9.:-]{0,252}[A-Za-z0-9:])?")

_MOST_DAYS = 3650


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="fedsplit certificates",
        description="Makes a set of certificates for tests: an authority, and a folder each for the trunk, for the "
        "operator of the federation, for Flower's SuperLink, and for each client. Nothing is overwritten.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to make, or an empty folder")
    parser.add_argument(
        "--clients", metavar="NAMES", required=True, help="names of the clients, separated by commas, in their order"
    )
    parser.add_argument(
        "--host",
        dest="hosts",
        metavar="NAME_OR_IP",
        nargs="+",
        default=[],
        help="names and addresses of the machines of the trunk and of the SuperLink, beside localhost",
    )
    parser.add_argument("--days", metavar="N", type=int, default=30, help="days until they expire (default: 30)")
    return parser


def problems(
    folder: Path,
    clients: Sequence[str],
    hosts: Sequence[str],
    days: int,
) -> Iterator[InputError]:
    """Yields an error for each wrong argument.

    Args:
        folder: Folder to make.
        clients: Names of the clients.
        hosts: Names and addresses of the trunk's machine.
        days: Days until the certificates expire.

    Example:
        >>> [str(error) for error in problems(Path("new"), ["a", "a"], [], 30)]
        ['clients: a is not possible; allowed: each name once']
    """
    from fedsplit.wire.set_layout import FEDERATION, SUPERLINK, TRUNK

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        yield SettingError("DIR", shortened(folder), "a folder that does not exist yet, or an empty one")
    for number, name in enumerate(clients):
        if not _NAME.fullmatch(name) or name in (FEDERATION, SUPERLINK, TRUNK):
            allowed = f"letters, digits, - and _ in each name, and not {FEDERATION}, {SUPERLINK} or {TRUNK}"
            yield SettingError("clients", shortened(name), allowed)
        elif name in clients[:number]:
            yield SettingError("clients", name, "each name once")
    for host in hosts:
        if not _HOST.fullmatch(host):
            yield SettingError("host", shortened(host), "the name or the address of a machine, without a port")
    if not 1 <= days <= _MOST_DAYS:
        yield SettingError("days", days, f"a whole number from 1 to {_MOST_DAYS}")


def explained(folder: Path, clients: Sequence[str], days: int) -> list[str]:
    """Returns lines about a set that was made: which folder goes where, and what it is for."""
    from fedsplit.wire.identities import CLIENTS_FILE
    from fedsplit.wire.set_layout import CLIENTS, FEDERATION, SUPERLINK, TRUNK

    return [
        f"certificates for tests, valid for {days} days; the key of their authority is not kept",
        f"  {folder / TRUNK}: to the machine of the trunk, for fedsplit serve --tls; {CLIENTS_FILE} says who is served",
        f"  {folder / SUPERLINK}: to the machine of Flower's SuperLink",
        f"  {folder / FEDERATION}: to the server, where the loop over rounds runs",
        *(f"  {folder / CLIENTS / name}: to client {number}, {name}" for number, name in enumerate(clients)),
        "a key.pem and a supernode.key are secrets: bring each folder to its party alone",
        "where real data are at stake, let an authority of your own issue certificates with the same names",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        flags = make_parser().read(argv).checked()
        clients = [name.strip() for name in flags.clients.split(",")]
        check_all(problems(flags.folder, clients, flags.hosts, flags.days))

        from fedsplit.wire.certificate_set import write_set

        try:
            write_set(flags.folder, clients, flags.hosts, flags.days)
        except OSError as error:
            raise InputError(f"{shortened(flags.folder)} cannot be written: {error.strerror}") from error
        print(*explained(flags.folder, clients, flags.days), sep="\n")

    return exit_code(work, argv)
