"""A budget keeps what it promises, and gives freed pages back before it sends anybody away."""

from __future__ import annotations

import subprocess
import sys

from fedsplit.trunk.memory import Budget

SCRIPT = """
import numpy as np
from fedsplit.trunk.memory import peak_memory, resident_memory, return_free_pages
before = resident_memory()
assert 10**7 < before <= peak_memory() + 10**6 < 2**40, "the system's counters may lag a little"
held = np.ones(50_000_000, np.uint8)
assert resident_memory() - before > 40_000_000
del held
many = [np.ones(100_000, np.uint8) for _ in range(500)]
many = many[-1:]
return_free_pages()
assert resident_memory() - before < 10_000_000
assert peak_memory() - before > 40_000_000
"""


def test_memory_is_read_in_bytes_and_given_back() -> None:
    """In a process of its own, whose memory nobody else uses."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_limit_keeps_every_graph() -> None:
    budget = Budget(None, resident=lambda: 2**60)
    budget.learn(1, 10**9, 10**9)
    assert budget.room(10**6, 10**9) == "graph"


def test_room_is_for_the_graph_then_for_the_input_then_for_nothing() -> None:
    resident, released = 0, []
    budget = Budget(1000, resident=lambda: resident, release=lambda: released.append(resident))
    budget.learn(tokens=10, graph=100, working=300)
    assert budget.room(10, 20) == "graph"
    resident = 580  # 580 + 20 + 100 + 300 = 1000
    assert budget.room(10, 20) == "graph"
    assert released == []
    resident = 581
    assert budget.room(10, 20) == "input"
    assert released == [581]
    resident = 681
    assert budget.room(10, 20) == "none"
    assert released == [581]  # nothing was freed since: there is nothing to give back
    budget.freed()
    assert not budget.fits(10, 20)
    assert released == [581, 681]
    assert budget.least(10, 20) == 681 + 20 + 300


def test_freed_pages_are_given_back_before_anybody_is_sent_away() -> None:
    resident = [900, 100]
    budget = Budget(1000, resident=lambda: resident[0], release=lambda: resident.pop(0))
    budget.learn(tokens=1, graph=100, working=300)
    assert budget.room(1, 10) == "graph"
