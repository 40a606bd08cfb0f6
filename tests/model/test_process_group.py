"""Groups of processes: what they add and say, and that nobody waits for one that is gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedsplit.model.process_group import ProcessGroup, Shard

SECOND = """
import sys, time
from pathlib import Path
import torch
from fedsplit.model.process_group import ProcessGroup, Shard

group = ProcessGroup(Path(sys.argv[1]), Shard(1, 2), timeout=30)
while True:
    fields, tensors = group.hear()
    if fields["do"] == "sum":
        group.summed(tensors[0] + 1)
    elif fields["do"] == "join":
        group.joined(tensors[0] + 1)
    elif fields["do"] == "wait":
        time.sleep(600)
    elif fields["do"] == "tell":
        described = [repr(tensor) if tensor is None else f"{tensor.dtype} {tensor.tolist()}" for tensor in tensors]
        print(fields, *described, flush=True)
"""


@pytest.fixture
def second(tmp_path: Path) -> Iterator[tuple[ProcessGroup, subprocess.Popen[str]]]:
    """The first of two processes, and the second."""
    file = tmp_path / "group"
    with subprocess.Popen([sys.executable, "-c", SECOND, str(file)], stdout=subprocess.PIPE, text=True) as process:
        yield ProcessGroup(file, Shard(0, 2), timeout=20), process
        process.kill()


def test_pieces_cover_a_dimension() -> None:
    assert [Shard(rank, 3).of(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]


def test_sums_and_joins(second: tuple[ProcessGroup, subprocess.Popen[str]]) -> None:
    group, _ = second
    for dtype in (torch.float32, torch.bfloat16):
        own = torch.tensor([[1.0, 2.0]], dtype=dtype)
        group.say({"do": "sum"}, [own])
        assert torch.equal(group.summed(own), torch.tensor([[3.0, 5.0]], dtype=dtype))
        assert own.tolist() == [[1.0, 2.0]]
    own = torch.arange(6.0).view(2, 3).t()  # not contiguous
    group.say({"do": "join"}, [own])
    assert torch.equal(group.joined(own), torch.cat([own, own + 1], -1))


def test_messages_carry_tensors_of_every_type(second: tuple[ProcessGroup, subprocess.Popen[str]]) -> None:
    group, process = second
    tensors = [torch.tensor([True, False]), None, torch.tensor([[7]]), torch.tensor([0.5], dtype=torch.bfloat16)]
    group.say({"do": "tell", "seed": 2**63 + 1}, [*tensors, torch.empty(0, 2)])
    assert process.stdout is not None
    expected = f"{{'do': 'tell', 'seed': {2**63 + 1}}} torch.bool [True, False] None torch.int64 [[7]]"
    assert process.stdout.readline() == f"{expected} torch.bfloat16 [0.5] torch.float32 []\n"


def test_nobody_waits_for_a_process_that_is_gone(second: tuple[ProcessGroup, subprocess.Popen[str]]) -> None:
    group, process = second
    process.kill()
    with pytest.raises(RuntimeError):
        group.summed(torch.ones(2))


def test_nobody_waits_for_ever_for_a_process_that_hangs(second: tuple[ProcessGroup, subprocess.Popen[str]]) -> None:
    group, _ = second
    group.say({"do": "wait"})
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        group.summed(torch.ones(2))


def test_a_process_ends_with_the_first(tmp_path: Path) -> None:
    """It waits for the next message, for which there is no timeout."""
    file = tmp_path / "group"
    first = (
        "import os, sys; from pathlib import Path; from fedsplit.model.process_group import ProcessGroup, Shard;"
        "ProcessGroup(Path(sys.argv[1]), Shard(0, 2), 30); os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", SECOND, str(file)], stderr=subprocess.DEVNULL) as process:
        subprocess.run([sys.executable, "-c", first, str(file)], check=True, timeout=60)
        assert process.wait(60) != 0


def test_sockets_are_bound_to_the_loopback_interface(second: tuple[ProcessGroup, subprocess.Popen[str]]) -> None:
    _, process = second
    for one in (psutil.Process(), psutil.Process(process.pid)):
        listening = [socket for socket in one.net_connections("inet") if socket.status == psutil.CONN_LISTEN]
        assert listening and {socket.laddr.ip for socket in listening} == {"127.0.0.1"}
