"""`fedsplit client`: a client at a site of its own, beside its data: a Flower SuperNode with the site's settings."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector, InputError, SettingError, check_all
from fedsplit.settings.command_line import Parser

if TYPE_CHECKING:
    from fedsplit.federation.client_site import Site
    from fedsplit.state.site_lock import SiteLock

_END_SECONDS = 20.0
"""Time that the SuperNode has to end after a signal."""

_MARGIN_SECONDS = 5.0
"""Time that a SuperLink may need to notice a lost SuperNode, beyond the deadline of heartbeats."""

_SETTINGS = {
    "dataset": "data set of the site, as for --dataset of a run",
    "model": "the base model at this site (default: the run's)",
    "server": "HOST:PORT of the trunk, where fedsplit serve runs",
    "tls": "folder with the certificate of this client for the trunk: ca.pem, cert.pem and key.pem",
    "token-file": "file with the trunk's token",
    "device": "device of bottom and top (default: the run's)",
}
"""Flags of single settings, with their help."""

_NAMES = {"server": "trunk.server", "tls": "trunk.tls", "token-file": "trunk.token_file"}
"""Names of the settings whose flags are shorter."""


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="fedsplit client",
        description="Plays one client of a federation at a site of its own. The client loads bottom and top of the "
        "model, keeps its data for itself, and needs neither Ray nor the trunk's weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--superlink", metavar="HOST:PORT", required=True, help="address of Flower's SuperLink")
    secure = parser.add_mutually_exclusive_group(required=True)
    secure.add_argument("--root-certificates", metavar="FILE", type=Path, help="authority of the SuperLink, for TLS")
    secure.add_argument("--insecure", action="store_true", help="no TLS to the SuperLink, on this machine only")
    parser.add_argument("--key", metavar="FILE", type=Path, help="private key by which the SuperLink knows this client")
    parser.add_argument(
        "--port", metavar="N", type=int, default=0, help="port of the SuperNode on this machine; 0 for any that is free"
    )
    of_site = parser.add_argument_group("the site", "Flags take precedence over the file.")
    of_site.add_argument("--site", metavar="FILE.toml", type=Path, help="the site's settings")
    of_site.add_argument("--client", metavar="N", type=int, help="number of the client, from 0")
    of_site.add_argument("--name", metavar="NAME", help="name of the client")
    of_site.add_argument("--folder", metavar="DIR", help="folder for data and state of runs")
    of_site.add_argument("--allow-code", action="store_true", default=None, help="import code that a run names")
    for name, help in _SETTINGS.items():
        of_site.add_argument(f"--{name}", metavar="VALUE", help=help)
    return parser


def site_of(flags: Mapping[str, Any]) -> Site:
    """Returns the site that the flags describe.

    Raises:
        InputError: A setting is wrong. All errors are reported together.
    """
    from fedsplit.federation.client_site import make_site
    from fedsplit.settings.flags import read_toml

    values, options = read_toml(flags["site"]) if flags["site"] else ({}, {})
    for name in ("client", "name", "folder"):
        if flags[name] is not None:
            values[name] = flags[name]
    if flags["allow_code"]:
        values["allow-code"] = True
    for flag in _SETTINGS:
        value = flags[flag.replace("-", "_")]
        if value is not None:
            values[_NAMES.get(flag, flag)] = value
    return make_site(values, options)


def problems(site: Site, flags: Mapping[str, Any]) -> Iterator[InputError]:
    """Yields an error for everything at the site that can be found wrong before a run begins."""
    from fedsplit.corpora.tables import check_dataset
    from fedsplit.settings.documents import build
    from fedsplit.trunk.dialing import check_server
    from fedsplit.wire.set_layout import is_of_one_party

    config = build({**site.settings, "data.at": "site"})
    collector = ErrorCollector()
    collector.collect([lambda: check_dataset(config.dataset, config.data)])
    is_no_party = bool(config.trunk.tls) and not is_of_one_party(Path(config.trunk.tls))
    # The folder of a whole set would be reported as one that lacks a file.
    if not is_no_party:
        collector.collect([lambda: check_server(config)])
    yield from collector.errors
    if is_no_party:
        files = "ca.pem, cert.pem and key.pem"
        allowed = f"a folder with the client's {files}, such as clients/NAME of fedsplit certificates"
        yield SettingError("trunk.tls", config.trunk.tls, allowed)
    if site.folder.exists() and not site.folder.is_dir():
        yield SettingError("folder", site.folder, "a folder, or a new name")
    _, colon, port = flags["superlink"].rpartition(":")
    if not (colon and port.isdecimal() and 0 < int(port) <= 65535):
        yield SettingError("superlink", flags["superlink"], "HOST:PORT, such as superlink.example:8000")
    for name in ("root_certificates", "key"):
        file: Path | None = flags[name]
        if file is not None and not file.is_file():
            yield SettingError(name.replace("_", "-"), file, "a file that is there")
    host = flags["superlink"].rpartition(":")[0].strip("[]")
    if flags["insecure"] and host not in ("127.0.0.1", "::1", "localhost"):
        yield SettingError("superlink", flags["superlink"], "an address of this machine with --insecure")


def supernode(flags: Mapping[str, Any], file: Path) -> list[str]:
    """Returns the command line of the SuperNode.

    Args:
        flags: Flags of the command.
        file: The site's file.
    """
    # Beside this Python first: a virtual environment need not be active.
    program = shutil.which("flower-supernode", path=str(Path(sys.executable).parent)) or "flower-supernode"
    from fedsplit.federation.client_site import NODE_KEY

    call = [program, "--superlink", flags["superlink"], "--node-config", f'{NODE_KEY}="{file}"']
    # With a port that is always the same, a machine could play one client only.
    call += ["--port", str(flags["port"] or _free_port())]
    if flags["insecure"]:
        call.append("--insecure")
    else:
        call += ["--root-certificates", str(flags["root_certificates"])]
    if flags["key"]:
        call += ["--auth-supernode-private-key", str(flags["key"])]
    return call


def _free_port() -> int:
    """Returns a port that is free now, on loopback, where the SuperNode talks to the processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> int:
        flags = vars(make_parser().read(argv).checked())
        prepare()
        from fedsplit.federation.client_site import write_site
        from fedsplit.state.site_lock import locked

        site = site_of(flags)
        check_all(problems(site, flags))
        # The SuperNode and the processes of the client read the path, too, wherever they work.
        site = replace(site, folder=site.folder.absolute())
        with locked(site.folder) as lock:
            if lock.was_killed:
                _wait_until_forgotten()
            site.remove_data()  # that a killed command has left
            file = write_site(site)
            try:
                return _play(supernode(flags, file), lock)
            finally:
                site.remove_data()

    return exit_code(work, argv)


def _wait_until_forgotten() -> None:
    """Waits until a SuperLink has noticed that the SuperNode of a killed command is gone.

    Until then, the SuperLink refuses another SuperNode with the same key, and the killed one's message has no reply.
    """
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

    seconds = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL + _MARGIN_SECONDS
    print(f"the client before was killed; starting in {seconds:g} seconds, when the SuperLink has noticed", flush=True)
    time.sleep(seconds)


def _play(call: Sequence[str], lock: SiteLock) -> int:
    """Runs the SuperNode to its end, and returns its exit code.

    Args:
        call: Command line of the SuperNode.
        lock: Lock of the site's folder. The SuperNode holds the lock, too: if this command alone is killed, the folder
            is still taken.
    """
    # Flower's programs start each other by name. They are beside this Python, which need not be on the path.
    beside_python = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen(call, pass_fds=(lock.descriptor,), env=environment) as process:
        try:
            return process.wait()
        finally:
            _end(process)
            if process.returncode != -signal.SIGKILL:  # a killed SuperNode has not taken leave of the SuperLink
                lock.end_well()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the SuperNode, which ends the processes that play the client."""
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
