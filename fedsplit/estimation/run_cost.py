"""An estimate of a run: everything that its settings decide, from a model's configuration alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedsplit.estimation.duration import Link, StepCost, step_seconds
from fedsplit.estimation.hardware import Hardware
from fedsplit.estimation.layout import Layout, layout_of
from fedsplit.estimation.party_memory import PartyMemory, client_memory, trunk_memory
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.run_traffic import RunTraffic, evaluation_sizes, run_traffic, sample_sizes
from fedsplit.estimation.step_traffic import StepTraffic, Traffic
from fedsplit.model.flops import Flops
from fedsplit.model.parts import Kind
from fedsplit.network.fleet import TrunkLink
from fedsplit.network.profiles import Profile


@dataclass(frozen=True)
class Field:
    """Where a run would take place: the lines and the devices of clients and trunk.

    Attributes:
        network: Name of the network.
        profile: Line of a client; of the slowest, where they differ.
        trunk_link: The trunk's own line, which all clients share.
        client: Device of each client.
        trunk: Device of the trunk.
    """

    network: str
    profile: Profile
    trunk_link: TrunkLink
    client: Hardware
    trunk: Hardware


@dataclass(frozen=True)
class Seconds:
    """Seconds of a step and a round.

    Attributes:
        step: Seconds of a step of a client that has the trunk for itself.
        client: Seconds of the step in which the client computes.
        trunk: Seconds of the step in which the trunk computes.
        wire: Seconds of the step in which the client's line carries bytes or a message is on its way.
        training: Seconds of a round's training of all clients.
        adapters: Seconds in which a client's adapters cross in a round.
        evaluation: Seconds of a client's evaluations in a round.
        limit: What limits a round: "client", "trunk", "wire" (a client's line) or "trunk_wire" (the trunk's line).
    """

    step: float
    client: float
    trunk: float
    wire: float
    training: float
    adapters: float
    evaluation: float
    limit: str

    @property
    def round(self) -> float:
        """Seconds of a round."""
        return self.training + self.adapters + self.evaluation


@dataclass(frozen=True)
class Estimate:
    """What a run would cost.

    Attributes:
        parties: The parties of the run.
        field: Where the run takes place.
        memory: Memory of the client, and of the trunk with one pending batch, by party.
        traffic: Bytes by step, round and run.
        flops: Operations of a step by part.
        layout: The model block by block.
        seconds: Seconds of a step and a round.
    """

    parties: Parties
    field: Field
    memory: dict[str, PartyMemory]
    traffic: RunTraffic
    flops: dict[Kind, Flops]
    layout: Layout
    seconds: Seconds

    @property
    def trunk_with_all(self) -> PartyMemory:
        """Memory of the trunk while a batch of each client that trains in a round is pending."""
        return replace(self.memory["trunk"], pending=self.parties.config.sampled)

    def document(self) -> dict[str, Any]:
        """Returns the estimate as plain values for JSON: bytes, operations and seconds."""
        config = self.parties.config
        memory = {**self.memory, "trunk_with_all_pending": self.trunk_with_all}
        return {
            "model": config.model,
            "model_type": self.parties.bottom.config.model_type,
            "blocks": self.parties.facts.blocks,
            "cut": config.cut,
            "clients": config.clients,
            "clients_a_round": config.sampled,
            "rounds": config.rounds,
            "steps_a_round": self.traffic.steps,
            "micro_batches": config.train.micro_batches,
            "dtype": config.dtype,
            "codec": config.wire.codec,
            "network": {"name": self.field.network, **self.field.profile.document()},
            "hardware": {"client": asdict(self.field.client), "trunk": asdict(self.field.trunk)},
            "memory": {party: {**asdict(one), "model": one.model, "peak": one.peak} for party, one in memory.items()},
            "bytes": {
                "step": dict(self.traffic.step),
                "round": dict(self.traffic.rounds[-1]),
                "rounds": [dict(traffic) for traffic in self.traffic.rounds],
                "run": dict(self.traffic.run),
            },
            "flops": {str(part): asdict(cost) for part, cost in self.flops.items()},
            "seconds": {**asdict(self.seconds), "round": self.seconds.round},
            "limit": self.seconds.limit,
        }


def estimate(parties: Parties, field: Field) -> Estimate:
    """Estimates a run.

    Args:
        parties: The parties of the run.
        field: Where the run takes place.

    Raises:
        InputError: The strategy of the run fails.

    Example:
        >>> from fedsplit.estimation.hardware import HARDWARE
        >>> from fedsplit.network.fleet import TrunkLink
        >>> from fedsplit.network.profiles import PROFILES
        >>> from fedsplit.settings.config import Config
        >>> field = Field("home", PROFILES["home"], TrunkLink(), HARDWARE["laptop"], HARDWARE["a100"])
        >>> estimate(Parties(Config()), field).seconds.limit
        'wire'
    """
    config = parties.config
    layout = layout_of(parties, config.train.batch_size)
    traffic = run_traffic(parties)
    batches = config.train.accumulation
    flops = {part: cost.times(batches) for part, cost in layout.flops(config.bounds).items()}
    memory = {"client": client_memory(parties), "trunk": trunk_memory(parties)}
    counted = StepTraffic(parties)
    seconds = seconds_of(parties, field, layout, traffic, counted, config.bounds, config.train.micro_batches)
    return Estimate(parties, field, memory, traffic, flops, layout, seconds)


def seconds_of(
    parties: Parties,
    field: Field,
    layout: Layout,
    traffic: RunTraffic,
    counted: StepTraffic,
    bounds: tuple[int, int],
    micros: int,
) -> Seconds:
    """Returns the seconds of a step and a round under a cut, a codec and a number of micro-batches.

    Args:
        parties: The parties of the run, under any cut.
        field: Where the run takes place.
        layout: The model block by block.
        traffic: Bytes of the run.
        counted: Bytes of steps under the codec.
        bounds: The cut.
        micros: Micro-batches of a batch.
    """
    config = parties.config
    train = config.train
    link = Link.of(field.profile)
    rows = max(1, train.batch_size // micros)
    one = counted.micro_batch(rows)
    cost = _cost_of(parties, field, layout.flops(bounds), one, micros)
    clipping = 1 if train.clip and parties.trunk_learns else 0
    step = step_seconds(cost, micros, link, train.accumulation, clipping)

    messages = train.accumulation * (4 if cost.gradient_up else 2) + 2 * clipping
    occupied = link.seconds_up(_total(one, "up")) + link.seconds_down(_total(one, "down"))
    wire = train.accumulation * micros * occupied + messages * link.delay
    client = train.accumulation * micros * cost.client
    trunk = train.accumulation * micros * cost.trunk
    trained = max(traffic.trained[-1], 1)
    # Clients compute and send at the same time. The trunk serves all of them.
    trunk_wire = train.accumulation * micros * _shared_seconds(one, field.trunk_link)
    loads = {"client": client, "wire": wire, "trunk": trained * trunk, "trunk_wire": trained * trunk_wire}
    return Seconds(
        step,
        client,
        trunk,
        wire,
        training=traffic.steps * max(step, trained * trunk, trained * trunk_wire),
        adapters=_adapter_seconds(traffic.rounds[-1], trained, link),
        evaluation=_evaluation_seconds(parties, counted, cost, rows, link),
        limit=max(loads, key=lambda name: loads[name]),
    )


def _cost_of(parties: Parties, field: Field, flops: dict[Kind, Flops], one: Traffic, micros: int) -> StepCost:
    """Returns the cost of a micro-batch.

    Args:
        parties: The parties of the run.
        field: Where the run takes place.
        flops: Operations of a batch by part.
        one: Bytes of a micro-batch.
        micros: Micro-batches of a batch.
    """
    dtype = parties.config.dtype
    at_client = field.client.speed(dtype) * field.profile.compute * micros
    at_trunk = field.trunk.speed(dtype) * micros
    returns = parties.schedule.expects_backward(parties.wants_gradient)
    return StepCost(
        bottom_forward=flops["bottom"].forward / at_client,
        trunk_forward=flops["trunk"].forward / at_trunk,
        top=flops["top"].total / at_client,
        trunk_backward=flops["trunk"].backward / at_trunk if returns else 0.0,
        bottom_backward=flops["bottom"].backward / at_client if parties.wants_gradient else 0.0,
        activation_up=one["activation_up"] + one["reference_up"],
        activation_down=one["activation_down"] + one["reference_down"],
        gradient_up=one["gradient_up"],
        gradient_down=one["gradient_down"],
    )


def _adapter_seconds(traffic: Traffic, clients: int, link: Link) -> float:
    """Returns the seconds in which the adapters of one client cross in a round, with a message for each way."""
    down = traffic["adapter_down"] / clients
    up = traffic["adapter_up"] / clients
    return link.seconds_down(down) + link.seconds_up(up) + 2 * link.delay


def _evaluation_seconds(parties: Parties, counted: StepTraffic, cost: StepCost, rows: int, link: Link) -> float:
    """Returns the seconds of the evaluations of a round: batch after batch, each through all parts.

    Args:
        parties: The parties of the run.
        counted: Bytes of steps.
        cost: Cost of a micro-batch of training.
        rows: Sequences of that micro-batch.
        link: The client's line.
    """
    seconds = 0.0
    share_of_forward = cost.bottom_forward + cost.trunk_forward + cost.top / 2  # the top's forward, about half
    for size in (*sample_sizes(parties), *evaluation_sizes(parties)):
        crossed = counted.evaluation(size, has_reference=False)
        wire = link.seconds_up(_total(crossed, "up")) + link.seconds_down(_total(crossed, "down")) + 2 * link.delay
        seconds += share_of_forward * size / rows + wire
    return seconds


def _shared_seconds(one: Traffic, line: TrunkLink) -> float:
    """Returns the seconds that a micro-batch occupies the trunk's line, which carries both directions at once."""
    return max(_total(one, "up") / line.from_clients, _total(one, "down") / line.to_clients)


def _total(traffic: Traffic, direction: str) -> int:
    """Returns the bytes of one direction between client and trunk."""
    names = ("activation", "gradient", "evaluation", "reference")
    return sum(Counter(traffic)[f"{name}_{direction}"] for name in names)
