"""Parties that play what a test wrote down: no model, no engine, and a server that is the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsplit.events import Event
from fedsplit.events.screen import line_of
from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.clients import ClientNode
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.messages import Answer, Briefing, Request
from fedsplit.federation.parties import Parties
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import RunTotals
from fedsplit.federation.workload import Workload
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.status import RoundCounts, Traffic, TrunkStatus
from fedsplit.updates import Adapters, Layer, Traits
from fedsplit.watchdog import Watchdog
from fedsplit.wire.transport import TrunkLost

NAMES = ("ann", "bob", "cid")
BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")
WORK = Workload(8, tokens=1024, held_out=20, sample=4)


def part(layer: str) -> Adapters:
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 3), f"{layer}.lora_B.weight": torch.zeros(4, 2)}
    return Adapters(tensors, {layer: Layer(4.0, False)})


PARTS = {"bottom": part("b"), "trunk": part("t"), "top": part("p")}


@dataclass
class ScriptedClients:
    """Three clients that answer as a function says."""

    play: Callable[[Request], Answer]
    nodes: list[ClientNode] = field(default_factory=lambda: [ClientNode(n + 1, name) for n, name in enumerate(NAMES)])
    asked: list[Request] = field(default_factory=list)
    grid: None = None

    def ask(self, requests: Iterable[Request], until: float | None = None) -> Iterator[Answer]:
        for request in requests:
            self.asked.append(request)
            yield self.play(request)

    def take_shipped(self) -> dict[str, int]:
        return {}


class NotedTrunk:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.groups: list[list[int]] = []
        self.finished: list[int] = []
        self.counts = RoundCounts(steps=4)
        self._is_lost = False

    def lose(self) -> None:
        """Is gone from now on."""
        self._is_lost = True

    def leave(self, client: int) -> None:
        self.left.append(client)

    def begin(self, group: Iterable[int]) -> None:
        self.groups.append(list(group))

    def end_round(self, finished: Iterable[int]) -> RoundCounts:
        self.finished = list(finished)
        return self.counts

    def status(self) -> TrunkStatus:
        if self._is_lost:
            raise TrunkLost("the trunk was lost")
        return TrunkStatus("first", Traffic(), resident_memory=5, peak_memory=6, pending=0, sessions=0, parameters={})


class NoFolder:
    """A run's folder without checkpoints."""

    def rounds_needed(self, client: int) -> tuple[int, ...]:
        return ()


class Reported(list[Event]):
    """Events of a run, in order."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def lines(self) -> list[str]:
        """Lines that the events leave on the screen."""
        return [line for line in map(line_of, self) if line is not None]


def gather(play: Callable[[Request], Answer], folder: Path, **settings: Any) -> tuple[Parties, RunState]:
    """Returns three clients with their server's state before the first round."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    config: Config = build({"clients": 3, "rounds": 5, "lora.rank": 2} | values)
    ledger = AdapterLedger(config, Traits(), PARTS, folder / "clients", folder / "folds")
    state = RunState(ledger.start, PARTS["trunk"], {}, ledger, RunTotals(0.0), EarlyStopping())
    parties: Any = Parties(
        config=config,
        briefing=BRIEFING,
        trunk=NotedTrunk(),  # type: ignore[arg-type]
        clients=ScriptedClients(play),  # type: ignore[arg-type]
        workloads=[WORK] * 3,
        aggregation=None,  # type: ignore[arg-type]
        folder=NoFolder(),  # type: ignore[arg-type]
        emit=Reported(),
        watchdog=Watchdog(600),
    )
    return parties, state
