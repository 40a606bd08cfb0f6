"""`fedsplit network`: shows networks, makes them from other projects' device traces, and records compute times."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import InputError, shortened
from fedsplit.formatting import aligned, plain_number
from fedsplit.network import device_traces
from fedsplit.network.fleet import read_fleet
from fedsplit.network.profiles import RANGES
from fedsplit.settings.command_line import Call, Parser
from fedsplit.settings.documents import build
from fedsplit.settings.flags import read_draft
from fedsplit.settings.validators import COMPUTE_TABLE

_PICKLES = (".pkl", ".pickle", "")
"""Endings of files that FedScale ships as pickles; its own have none."""


MOST_CLIENTS = 100_000
"""Largest number of clients in a table or in a file that the command writes: a row for each client."""


def _show(call: Call) -> list[str]:
    """Returns the table of a network's profiles by client, with the trunk's own link in the last row."""
    flags = call.checked()
    config = build({"network.profile": flags.network, "clients": flags.clients, "seed": flags.seed})
    fleet = read_fleet(config.network.profile)
    # Which numbers the names of clients belong to is known with the data alone: they have rows of their own.
    by_name = {}
    for rule in fleet.rules:
        for client in rule.clients:
            if isinstance(client, str):
                by_name[client] = rule.profile
    numbered = []
    for rule in fleet.rules:
        numbers = tuple(client for client in rule.clients if isinstance(client, int))
        numbered.append(replace(rule, clients=numbers))
    profiles = replace(fleet, rules=tuple(numbered)).profiles([""] * config.clients, config.seed)

    rows = [("client", *RANGES)]
    for name, profile in [*enumerate(profiles), *by_name.items()]:
        rows.append((str(name), *map(plain_number, profile.document().values())))
    links = (plain_number(fleet.trunk.uplink_mbps), plain_number(fleet.trunk.downlink_mbps))
    empty = [""] * (len(RANGES) - len(links))
    rows.append(("trunk", *links, *empty))
    return aligned(rows)


def _import_fedscale(call: Call) -> list[str]:
    """Writes a network file from FedScale's traces."""
    flags = call.checked()
    devices = _read(flags.devices, flags.unpickle)
    behaviour = None if flags.behaviour is None else _read(flags.behaviour, flags.unpickle)
    document = device_traces.from_fedscale(devices, behaviour, flags.clients, flags.seed, flags.rtt_ms)
    return _written(document, flags.out)


def _import_flhetbench(call: Call) -> list[str]:
    """Writes a network file from FLHetBench's data."""
    flags = call.checked()
    devices = _read(flags.devices, False)
    timers = None if flags.timers is None else _read(flags.timers, False)
    states = None if flags.states is None else _read(flags.states, False)
    if states is not None and timers is None:
        raise InputError("--states needs --timers, whose devices it names")
    document = device_traces.from_flhetbench(devices, timers, states, flags.clients, flags.seed, flags.rtt_ms)
    return _written(document, flags.out)


