"""Trunks behind gRPC for tests: in this process, and as the command `fedsplit serve` in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsplit.federation.trunk_terms import terms_of
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.settings.config import Config
from fedsplit.trunk.served import ServedTrunk
from fedsplit.trunk.service import load_service
from fedsplit.wire.grpc_server import GrpcServer
from fedsplit.wire.token_files import own_token

READY = re.compile(r"trunk ready at 127\.0\.0\.1:(\d+): ")


@contextlib.contextmanager
def offered(config: Config, token: Path) -> Iterator[tuple[dict[str, object], ServedTrunk]]:
    """Offers a trunk in this process until the end of the context.

    Args:
        config: Settings of the runs.
        token: File for the token.

    Yields:
        The settings of a run that uses the trunk, beside those in `config`; and the trunk.
    """
    stage = stage_maker(config)
    trunk = ServedTrunk(lambda run, incarnation: load_service(config, run, incarnation, stage=stage), terms_of(config))
    server = GrpcServer(trunk.serve, trunk.control, token=own_token(token))
    try:
        yield {"trunk.server": f"127.0.0.1:{server.port}", "trunk.token_file": str(token)}, trunk
    finally:
        server.close()
        trunk.close()


class Served(subprocess.Popen[str]):
    """The command `fedsplit serve`, ready to be used.

    Attributes:
        port: Port at which it listens.
        said: Lines on standard output and on standard error so far.
    """

    def __init__(self, cwd: Path, config: Path, *flags: str, port: int = 0) -> None:
        call = [sys.executable, "-m", "fedsplit", "serve", "--run", str(config), "--port", str(port), *flags]
        super().__init__(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
        assert self.stdout is not None
        self.said: list[str] = []
        for line in self.stdout:
            self.said.append(line)
            if found := READY.match(line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError(f"fedsplit serve ended with {self.wait()}: {''.join(self.said)}")
        # Read to the end: a full pipe would halt the process.
        self._reader = threading.Thread(target=lambda: self.said.extend(self.stdout or ()), daemon=True)
        self._reader.start()

    @property
    def flags(self) -> list[str]:
        """Flags of a run that uses the trunk, beside the token."""
        return ["--trunk.server", f"127.0.0.1:{self.port}"]

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.wait()
        self._reader.join(60)


def simulate(cwd: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs `fedsplit simulate` to its end."""
    call = [sys.executable, "-m", "fedsplit", "simulate", "--report", "false", *flags]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, check=False)
