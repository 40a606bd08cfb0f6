"""The trunk in a process of its own: the same bits, and a clear word when it is gone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import socket, sys, time
from dataclasses import replace
from fedsplit.environment import prepare
prepare()
import ray, torch
from pathlib import Path
from fedsplit.adaptation import lora
from fedsplit.trunk.actor import ActorSetup, RayTransport, RayTrunk, Seat, find_trunk, start_trunk
from fedsplit.trunk import cluster
from fedsplit.settings.documents import build
from fedsplit.model.split import load_parts
from fedsplit.wire import sockets
from fedsplit.wire.steps import ForeignStep, UnknownStep
from fedsplit.wire.transport import TrunkLost
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.codecs import make_codec

values = {"model": sys.argv[1], "cut": "1:2", "lora.dropout": 0.3, "trunk.memory": "8GB", "train.max_length": 8}
config = build(values)
torch.set_num_threads(1)
(part,) = load_parts(config.model_path, config.bounds, ["trunk"], kernels=config.kernels)
lora.add(part, config.lora, config.seed)
codec = make_codec("raw")
started = cluster.running(workers=1)
started.__enter__()
handle = start_trunk(config, Seat("t", "t", "life"), ActorSetup(threads=1, workers=2))
try:
    life = handle.status().incarnation
    assert 10**8 < handle.status().least_memory < 8 * 10**9
    local = TrunkServer(part, codec, "shared", config.train, config.seed, run="t", incarnation=life)
    handles = {name: find_trunk("t") for name in ("hidden", "gradient")}  # as two processes have them
    for step in range(5):
        key = StepKey(1, 0, step, run="t")
        hidden, gradient = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        for tensor, name, call in ((hidden, "hidden", "forward"), (gradient, "gradient", "backward")):
            packet = Packet(key, {name: codec.encode(tensor)}, incarnation=life)
            here, there = getattr(local, call)(packet), handles[name].send(packet)()
            assert torch.equal(codec.decode(here.tensors[name]), codec.decode(there.tensors[name])), (step, call)
    weights = handle.read().tensors
    assert all(torch.equal(tensor, weights[name]) for name, tensor in local.adapters.read().tensors.items())
    status = handle.status()
    assert status.traffic == local.traffic
    assert status.over_socket == (10 if sockets.is_possible() else 0), status
    actor = handle._calls._actor
    through_ray = RayTrunk(actor, transport=RayTransport(handle._calls))  # as a client on another machine
    cut_off = find_trunk("t")
    for other in (through_ray, cut_off):
        if other is cut_off:
            way = other.transport()._first
            assert way.is_open
            way._connection.shutdown(socket.SHUT_RDWR)
        again = other.send(packet)()
        assert torch.equal(codec.decode(again.tensors["gradient"]), codec.decode(there.tensors["gradient"]))
    assert not way.is_open
    known = local.adapters.read().tensors
    assert all(torch.equal(tensor, known[name]) for name, tensor in handle.read().tensors.items()), "counted twice"
    assert status.peak_memory + 10**6 >= status.resident_memory > 10**8
    for wrong, refusal in (
        (replace(packet, key=replace(key, step=9)), UnknownStep),
        (replace(packet, incarnation="another"), ForeignStep),
    ):
        try:
            handle.send(wrong)()
        except refusal as error:
            assert "client 0" in str(error)
        else:
            raise AssertionError("what must be refused was answered")
    waiting = [handle.send(Packet(StepKey(2, 0, 0, micro=m, run="t"), {"hidden": codec.encode(hidden)}, micros=3,
                                  incarnation=life)) for m in range(3)]
    assert all(answer().tensors for answer in waiting)
    handle.leave(0)
    assert handle.end_round([0]).abandoned == 3
    assert handle.status().pending == 0
    handle.write({name: tensor * 0 for name, tensor in weights.items()})
    assert all(not tensor.any() for tensor in handle.read().tensors.values())
    import psutil
    processes = psutil.Process().children(recursive=True)
    connections = [connection for process in processes for connection in process.net_connections("inet")]
    addresses = {connection.laddr.ip for connection in connections if connection.status == "LISTEN"}
    print("listening on", sorted(addresses))
    ray.kill(actor)
    for gone in (handle.status, lambda: find_trunk("nobody").status()):
        for _ in range(100):  # a kill takes a moment
            try:
                gone()
            except TrunkLost as error:
                print("lost:", str(error).splitlines()[0])
                break
            time.sleep(0.1)
        else:
            raise AssertionError("a trunk that is gone answered")
finally:
    started.__exit__(None, None, None)
"""


@pytest.mark.slow
def test_a_trunk_across_processes_is_the_trunk_itself(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny_models["llama"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lost:") == 2
    listening = done.stdout.partition("listening on ")[2].splitlines()[0]
    assert re.findall(r"'([^']+)'", listening), "no server was found"
    assert all(address.endswith("127.0.0.1") for address in re.findall(r"'([^']+)'", listening)), listening
