"""Other cuts, codecs and numbers of micro-batches, and what each would cost in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.estimation.run_cost import Estimate, Seconds, seconds_of
from fedsplit.estimation.step_traffic import StepTraffic

CODECS = ("raw", "bf16", "fp8_e4m3", "int8", "int4")
"""Codecs that are compared beside the run's: one of each width.

Codecs that leave values out are not among them. They send least, but hidden states do not stand them, as
`experiments/codecs` shows: a table of costs must not recommend what spoils the training.
"""

MICRO_BATCHES = (1, 2, 4)
"""Numbers of micro-batches that are compared."""


@dataclass(frozen=True)
class Alternative:
    """A choice of cut, codec and micro-batches.

    Attributes:
        cut: The cut (LO, HI).
        codec: Name of the codec.
        micro_batches: Micro-batches of a batch.
        step_bytes: Bytes of a step of one client, in both directions.
        client_weights: Bytes of the weights of a client.
        seconds: Seconds of a step and a round.
    """

    cut: tuple[int, int]
    codec: str
    micro_batches: int
    step_bytes: int
    client_weights: int
    seconds: Seconds


def alternatives_of(found: Estimate) -> list[Alternative]:
    """Returns every combination of the compared cuts, codecs and micro-batches, the quickest first.

    Args:
        found: The estimate of the run as it is set.
    """
    parties = found.parties
    config = parties.config
    compared = []
    for codec in codecs_of(found):
        counted = StepTraffic(parties, "" if codec == config.wire.codec else codec)
        for micros in micro_batches_of(found):
            rows = max(1, config.train.batch_size // micros)
            of_step = sum(counted.micro_batch(rows).values()) * micros * config.train.accumulation
            for cut in cuts_of(found):
                seconds = seconds_of(parties, found.field, found.layout, found.traffic, counted, cut, micros)
                weights = found.layout.client_weights(cut)
                compared.append(Alternative(cut, codec, micros, of_step, weights, seconds))
    return sorted(compared, key=lambda one: (one.seconds.round, one.step_bytes, one.client_weights))


def cuts_of(found: Estimate) -> list[tuple[int, int]]:
    """Returns the cuts that are compared: that of the run, and some that leave both ends as many blocks.

    Example:
        >>> from fedsplit.estimation.run_cost import Field, estimate
        >>> from fedsplit.estimation.hardware import HARDWARE
        >>> from fedsplit.estimation.party_shapes import Parties
        >>> from fedsplit.network.fleet import TrunkLink
        >>> from fedsplit.network.profiles import PROFILES
        >>> from fedsplit.settings.config import Config
        >>> field = Field("lan", PROFILES["lan"], TrunkLink(), HARDWARE["laptop"], HARDWARE["a100"])
        >>> cuts_of(estimate(Parties(Config()), field))
        [(1, 5), (2, 4)]
    """
    facts = found.parties.facts
    own = found.parties.config.bounds
    if found.parties.config.trunk.stages:
        return [own]
    depths = {1, 2, facts.blocks // 8, facts.blocks // 4, facts.blocks // 3}
    cuts = [(depth, facts.blocks - depth) for depth in sorted(depths) if 0 < depth < facts.blocks - depth]
    possible = [cut for cut in cuts if not facts.closed.intersection(cut)]
    return [own, *(cut for cut in possible if cut != own)]


def codecs_of(found: Estimate) -> list[str]:
    """Returns the codecs that are compared, the run's first."""
    config = found.parties.config
    own = config.wire.codec
    is_narrow = config.dtype != "fp32"  # then bf16 saves nothing, and loses digits of float16
    return [own, *(name for name in CODECS if name != own and not (name == "bf16" and is_narrow))]


def micro_batches_of(found: Estimate) -> list[int]:
    """Returns the numbers of micro-batches that are compared: that of the run, and those that divide its batch."""
    config = found.parties.config
    own = config.train.micro_batches
    if found.parties.schedule.gathers:
        return [own]
    examples = config.train.batch_size // found.parties.demands.rows
    return [own, *(count for count in MICRO_BATCHES if count != own and examples % count == 0)]


def shown(found: Estimate, compared: Sequence[Alternative]) -> list[Alternative]:
    """Returns the alternatives that differ from the run in one choice, the run itself first."""
    config = found.parties.config
    own = (config.bounds, config.wire.codec, config.train.micro_batches)
    chosen = []
    for one in compared:
        choice = (one.cut, one.codec, one.micro_batches)
        differences = sum(mine != other for mine, other in zip(own, choice, strict=True))
        if differences <= 1:
            chosen.append((differences, one.codec != own[1], one.micro_batches != own[2], one))
    return [one for *_, one in sorted(chosen, key=lambda entry: (*entry[:3], entry[3].cut, entry[3].micro_batches))]
