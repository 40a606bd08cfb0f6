"""Other cuts, codecs and numbers of micro-batches, and what each would cost in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsplit.estimation.duration import Seconds, seconds_of
from fedsplit.estimation.layout import operations
from fedsplit.estimation.phase_clock import Clock, Limits
from fedsplit.estimation.run_cost import Estimate, codec_name
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.network.compute import StatedCompute
from fedsplit.settings.config import Config

CODECS = ("raw", "bf16", "fp8_e4m3", "int8", "int4")
"""Codecs that are compared beside the run's: one of each width.

Codecs that leave values out are not among them. They send least, but hidden states do not stand them, as
`experiments/codecs` shows: a table of costs must not recommend what spoils the training.
"""

MICRO_BATCHES = (1, 2, 4)
"""Numbers of micro-batches that are compared."""

LIMITS = Limits(crossings=400, clients=10)
"""How much of a phase is replayed."""

_ROLES = ("activation_up", "activation_down", "gradient_up", "gradient_down")


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
    config = found.parties.config
    # Short replays are not as exact as that of the run, and are off by about as much under all alternatives.
    as_set = _seconds(found, StepTraffic(found.parties), config.bounds)
    training = found.seconds.training / as_set.training if as_set.training else 1.0
    evaluation = found.seconds.evaluation / as_set.evaluation if as_set.evaluation else 1.0
    own = (config.bounds, codec_name(config.wire), config.train.micro_batches)
    of_batch = config.train.batch_size * config.train.accumulation
    compared = []
    for codec in codecs_of(found):
        for micros in micro_batches_of(found):
            counted = StepTraffic(found.parties, "" if codec == own[1] else codec, micros)
            of_step = sum(counted.step(of_batch).values())
            for cut in cuts_of(found):
                seconds = found.seconds
                # The run as it is set has been replayed already, and more exactly.
                if (cut, codec, micros) != own:
                    short = _seconds(found, counted, cut)
                    scaled = short.training * training, short.evaluation * evaluation
                    seconds = replace(short, training=scaled[0], evaluation=scaled[1])
                weights = found.layout.client_weights(cut)
                compared.append(Alternative(cut, codec, micros, of_step, weights, seconds))
    return sorted(compared, key=lambda one: (one.seconds.round, one.step_bytes, one.client_weights))


def _seconds(found: Estimate, counted: StepTraffic, cut: tuple[int, int]) -> Seconds:
    """Returns the seconds of an alternative.

    Args:
        found: The estimate of the run as it is set.
        counted: Bytes of steps under the codec and the number of micro-batches.
        cut: The cut (LO, HI).
    """
    parties = found.parties
    config = parties.config
    compute = found.clock.virtual.field.compute
    if cut != config.bounds:
        of_cut = operations(found.layout, cut, config.train.batch_size)
        dtype = config.dtype
        client_speed = found.field.client.speed(dtype)
        trunk_speed = found.field.trunk.speed(dtype)
        compute = StatedCompute(of_cut, client_speed, trunk_speed)
    clock = Clock(parties, counted, compute, LIMITS)
    return seconds_of(config, clock, found.adapters[-1])


def flags_of(one: Alternative, config: Config) -> str:
    """Returns the choice of an alternative, as flags that change the run's settings to it.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> seconds = Seconds(1, 1, 1, 1, 1, 1, "wire")
        >>> flags_of(Alternative((1, 5), "int8", 2, 10, 10, seconds), build({"wire.gradient_up": "int4"}))
        '--cut 1:5 --wire.codec int8 --wire.gradient-up int8 --micro-batches 2'
    """
    wire = config.wire
    flags = [f"--cut {one.cut[0]}:{one.cut[1]}"]
    is_own = one.codec == codec_name(wire)
    flags.append(f"--wire.codec {wire.codec if is_own else one.codec}")
    for role in _ROLES:
        # The codec of a role wins over --wire.codec. Each role that the run sets has to be set again.
        if getattr(wire, role):
            flags.append(f"--wire.{role.replace('_', '-')} {getattr(wire, role) if is_own else one.codec}")
    return " ".join([*flags, f"--micro-batches {one.micro_batches}"])


def cuts_of(found: Estimate) -> list[tuple[int, int]]:
    """Returns the cuts that are compared: that of the run, and some that leave both ends as many blocks.

    Example:
        >>> from fedsplit.estimation.phase_clock import Field
        >>> from fedsplit.estimation.hardware import HARDWARE
        >>> from fedsplit.estimation.party_shapes import Parties
        >>> from fedsplit.estimation.run_cost import estimate
        >>> field = Field("home", HARDWARE["laptop"], HARDWARE["a100"])
        >>> cuts_of(estimate(Parties(Config(rounds=1, clients=2)), field))
        [(1, 5), (2, 4)]
    """
    facts = found.parties.facts
    own = found.parties.config.bounds
    # Recorded compute times are those of the parts under the run's cut.
    if found.parties.config.trunk.stages or found.parties.config.network.compute:
        return [own]
    depths = {1, 2, facts.blocks // 8, facts.blocks // 4, facts.blocks // 3}
    cuts = [(depth, facts.blocks - depth) for depth in sorted(depths) if 0 < depth < facts.blocks - depth]
    # Blocks that share keys and values cannot be parted.
    possible = [cut for cut in cuts if not facts.closed.intersection(cut)]
    return [own, *(cut for cut in possible if cut != own)]


def codecs_of(found: Estimate) -> list[str]:
    """Returns the codecs that are compared, the run's first."""
    config = found.parties.config
    own = codec_name(config.wire)
    is_narrow = config.dtype != "fp32"  # then bf16 saves nothing, and loses digits of float16
    return [own, *(name for name in CODECS if name != own and not (name == "bf16" and is_narrow))]


def micro_batches_of(found: Estimate) -> list[int]:
    """Returns the numbers of micro-batches that are compared: that of the run, and those that divide its batch."""
    config = found.parties.config
    own = config.train.micro_batches
    # A schedule that gathers steps takes no micro-batches.
    if found.parties.schedule.gathers:
        return [own]
    examples = config.train.batch_size // found.parties.demands.rows
    return [own, *(count for count in MICRO_BATCHES if count != own and examples % count == 0)]


def shown(found: Estimate, compared: Sequence[Alternative]) -> list[Alternative]:
    """Returns the alternatives that differ from the run in one choice, the run itself first."""
    config = found.parties.config
    own = (config.bounds, codec_name(config.wire), config.train.micro_batches)
    chosen = []
    for one in compared:
        choice = (one.cut, one.codec, one.micro_batches)
        differences = sum(mine != other for mine, other in zip(own, choice, strict=True))
        if differences <= 1:
            has_other_codec = one.codec != own[1]
            has_other_micros = one.micro_batches != own[2]
            chosen.append((differences, has_other_codec, has_other_micros, one))
    # The run itself, then other cuts, then other codecs, then other numbers of micro-batches.
    chosen.sort(key=lambda entry: (*entry[:3], entry[3].cut, entry[3].micro_batches))
    return [one for *_, one in chosen]
