"""Who gets how much of the machine: processes, threads, and parts of a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.trunk.schedules import SCHEDULES, is_deterministic

LARGE = 2**25
"""Tokens times the square of the width from which on computing half a batch takes far longer than its messages do."""


@dataclass(frozen=True)
class Plan:
    """Who gets how much of the machine.

    Attributes:
        workers: Processes that play the clients.
        client_threads: Threads of each of them.
        trunk_threads: Threads of each of the trunk's lanes.
        micro_batches: Parts of a batch that each client has under way at once.
        trunk_lanes: 2 where the trunk computes a forward and a backward at the same time.
    """

    workers: int
    client_threads: int
    trunk_threads: int
    micro_batches: int
    trunk_lanes: int


def plan(config: Config, width: int = 0) -> Plan:
    """Deals the cores out; threads that outnumber the cores make every process several times slower.

    Where there are fewer clients at a time than cores, half of the cores are the trunk's, and two micro-batches
    keep both sides at work. Where the model is large they also do so with as many clients as cores, and take less
    memory there: at the shape of GPT-2 small 1.91 of 2 cores were busy in place of 1.84. Of a small model a second
    message costs more than that (6 to 19 % less speed with the bundled one); in 16 bits products of half a batch do.

    With as many clients as cores the trunk has two lanes: it has half of a model's work and more, so with one thread it
    is what all wait for. At the shape of GPT-2 small 1.91 of 2 cores were busy in place of 1.82; with the bundled model
    it makes no difference that was seen.

    Where the result must not depend on the number of processes, threads and micro-batches do not either: they decide
    how sums are rounded, and which dropout is drawn.

    Args:
        config: The run's.
        width: The size of the model's hidden states; 0 where it is not known.

    Raises:
        SettingError: More clients should train at once than there are processes.
    """
    if config.engine == "local":
        return _plan_local(config, width)
    cores = _cores()
    workers = min(config.workers or cores, config.clients)
    fixed = config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every)
    at_once = min(cores, config.clients) if fixed else workers
    trunk = cores // 2 if at_once < cores else 1
    client = max(1, (cores - trunk) // at_once) if at_once < cores else 1
    group = config.trunk.group
    if config.deterministic and group > workers:
        raise SettingError("trunk.group", group, f"1 to {workers}, the number of client processes")
    one = SCHEDULES[config.trunk.schedule].gathers or config.router_aux_loss > 0  # what they would change
    tokens = config.train.batch_size * config.train.max_length / 2
    large = config.train.batch_size > 1 and tokens * width**2 >= LARGE and config.dtype == "fp32"
    micro_batches = 2 if not one and (at_once < cores or large) else 1
    alone = config.deterministic or config.trunk.memory or at_once < cores
    return Plan(
        workers,
        config.threads or client,
        config.trunk.threads or trunk,
        config.train.micro_batches or micro_batches,
        config.trunk.lanes or (1 if alone else 2),
    )


def _plan_local(config: Config, width: int) -> Plan:
    """Plans a run in one process, in which clients and trunk compute in turns.

    Raises:
        SettingError: The settings ask for more than one client at a time.
    """
    if config.deterministic and config.trunk.group > 1:
        raise SettingError(
            "trunk.group", config.trunk.group, "1 with the engine local, which plays one client at a time"
        )
    if config.workers > 1:
        raise SettingError("workers", config.workers, "0 or 1 with the engine local")
    if config.trunk.memory:
        allowed = "no limit with the engine local, where the trunk has no process of its own"
        raise SettingError("trunk.memory", config.trunk.memory, allowed)
    alike = plan(replace(config, engine="ray"), width)
    if config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every):
        return replace(alike, workers=1, trunk_lanes=1)  # threads and micro-batches decide how sums are rounded
    cores = _cores()
    return Plan(
        workers=1,
        client_threads=config.threads or cores,
        trunk_threads=config.trunk.threads or config.threads or cores,
        micro_batches=config.train.micro_batches or 1,
        trunk_lanes=1,
    )


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
