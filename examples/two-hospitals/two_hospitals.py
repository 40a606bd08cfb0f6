"""Two hospitals and a trunk on this machine, each in a process and a folder of its own, as in a real federation.

Run it from the repository: `python examples/two-hospitals/two_hospitals.py`. It prints each command before the command
runs, then what each party holds, and at the end whether the adapter is that of `fedsplit simulate`, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[2]

HOSPITALS = ("north", "south")

PATIENTS = 60

SETTINGS = """\
clients = 2
rounds = {rounds}
dataset = "both.jsonl"
partition = "natural"
deterministic = true

[data]
format = "text"

[train]
steps = 2
max_length = 32

[lora]
rank = 2

[eval]
samples = 4
"""
"""Settings of the run, in the file that the trunk's server and the simulation read."""

RUN_CONFIG = {
    "clients": 2,
    "local-steps": 2,
    "deterministic": True,
    "lora.rank": "2",
    "train.max-length": 32,
}
"""The same settings as the run configuration of `flwr run`."""

START_SECONDS = 300.0
"""Longest time in which a server must be ready."""

ENVIRONMENT = {
    **os.environ,
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}


def notes_of(hospital: str) -> list[str]:
    """Returns made-up notes of a hospital."""
    chance = random.Random(hospital)
    notes = []
    for patient in range(PATIENTS):
        complaint = chance.choice(["a cough", "a fever", "a headache"] if hospital == "north" else ["a rash", "a burn"])
        days = chance.randint(1, 9)
        notes.append(f"Patient {patient} of {hospital} came with {complaint}, stayed for {days} days, and went home.")
    return notes


def write_notes(file: Path, hospitals: Sequence[str]) -> None:
    """Writes notes as JSON lines; of several hospitals, with the owner of each note."""
    rows = []
    for hospital in hospitals:
        for note in notes_of(hospital):
            rows.append({"text": note, "owner": hospital} if len(hospitals) > 1 else {"text": note})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def said(command: Sequence[object], folder: Path) -> list[str]:
    """Prints a command and where it runs, and returns its words."""
    words = [str(word) for word in command]
    print(f"[{folder.name}]$ {shlex.join(words)}", flush=True)
    program = Path(sys.executable).parent / words[0]
    return [str(program), *words[1:]]


