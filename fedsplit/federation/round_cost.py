"""The cost of a round: bytes, seconds, tokens and memory, in all and by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedsplit.events.event_types import RoundCost
from fedsplit.federation.evaluation import Evaluation
from fedsplit.federation.messages import SAMPLE_SECONDS
from fedsplit.federation.replies import memory_of, seconds_of
from fedsplit.federation.run_state import RunState
from fedsplit.federation.run_totals import with_prefix
from fedsplit.federation.training import Training
from fedsplit.trunk.status import FRAMING, PACKETS, Traffic


@dataclass
class Cost:
    """Cost of the phases of one round so far.

    Attributes:
        seconds: Duration of the training, the aggregation and the evaluation at the server.
        tokens: Trained tokens by client.
        training: Seconds of a client's local steps, by client.
        sample: Seconds in which a client measured its sample after local training, by client.
        evaluation: Seconds in which a client measured its held-out text, by client.
        memory: Largest resident memory of a client's process in bytes, by client.

    Example:
        >>> cost = Cost()
        >>> cost.seconds["aggregation"] = 0.5
        >>> sum(cost.seconds.values())
        0.5
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    training: dict[int, float] = field(default_factory=dict)
    sample: dict[int, float] = field(default_factory=dict)
    evaluation: dict[int, float] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)

    def add_training(self, training: Training) -> None:
        """Adds the training of the round, of all clients with a usable update."""
        self.seconds["training"] = training.seconds
        for update, reply in zip(training.updates, training.replies, strict=True):
            client = update.client
            self.tokens[client] = update.tokens
            self.training[client] = seconds_of(reply)
            self.sample[client] = seconds_of(reply, SAMPLE_SECONDS)
            self.memory[client] = memory_of(reply)

    def add_evaluation(self, found: Evaluation) -> None:
        """Adds the evaluation of the round, of all clients with a usable measurement."""
        self.seconds["evaluation"] = found.seconds
        for client, reply in found.replies.items():
            self.evaluation[client] = seconds_of(reply)
            self.memory[client] = max(memory_of(reply), self.memory.get(client, 0))

    def event(
        self,
        state: RunState,
        round: int,
        traffic: Traffic,
        name: Callable[[int], str],
    ) -> RoundCost:
        """Returns the event that reports the cost.

        Args:
            state: State of the round. The totals remember which bytes and seconds have been reported.
            round: Number of the round.
            traffic: Bytes that the trunk has counted so far.
            name: Returns the name of a client.
        """

        def named(values: Mapping[int, float]) -> dict[str, float]:
            return {name(client): value for client, value in sorted(values.items())}

        totals = state.totals
        crossed = traffic.ledger()
        by_client = totals.client_bytes(traffic.by_client())

        def by_kind(prefix: str) -> dict[str, dict[str, float]]:
            return {kind: named(clients) for kind, clients in with_prefix(by_client, prefix).items()}

        elapsed = totals.seconds
        # Discarded attempts, checkpoints, and the start before the first round are no phase of a round.
        other = totals.seconds_since(elapsed) - sum(self.seconds.values())
        tokens = sum(self.tokens.values())
        training = self.seconds.get("training", 0.0)
        speeds = {}
        for client, count in self.tokens.items():
            if self.training[client]:
                speeds[client] = count / self.training[client]
        client_seconds = {"training": self.training, "sample": self.sample, "evaluation": self.evaluation}
        return RoundCost(
            round=round,
            bytes=totals.bytes_since(RoundCost.name, crossed),
            client_bytes=by_kind(""),  # type: ignore[arg-type]  # whole numbers
            framing=totals.framing_since(RoundCost.name, crossed),
            client_framing=by_kind(FRAMING),  # type: ignore[arg-type]
            packets=totals.packets_since(RoundCost.name, crossed),
            client_packets=by_kind(PACKETS),  # type: ignore[arg-type]
            seconds={**self.seconds, "other": max(0.0, other)},
            client_seconds={phase: named(values) for phase, values in client_seconds.items() if values},
            tokens=tokens,
            client_tokens={name(client): count for client, count in sorted(self.tokens.items())},
            tokens_per_second=tokens / training if training else None,
            client_tokens_per_second=named(speeds),
            client_peak_memory={name(client): size for client, size in sorted(self.memory.items())},
            elapsed=elapsed,
        )
