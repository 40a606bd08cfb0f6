"""A federation that hangs is told from one that is slow."""

from __future__ import annotations

import pytest

from fedsplit.engines.stalls import StallWatch
from fedsplit.federation.clients import FederationFailed


class Scene:
    """A clock, a trunk and processes that the test moves."""

    def __init__(self) -> None:
        self.now, self.packets, self.killed = 0.0, 0, 0
        self.watch = StallWatch(10, lambda: self.packets, self._kill, clock=lambda: self.now)

    def _kill(self) -> None:
        self.killed += 1

    def after(self, seconds: float, packets: int = 0) -> None:
        self.now += seconds
        self.packets += packets
        self.watch.look()


def test_replies_and_packets_are_signs_of_life() -> None:
    scene = Scene()
    for _ in range(50):
        scene.after(9)
        scene.watch.heard()
    for _ in range(50):
        scene.after(11, packets=1)
    assert scene.killed == 0


def test_without_a_sign_of_life_processes_are_killed_once_and_then_the_federation_has_failed() -> None:
    scene = Scene()
    scene.after(11)  # learns what the trunk has got so far
    scene.after(9)
    assert scene.killed == 0
    scene.after(2)
    assert scene.killed == 1
    with pytest.raises(FederationFailed, match="for 10 seconds"):
        scene.after(11)
    assert scene.killed == 1


def test_after_a_reply_it_may_hang_again() -> None:
    scene = Scene()
    scene.after(11, packets=1)
    for _ in range(3):
        scene.after(11)
        scene.watch.heard()
    assert scene.killed == 3


def test_a_trunk_that_is_gone_is_reported() -> None:
    def gone() -> object:
        raise ConnectionError

    watch = StallWatch(0, gone, lambda: None)
    with pytest.raises(ConnectionError):
        watch.look()
