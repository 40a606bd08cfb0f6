"""Events: the typed records by which a run reports, and the sinks that receive them."""

from fedsplit.events.event_types import (
    ClientFailed,
    Event,
    Notice,
    Progress,
    RoundAggregated,
    RoundCost,
    RoundEnded,
    RoundEvaluated,
    RoundTrained,
    RunEnded,
    RunFailed,
    RunStarted,
)
from fedsplit.events.sink import Sink

__all__ = [
    "ClientFailed",
    "Event",
    "Notice",
    "Progress",
    "RoundAggregated",
    "RoundCost",
    "RoundEnded",
    "RoundEvaluated",
    "RoundTrained",
    "RunEnded",
    "RunFailed",
    "RunStarted",
    "Sink",
]
