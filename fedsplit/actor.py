"""The trunk in a process of its own: a Ray actor, the handle clients call, and the cluster around them."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from fedsplit import adapters
from fedsplit.config import Config
from fedsplit.split import TYPES, load_parts
from fedsplit.trunk import TrunkServer
from fedsplit.updates import Adapters, Packet
from fedsplit.wire import make_codec

NAMESPACE = "fedsplit"
"""Ray's namespace of all named actors."""

_OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory for tensors under way; a step's are freed as it ends."""


class TrunkLost(Exception):
    """The trunk's process is gone, or never came up."""


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TrunkActor:
    """A `TrunkServer` and what only its process can tell."""

    def __init__(self, config: Config, threads: int) -> None:
        """Loads the trunk's blocks, and no others, and puts the adapter on them."""
        torch.set_num_threads(threads)
        (part,) = load_parts(config.model_path, config.bounds, ["trunk"], TYPES[config.dtype], config.kernels)
        adapters.add(part, config.lora, config.seed)
        codec = make_codec(config.wire.codec)
        self._server = TrunkServer(part, codec, config.trunk.schedule, config.train, config.seed)

    def forward(self, packet: Packet) -> Packet:
        """As `TrunkServer.forward`."""
        return self._server.forward(packet)

    def backward(self, packet: Packet) -> Packet:
        """As `TrunkServer.backward`."""
        return self._server.backward(packet)

    def read(self) -> Adapters:
        """The trunk's adapter."""
        return self._server.read()

    def forget_pending(self) -> int:
        """As `TrunkServer.forget_pending`."""
        return self._server.forget_pending()

    def status(self) -> dict[str, Any]:
        """{"traffic": bytes by direction, "peak_memory": bytes, "parameters": counts}."""
        return {
            "traffic": dict(self._server.traffic),
            "peak_memory": peak_memory(),
            "parameters": self._server.count(),
        }


class TrunkHandle:
    """A trunk elsewhere, called as if it were here.

    Every call waits for its answer. A trunk that is gone raises `TrunkLost`; what the trunk itself
    raises is raised here.
    """

    def __init__(self, actor: Any) -> None:
        """Wraps Ray's handle of the actor."""
        self._actor = actor

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*args))
        except ray.exceptions.RayActorError as error:
            raise TrunkLost(f"the trunk's process is gone ({str(error).strip().splitlines()[0]})") from error

    def forward(self, packet: Packet) -> Packet:
        """As `TrunkServer.forward`."""
        answer: Packet = self._call("forward", packet)
        return answer

    def backward(self, packet: Packet) -> Packet:
        """As `TrunkServer.backward`."""
        answer: Packet = self._call("backward", packet)
        return answer

    def read(self) -> Mapping[str, Tensor]:
        """The trunk's adapter by exported name."""
        answer: Adapters = self._call("read")
        return answer.tensors

    def forget_pending(self) -> int:
        """As `TrunkServer.forget_pending`."""
        return int(self._call("forget_pending"))

    def status(self) -> dict[str, Any]:
        """As `TrunkActor.status`."""
        answer: dict[str, Any] = self._call("status")
        return answer


def start_cluster(workers: int) -> None:
    """Starts a Ray of our own on this machine.

    It binds to the loopback interface and asks for a token where the environment says so, as that of
    `fedsplit.simulate` does; Ray reads it when it is imported.

    Args:
        workers: Client processes it has room for.
    """
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        namespace=NAMESPACE,
        object_store_memory=_OBJECT_STORE,
    )


def start_trunk(config: Config, name: str, threads: int) -> TrunkHandle:
    """Starts the trunk's actor; it loads while the caller goes on.

    It asks for no CPU: Flower counts all CPUs of a node as its own, and would wait for ever for one that
    the trunk has.
    """
    remote = ray.remote(num_cpus=0)(TrunkActor)
    return TrunkHandle(remote.options(name=name).remote(config, threads))


def find_trunk(name: str) -> TrunkHandle:
    """The trunk of that name, from any process of the cluster.

    Raises:
        TrunkLost: There is none.
    """
    try:
        return TrunkHandle(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError as error:
        raise TrunkLost(f"there is no trunk named {name}") from error


def stop_cluster() -> None:
    """Stops what `start_cluster` started, if it still runs."""
    if ray.is_initialized():
        ray.shutdown()
