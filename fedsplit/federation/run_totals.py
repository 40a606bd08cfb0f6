"""Totals of a run, and of the commands that it resumes: tokens, seconds, bytes, and the most memory."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CROSSING = ("activation", "gradient", "adapter", "repeated")
"""Kinds of bytes that cross in training, up and down."""


@dataclass
class RunTotals:
    """Totals of a run.

    Attributes:
        started: Time at which the command began, by `time.perf_counter`.
        tokens: Tokens that clients trained on.
        train_seconds: Seconds from the first message of a round's training to its last reply, summed over the rounds.
        earlier_seconds: Seconds of the commands that this one resumes.
        asked: Client-rounds: how often a client was asked to train, over all rounds.
        failed: Client-rounds without an update that could be used.
        client_memory: Largest resident memory of a client's process, in bytes.
        traffic: Bytes that the server counted, by kind and direction: "adapter_up", "evaluation_adapter_down", ….
            The trunk counts its own.

    Example:
        >>> totals = RunTotals(time.perf_counter(), tokens=600, train_seconds=2.0)
        >>> totals.speed
        300.0
        >>> totals.traffic["adapter_up"] += 5
        >>> totals.bytes_of_round(trunk={"activation_up": 9})["activation_up"]
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
    _reported: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds since the command began, and those of the commands that it resumes."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def speed(self) -> float:
        """Tokens a second of training."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def bytes_of_round(self, trunk: Mapping[str, int]) -> dict[str, int]:
        """Returns the bytes since the last call, by the kinds and directions of `summary`.

        Args:
            trunk: Bytes that the trunk has counted so far, by kind and direction.
        """
        totals = _by_kind(self._with(trunk))
        since = {kind: total - self._reported.get(kind, 0) for kind, total in totals.items()}
        self._reported = totals
        return since

    def copy(self) -> RunTotals:
        """Returns totals that can change without these."""
        return dataclasses.replace(self, traffic=Counter(self.traffic), _reported=dict(self._reported))

    def document(self, trunk: Mapping[str, int]) -> dict[str, Any]:
        """Returns the totals as plain values for a checkpoint.

        Args:
            trunk: Bytes that the trunk has counted so far, by kind and direction.
        """
        document = dataclasses.asdict(self)
        del document["started"], document["_reported"]
        return document | {"earlier_seconds": self.seconds, "traffic": self._with(trunk)}

    def go_on(self, document: Mapping[str, Any]) -> RunTotals:
        """Returns the totals of a checkpoint, as `document` returned them, to go on from."""
        totals = RunTotals(**{**document, "started": self.started, "traffic": Counter(document["traffic"])})
        totals.bytes_of_round(trunk={})  # a new trunk counts from 0
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
            "bytes": _by_kind(self._with(trunk)),
        }

    def _with(self, trunk: Mapping[str, int]) -> Counter[str]:
        return Counter(trunk) + self.traffic


def _by_kind(traffic: Mapping[str, int]) -> dict[str, int]:
    """Returns bytes by kind and direction, with those of evaluation as one kind."""
    sent = {f"{kind}_{way}": traffic.get(f"{kind}_{way}", 0) for kind in CROSSING for way in ("up", "down")}
    for way in ("up", "down"):
        in_evaluation = [name for name in traffic if name.startswith("evaluation_") and name.endswith(f"_{way}")]
        sent[f"evaluation_{way}"] = sum(traffic[name] for name in in_evaluation)
    return sent
