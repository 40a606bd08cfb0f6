"""Who gets how much of the machine: processes, threads, and parts of a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fedsplit.config import Config, SettingError
from fedsplit.schedules import SCHEDULES, is_deterministic


@dataclass(frozen=True)
class Plan:
    """Who gets how much of the machine.

    Attributes:
        workers: Processes that play the clients.
        client_threads: Threads of each of them.
        trunk_threads: Threads of the trunk's process.
        micro_batches: Parts of a batch that each client has under way at once.
    """

    workers: int
    client_threads: int
    trunk_threads: int
    micro_batches: int


def plan(config: Config) -> Plan:
    """Deals the cores out; threads that outnumber the cores make every process several times slower.

    Where there are fewer clients at a time than cores, half of the cores are the trunk's, and two micro-batches
    keep both sides at work. Where the result must not depend on the number of processes, threads and
    micro-batches do not either: they decide how sums are rounded, and which dropout is drawn.

    Raises:
        SettingError: More clients should train at once than there are processes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, config.clients)
    fixed = config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every)
    at_once = min(cores, config.clients) if fixed else workers
    trunk = cores // 2 if at_once < cores else 1
    client = max(1, (cores - trunk) // at_once) if at_once < cores else 1
    group = config.trunk.group
    if config.deterministic and group > workers:
        raise SettingError("trunk.group", group, f"1 to {workers}, the number of client processes")
    one = SCHEDULES[config.trunk.schedule].gathers or config.router_aux_loss > 0  # what they would change
    micro_batches = 1 if one or at_once >= cores else 2
    return Plan(
        workers, config.threads or client, config.trunk.threads or trunk, config.train.micro_batches or micro_batches
    )
