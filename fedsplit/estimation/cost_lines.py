"""An estimate as lines for people, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from fedsplit.estimation.alternatives import Alternative, shown
from fedsplit.estimation.hardware import HARDWARE, Hardware
from fedsplit.estimation.run_cost import Estimate
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
        f"cut {config.cut}; {counted(config.clients, 'client', 'clients')}, {config.sampled} a round; "
        f"{counted(config.rounds, 'round', 'rounds')} of {counted(found.traffic.steps, 'step', 'steps')}",
        f"a step: {of_step}; micro-batches: {train.micro_batches}; codec: {config.wire.codec}",
        f"trunk: {config.trunk.schedule}; strategy: {config.strategy}",
    ]


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
    config = found.parties.config
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
    if config.sampled > 1:
        rows.append((f"  peak, batches of all {config.sampled} pending", "", size(everybody.peak)))
    return aligned(rows)


def _bytes(found: Estimate) -> list[str]:
    """Returns the table of bytes by kind and direction."""
    traffic = found.traffic
    columns = [traffic.step, traffic.rounds[-1], traffic.run]
    rows: list[tuple[str, ...]] = [("bytes", "a client's step", "a round of all", "the run")]
    for kind, words in _KINDS.items():
        for direction in ("up", "down"):
            values = [column[f"{kind}_{direction}"] for column in columns]
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
    field = found.field
    seconds = found.seconds
    profile = field.profile
    dtype = found.parties.config.dtype
    return [
        f"seconds on {field.network} ({profile.uplink_mbps:g} Mbit/s up, {profile.downlink_mbps:g} down, "
        f"{profile.rtt_ms:g} ms)",
        f"  client: {_device(field.client, dtype, profile.compute)}; trunk: {_device(field.trunk, dtype)}",
        f"  a step  {_time(seconds.step)}: client {_time(seconds.client)}, trunk {_time(seconds.trunk)}, "
        f"wire {_time(seconds.wire)}",
        f"  a round {_time(seconds.round)}: training {_time(seconds.training)}, adapters "
        f"{_time(seconds.adapters)}, evaluation {_time(seconds.evaluation)}",
        f"  the run {_time(seconds.round * found.parties.config.rounds)}",
        f"  limit: {_LIMITS[seconds.limit]}",
    ]


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
        f"    {_named(quickest)}",
        f"  in bytes, {size(fewest.step_bytes)} a step:",
        f"    {_named(fewest)}",
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


def _named(one: Alternative) -> str:
    """Returns the choice of an alternative, as flags."""
    return f"--cut {one.cut[0]}:{one.cut[1]} --wire.codec {one.codec} --micro-batches {one.micro_batches}"


def _line(found: Estimate) -> str:
    """Returns the bandwidth of the trunk's line in words."""
    line = found.field.trunk_link
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
    if config.rounds > 12:
        lines.append("after round 12, adapters cross as in the two rounds before")
    if config.patience:
        lines.append("the run is not ended early by --patience")
    if config.train.epochs:
        lines.append(f"each client has {found.parties.workload.sequences} training sequences")
    return lines
