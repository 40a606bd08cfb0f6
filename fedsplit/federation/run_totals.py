"""Totals of a run over all its commands: tokens, seconds, bytes, and peak memory."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedsplit.trunk.status import FRAMING, PACKETS

T = TypeVar("T")

CROSSING = ("activation", "gradient", "adapter", "repeated", "client_files")
"""Kinds of bytes that cross in training, up and down. Files of clients cross between the nodes of a cluster."""

RESUMED = ""
"""Stands for the name of an event: bytes before the command began belong to no event of the command."""


@dataclass
class RunTotals:
    """Totals of a run.

    Attributes:
        started: Start of the command, by `time.perf_counter`.
        tokens: Number of trained tokens.
        train_seconds: Seconds from the first message of a round's training to its last reply, summed over the rounds.
        earlier_seconds: Seconds of earlier commands of a resumed run.
        asked: Number of requests to train, over all clients and rounds.
        failed: Number of requests to train that failed: without a usable update, though the client was available, met
            the deadline in virtual time, and was needed.
        client_memory: Largest resident memory of a client's process, in bytes.
        traffic: Bytes that the server counted, by kind and direction: "adapter_up", "evaluation_adapter_down", ….
            The trunk counts its own.
        by_client: The part of `traffic` that belongs to single clients since the last call of `client_bytes`.

    Example:
        >>> totals = RunTotals(time.perf_counter(), tokens=600, train_seconds=2.0)
        >>> totals.speed
        300.0
        >>> totals.count("adapter_up", client=2, nbytes=5)
        >>> totals.bytes_since("evaluate", trunk={"activation_up": 9})["activation_up"]
        9
    """

    started: float
    tokens: int = 0
    train_seconds: float = 0.0
    earlier_seconds: float = 0.0
    asked: int = 0
    failed: int = 0
    client_memory: int = 0
    traffic: Counter[str] = field(default_factory=Counter)
    by_client: dict[str, Counter[int]] = field(default_factory=dict)
    _reported: dict[str, dict[str, int]] = field(default_factory=dict)  # totals at the last `bytes_since`, by event
    _trunk_reported: dict[str, dict[int, int]] = field(default_factory=dict)  # at the last `client_bytes`
    _seconds_reported: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the command so far, and of earlier commands of a resumed run."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def speed(self) -> float:
        """Tokens a second of training."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def count(self, kind: str, client: int, nbytes: int) -> None:
        """Counts bytes of one client, such as "adapter_up"."""
        self.traffic[kind] += nbytes
        self.by_client.setdefault(kind, Counter())[client] += nbytes

    def bytes_since(self, event: str, trunk: Mapping[str, int]) -> dict[str, int]:
        """Returns the bytes since the last call for the same event, by the kinds and directions of `summary`.

        Args:
            event: Name of the event that reports the bytes.
            trunk: Bytes that the trunk has counted so far, by kind and direction.
        """
        return self._since(event, trunk, "")

    def framing_since(self, event: str, trunk: Mapping[str, int]) -> dict[str, int]:
        """Returns the bytes around the arrays since the last call for the same event, as `bytes_since` does."""
        return self._since(event, trunk, FRAMING)

    def packets_since(self, event: str, trunk: Mapping[str, int]) -> dict[str, int]:
        """Returns the numbers of packets since the last call for the same event, as `bytes_since` does."""
        return self._since(event, trunk, PACKETS)

    def _since(self, event: str, trunk: Mapping[str, int], prefix: str) -> dict[str, int]:
        """Returns the counts with a prefix since the last call for the same event and prefix."""
        totals = self._totals(trunk, prefix)
        # The first event of a name counts from the resumption, if the run was resumed.
        reported = self._reported.get(prefix + event, self._reported.get(prefix + RESUMED, {}))
        self._reported[prefix + event] = totals
        return {kind: total - reported.get(kind, 0) for kind, total in totals.items()}

    def _totals(self, trunk: Mapping[str, int], prefix: str) -> dict[str, int]:
        """Returns the counts with a prefix over the whole run. Only bytes of arrays are listed where they are 0."""
        by_kind = _by_kind(with_prefix(self._with(trunk), prefix))
        return {kind: count for kind, count in by_kind.items() if count or not prefix}

    def client_bytes(self, trunk: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
        """Returns the counts of each client since the last call, by kind and direction, and then by client.

        Names of framing and of packets begin with `FRAMING` and `PACKETS`.

        Files of clients, and what crosses between the stages of a trunk, belong to no client here.

        Args:
            trunk: Bytes that the trunk has counted so far, by kind, direction and client.
        """
        crossed = {kind: Counter(clients) for kind, clients in self.by_client.items()}
        for kind, clients in trunk.items():
            reported = self._trunk_reported.get(kind, {})
            so_far = crossed.setdefault(kind, Counter())
            for client, total in clients.items():
                so_far[client] += total - reported.get(client, 0)
        self.by_client = {}
        self._trunk_reported = {kind: dict(clients) for kind, clients in trunk.items()}
        return _joined_evaluation(crossed)

    def seconds_since(self, elapsed: float) -> float:
        """Returns the seconds since the last call.

        Args:
            elapsed: Present value of `seconds`.
        """
        # The first call of a resumed run reports the seconds of this command alone.
        since = elapsed - max(self._seconds_reported, self.earlier_seconds)
        self._seconds_reported = elapsed
        return since

    def begin_new_trunk(self, traffic: Mapping[str, int]) -> None:
        """Takes over the bytes that a lost trunk has counted. The new trunk counts from 0.

        Args:
            traffic: Bytes by kind and direction, as they were after the last committed round.
        """
        self.traffic.update(traffic)
        self._trunk_reported = {}

    def copy(self) -> RunTotals:
        """Returns an independent copy."""
        by_client = {kind: Counter(clients) for kind, clients in self.by_client.items()}
        reported = dict(self._reported)  # its values are replaced, and never changed
        return dataclasses.replace(self, traffic=Counter(self.traffic), by_client=by_client, _reported=reported)

    def document(self, trunk: Mapping[str, int]) -> dict[str, Any]:
        """Returns the totals as plain values for a checkpoint.

        Args:
            trunk: Bytes that the trunk has counted so far, by kind and direction.
        """
        return {
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "earlier_seconds": self.seconds,
            "asked": self.asked,
            "failed": self.failed,
            "client_memory": self.client_memory,
            "traffic": dict(self._with(trunk)),
        }

    def go_on(self, document: Mapping[str, Any]) -> RunTotals:
        """Returns the totals of a checkpoint, as `document` returned them, to go on from."""
        totals = RunTotals(**{**document, "started": self.started, "traffic": Counter(document["traffic"])})
        for prefix in ("", FRAMING, PACKETS):
            totals._since(RESUMED, {}, prefix)  # a new trunk counts from 0
        return totals

    def summary(self, trunk: Mapping[str, int]) -> dict[str, Any]:
        """Returns the totals under their keys in summary.json.

        Args:
            trunk: Bytes that the trunk has counted so far, by kind and direction.
        """
        return {
            "tokens": self.tokens,
            "tokens_per_second": self.speed,
            "wall_seconds": self.seconds,
            "client_rounds": {"asked": self.asked, "failed": self.failed},
            "bytes": self._totals(trunk, ""),
            "framing": self._totals(trunk, FRAMING),
            "packets": self._totals(trunk, PACKETS),
        }

    def _with(self, trunk: Mapping[str, int]) -> Counter[str]:
        return Counter(trunk) + self.traffic


def _by_kind(traffic: Mapping[str, int]) -> dict[str, int]:
    """Returns bytes by kind and direction, with those of evaluation as one kind."""
    sent = {f"{kind}_{way}": traffic.get(f"{kind}_{way}", 0) for kind in CROSSING for way in ("up", "down")}
    for way in ("up", "down"):
        in_evaluation = [name for name in traffic if name.startswith("evaluation_") and name.endswith(f"_{way}")]
        sent[f"evaluation_{way}"] = sum(traffic[name] for name in in_evaluation)
        # A trunk in one piece sends nothing inside, and few objectives compare with the base model.
        for name in (f"reference_{way}", f"between_stages_{way}"):
            if name in traffic:
                sent[name] = traffic[name]
    return sent


def with_prefix(counts: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Returns the counts whose names begin with a prefix, without it; for an empty prefix, those of arrays.

    Example:
        >>> with_prefix({"adapter_up": 5, "packets.token_up": 2}, "packets.")
        {'token_up': 2}
    """
    if not prefix:
        return {name: count for name, count in counts.items() if "." not in name}
    return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}


def _joined_evaluation(crossed: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Returns bytes by kind and client, with those of evaluation as one kind, and without counts of 0."""
    joined: dict[str, Counter[int]] = {}
    for kind, clients in crossed.items():
        prefix, dot, purpose = kind.rpartition(".")
        way = kind.rpartition("_")[2]
        name = f"{prefix}{dot}evaluation_{way}" if purpose.startswith("evaluation_") else kind
        joined.setdefault(name, Counter()).update(clients)
    by_client = {}
    for kind, clients in joined.items():
        crossed_any = {client: count for client, count in sorted(clients.items()) if count}
        if crossed_any:
            by_client[kind] = crossed_any
    return by_client
