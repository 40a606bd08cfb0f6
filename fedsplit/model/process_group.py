"""Processes that compute one part of a model together: sums over their tensors, and messages of the first process.

All processes are on one machine. They are connected by torch.distributed: by gloo on CPUs, by NCCL on GPUs, and by gloo
for messages. The sockets of gloo are bound to the loopback interface. The processes find each other by a file, which
should lie in a folder of their user's alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from fedsplit.model.devices import CPU

_dist: Any = distributed  # the classes of its groups have no types

_LOOPBACK = "127.0.0.1"

_IDLE = timedelta(days=365)
"""Time for which a process waits for the next message of the first. Only the end of the first ends the wait."""

Message = tuple[dict[str, Any], list[Tensor | None]]
"""Fields in JSON's types, and tensors."""


@dataclass(frozen=True)
class Shard:
    """Place of one process among those that share a part.

    Attributes:
        rank: Number of the process. The first process, 0, leads.
        size: Number of processes.
    """

    rank: int
    size: int

    def of(self, length: int) -> slice:
        """Returns the positions of this process's piece of a dimension.

        Example:
            >>> Shard(rank=1, size=2).of(6)
            slice(3, 6, None)
        """
        piece = length // self.size
        return slice(self.rank * piece, (self.rank + 1) * piece)


class ProcessGroup:
    """A group of processes that share a part, as one of them sees it.

    All processes make the same calls in the same order, except that the first says what the others hear. A method
    raises a `RuntimeError` if a process is gone, or has not come to the same call within the timeout.

    Attributes:
        shard: Place of this process.
    """

    def __init__(
        self,
        file: Path,
        shard: Shard,
        timeout: float,
        device: torch.device = CPU,
    ) -> None:
        """Waits for all processes of the group.

        Args:
            file: Path by which the processes find each other. No file of this name exists before, and it can be deleted
                after the first sum.
            shard: Place of this process.
            timeout: Seconds after which a process that does not come counts as gone.
            device: Device of the tensors that are summed.
        """
        self.shard = shard
        self._device = device
        within = timedelta(seconds=timeout)
        store = _dist.FileStore(str(file), shard.size)
        store.set_timeout(within)
        gloo = _dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)
        # A group of its own for messages, since the timeout belongs to a group: a process waits for its next message
        # as long as the run pauses, and for a sum only as long as the others need to compute.
        self._messages = _gloo(store, "messages", shard, gloo, _IDLE)
        if device.type == "cuda":
            options = _dist.ProcessGroupNCCL.Options()
            options._timeout = within
            of_sums = _dist.PrefixStore("sums", store)
            self._sums: Any = _dist.ProcessGroupNCCL(of_sums, shard.rank, shard.size, options)
        else:
            self._sums = _gloo(store, "sums", shard, gloo, within)

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum of all processes' tensors."""
        # A copy, since the sum is written over the tensor of each process.
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._sums.allreduce([total]).wait()
        return total

    def joined(self, tensor: Tensor) -> Tensor:
        """Returns the tensors (..., W) of all processes side by side, (..., N * W)."""
        own = tensor.detach().contiguous()
        pieces = [torch.empty_like(own) for _ in range(self.shard.size)]
        self._sums.allgather([pieces], [own]).wait()
        return torch.cat(pieces, -1)

    def say(self, fields: Mapping[str, Any], tensors: Sequence[Tensor | None] = ()) -> None:
        """Sends a message from the first process to all others."""
        described = []
        for tensor in tensors:
            described.append(None if tensor is None else [str(tensor.dtype), list(tensor.shape)])
        encoded = json.dumps({"fields": fields, "tensors": described}).encode()
        # The length goes first, since a receiver must have memory of the right size before a broadcast.
        self._messages.broadcast([torch.tensor([len(encoded)])]).wait()
        as_tensor = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        self._messages.broadcast([as_tensor]).wait()
        for tensor in tensors:
            if tensor is not None:
                self._send_bytes(tensor.detach().contiguous().flatten())

    def hear(self) -> Message:
        """Waits for the next message of the first process."""
        length = torch.zeros(1, dtype=torch.int64)
        self._messages.broadcast([length]).wait()
        encoded = torch.empty(int(length), dtype=torch.uint8)
        self._messages.broadcast([encoded]).wait()
        document = json.loads(bytes(encoded.tolist()))
        tensors: list[Tensor | None] = []
        for description in document["tensors"]:
            tensors.append(None if description is None else self._receive(*description))
        return document["fields"], tensors

    def _receive(self, kind: str, shape: Sequence[int]) -> Tensor:
        dtype: torch.dtype = getattr(torch, kind.removeprefix("torch."))
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._send_bytes(tensor.view(-1))
        return tensor

    def _send_bytes(self, flat: Tensor) -> None:
        """Sends the bytes of a tensor from the first process into the memory of the others' tensors."""
        if flat.numel():  # as bytes: gloo does not know all types
            self._sums.broadcast([flat.view(torch.uint8)]).wait()


def _gloo(
    store: Any,
    name: str,
    shard: Shard,
    device: Any,
    timeout: timedelta,
) -> Any:
    """Returns one of torch's groups, with sockets that are bound to the address of a device of gloo's."""
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [device]
    options._timeout = timeout
    return _dist.ProcessGroupGloo(_dist.PrefixStore(name, store), shard.rank, shard.size, options)
