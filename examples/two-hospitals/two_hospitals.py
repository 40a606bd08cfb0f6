"""Two hospitals and a trunk on this machine, each in a process and a folder of its own, as in a real federation.

Run it from the repository: `python examples/two-hospitals/two_hospitals.py`. It prints each command before the command
runs, then what each party holds, and at the end whether the adapter is that of `fedsplit simulate`, to the bit. With
`--users`, which only root may ask for, each party has a user of its own. With `--kill`, a hospital loses its power in
round 2, and is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
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

KILL_SECONDS = 3.0
"""Time from the start of a hospital's process for round 2 until the hospital is killed."""

FIRST_USER = 61000
"""Number of the first party's user. The parties after it have the numbers that follow."""

ENVIRONMENT = {
    **os.environ,
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    # Flower's programs start each other by name.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
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


@dataclass(frozen=True)
class Party:
    """A party of the federation.

    Attributes:
        folder: The party's folder, which bears the party's name.
        user: Number of the user that owns the folder and runs the party's processes; None for the user of this script.
    """

    folder: Path
    user: int | None = None

    @property
    def name(self) -> str:
        """Name of the party."""
        return self.folder.name

    def receive(self, file: Path, name: str) -> None:
        """Puts a file or a folder into the party's folder, for the party's eyes alone."""
        target = self.folder / name
        if file.is_dir():
            shutil.copytree(file, target)
        else:
            shutil.copy(file, target)
        self.own(target)

    def own(self, path: Path) -> None:
        """Makes the party the owner of a file, or of a folder with all that is in it."""
        if self.user is not None:
            for each in (path, *path.rglob("*")):
                os.chown(each, self.user, self.user)

    def start(self, command: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        """Prints a command, and starts the command in the party's folder as the party's user."""
        words = [str(word) for word in command]
        print(f"[{self.name}]$ {shlex.join(words)}", flush=True)
        program = Path(sys.executable).parent / words[0]
        env = {**ENVIRONMENT, "FLWR_HOME": str(self.folder / "flower")}
        if self.user is not None:
            env |= {"HOME": str(self.folder), "USER": self.name, "LOGNAME": self.name}
            options |= {"user": self.user, "group": self.user, "extra_groups": []}
        return subprocess.Popen([str(program), *words[1:]], cwd=self.folder, env=env, **options)

    def do(self, command: Sequence[object], seen: Callable[[str], None] = lambda line: None) -> str:
        """Runs a command to its end, and returns what the command printed.

        Args:
            command: Words of the command line.
            seen: Takes each line as it is printed.

        Raises:
            SystemExit: The command failed.
        """
        printed = ""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed += line
                seen(line)
        if process.returncode:
            raise SystemExit(f"{printed}\n{command[0]} ended with {process.returncode}")
        return printed


class Server:
    """A command of a party that runs until it is ended."""

    def __init__(self, party: Party, command: Sequence[object], ready: str) -> None:
        """Starts the command, and waits until its log has some words.

        Raises:
            SystemExit: The command ended, or was not ready in time.
        """
        log = party.folder / f"{Path(str(command[0])).name}.log"
        with open(log, "ab") as output:
            begin = output.tell()
            self._process = party.start(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + START_SECONDS
        while ready not in (text := log.read_bytes()[begin:].decode(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > until:
                self.end()
                raise SystemExit(f"{text}\n{command[0]} is not ready")
            time.sleep(0.2)

    def end(self) -> None:
        """Ends the command in good order."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def is_working_since(self, moment: float) -> bool:
        """Returns True if a process that plays the client has started after a moment, in seconds since 1970."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.create_time() > moment and "flwr-clientapp" in " ".join(process.cmdline()):
                    return True
        return False

    def kill(self) -> None:
        """Kills the command and all processes that it has started, as a loss of power would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class PowerCut:
    """Kills a hospital in the middle of round 2, and starts the hospital again.

    Attributes:
        has_come: True once the hospital was killed.
    """

    def __init__(self, hospital: Server, start: Callable[[], Server], metrics: Path) -> None:
        """Takes the hospital.

        Args:
            hospital: The running command.
            start: Starts the command again.
            metrics: The run's file of events.
        """
        self.has_come = False
        self._hospital = hospital
        self._start = start
        self._metrics = metrics
        self._run_is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        """Waits for round 2 in a thread of its own."""
        self._thread.start()

    def _run(self) -> None:
        while not (self._metrics.exists() and '"event": "cost", "round": 1' in self._metrics.read_text()):
            if self._run_is_over.wait(0.1):
                return
        end_of_round = time.time()
        while not self._hospital.is_working_since(end_of_round):
            if self._run_is_over.wait(0.1):
                return
        time.sleep(KILL_SECONDS)
        print("north loses power, and is started again", flush=True)
        self._hospital.kill()
        self.has_come = True
        self._hospital = self._start()

    def end(self) -> None:
        """Ends the hospital."""
        self._run_is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._hospital.end()


def holdings(party: Party) -> str:
    """Returns the names of what is in a party's folder, without what libraries keep."""
    files = [path.relative_to(party.folder).parts[0] for path in party.folder.rglob("*") if path.is_file()]
    return ", ".join(name for name in sorted(set(files)) if name not in ("flower", "checkpoints", "Library", ".cache"))


def readable(party: Party, parties: Sequence[Party]) -> str:
    """Returns, in words, how many files of the others a party's user can read."""
    script = (
        "import os, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    for place, _, names in os.walk(folder):\n"
        "        for name in names:\n"
        "            if os.access(os.path.join(place, name), os.R_OK):\n"
        "                print(os.path.join(place, name))\n"
    )
    others = [str(other.folder) for other in parties if other != party]
    call = [sys.executable, "-c", script, *others]
    done = subprocess.run(
        call, capture_output=True, text=True, check=True, user=party.user, group=party.user, extra_groups=[]
    )
    files = done.stdout.splitlines()
    return f"can read {len(files)} files of the other parties"


def federate(root: Path, rounds: int, with_users: bool, with_kill: bool) -> Path:
    """Plays the federation, and returns the folder of the run.

    Args:
        root: An empty folder.
        rounds: Number of rounds.
        with_users: True to give each party a user of its own.
        with_kill: True to kill a hospital in the middle, and to start it again.
    """
    # 1. Every party gets a folder that no other user may enter, and its own certificates.
    names = ("trunk", "server", "operator", *HOSPITALS)
    parties = {
        name: Party(root / name, FIRST_USER + number if with_users else None) for number, name in enumerate(names)
    }
    trunk, server, operator = (parties[name] for name in names[:3])
    sites = [parties[name] for name in HOSPITALS]
    made = root / "certificates"
    Party(root).do(["fedsplit", "certificates", made.name, "--clients", ",".join(HOSPITALS)])
    for party in parties.values():
        party.folder.mkdir(mode=0o700)
        party.own(party.folder)
    trunk.receive(made / "trunk", "certificate")
    server.receive(made / "superlink", "superlink")
    server.receive(made / "federation", "federation")
    operator.receive(made / "superlink" / "ca.pem", "ca.pem")
    for site in sites:
        site.receive(made / "clients" / site.name, "certificate")
        operator.receive(made / "clients" / site.name / "supernode.pub", f"{site.name}.pub")
        write_notes(site.folder / "notes.jsonl", [site.name])
        site.own(site.folder / "notes.jsonl")
    shutil.rmtree(made)
    (trunk.folder / "run.toml").write_text(SETTINGS.format(rounds=rounds))

    trunk_at, superlink_at = (f"127.0.0.1:{free_port()}" for _ in range(2))
    serve = ["fedsplit", "serve", "--run", "run.toml", "--port", trunk_at.partition(":")[2], "--tls", "certificate"]
    link = ["flower-superlink", "--port", superlink_at.partition(":")[2], "--enable-supernode-auth"]
    link += ["--ssl-certfile", "superlink/cert.pem", "--ssl-keyfile", "superlink/key.pem"]
    link += ["--ssl-ca-certfile", "superlink/ca.pem"]
    with contextlib.ExitStack() as running:
        # 2. The party of the trunk starts its server; the party of the server starts Flower's SuperLink.
        running.callback(Server(trunk, serve, ready="trunk ready").end)
        running.callback(Server(server, link, ready="Uvicorn running").end)

        # 3. The trunk's party gives its token to server and hospitals. The operator registers the hospitals' keys.
        for party in (server, *sites):
            party.receive(trunk.folder / "run.token", "trunk.token")
        home = operator.folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n[superlink.ours]\naddress = "{superlink_at}"\n'
            f'root-certificates = "{operator.folder / "ca.pem"}"\n'
        )
        operator.own(home)
        for site in sites:
            operator.do(["flwr", "supernode", "register", f"{site.name}.pub", "ours"])

        # 4. Each hospital starts one process beside its data.
        def start(site: Party) -> Server:
            client = ["fedsplit", "client", "--client", HOSPITALS.index(site.name), "--name", site.name]
            client += ["--folder", "state", "--dataset", "notes.jsonl", "--server", trunk_at]
            client += ["--token-file", "trunk.token", "--tls", "certificate", "--superlink", superlink_at]
            client += ["--key", "certificate/supernode.key", "--root-certificates", "certificate/ca.pem"]
            return Server(site, client, ready="SuperNode ID")

        north, south = sites
        running.callback(start(south).end)
        cut = PowerCut(start(north), lambda: start(north), server.folder / "run" / "metrics.jsonl")
        running.callback(cut.end)
        if with_kill:
            cut.begin()

        # 5. The operator starts the run. The loop over rounds runs beside the SuperLink.
        place = server.folder
        flags: list[object] = [
            "--data.at",
            "site",
            "--data.format",
            "text",
            "--eval.samples",
            "4",
            "--trunk.server",
            trunk_at,
        ]
        flags += ["--trunk.tls", place / "federation", "--trunk.token-file", place / "trunk.token"]
        values = {
            **RUN_CONFIG,
            "num-server-rounds": rounds,
            "out": str(place / "run"),
            "flags": shlex.join(map(str, flags)),
        }
        settings = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())

        def seen(line: str) -> None:
            if line.startswith(("round", *HOSPITALS, "held-out loss")):
                print(line, end="", flush=True)

        shown = operator.do(["flwr", "run", REPOSITORY, "ours", "--stream", "--run-config", settings], seen)
        if not (place / "run" / "summary.json").exists():
            raise SystemExit(shown)
        if with_kill and not cut.has_come:
            raise SystemExit("north was not killed: the run was over before")
        print("what each party holds:")
        for party in parties.values():
            print(f"  {party.name + ':':<10} {holdings(party)}")
            if with_users:
                print(f"  {'':<10} {readable(party, list(parties.values()))}")
    return place / "run"


def others_can_start() -> bool:
    """Returns True if a user other than root can start this Python with fedsplit. Only root may ask."""
    call = [sys.executable, "-c", "import fedsplit"]
    try:
        done = subprocess.run(
            call, cwd="/", user=FIRST_USER, group=FIRST_USER, extra_groups=[], capture_output=True, check=False
        )
    except PermissionError:
        return False
    return done.returncode == 0


def simulate(root: Path, rounds: int) -> Path:
    """Simulates the same federation, and returns the folder of the run."""
    folder = root / "simulation"
    folder.mkdir()
    write_notes(folder / "both.jsonl", HOSPITALS)
    (folder / "run.toml").write_text(SETTINGS.format(rounds=rounds))
    Party(folder).do(["fedsplit", "simulate", "--config", "run.toml", "--engine", "local", "--out", "run"])
    return folder / "run"


def main() -> None:
    """Plays and simulates the federation, and compares the two.

    Raises:
        SystemExit: The adapters differ.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="an empty folder for all parties (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds (default: 2)")
    parser.add_argument("--users", action="store_true", help="give each party a user of its own (for root only)")
    parser.add_argument("--kill", action="store_true", help="kill a hospital in the middle, and start it again")
    flags = parser.parse_args()
    if flags.users and os.geteuid() != 0:
        parser.error("--users: only root can give each party a user of its own")
    if flags.users and not others_can_start():
        parser.error(f"--users: other users cannot start {sys.executable}, or cannot read fedsplit")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that all parties are ended
    given: Path | None = flags.folder
    with tempfile.TemporaryDirectory() as temporary:
        root = (given or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o711 if flags.users else 0o700)  # other users can pass, and see no names
        played = federate(root, flags.rounds, flags.users, flags.kill)
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
