"""`fedsplit serve --run CONFIG.toml`: offers the trunk of a run to a federation of other processes, over gRPC."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector, InputError, SettingError
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import Config

if TYPE_CHECKING:
    from fedsplit.trunk.served import ServedTrunk
    from fedsplit.wire.grpc_server import GrpcServer

_never = threading.Event()

PORT = 50052
"""Default port."""

LIMITS = {
    "clients": "most clients that are connected at the same time",
    "streams": "most connections of one client at the same time",
    "pending": "most packets of a client without an answer",
    "window": "most bytes of a client that are on the way or wait for an answer",
    "largest_packet": "most bytes of a packet",
    "largest_control": "most bytes of a message of the federation, which may carry the adapters of all clients",
    "rate": "most bytes that one client may send in a second; 0: no limit",
    "pause": "seconds without progress after which a connection is ended",
}
"""Help texts of the fields of `fedsplit.wire.limits.Limits`."""


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="fedsplit serve",
        description="Offers the trunk of a run to a federation of other processes, over gRPC. It loads the trunk's "
        "blocks alone, and serves run after run until it is stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", dest="config", metavar="CONFIG.toml", type=Path, required=True, help="settings of the runs"
    )
    parser.add_argument(
        "--host", metavar="HOST", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=PORT, help="port; 0 for any that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--tls",
        metavar="DIR",
        type=Path,
        help="folder with ca.pem, cert.pem, key.pem and clients.toml, such as DIR/trunk of fedsplit certificates DIR "
        "(default: no encryption, on this machine only)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with the token that callers must know, written if it is not there (default: CONFIG.token)",
    )
    limits = parser.add_argument_group("limits", "A client that goes beyond one of them is refused.")
    for name, help in LIMITS.items():
        kind = float if name == "pause" else int
        limits.add_argument(
            f"--limits.{name.replace('_', '-')}", dest=f"limits.{name}", metavar="N", type=kind, help=help
        )
    return parser


def load_config(path: Path) -> Config:
    """Returns the settings of a file, checked as far as a trunk needs them. No weight is loaded.

    Args:
        path: A TOML file, as for `--config` of a run, or the `config.toml` of a run.

    Raises:
        InputError: A setting is wrong. All errors are reported together.
    """
    from fedsplit.commands import checks, model_checks
    from fedsplit.commands.server_checks import check_served
    from fedsplit.model.devices import check_devices
    from fedsplit.model.facts import read_facts
    from fedsplit.model.quantization import check_quantization
    from fedsplit.model.sources import config_folder
    from fedsplit.optimization.optim import check_optimizer
    from fedsplit.settings.flags import settle

    try:
        config = settle({}, {}, path)
    except SettingError as error:
        # `settle` names the file after its flag in a run. Here the flag is --run.
        if error.setting != "config":
            raise
        raise SettingError("run", error.value, error.allowed) from error
    # An error here is reported by itself, since several checks below need the facts.
    facts = read_facts(config_folder(config.model))
    collector = ErrorCollector()
    checks_of_trunk: list[Callable[[], object]] = [
        lambda: check_served(config),
        lambda: checks.check_prompt(config),
        lambda: checks.check_training(config),
        lambda: checks.check_trunk(config),
        lambda: model_checks.check_cut(config, facts),
        lambda: model_checks.check_lengths(config, facts),
        lambda: model_checks.check_adapters(config, facts),
        lambda: check_devices(config),
        lambda: check_optimizer(config.train),
        lambda: check_quantization(config),
    ]
    collector.collect(checks_of_trunk)
    collector.check()
    return config


def load_trunk(config: Config) -> ServedTrunk:
    """Loads the trunk's blocks, for run after run.

    Args:
        config: Settings of the runs.
    """
    import torch

    from fedsplit.engines.planning import plan
    from fedsplit.federation.trunk_terms import terms_of
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder
    from fedsplit.optimization.own_stage import stage_maker
    from fedsplit.trunk.served import ServedTrunk
    from fedsplit.trunk.service import TrunkService, load_service

    shares = plan(config, read_facts(config_folder(config.model)).width)
    torch.set_num_threads(shares.trunk_threads)

    def load(run: str, incarnation: str) -> TrunkService:
        return load_service(
            config,
            run,
            incarnation,
            threads=shares.trunk_threads,
            workers=shares.trunk_lanes,
            stage=stage_maker(config),
        )

    return ServedTrunk(load, terms_of(config), shares.trunk_threads, config.timeout)


@contextmanager
def serving(
    config: Config,
    host: str,
    port: int,
    tls: Path | None,
    token: Path,
    limits: dict[str, Any],
) -> Iterator[GrpcServer]:
    """Offers a trunk until the end of the context.

    Args:
        config: Settings of the runs.
        host: Address to listen at.
        port: Port; 0 for any that is free.
        tls: Folder of certificates; None for no encryption.
        token: File with the token, which is written if it is not there.
        limits: Limits by name, for those that differ from the defaults.

    Raises:
        InputError: The certificates, the token or a limit cannot be used, or the port is taken.
    """
    try:
        from fedsplit.wire.grpc_server import GrpcServer
    except ModuleNotFoundError as error:
        raise InputError(f"fedsplit serve needs {error.name}: install fedsplit[grpc]") from error
    from fedsplit.wire.identities import read_identities
    from fedsplit.wire.limits import Limits
    from fedsplit.wire.token_files import own_token

    # Limits, certificates and token come before the weights, which take a while to load.
    checked_limits = dataclasses.replace(Limits(), **limits)
    identities = read_identities(tls) if tls is not None else None
    secret = own_token(token)
    trunk = load_trunk(config)
    with closing(trunk):
        try:
            server = GrpcServer(
                trunk.serve,
                trunk.control,
                host=host,
                port=port,
                identities=identities,
                token=secret,
                limits=checked_limits,
            )
        except OSError as error:
            raise InputError(f"port: {error}") from error
        with closing(server):
            yield server


def main(
    argv: Sequence[str] | None = None,
    wait: Callable[[], object] = _never.wait,
) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code.

    Args:
        argv: Arguments; None for those of the process.
        wait: Returns when the server is to end. By default, only a signal ends the server.
    """

    def work() -> None:
        flags = make_parser().read(argv).checked()
        if not 0 <= flags.port <= 65535:
            raise SettingError("port", flags.port, "a whole number from 0 to 65535")
        prepare()
        warnings.simplefilter("ignore")
        config = load_config(flags.config)
        token = flags.token_file or flags.config.with_suffix(".token")
        # By `vars`, since a name with a dot is no attribute.
        limits = {name: value for name in LIMITS if (value := vars(flags)[f"limits.{name}"]) is not None}
        with serving(config, flags.host, flags.port, flags.tls, token, limits) as server:
            how = "TLS" if flags.tls else "no encryption"
            # The colons of an IPv6 address would run into that of the port.
            place = f"[{flags.host}]" if ":" in flags.host else flags.host
            about = f"model {config.model}, blocks {config.cut}, {how}, token in {token}"
            # Flushed: whoever has started this process waits for the line, and a pipe would hold it back.
            print(f"trunk ready at {place}:{server.port}: {about}", flush=True)
            wait()

    return exit_code(work, argv)
