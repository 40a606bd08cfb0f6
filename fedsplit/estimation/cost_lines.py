"""An estimate as lines for people, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.estimation.adapter_traffic import PLAYED
from fedsplit.estimation.alternatives import LIMITS, Alternative, flags_of, shown
from fedsplit.estimation.hardware import HARDWARE, Hardware
from fedsplit.estimation.phase_clock import MOST_CLIENTS
from fedsplit.estimation.run_cost import Estimate, codec_name
from fedsplit.estimation.step_traffic import Traffic
from fedsplit.formatting import aligned, counted, size

_KINDS = {
    "activation": "activations",
    "gradient": "gradients",
    "adapter": "adapters",
    "evaluation": "evaluation",
    "reference": "base model's states",
    "between_stages": "between stages",
}
"""Words for the kinds of bytes, in the order of the table."""

_LIMITS = {
    "client": "the client's device",
    "trunk": "the trunk, which serves all clients",
    "wire": "the client's line",
    "trunk_wire": "the trunk's line, which all clients share",
}
"""Words for what limits a round."""


def lines_of(found: Estimate, compared: Sequence[Alternative]) -> list[str]:
    """Returns an estimate as lines.

    Args:
        found: The estimate.
        compared: Alternatives, the quickest first.
    """
    return [
        *_opening(found),
        "",
        *_parameters(found),
        "",
        *_memory(found),
        "",
        *_bytes(found),
        "",
        *_flops(found),
        "",
        *_seconds(found),
        "",
        *_alternatives(found, compared),
        "",
        *(f"mind: {line}" for line in warnings(found)),
        "assumed",
        *(f"  - {line}" for line in assumptions(found)),
    ]


def _opening(found: Estimate) -> list[str]:
    """Returns the lines on what is estimated."""
    parties = found.parties
    config = parties.config
    train = config.train
    of_step = f"{train.batch_size} x {train.max_length} tokens"
    if train.accumulation > 1:
        of_step += f", {train.accumulation} times"
    return [
        f"{config.model}: {parties.bottom.config.model_type}, {parties.facts.blocks} blocks of width "
        f"{parties.facts.width}, {config.dtype}",
        f"cut {config.cut}; {counted(config.clients, 'client', 'clients')}, {config.asked} a round; "
        f"{counted(config.rounds, 'round', 'rounds')} of {counted(found.traffic.steps, 'step', 'steps')}",
        f"a step: {of_step}; micro-batches: {train.micro_batches}; codec: {codec_name(config.wire)}",
        *_roles(found),
        f"trunk: {config.trunk.schedule}; strategy: {config.strategy}",
    ]


def _roles(found: Estimate) -> list[str]:
    """Returns a line for each role of the wire, if roles have different codecs."""
    wire = found.parties.config.wire
    if codec_name(wire) != "by role":
        return []
    return [f"  codec of {_KINDS[kind]} {way}: {codec}" for (kind, way), codec in wire.codecs.items()]


def _parameters(found: Estimate) -> list[str]:
    """Returns the table of parameters."""
    client = found.memory["client"]
    trunk = found.memory["trunk"]
    rows = [("parameters", "client", "trunk", "together")]
    for name, key in (("total", "parameters"), ("trained", "trainable")):
        mine, theirs = getattr(client, key), getattr(trunk, key)
        rows.append((f"  {name}", f"{mine:,}", f"{theirs:,}", f"{mine + theirs:,}"))
    return aligned(rows)


def _memory(found: Estimate) -> list[str]:
    """Returns the table of memory by party."""
    client = found.memory["client"]
    trunk = found.memory["trunk"]
    everybody = found.trunk_with_all
    rows = [("memory", "client", "trunk")]
    for name, key in (
        ("base weights", "weights"),
        ("adapters", "adapters"),
        ("their gradients", "gradients"),
        ("optimiser's moments", "moments"),
        ("activations, a batch that is pending", "activations"),
        ("more at the peak of a step", "working"),
        ("process without a model", "libraries"),
        ("peak, one client's batch pending", "peak"),
    ):
        rows.append((f"  {name}", size(getattr(client, key)), size(getattr(trunk, key))))
    if found.pending > 1:
        whose = "a replica's" if found.parties.config.trunk.replicas > 1 else "all"
        rows.append((f"  peak, batches of {whose} {found.pending} pending", "", size(everybody.peak)))
    return aligned(rows)


def _bytes(found: Estimate) -> list[str]:
    """Returns the table of bytes by kind and direction."""
    traffic = found.traffic
    columns = [traffic.step, traffic.rounds[-1], traffic.run]
    rows: list[tuple[str, ...]] = [("bytes", "a client's step", "a round of all", "the run")]
    for kind, words in _KINDS.items():
        for direction in ("up", "down"):
            values = [column[f"{kind}_{direction}"] for column in columns]
            # A row of dashes would tell nothing.
            if any(values):
                rows.append((f"  {words} {direction}", *(size(value) if value else "-" for value in values)))
    for direction in ("up", "down"):
        rows.append((f"  all {direction}", *(size(_to_clients(column, direction)) for column in columns)))
    return aligned(rows)


def _to_clients(traffic: Traffic, direction: str) -> int:
    """Returns the bytes between clients and server in one direction."""
    return sum(
        nbytes
        for name, nbytes in traffic.items()
        if name.endswith(f"_{direction}") and not name.startswith("between_stages")
    )


def _flops(found: Estimate) -> list[str]:
    """Returns the table of operations."""
    rows = [("GFLOP a step", "forward", "backward")]
    for kind, cost in found.flops.items():
        rows.append((f"  {kind}", f"{cost.forward / 1e9:,.2f}", f"{cost.backward / 1e9:,.2f}"))
    return aligned(rows)


def _seconds(found: Estimate) -> list[str]:
    """Returns the lines on seconds, and on what limits a round."""
    seconds = found.seconds
    last = found.parties.config.rounds
    return [
        *_place(found),
        f"  a step  {_time(seconds.step)}: client {_time(seconds.client)}, trunk {_time(seconds.trunk)}, "
        f"wire {_time(seconds.wire)}",
        f"  round {last} {_time(seconds.round)}: training {_time(seconds.training)}, "
        f"evaluation {_time(seconds.evaluation)}",
        f"  the run {_time(found.run_seconds)}: training {_time(sum(one.training for one in found.rounds))}, "
        f"evaluation {_time(sum(one.evaluation for one in found.rounds))}",
        f"  limit: {_LIMITS[seconds.limit]}",
    ]


def _place(found: Estimate) -> list[str]:
    """Returns the lines on networks and devices."""
    field = found.field
    config = found.parties.config
    profile, *others = found.profiles
    words = f"{profile.uplink_mbps:g} Mbit/s up, {profile.downlink_mbps:g} down, {profile.rtt_ms:g} ms"
    if others:
        words = f"{len(found.profiles)} kinds of clients"
    if config.network.compute:
        return [f"seconds on {field.network} ({words})", "  client and trunk: recorded by --network.compute"]
    # Several kinds of clients have several factors, of which the line names none.
    factor = 1.0 if others else profile.compute
    devices = f"  client: {_device(field.client, config.dtype, factor)}; trunk: {_device(field.trunk, config.dtype)}"
    return [f"seconds on {field.network} ({words})", devices]


def _device(device: Hardware, dtype: str, factor: float = 1.0) -> str:
    """Returns a device in words.

    Args:
        device: The device.
        dtype: Type of computation.
        factor: Speed of the device as a multiple of the stated one.
    """
    speed = _speed(device.speed(dtype) * factor)
    return f"{device.name}, {speed}" if device.name in HARDWARE else speed


def _speed(flops: float) -> str:
    """Writes operations a second.

    Example:
        >>> _speed(1.5e11), _speed(1.248e14)
        ('150 GFLOP/s', '124.8 TFLOP/s')
    """
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.0f} GFLOP/s"


def _time(seconds: float) -> str:
    """Writes seconds with a unit that suits.

    Example:
        >>> _time(0.0123), _time(4.2), _time(600), _time(90000)
        ('12 ms', '4.2 s', '10.0 min', '25.0 h')
    """
    # From 0.0995 s on, milliseconds would be rounded to 100 and more, where 0.1 s says as much.
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 or not seconds else f"{seconds * 1000:.1g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _alternatives(found: Estimate, compared: Sequence[Alternative]) -> list[str]:
    """Returns the table of alternatives, and the cheapest of all."""
    rows: list[tuple[str, ...]] = [("  cut", "codec", "micro", "a step", "client's weights", "a step", "a round")]
    rows += [_row(one) for one in shown(found, compared)]
    quickest = compared[0]
    fewest = min(compared, key=lambda one: (one.step_bytes, one.seconds.round))
    return [
        "one choice changed (the first line is the run)",
        *aligned(rows),
        f"of {counted(len(compared), 'combination', 'combinations')}, cheapest",
        f"  in time, {_time(quickest.seconds.round)} a round:",
        f"    {flags_of(quickest, found.parties.config)}",
        f"  in bytes, {size(fewest.step_bytes)} a step:",
        f"    {flags_of(fewest, found.parties.config)}",
    ]


def _row(one: Alternative) -> tuple[str, ...]:
    """Returns a row of the table of alternatives."""
    return (
        f"  {one.cut[0]}:{one.cut[1]}",
        one.codec,
        str(one.micro_batches),
        size(one.step_bytes),
        size(one.client_weights),
        _time(one.seconds.step),
        _time(one.seconds.round),
    )


def _line(found: Estimate) -> str:
    """Returns the bandwidth of the trunk's line in words."""
    line = found.clock.virtual.field.link
    if line.uplink_mbps == line.downlink_mbps:
        return f"{line.uplink_mbps:g} Mbit/s"
    return f"{line.uplink_mbps:g} Mbit/s to them and {line.downlink_mbps:g} from them"


