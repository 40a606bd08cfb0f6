"""An estimate of a run: everything that its settings decide, from a model's configuration alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedsplit.estimation.adapter_traffic import RoundOfAdapters, rounds_of_adapters
from fedsplit.estimation.duration import RoundSeconds, Seconds, rounds_of, seconds_of
from fedsplit.estimation.layout import Layout, layout_of
from fedsplit.estimation.party_memory import PartyMemory, client_memory, trunk_memory
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.phase_clock import Clock, Field, compute_on
from fedsplit.estimation.run_traffic import RunTraffic, run_traffic
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.model.flops import Flops
from fedsplit.model.parts import Kind
from fedsplit.network.profiles import Profile
from fedsplit.settings.sections import WireSettings


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
        seconds: Seconds of a step and of the last round.
        rounds: Seconds of each round; the first entry is the evaluation before the first round.
        clock: The virtual clock.
        adapters: Adapters of each round.
    """

    parties: Parties
    field: Field
    memory: dict[str, PartyMemory]
    traffic: RunTraffic
    flops: dict[Kind, Flops]
    layout: Layout
    seconds: Seconds
    rounds: list[RoundSeconds]
    clock: Clock
    adapters: list[RoundOfAdapters]

    @property
    def run_seconds(self) -> float:
        """Seconds of the run: of all its rounds, and of the evaluation before the first."""
        return sum(of_round.total for of_round in self.rounds)

    @property
    def pending(self) -> int:
        """Largest number of clients that train in a round with the same trunk, or with the same replica."""
        replica = self.clock.virtual.field.replica
        counts = [Counter(map(replica, of_round.down)) for of_round in self.adapters]
        return max((max(count.values()) for count in counts if count), default=1)

    @property
    def trunk_with_all(self) -> PartyMemory:
        """Memory of the trunk, or of its busiest replica, while a batch of each of its clients is pending."""
        return replace(self.memory["trunk"], pending=self.pending)

    @property
    def profiles(self) -> list[Profile]:
        """Different lines and devices of the clients, those of most clients first."""
        return [profile for profile, _ in Counter(self.clock.virtual.field.profiles).most_common()]

    def document(self) -> dict[str, Any]:
        """Returns the estimate as plain values for JSON: bytes, operations and seconds."""
        config = self.parties.config
        parties = {**self.memory, "trunk_with_all_pending": self.trunk_with_all}
        memory = {}
        for party, one in parties.items():
            memory[party] = {**asdict(one), "model": one.model, "peak": one.peak}
        return {
            "model": config.model,
            "model_type": self.parties.bottom.config.model_type,
            "blocks": self.parties.facts.blocks,
            "cut": config.cut,
            "clients": config.clients,
            "clients_a_round": config.asked,
            "rounds": config.rounds,
            "steps_a_round": self.traffic.steps,
            "micro_batches": config.train.micro_batches,
            "dtype": config.dtype,
            "codec": codec_name(config.wire),
            "codecs": {f"{kind}_{way}": codec for (kind, way), codec in config.wire.codecs.items()},
            "network": {"name": self.field.network, "lines": [profile.document() for profile in self.profiles]},
            "hardware": {"client": asdict(self.field.client), "trunk": asdict(self.field.trunk)},
            "memory": memory,
            "bytes": {
                "step": dict(self.traffic.step),
                "round": dict(self.traffic.rounds[-1]),
                "rounds": [dict(traffic) for traffic in self.traffic.rounds],
                "run": dict(self.traffic.run),
            },
            "flops": {str(part): asdict(cost) for part, cost in self.flops.items()},
            "seconds": {
                **asdict(self.seconds),
                "round": self.seconds.round,
                "rounds": [asdict(of_round) for of_round in self.rounds],
                "run": self.run_seconds,
            },
            "limit": self.seconds.limit,
        }


def estimate(parties: Parties, field: Field) -> Estimate:
    """Estimates a run.

    Args:
        parties: The parties of the run.
        field: Where the run takes place.

    Raises:
        InputError: The strategy of the run fails, or the network lists a client that does not exist.

    Example:
        >>> from fedsplit.estimation.hardware import HARDWARE
        >>> from fedsplit.settings.documents import build
        >>> parties = Parties(build({"rounds": 1, "network.profile": "home"}))
        >>> estimate(parties, Field("home", HARDWARE["laptop"], HARDWARE["a100"])).seconds.limit
        'wire'
    """
    config = parties.config
    layout = layout_of(parties, config.train.batch_size)
    clock = Clock(parties, StepTraffic(parties), compute_on(parties, field.client, field.trunk))
    adapters = rounds_of_adapters(parties, clock)
    traffic = run_traffic(parties, adapters)
    batches = config.train.accumulation
    flops = {part: cost.times(batches) for part, cost in layout.flops(config.bounds).items()}
    memory = {"client": client_memory(parties), "trunk": trunk_memory(parties)}
    seconds = seconds_of(config, clock, adapters[-1])
    rounds = rounds_of(config, clock, adapters)
    return Estimate(parties, field, memory, traffic, flops, layout, seconds, rounds, clock, adapters)


def codec_name(wire: WireSettings) -> str:
    """Returns the codec of all roles, or "by role" if roles have different ones.

    Example:
        >>> codec_name(WireSettings("int8")), codec_name(WireSettings(gradient_up="int4"))
        ('int8', 'by role')
    """
    codecs = {*wire.codecs.values()}
    return codecs.pop() if len(codecs) == 1 else "by role"
