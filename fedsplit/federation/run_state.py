"""The state that a committed round leaves, and that the next round starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.early_stopping import EarlyStopping
from fedsplit.federation.run_totals import RunTotals
from fedsplit.updates import Adapters


@dataclass
class RunState:
    """State of a run between two rounds.

    Attributes:
        round: Last committed round; 0 before the first one.
        adapters: Adapters that the strategy's next round starts from.
        trunk: Adapter of the trunk.
        moments: State of the trunk's optimisers and of its codec.
        ledger: Who has which adapters.
        totals: Sums over the run.
        stopping: Best round and patience.
        before: Held-out loss before the first round, in nats.
        after: Held-out loss after the last measured round, in nats.
        measured: Number of that round.
        forgotten: By client's name, the rise of its loss since it was measured after its own steps, in nats.
        error: Aggregation error of the last round; None where nothing was aggregated.
        accuracy: Accuracy of a classifier, before and after; empty where tokens are predicted.
        metrics: Means of the user's metrics over all clients by name, before and after.
        trunk_traffic: Bytes that the trunk of this state has counted, by kind and direction.
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

    def copy(self) -> RunState:
        """Returns a state that can change without this one; tensors are shared, since none is written to."""
        return replace(
            self,
            ledger=self.ledger.copy(),
            totals=self.totals.copy(),
            stopping=replace(self.stopping),
            forgotten=dict(self.forgotten),
            accuracy=dict(self.accuracy),
            metrics=dict(self.metrics),
        )

    def take_over_traffic(self) -> None:
        """Keeps the bytes that the trunk has counted, since another trunk takes its place and counts from 0."""
        self.totals.traffic.update(self.trunk_traffic)
        self.trunk_traffic = {}

    def facts(self, traffic: Mapping[str, int]) -> dict[str, Any]:
        """Returns the plain values of a checkpoint.

        Args:
            traffic: Bytes that the trunk has counted.
        """
        return {
            "before": self.before,
            "after": self.after,
            "measured": self.measured,
            "tally": self.totals.document(traffic),
            "forgotten": self.forgotten,
            "error": self.error,
            "course": self.stopping.document(),
            "accuracy": self.accuracy,
            "metrics": self.metrics,
        }

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
        self.accuracy = facts.get("accuracy", {})
        self.metrics = facts.get("metrics", {})
