"""Container file and units of systemd: their commands are commands, and what they copy is there."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from fedsplit.commands import serve, site_client

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "deployment"
UNITS = sorted(FOLDER.glob("*.service"))


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the container file: names and arguments."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found = []
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        found.append((name, rest.strip()))
    return found


def images() -> dict[str, list[str]]:
    """Returns the command of each image that a party runs."""
    commands: dict[str, list[str]] = {}
    stage = ""
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        elif name in ("ENTRYPOINT", "CMD"):
            commands.setdefault(stage, []).extend(json.loads(rest))
    return commands


def command_of(unit: Path) -> list[str]:
    """Returns the command of a unit, without the folder of its program."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text().replace("\\\n", " "), flags=re.M)
    program, *words = shlex.split(line)
    return [Path(program).name, *words]


def check_command(words: list[str]) -> None:
    """Reads a command line as its program does."""
    program, *rest = words
    if program == "flower-superlink":
        _parse_args_run_superlink().parse_args(rest)
    elif program == "fedsplit":
        command, *flags = rest
        {"serve": serve, "client": site_client}[command].make_parser().read(flags).checked()
    else:
        assert program == "flwr" and rest[0] == "run", words


def test_there_is_an_image_for_each_role() -> None:
    commands = images()
    assert list(commands) == ["trunk", "server", "operator", "client"]
    assert commands["client"].pop() == "--help"  # the address of the SuperLink comes from the user
    commands["client"] += ["--superlink", "superlink.example:8000"]
    for words in commands.values():
        check_command(words)
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["10001"]


def test_what_images_copy_is_there_and_let_through() -> None:
    allowed = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert copied
    for word in copied:
        assert (ROOT / word).exists() and any(fnmatch.fnmatch(word, pattern) for pattern in allowed), word


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_command_that_is_one(unit: Path, tmp_path: Path) -> None:
    check_command(command_of(unit))
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/fedsplit/bin", str(Path(sys.executable).parent)))
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


def test_there_is_a_unit_for_each_party_that_runs_for_ever() -> None:
    assert [unit.stem for unit in UNITS] == ["fedsplit-client", "fedsplit-server", "fedsplit-trunk"]
