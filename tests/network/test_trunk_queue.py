"""The trunk's queue: two lanes, barriers and gathered batches; the clock's tests have the times of whole phases."""

from __future__ import annotations

from typing import Any

import simpy

from fedsplit.network.trace import Crossing, Kind
from fedsplit.network.trunk_queue import Discipline, Job, TrunkQueue


class Played:
    """A queue to which messages are submitted at given times."""

    def __init__(self, discipline: Discipline, clients: int) -> None:
        self.env = simpy.Environment()
        self.queue = TrunkQueue(self.env, discipline, range(clients), clips=False)
        self.jobs: dict[str, Job] = {}

    def submit(self, name: str, at: float, client: int, kind: Kind = "forward", **values: Any) -> None:
        crossing = Crossing(1, client, 0, values.pop("step", 0), 0, 0, kind, 0, 0, ends=True, **values)
        job = Job(crossing, 1.0, self.env.event(), self.env.event(), sent=at)
        self.jobs[name] = job
        self.call(at, lambda: self.queue.submit(job))

    def call(self, at: float, function: Any) -> None:
        timer = self.env.timeout(at)
        timer.callbacks.append(lambda _: function())

    def ends(self) -> dict[str, float]:
        self.env.run()
        return {name: job.ended for name, job in self.jobs.items()}


def test_two_lanes_compute_both_directions_at_once() -> None:
    for lanes, expected in ((1, {"f": 2.0, "b": 1.0}), (2, {"f": 1.0, "b": 1.0})):
        played = Played(Discipline(lanes=lanes), 2)
        played.submit("b", 0, 0, "backward")
        played.submit("f", 0, 1)
        assert played.ends() == expected


def test_held_out_text_waits_at_no_barrier() -> None:
    played = Played(Discipline(sums=True, every=1), 2)
    played.submit("b", 0, 0, "backward")
    played.submit("held", 0, 0, step=1)
    played.submit("eval", 0, 0, "evaluation", step=2)
    played.submit("private", 0, 0, step=3, learns=False)
    played.submit("other", 9, 1, "backward")
    assert played.ends() == {"b": 1.0, "eval": 2.0, "private": 3.0, "other": 10.0, "held": 11.0}


def test_nobody_waits_for_a_client_that_has_left() -> None:
    gathered = Played(Discipline(gathers=True), 2)
    gathered.submit("forward", 0, 0)
    gathered.call(7, lambda: gathered.queue.leave(1))
    gathered.submit("gradient", 9, 0, "backward")
    assert gathered.ends() == {"forward": 8.0, "gradient": 10.0}

    summed = Played(Discipline(sums=True, every=1), 2)
    summed.submit("gradient", 0, 0, "backward")
    summed.submit("next", 5, 0, step=1)
    summed.call(7, lambda: summed.queue.leave(1))
    assert summed.ends() == {"gradient": 1.0, "next": 8.0}


def test_a_gathered_batch_takes_the_sum_of_its_members() -> None:
    played = Played(Discipline(gathers=True), 2)
    played.submit("a", 0, 0)
    played.submit("b", 4, 1)
    assert played.ends() == {"a": 6.0, "b": 6.0}
    assert played.jobs["a"].eligible == 4.0
