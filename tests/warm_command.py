"""Commands as a user types them, from a process that has imported the libraries already.

Most of a short run is the import of torch, transformers and PEFT. `command` forks the run from a warm process, and runs
the module there as `python -m` does. Tests of imports, of signals and of the environment start Python themselves.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SECONDS = 550.0
"""Longest time of a command."""


def command(
    module: str, *argv: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGUMENTS` in a fork of the warm process, and returns exit code and output.

    Args:
        module: Such as "fedsplit.simulate".
        argv: Arguments of the command.
        cwd: Working folder.
        env: Environment variables; None for those of this process. Variables that a library reads at its import have
            no effect.
        timeout: Longest time in seconds.
    """
    words = [module, *map(str, argv)]
    variables = dict(os.environ if env is None else env)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(socket.AF_UNIX) as line:
        line.connect(_warm_process())
        line.settimeout(timeout)
        request = json.dumps({"argv": words, "cwd": str(cwd), "env": variables}).encode()
        socket.send_fds(line, [len(request).to_bytes(4, "big")], [out.fileno(), err.fileno()])
        line.sendall(request)
        pid = int(line.recv(16))
        try:
            code = int(line.recv(16))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(words, code, *texts)


@functools.cache
def _warm_process() -> str:
    """Starts the warm process of this test process, and returns the path of its socket."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    path = f"{folder.name}/socket"
    process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.read(1) == b"+", "the warm process has not begun"

    def end() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return path


def _serve(path: str) -> None:
    """Forks a process for each connection, until the parent process is gone."""
    from fedsplit.environment import quieten

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks, and none may stay as a zombie
    quieten()
    import fedsplit.commands.run_checks
    import fedsplit.engines.in_process
    import fedsplit.results.merging  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("+", end="", flush=True)
        # The standard input ends with the process of the tests, which may be killed.
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            line, _ = server.accept()
            with line:
                if os.fork() == 0:
                    server.close()
                    _attend(line)


def _attend(line: socket.socket) -> None:
    """Runs the command of a connection in a further fork, and sends the exit code. Does not return."""
    header, (out, err), *_ = socket.recv_fds(line, 4, 2)
    size = int.from_bytes(header, "big")
    text = b""
    while len(text) < size:
        text += line.recv(size - len(text))
    request = json.loads(text)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        line.close()
        _become(request, out, err)
    line.sendall(f"{child:16}".encode())
    _, status = os.waitpid(child, 0)
    line.sendall(f"{os.waitstatus_to_exitcode(status):16}".encode())
    os._exit(0)


def _become(request: dict[str, object], out: int, err: int) -> None:
    """Runs a module as `python -m` does, with the standard streams of the test. Does not return.

    Raises:
        SystemExit: At the end of the command. Nobody catches it, so that Python ends as it does after any program.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    argv, cwd, env = request["argv"], request["cwd"], request["env"]
    assert isinstance(argv, list) and isinstance(cwd, str) and isinstance(env, dict)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.path[0] = cwd
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    _serve(sys.argv[1])
