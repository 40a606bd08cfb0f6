"""What is summed over a run, and over those that it goes on from: tokens, seconds, bytes, the most memory."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CROSSING = ("activation", "gradient", "adapter", "repeated")
"""What crosses in training, up and down."""


@dataclass
class Tally:
    """Sums of a run.

    Attributes:
        started: When its command began, by `time.perf_counter`.
        tokens: Trained on.
        train_seconds: From the first message of a round of training to its last answer, over all rounds.
        earlier_seconds: Of the commands that this one goes on from.
        asked: Client-rounds: how often a client was asked to train, over all rounds.
        failed: Client-rounds whose update could not be used: the client failed, or sent what cannot be used.
        client_memory: The most resident memory of a client's process, in bytes.
        traffic: Bytes by direction: "adapter_up", "evaluation_adapter_down", …; the trunk counts its own.
    """

    started: float
    tokens: int = 0
    train_seconds: float = 0.0
    earlier_seconds: float = 0.0
    asked: int = 0
    failed: int = 0
    client_memory: int = 0
    traffic: Counter[str] = field(default_factory=Counter)
    _told: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Since the command began, those that it goes on from included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def speed(self) -> float:
        """Tokens a second of training."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    def adapter_bytes(self) -> dict[str, int]:
        """What crossed of adapters, control variates and changes of base weights since this was asked last."""
        so_far = Counter({way: self.traffic[f"adapter_{way}"] for way in ("up", "down")})
        before, self._told = self._told, so_far
        return {way: so_far[way] - before[way] for way in ("up", "down")}

    def document(self, trunk: Mapping[str, int]) -> dict[str, Any]:
        """As plain values, for a checkpoint.

        Args:
            trunk: The trunk's bytes by direction.
        """
        document = dataclasses.asdict(self) | {"earlier_seconds": self.seconds, "traffic": self._with(trunk)}
        del document["started"], document["_told"]
        return document

    def go_on(self, document: Mapping[str, Any]) -> Tally:
        """The sums of a checkpoint, to go on from."""
        tally = Tally(**{**document, "started": self.started, "traffic": Counter(document["traffic"])})
        tally.adapter_bytes()
        return tally

    def _with(self, trunk: Mapping[str, int]) -> Counter[str]:
        return Counter(trunk) + self.traffic

    def summary(self, trunk: Mapping[str, int]) -> dict[str, Any]:
        """The part of summary.json that is a sum.

        Args:
            trunk: The trunk's bytes by direction.
        """
        traffic = self._with(trunk)
        sent = {f"{what}_{way}": traffic[f"{what}_{way}"] for what in CROSSING for way in ("up", "down")}
        for way in ("up", "down"):
            sent[f"evaluation_{way}"] = sum(
                size for name, size in traffic.items() if name.startswith("evaluation_") and name.endswith(f"_{way}")
            )
        return {
            "tokens": self.tokens,
            "tokens_per_second": self.speed,
            "wall_seconds": self.seconds,
            "client_rounds": {"asked": self.asked, "failed": self.failed},
            "bytes": sent,
        }
