"""What a command and all that it starts uses: CPU time and the most memory, process by process."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

LOOK_EVERY = 1.0
"""Seconds between two looks. A process that ends in between loses the CPU time of that long at most."""


class Tree:
    """A process and its descendants, those that have ended included.

    Attributes:
        cpu: CPU seconds of each, as of the last look.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.cpu: dict[psutil.Process, float] = {}
        self._memory: dict[psutil.Process, int] = {}
        self._resident: dict[psutil.Process, int] = {}
        self._roles = {self._root: "command"}
        self.look()

    def look(self) -> float:
        """Notes what all processes have used; returns the CPU seconds of all so far."""
        try:
            found = {self._root, *self._root.children(recursive=True), *self.cpu}
        except psutil.NoSuchProcess:
            found = set(self.cpu)
        for process in found:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self.cpu[process] = times.user + times.system
                    self._resident[process] = process.memory_info().rss
                    self._memory[process] = max(_peak_memory(process), self._memory.get(process, 0))
                    if role := _role(process.name()):  # a worker has another name before it knows its work
                        self._roles[process] = role
            except (psutil.Error, OSError):
                self._resident.pop(process, None)  # it has ended, and keeps what was noted else
        return sum(self.cpu.values())

    @property
    def peak_memory(self) -> dict[str, int]:
        """Most bytes so far by role; of processes with one role, the largest."""
        return self._by_role(self._memory)

    @property
    def resident_memory(self) -> dict[str, int]:
        """Bytes at the last look by role; of processes with one role, the largest."""
        return self._by_role(self._resident)

    def _by_role(self, memory: Mapping[psutil.Process, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for process, held in memory.items():
            role = self._roles.get(process, "other")
            found[role] = max(held, found.get(role, 0))
        return found

    def stop(self, patience: float = 15) -> None:
        """Waits for all processes to end, and ends those that do not."""
        _, alive = psutil.wait_procs(list(self.cpu), timeout=patience)
        for process in alive:
            process.kill()


def _role(name: str) -> str | None:
    """A process by what it does; Ray's workers name themselves after the class they run."""
    for title, role in {"ray::TrunkActor": "trunk", "ray::ClientWorker": "client", "ray::ClientApp": "client"}.items():
        if name.startswith(title[:15]):  # the system keeps no more
            return role
    return None


def _peak_memory(process: psutil.Process) -> int:
    """The most resident memory a process has had, in bytes.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def events(log: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON objects; none where there is no file yet."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def follow(
    command: Sequence[str], log: Path, env: Mapping[str, str], output: Path
) -> tuple[list[dict[str, Any]], Tree]:
    """Runs a command that logs events, and notes the CPU time used until each.

    Args:
        command: What to run.
        log: Where it logs.
        env: Its environment.
        output: Where its output goes.

    Returns:
        The events, each with "cpu" (seconds from the command's start) and "memory" (bytes by role), and the processes.

    Raises:
        RuntimeError: It failed; with the last lines of its output.
    """
    noted: list[dict[str, Any]] = []
    with open(output, "w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    tree, looked, size = Tree(process.pid), time.monotonic(), 0
    try:
        while process.poll() is None:
            grown = os.path.getsize(log) if log.exists() else 0
            if grown != size or time.monotonic() - looked > LOOK_EVERY:
                cpu, looked, size = tree.look(), time.monotonic(), grown
                memory = tree.resident_memory
                noted += [{**event, "cpu": cpu, "memory": memory} for event in events(log)[len(noted) :]]
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.terminate()
        tree.stop()
        process.wait()
    if process.returncode:
        raise RuntimeError("\n".join(output.read_text().splitlines()[-5:]))
    return noted, tree
