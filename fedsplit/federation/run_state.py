"""The state of a run between two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.run_totals import RunTotals
from fedsplit.federation.virtual_time import VirtualTotals
from fedsplit.updates import Adapters


@dataclass
class RunState:
    """State of a run between two rounds.

    Attributes:
        round: Last committed round; 0 before the first one.
        adapters: Aggregated adapters, from which the next round starts.
        trunk: Adapter of the trunk.
        moments: State of the trunk's optimisers and of its codec.
        ledger: Ledger of the adapters at the clients.
        totals: Sums over the run.
        stopping: Best round and patience.
        before: Held-out loss before the first round, in nats.
        after: Held-out loss after the last measured round, in nats.
        measured: Last measured round.
        forgotten: Rise of a client's loss from local training to the end of the round, in nats, by the client's name.
        error: Aggregation error of the last round; None without an aggregation.
        accuracy: Accuracy of a classifier, before and after; empty for a model that predicts tokens.
        metrics: Means of the user's metrics over all clients by name, before and after.
        trunk_traffic: Bytes that the current trunk has counted, by kind and direction.
        virtual: Virtual time so far; None without a network.
    """

    adapters: Adapters
    trunk: Adapters
    moments: Mapping[str, Tensor]
    ledger: AdapterLedger
    totals: RunTotals
    stopping: EarlyStopping
    round: int = 0
    before: float = 0.0
    after: float = 0.0
    measured: int = 0
    forgotten: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    trunk_traffic: Mapping[str, int] = field(default_factory=dict)
    virtual: VirtualTotals | None = None

    def copy(self) -> RunState:
        """Returns an independent copy. The tensors are shared, since no code writes to them."""
        return replace(
            self,
            ledger=self.ledger.copy(),
            totals=self.totals.copy(),
            stopping=replace(self.stopping),
            forgotten=dict(self.forgotten),
            accuracy=dict(self.accuracy),
            metrics=dict(self.metrics),
            virtual=self.virtual and self.virtual.copy(),
        )

    def take_over_traffic(self) -> None:
        """Adds the trunk's counted bytes to the totals, before a new trunk starts to count from 0."""
        self.totals.begin_new_trunk(self.trunk_traffic)
        self.trunk_traffic = {}

    def facts(self, traffic: Mapping[str, int]) -> dict[str, Any]:
        """Returns the plain values of a checkpoint.

        Args:
            traffic: Bytes that the trunk has counted.
        """
        facts = {
            "before": self.before,
            "after": self.after,
            "measured": self.measured,
            # Keys of the file format, which outlive the names of classes.
            "tally": self.totals.document(traffic),
            "forgotten": self.forgotten,
            "error": self.error,
            "course": self.stopping.document(),
            "accuracy": self.accuracy,
            "metrics": self.metrics,
        }
        return facts if self.virtual is None else {**facts, "virtual": self.virtual.document()}

    def restore(self, round: int, facts: Mapping[str, Any]) -> None:
        """Takes the plain values of a checkpoint."""
        self.round = round
        self.before = facts["before"]
        self.after = facts["after"]
        self.measured = facts["measured"]
        self.totals = self.totals.go_on(facts["tally"])
        self.forgotten = facts["forgotten"]
        self.error = facts["error"]
        self.stopping.go_on(facts["course"])
        self.accuracy = facts.get("accuracy", {})  # checkpoints of older versions lack it
        self.metrics = facts.get("metrics", {})
        if "virtual" in facts:
            self.virtual = VirtualTotals(**facts["virtual"])
