"""Processes that share the trunk's blocks: how they load their pieces, and how they are started on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from fedsplit.adaptation import lora, run_adapters
from fedsplit.errors import SettingError
from fedsplit.model.devices import TYPES, resolve
from fedsplit.model.parts import Trunk
from fedsplit.model.process_group import ProcessGroup, Shard
from fedsplit.model.sources import config_folder
from fedsplit.model.split import empty_part
from fedsplit.model.tensor_parallel import check_sizes, styles_of
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, from_document
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.sharded import Follower, LeadingBlocks, ShardedBlocks

_METHODS = ("lora", "rslora")
"""Adapter methods whose factors can be cut like the projections."""


def check_tensor_parallel(config: Config) -> None:
    """Checks that several processes can share the trunk of a run.

    Raises:
        SettingError: The model, the adapters or a further setting do not allow it.
    """
    size = config.trunk.tensor_parallel
    if size == 1:
        return
    for name, value, is_possible, words in (
        ("trunk.stages", config.trunk.stages, not config.trunk.stages, "none"),
        ("trunk.replicas", config.trunk.replicas, config.trunk.replicas == 1, "1"),
        ("trunk.devices", config.trunk.devices, not config.trunk.devices, "none"),
        (
            "trunk.lanes",
            config.trunk.lanes,
            config.trunk.lanes < 2,
            "0 or 1: all processes compute one thing at a time",
        ),
        ("quantization", config.quantization, "trunk" not in config.bits, "parts without the trunk"),
        ("dtype", config.dtype, config.dtype != "fp16", "fp32 | bf16"),
        ("prompt.kind", config.prompt.kind, config.prompt.kind == "off", "off"),
        ("lora.method", config.lora.method, config.lora.method in _METHODS, " | ".join(_METHODS)),
        ("lora.options", config.lora.options, not config.lora.options, "none"),
    ):
        if not is_possible:
            raise SettingError(name, value, f"{words}, with --trunk.tensor-parallel {size}")
    fused = config.kernels == "fused"
    folder = config_folder(config.model)
    # Blocks without weights, so that a wrong number of processes is found before anything large is loaded.
    part = empty_part(folder, config.bounds, "trunk", TYPES[config.dtype], fused, classes=0)
    check_sizes(part, size)


def join(config: Config, file: Path, rank: int) -> ProcessGroup:
    """Joins the processes of a run's trunk.

    Args:
        config: Settings of the run.
        file: Path by which the processes find each other.
        rank: Number of this process.
    """
    shard = Shard(rank, config.trunk.tensor_parallel)
    device = resolve(config.device_of("trunk"), rank)
    return ProcessGroup(file, shard, config.timeout, device)


def _load_pieces(config: Config, adapter: Path | None, group: ProcessGroup) -> tuple[Trunk, dict[str, str]]:
    """Loads this process's pieces of the blocks, with an adapter.

    Args:
        config: Settings of the run.
        adapter: Folder of a finished run's adapter; None for a new adapter.
        group: The processes.

    Returns:
        The part, and how each projection is cut.
    """
    (part,) = run_adapters.bare_parts(config, ["trunk"], shard=group.shard)
    styles = styles_of(part, group.shard.size)
    # The values of the adapter come with each step. A finished run's adapter has ranks and scalings of its own.
    if adapter is None:
        lora.add(part, config.lora, config.seed)
    else:
        run_adapters.adopt(adapter, config, part)
    group.summed(torch.zeros(1, device=next(part.parameters()).device))  # waits until all have loaded
    return part, styles


def lead(
    config: Config,
    adapter: Path | None,
    group: ProcessGroup,
    on_loss: Any,
) -> tuple[Trunk, Blocks]:
    """Loads the pieces of the first process.

    Args:
        config: Settings of the run.
        adapter: Folder of a finished run's adapter; None for a new adapter.
        group: The processes.
        on_loss: Called at the loss of the trunk.

    Returns:
        The part with whole adapters and without base weights, and the blocks.
    """
    whole = run_adapters.weightless(config, "trunk")
    if adapter is not None:
        lora.adopt(run_adapters.load(adapter), whole)
    part, styles = _load_pieces(config, adapter, group)
    assert isinstance(whole, Trunk)
    return whole, LeadingBlocks(part, styles, group, on_loss)


def follow(config: Config, adapter: Path | None, threads: int, group: ProcessGroup) -> None:
    """Loads the pieces of a further process, and does what the first process says, for ever.

    Args:
        config: Settings of the run.
        adapter: Folder of a finished run's adapter; None for a new adapter.
        threads: Number of threads that torch may use.
        group: The processes.

    Raises:
        RuntimeError: The first process is gone, or a process has not come to the same step in time.
    """
    torch.set_num_threads(threads)
    part, styles = _load_pieces(config, adapter, group)
    Follower(ShardedBlocks(part, styles, group), group).work()


class LocalShards:
    """Processes on this machine that share the trunk with this process. They end with it, or with `close`."""

    def __init__(self, config: Config) -> None:
        """Starts the processes.

        Args:
            config: Settings of the run.
        """
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="fedsplit-")  # of this user's alone
        self._file = Path(self._folder.name, "group")
        self._processes = [self._start(rank) for rank in range(1, config.trunk.tensor_parallel)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        """Starts one process, which ends with this process: the end closes the input that the other waits for."""
        code = "from fedsplit.trunk.shard_group import main; main()"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        task = {
            "config": as_document(self._config),
            "rank": rank,
            "file": str(self._file),
            "threads": torch.get_num_threads(),
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(task).encode() + b"\n")
        process.stdin.flush()
        return process

    def lead(self, config: Config, adapter: Path | None) -> tuple[Trunk, Blocks]:
        """Loads the pieces of this process; see `lead`."""
        loaded = lead(config, adapter, join(config, self._file, 0), self.close)
        self._folder.cleanup()
        return loaded

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._folder.cleanup()


def main() -> None:
    """Follows in a process that `LocalShards` has started."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    config = from_document(task["config"])
    group = join(config, Path(task["file"]), task["rank"])
    try:
        follow(config, None, task["threads"], group)
    except RuntimeError:
        os._exit(1)  # the first process is gone, or knows of the loss


def _end_with_input() -> None:
    """Ends this process when the process that started it is gone."""
    sys.stdin.read()
    os._exit(0)