def _read(path: Path, unpickles: bool) -> object:
    """Reads a trace: JSON, or a pickle of plain values if that is asked for.

    Raises:
        InputError: The file cannot be read, or is a pickle and nobody asked to unpickle it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{shortened(path)} cannot be read: {error.strerror}") from None
    try:
        # JSON first, whatever the name says: a trace that was converted may have kept its name.
        return json.loads(content)
    except (ValueError, RecursionError):
        if path.suffix not in _PICKLES:
            raise InputError(f"{shortened(path)} is no JSON") from None
    if not unpickles:
        words = "is no JSON, and is not unpickled unless --unpickle asks for it"
        raise InputError(f"{shortened(path)} {words}; then plain values alone are read")
    from fedsplit.network.plain_pickle import read_plain

    return read_plain(path)


def _written(document: Mapping[str, Any], out: Path) -> list[str]:
    """Writes a network file, and returns lines about it.

    Raises:
        InputError: The file exists, or cannot be written.
    """
    import tomli_w

    read_fleet(json.dumps(document))  # what is written can be read
    try:
        # "x": a file that is there stays.
        with out.open("x", encoding="utf-8") as file:
            file.write(tomli_w.dumps(document))
    except OSError as error:
        raise InputError(f"{shortened(out)} cannot be written: {error.strerror}") from None
    return [f"{len(document['clients'])} clients in {out}", f"  fedsplit simulate --network {out} …"]


def _measure(call: Call) -> list[str]:
    """Measures compute times on this machine, and writes them."""
    config = read_draft(call.rest, call.errors).checked(lambda _: None)
    out: Path = call.flags.out

    import tomli_w

    from fedsplit.federation.compute_profile import measured

    # Before the measurement, which takes a while.
    if out.exists():
        raise InputError(f"{shortened(out)} exists")
    document = measured(config)
    out.write_text(tomli_w.dumps(document), encoding="utf-8")
    tokens = config.train.batch_size * config.train.max_length
    lines = [f"{task}: {1000 * seconds * tokens:.2f} ms for {tokens} tokens" for task, seconds in
             document[COMPUTE_TABLE].items()]  # fmt: skip
    return [*lines, f"  fedsplit simulate --network home --network.compute {out} …"]


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="fedsplit network",
        description="Shows networks, makes them from device traces, and records compute times for the virtual clock.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(
        name: str,
        work: Callable[[Call], list[str]],
        help: str,
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(work=work)
        return added

    show = command("show", _show, "show the profile of each client")
    show.add_argument("network", metavar="NAME|FILE", help="a named network, or a TOML file")
    _add_clients(show)
    fedscale = command("fedscale", _import_fedscale, "make a network file from FedScale's traces")
    fedscale.add_argument("devices", type=Path, metavar="FILE", help="client_device_capacity, as JSON or as it is")
    fedscale.add_argument("--behaviour", type=Path, metavar="FILE", help="client_behave_trace, as JSON or as it is")
    unpickle_help = "read pickles, of which plain values alone are accepted"
    fedscale.add_argument("--unpickle", action="store_true", help=unpickle_help)
    _add_import(fedscale)
    flhetbench = command("flhetbench", _import_flhetbench, "make a network file from FLHetBench's data")
    flhetbench.add_argument("devices", type=Path, metavar="FILE", help="JSON list of devices with tcp_speed_results")
    flhetbench.add_argument("--timers", type=Path, metavar="FILE", help="cached_timers.json, for availability")
    flhetbench.add_argument("--states", type=Path, metavar="FILE", help="JSON list of names in the timers")
    _add_import(flhetbench)
    about_measure = "record compute times on this machine; takes the flags of simulate, such as --model and --cut"
    _add_out(command("measure", _measure, about_measure))
    return parser


def _add_clients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=_clients, default=8, metavar="N", help="number of clients (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all draws (default: 0)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_clients(parser)
    rtt_help = "round-trip time of all clients, which the traces lack (default: 50)"
    parser.add_argument("--rtt-ms", type=float, default=50.0, metavar="X", help=rtt_help)
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="TOML file to write")


def _clients(text: str) -> int:
    """Reads a number of clients. argparse shows the message of an `ArgumentTypeError` as it is."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= MOST_CLIENTS:
        words = f"a whole number from 1 to {MOST_CLIENTS}"
        raise argparse.ArgumentTypeError(f"{shortened(text)} is not possible; allowed: {words}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        call = make_parser().read_known(argv)
        # Only a first reading tells which command it is.
        work_of_command = call.flags.work
        # Measuring loads a model, which may have to be fetched.
        quieten(offline=work_of_command is not _measure)
        if work_of_command is not _measure:  # the other commands have no further flags
            call = make_parser().read(argv)
        print(*work_of_command(call), sep="\n")

    return exit_code(work, argv)