def do(command: Sequence[object], folder: Path, **variables: str) -> str:
    """Runs a command to its end, and returns what it printed.

    Raises:
        SystemExit: The command failed.
    """
    call = said(command, folder)
    env = {**ENVIRONMENT, **variables}
    done = subprocess.run(call, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{shlex.join(call)} ended with {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def running(command: Sequence[object], folder: Path, ready: str, **variables: str) -> Iterator[None]:
    """Starts a command, waits until its log has some words, and ends it with the context.

    Raises:
        SystemExit: The command ended, or was not ready in time.
    """
    log = folder / f"{Path(str(command[0])).name}.log"
    with open(log, "wb") as output:
        env = {**ENVIRONMENT, **variables}
        process = subprocess.Popen(said(command, folder), cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_SECONDS
        while ready not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{log.read_text(errors='replace')}\n{command[0]} is not ready")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show(folder: Path) -> None:
    """Prints the files of a party, without what libraries keep."""
    hidden = {"flower", "checkpoints"}
    names = sorted({path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()} - hidden)
    print(f"  {folder.name + ':':<12} {', '.join(names)}")


def federate(root: Path, rounds: int) -> Path:
    """Plays the federation, and returns the folder of the run.

    Args:
        root: An empty folder.
        rounds: Number of rounds.
    """
    # 1. Every party gets a folder that no other user may enter, and its own certificate.
    trunk, superlink, operator = (root / name for name in ("trunk", "superlink", "operator"))
    sites = {name: root / name for name in HOSPITALS}
    do(["fedsplit", "certificates", "certificates", "--clients", ",".join(HOSPITALS)], root)
    made = root / "certificates"
    for folder, party in ((trunk, "trunk"), (superlink, "superlink"), (operator, "federation")):
        folder.mkdir(mode=0o700)
        shutil.move(made / party, folder / "certificate")
    for name, folder in sites.items():
        folder.mkdir(mode=0o700)
        shutil.move(made / "clients" / name, folder / "certificate")
        write_notes(folder / "notes.jsonl", [name])
    shutil.rmtree(made)
    (trunk / "run.toml").write_text(SETTINGS.format(rounds=rounds))

    trunk_at, superlink_at = (f"127.0.0.1:{free_port()}" for _ in range(2))
    serve = ["fedsplit", "serve", "--run", "run.toml", "--port", trunk_at.partition(":")[2], "--tls", "certificate"]
    link = ["flower-superlink", "--port", superlink_at.partition(":")[2], "--enable-supernode-auth"]
    link += ["--ssl-certfile", "certificate/cert.pem", "--ssl-keyfile", "certificate/key.pem"]
    link += ["--ssl-ca-certfile", "certificate/ca.pem"]
    with contextlib.ExitStack() as parties:
        # 2. The trunk's party and the operator of Flower's SuperLink each start a server.
        parties.enter_context(running(serve, trunk, ready="trunk ready"))
        parties.enter_context(running(link, superlink, ready="Uvicorn running", FLWR_HOME=str(superlink / "flower")))

        # 3. The trunk's party gives its token to all others. The operator registers the keys of the hospitals.
        for folder in (operator, *sites.values()):
            shutil.copy(trunk / "run.token", folder / "trunk.token")
        home = operator / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n[superlink.ours]\naddress = "{superlink_at}"\n'
            f'root-certificates = "{operator / "certificate" / "ca.pem"}"\n'
        )
        for name, folder in sites.items():
            shutil.copy(folder / "certificate" / "supernode.pub", operator / f"{name}.pub")
            do(["flwr", "supernode", "register", f"{name}.pub", "ours"], operator, FLWR_HOME=str(home))

        # 4. Each hospital starts one process beside its data.
        for number, (name, folder) in enumerate(sites.items()):
            client = ["fedsplit", "client", "--client", number, "--name", name, "--folder", "state"]
            client += ["--dataset", "notes.jsonl", "--server", trunk_at, "--token-file", "trunk.token"]
            client += ["--tls", "certificate", "--superlink", superlink_at, "--key", "certificate/supernode.key"]
            client += ["--root-certificates", "certificate/ca.pem"]
            ready = "SuperNode ID"
            parties.enter_context(running(client, folder, ready, FLWR_HOME=str(folder / "flower")))

        # 5. The operator starts the run.
        flags = ["--data.at", "site", "--data.format", "text", "--eval.samples", "4", "--trunk.server", trunk_at]
        flags += ["--trunk.tls", operator / "certificate", "--trunk.token-file", operator / "trunk.token"]
        values = {
            **RUN_CONFIG,
            "num-server-rounds": rounds,
            "out": str(operator / "run"),
            "flags": shlex.join(map(str, flags)),
        }
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        shown = do(
            ["flwr", "run", REPOSITORY, "ours", "--stream", "--run-config", settings], operator, FLWR_HOME=str(home)
        )
        print(*(line for line in shown.splitlines() if line.startswith(("round", "held-out loss"))), sep="\n")
        if not (operator / "run" / "summary.json").exists():
            raise SystemExit(shown)
        print("what each party holds:")
        for folder in (trunk, superlink, operator, *sites.values()):
            show(folder)
    return operator / "run"


def simulate(root: Path, rounds: int) -> Path:
    """Simulates the same federation, and returns the folder of the run."""
    folder = root / "simulation"
    folder.mkdir()
    write_notes(folder / "both.jsonl", HOSPITALS)
    (folder / "run.toml").write_text(SETTINGS.format(rounds=rounds))
    do(["fedsplit", "simulate", "--config", "run.toml", "--engine", "local", "--out", "run"], folder)
    return folder / "run"


def main() -> None:
    """Plays and simulates the federation, and compares the two.

    Raises:
        SystemExit: The adapters differ.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="an empty folder for all parties (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds (default: 2)")
    flags = parser.parse_args()
    given: Path | None = flags.folder
    with tempfile.TemporaryDirectory() as temporary:
        root = (given or Path(temporary)).absolute()
        played = federate(root, flags.rounds)
        simulated = simulate(root, flags.rounds)
        losses = [json.loads((run / "summary.json").read_text())["eval_loss"] for run in (played, simulated)]
        adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (played, simulated)]
    print(f"held-out loss of the federation: {losses[0]}; of its simulation: {losses[1]}")
    same = adapters[0].keys() == adapters[1].keys()
    same = same and all(adapters[0][name].tobytes() == adapters[1][name].tobytes() for name in adapters[0])
    if not same or losses[0] != losses[1]:
        raise SystemExit("the federation and its simulation differ")
    print("both adapters are equal to the bit")


if __name__ == "__main__":
    main()
