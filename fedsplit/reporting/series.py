"""Numbers of a run as series for figures: losses, bytes and seconds by round, and values by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedsplit.reporting.run_record import RunRecord, number, numbers, text

KINDS = {
    "activation": "hidden states",
    "gradient": "gradients",
    "adapter": "adapters",
    "evaluation": "evaluation",
    "reference": "base model's hidden states",
    "between_stages": "between stages",
    "repeated": "sent again",
    "client_files": "files of clients",
}
"""Kinds of bytes in metrics.jsonl, in words."""

PHASES = {
    "training": "training",
    "aggregation": "aggregation",
    "evaluation": "evaluation",
    "other": "start and other",
}
"""Phases of a round in metrics.jsonl, in words."""

Points = list[tuple[float, float]]
"""Pairs of x and y."""


@dataclass(frozen=True)
class Losses:
    """Losses of a run by round, in nats.

    Attributes:
        held_out: Held-out loss over all clients; round 0 is before training.
        training: Mean training loss over the clients.
        own: Held-out loss right after the clients' own steps, before aggregation: the held-out loss, less the mean of
            what aggregation and the other clients changed. Measured on samples (`--eval.after`).
        clients: Held-out loss of each client.
    """

    held_out: Points
    training: Points
    own: Points
    clients: Mapping[str, Points]

    @property
    def before(self) -> float | None:
        """Held-out loss before training; None if it was not measured."""
        return next((loss for round, loss in self.held_out if round == 0), None)


def losses(run: RunRecord) -> Losses:
    """Returns the losses of a run by round."""
    held_out: Points = []
    own: Points = []
    clients: dict[str, Points] = {}
    for event in run.of("evaluate"):
        round = float(event["round"])
        loss = number(event.get("loss"))
        if loss is None:
            continue
        held_out.append((round, loss))
        # Only runs with --eval.after measure what clients forget.
        forgotten = numbers(event.get("forgotten"))
        if forgotten:
            own.append((round, loss - sum(forgotten.values()) / len(forgotten)))
        for name, of_client in numbers(event.get("clients")).items():
            clients.setdefault(name, []).append((round, of_client))
    training = _by_round(run, "train", "loss")
    return Losses(held_out, training, own, clients)


def _by_round(run: RunRecord, event: str, key: str) -> Points:
    """Returns a number of the events of a name, by round. Events without the number are left out."""
    points = []
    for each in run.of(event):
        value = number(each.get(key))
        if value is not None:
            points.append((float(each["round"]), value))
    return points


def errors(run: RunRecord) -> Points:
    """Returns the aggregation error of a run by round."""
    return _by_round(run, "aggregate", "error")


def learning_rates(run: RunRecord) -> Points:
    """Returns the learning rate of the last local step by round."""
    return _by_round(run, "train", "learning_rate")


def loss_against(run: RunRecord, what: str) -> Points:
    """Returns the held-out loss of a run against what had been spent when it was measured.

    Args:
        run: The run.
        what: "bytes" that had crossed, those of evaluation and of files between nodes left out; "seconds" since the
            command began; or "virtual" seconds on the run's network.
    """
    if what == "virtual":
        virtual = {event["round"]: number(event.get("virtual_elapsed")) for event in run.of("network")}
        spent_then = [(virtual.get(int(round)), loss) for round, loss in losses(run).held_out]
        return [(seconds, loss) for seconds, loss in spent_then if seconds is not None]
    spent_by_round: dict[int, float] = {}
    spent = 0.0
    for event in run.of("cost"):
        if what == "bytes":
            spent += training_bytes(numbers(event.get("bytes")))
        else:
            # `elapsed` counts from the start of the command, so that nothing is added up.
            spent = number(event.get("elapsed")) or spent
        spent_by_round[event["round"]] = spent
    points = []
    for round, loss in losses(run).held_out:
        # A killed run may lack the costs of its last evaluation.
        if int(round) in spent_by_round:
            points.append((spent_by_round[int(round)], loss))
    return points


def training_bytes(crossed: Mapping[str, float]) -> float:
    """Returns the bytes that training sends: all but those of evaluation, and of files between nodes.

    Example:
        >>> training_bytes({"activation_up": 8.0, "evaluation_up": 4.0})
        8.0
    """
    skipped = ("evaluation_", "client_files_")
    return sum(count for kind, count in crossed.items() if not kind.startswith(skipped))


@dataclass(frozen=True)
class TwoWays:
    """Bytes of one kind by round.

    Attributes:
        up: Bytes from clients to the server or the trunk.
        down: Bytes to the clients.
    """

    up: Points
    down: Points


def bytes_by_round(run: RunRecord) -> dict[str, TwoWays]:
    """Returns the bytes of a run by kind and round. Kinds without any byte are left out."""
    found = {}
    for kind, words in KINDS.items():
        ways = TwoWays([], [])
        for event in run.of("cost"):
            crossed = numbers(event.get("bytes"))
            ways.up.append((float(event["round"]), crossed.get(f"{kind}_up", 0.0)))
            ways.down.append((float(event["round"]), crossed.get(f"{kind}_down", 0.0)))
        if any(count for _, count in (*ways.up, *ways.down)):
            found[words] = ways
    return found


def seconds_by_round(run: RunRecord) -> dict[str, Points]:
    """Returns the seconds of a run by phase and round. Phases without any second are left out."""
    found = {}
    for phase, words in PHASES.items():
        points = []
        for event in run.of("cost"):
            round = float(event["round"])
            of_phases = numbers(event.get("seconds"))
            points.append((round, of_phases.get(phase, 0.0)))
        if any(seconds for _, seconds in points):
            found[words] = points
    return found


def totals_by_client(run: RunRecord, key: str) -> dict[str, dict[str, float]]:
    """Returns sums over all rounds of a mapping of the event `cost`, by kind and client.

    Args:
        run: The run.
        key: "client_bytes" or "client_seconds".
    """
    totals: dict[str, dict[str, float]] = {}
    for event in run.of("cost"):
        by_kind = event.get(key)
        if not isinstance(by_kind, Mapping):
            continue
        for kind, clients in by_kind.items():
            for client, value in numbers(clients).items():
                of_kind = totals.setdefault(str(kind), {})
                of_kind[client] = of_kind.get(client, 0.0) + value
    return totals


def virtual_places(run: RunRecord) -> dict[str, dict[str, float]]:
    """Returns the virtual seconds of each client over all rounds, by the client's name and then by place."""
    found: dict[str, dict[str, float]] = {}
    for event in run.of("network"):
        clients = event.get("clients")
        if not isinstance(clients, Mapping):
            continue
        for name, places in clients.items():
            of_client = found.setdefault(text(name), {})
            for place, seconds in numbers(places).items():
                of_client[place] = of_client.get(place, 0.0) + seconds
    return found


def by_block(layers: Mapping[str, float]) -> dict[str, Points]:
    """Returns values by layer as a series over the blocks of the model, for each projection of a block.

    Layers outside of blocks, such as a head, are left out.

    Example:
        >>> by_block({"h.1.attn.c_attn": 0.5, "h.0.attn.c_attn": 0.25, "lm_head": 1.0})
        {'attn.c_attn': [(0.0, 0.25), (1.0, 0.5)]}
    """
    found: dict[str, Points] = {}
    for layer, value in layers.items():
        # The first number in a name is the block. Numbers further behind, such as those of experts, stay in the
        # projection's name.
        match = re.search(r"(?:^|\.)(\d{1,6})\.(.+)$", layer)
        if match is not None:
            found.setdefault(match[2], []).append((float(match[1]), value))
    return {projection: sorted(points) for projection, points in found.items()}


def mean(values: Iterable[float]) -> float:
    """Returns the mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)
