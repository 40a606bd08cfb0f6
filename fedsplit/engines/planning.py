"""Plans the use of the machine: number of processes, threads, micro-batches and trunk lanes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsplit.environment import available_cores
from fedsplit.errors import SettingError
from fedsplit.settings.config import Config
from fedsplit.trunk.schedules import SCHEDULES, is_deterministic

LARGE = 2**25
"""Tokens of half a batch times the square of the width, from which on computing it outweighs its messages by far."""


@dataclass(frozen=True)
class Plan:
    """Use of the machine by clients and trunk.

    Attributes:
        workers: Number of processes for clients; on the engine `local`, number of threads for clients.
        client_threads: Number of torch's threads in each worker.
        trunk_threads: Number of threads of each lane of the trunk.
        micro_batches: Number of micro-batches in a batch of a client.
        trunk_lanes: 2 if the trunk computes a forward and a backward at the same time, else 1.
    """

    workers: int
    client_threads: int
    trunk_threads: int
    micro_batches: int
    trunk_lanes: int


def plan(config: Config, width: int = 0) -> Plan:
    """Distributes the cores over clients and trunk. A setting that is not 0 takes precedence over the plan.

    More threads than cores would make every process several times slower. The rules were measured on two cores:

    - **Fewer clients at a time than cores.** The trunk gets half of the cores. Two micro-batches keep client and trunk
      busy at the same time.
    - **As many clients as cores.** Each process gets one thread. The trunk gets two lanes, since it has half of a
      model's work or more and all clients wait for it: at the shape of GPT-2 small 1.91 of 2 cores were busy instead
      of 1.82. With the bundled model no difference was seen.
    - **A large model in fp32.** Two micro-batches in any case, which also save memory: 1.91 of 2 cores were busy
      instead of 1.84. For a small model the second message costs more (6 to 19 % of the speed of the bundled model),
      and so do products of half a batch in 16 bits.

    With `--deterministic`, the result must not depend on the number of processes. So threads and micro-batches do not
    depend on the number either: both decide how sums are rounded, and which dropout masks are drawn.

    Args:
        config: Settings of the run.
        width: Size of the model's hidden states; 0 if unknown.

    Raises:
        SettingError: `trunk.group` asks for more clients at once than there are processes.
    """
    if config.engine == "local":
        return _plan_local(config, width)
    cores = available_cores()
    workers = min(config.workers or cores, config.clients)
    is_here = config.ray.address == "local"  # a cluster has more processes than this machine, as the engine finds out
    if is_here and config.deterministic and config.trunk.group > workers:
        raise SettingError("trunk.group", config.trunk.group, f"1 to {workers}, the number of client processes")

    independent = config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every)
    clients_at_once = min(cores, config.clients) if independent else workers
    spare = clients_at_once < cores
    trunk_threads = max(1, cores // 2 // config.trunk.tensor_parallel) if spare else 1
    client_threads = max(1, (cores - cores // 2) // clients_at_once) if spare else 1

    # A memory budget sets room aside for one step at a time, and processes that share a trunk compute one thing at a
    # time.
    one_lane = config.deterministic or config.trunk.memory or spare or config.trunk.tensor_parallel > 1
    return Plan(
        workers,
        config.threads or client_threads,
        config.trunk.threads or trunk_threads,
        config.train.micro_batches or _planned_micro_batches(config, width, spare),
        config.trunk.lanes or (1 if one_lane else 2),
    )


def _plan_local(config: Config, width: int) -> Plan:
    """Plans a run in one process, in which the trunk computes in the threads of the clients.

    - **Deterministic results.** One client trains at a time, with threads and micro-batches as on Ray, since both
      decide how sums are rounded.
    - **Elsewhere.** `--workers` clients train at once, each in a thread, with an equal share of the cores. The default
      is one client with all cores: a repeated run then gives equal numbers under every schedule.

    Raises:
        SettingError: The settings ask for more clients at once than the engine plays.
    """
    if config.deterministic and config.trunk.group > 1:
        raise SettingError(
            "trunk.group", config.trunk.group, "1 with the engine local, which plays one client at a time"
        )
    is_fixed = config.deterministic or is_deterministic(config.trunk.schedule, config.trunk.every)
    if is_fixed and config.workers > 1:
        allowed = "0 or 1 with the engine local, where results do not depend on the order of the clients"
        raise SettingError("workers", config.workers, allowed)
    if config.trunk.memory:
        allowed = "no limit with the engine local, where the trunk has no process of its own"
        raise SettingError("trunk.memory", config.trunk.memory, allowed)
    if is_fixed:
        return replace(plan(replace(config, engine="ray"), width), workers=1, trunk_lanes=1)
    cores = available_cores()
    workers = min(config.workers or 1, config.clients)
    threads = max(1, cores // workers)
    return Plan(
        workers=workers,
        client_threads=config.threads or threads,
        trunk_threads=config.trunk.threads or config.threads or threads,
        micro_batches=config.train.micro_batches or 1,
        trunk_lanes=1,
    )


def _planned_micro_batches(config: Config, width: int, spare: bool) -> int:
    """Returns 2 if two micro-batches pay off and change no result, else 1.

    Args:
        config: Settings of the run.
        width: Size of the model's hidden states; 0 if unknown.
        spare: True if there are fewer clients at a time than cores.
    """
    # A gathered batch has no micro-batches, and the auxiliary loss of routers would be another number.
    if SCHEDULES[config.trunk.schedule].gathers or config.router_aux_loss > 0:
        return 1
    tokens = config.train.batch_size * config.train.max_length / 2
    large = config.train.batch_size > 1 and tokens * width**2 >= LARGE and config.dtype == "fp32"
    return 2 if spare or large else 1