def assumptions(found: Estimate) -> list[str]:
    """Returns what an estimate takes for granted, where a run's data or the place decide."""
    config = found.parties.config
    lines = [
        "every sequence has full length, so that no mask crosses",
        f"each client has {found.parties.workload.held_out or config.eval.samples} held-out sequences or more",
        "no process is lost, and no request is repeated",
        "clients compute at the same time, each on a device of its own",
        f"the trunk serves one step at a time; its line has {_line(found)} for all",
    ]
    if config.trunk.replicas > 1:
        # In place of the line on a single trunk.
        lines[-1] = f"each of {config.trunk.replicas} replicas serves one step at a time, on a line of {_line(found)}"
    if config.rounds > PLAYED:
        lines.append(f"after round {PLAYED}, rounds are as the two before, in bytes and seconds")
    if found.clock.extends:
        lines.append("steps of a long phase take as long as its first ones, which are replayed")
    if found.clock.thins:
        lines.append(f"of {MOST_CLIENTS} clients or fewer, each stands for some; the trunk is as much slower")
    lines.append(f"alternatives replay up to {LIMITS.clients} clients and about {LIMITS.crossings} messages a phase")
    if any(name in text for text in config.wire.codecs.values() for name in ("zstd", "delta")):
        lines.append("what zstd and delta save is measured on random values")
    if config.patience:
        lines.append("the run is not ended early by --patience")
    if config.train.epochs:
        lines.append(f"each client has {found.parties.workload.sequences} training sequences")
    return lines


def warnings(found: Estimate) -> list[str]:
    """Returns what will keep a run from going as its settings say."""
    config = found.parties.config
    lines = []
    need = found.memory["trunk"].peak
    allowed = config.trunk.memory_bytes
    if allowed is not None and allowed < need:
        lines.append(f"--trunk.memory {config.trunk.memory} is less than the trunk's peak, {size(need)}")
    if config.round_deadline:
        times = [one.time for one in found.adapters if one.time is not None]
        arrivals = [time.phase.arrivals for time in times if time.phase.arrivals]
        if arrivals and all(min(one.values()) > config.round_deadline for one in arrivals):
            first = min(min(one.values()) for one in arrivals)
            lines.append(f"no update can arrive before --round-deadline: the first takes {_time(first)}")
    return lines
