"""Device traces of other projects as networks: FedScale's (2105.11367), and those of FLHetBench.

FedScale has one bandwidth in kbit/s for both directions, and milliseconds of inference for one sample. FLHetBench has
measured download speeds in kbit/s, which it uses for both directions, and no compute times by client. Neither has
latencies. Times in which a client is active become its availability: their share of the trace.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.errors import InputError, shortened
from fedsplit.seeds import derive_seed

Document = dict[str, Any]
"""Tables of a network file, as `fedsplit.network.fleet` reads them."""


def _number(value: object, what: str) -> float:
    """Returns a value of a trace as a finite number above 0.

    Raises:
        InputError: The value is something else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]  # a number by now
        raise InputError(f"{what} is {shortened(value)}, not a finite number above 0")
    return float(value)  # type: ignore[arg-type]


def _items(table: object, what: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the entries of a trace by name, in a fixed order.

    Raises:
        InputError: The trace is no mapping of names to tables, or is empty.
    """
    if not isinstance(table, Mapping) or not table or not all(isinstance(one, Mapping) for one in table.values()):
        raise InputError(f"{what} is no trace: it must map each device to a table")
    return sorted((str(name), one) for name, one in table.items())


def _drawn(
    pool: Sequence[Any],
    clients: int,
    seed: int,
    what: str,
) -> list[Any]:
    """Returns one entry for each client, drawn from the seed without repetition as long as there are enough."""
    generator = random.Random(derive_seed(seed, "device traces", what))
    shuffled = generator.sample(list(pool), len(pool))
    return [shuffled[client % len(shuffled)] for client in range(clients)]


def from_fedscale(devices: object, behaviour: object, clients: int, seed: int, rtt_ms: float) -> Document:
    """Returns a network from FedScale's traces.

    Args:
        devices: `client_device_capacity`: "computation" and "communication" by device.
        behaviour: `client_behave_trace`: "active", "inactive" and "finish_time" by device; None for always active.
        clients: Number of clients.
        seed: Seed of the choice of devices.
        rtt_ms: Round-trip time of all clients in milliseconds.

    Raises:
        InputError: A trace is malformed.

    Example:
        >>> fast, slow = {"computation": 50, "communication": 4000}, {"computation": 100, "communication": 8000}
        >>> devices = {"a": slow, "b": fast}
        >>> network = from_fedscale(devices, None, clients=2, seed=0, rtt_ms=50)
        >>> sorted((one["uplink_mbps"], one["compute"]) for one in network["clients"])
        [(4.0, 1.5), (8.0, 0.75)]
    """
    pool = []
    for name, one in _items(devices, "the trace of devices"):
        speed = _number(one.get("communication"), f"communication of device {name}")
        milliseconds = _number(one.get("computation"), f"computation of device {name}")
        pool.append((speed, milliseconds))
    # The trace has no speeds of a known model. The median device gets the factor 1, and the others are compared with
    # it.
    typical = statistics.median(milliseconds for _, milliseconds in pool)
    shares = [1.0] if behaviour is None else _active_shares(behaviour)
    rows = []
    for (speed, milliseconds), share in zip(
        _drawn(pool, clients, seed, "devices"), _drawn(shares, clients, seed, "behaviour"), strict=True
    ):
        mbps = speed / 1000
        rows.append(
            {"uplink_mbps": mbps, "downlink_mbps": mbps, "compute": typical / milliseconds, "availability": share}
        )
    return _document(rows, rtt_ms)


def _active_shares(behaviour: object) -> list[float]:
    """Returns the share of its trace in which each device of FedScale is active. Devices that never are, are left out.

    Raises:
        InputError: The trace is malformed, or no device is ever active.
    """
    shares = []
    for name, one in _items(behaviour, "the trace of behaviour"):
        active, inactive = one.get("active"), one.get("inactive")
        total = _number(one.get("finish_time"), f"finish_time of device {name}")
        if not isinstance(active, list) or not isinstance(inactive, list) or len(active) != len(inactive):
            raise InputError(f"active and inactive of device {name} are not two lists of equal length")
        shares.append(_share(list(zip(active, inactive, strict=True)), 0.0, total, name))
    return _those_above_zero(shares)


def _share(intervals: Sequence[Any], start: float, end: float, name: str) -> float:
    """Returns the share of a trace that intervals cover.

    Raises:
        InputError: An interval is no pair of numbers.
    """
    covered = 0.0
    for interval in intervals:
        is_pair = isinstance(interval, list | tuple) and len(interval) == 2
        # NaN and infinity are floats, too, and a trace is a stranger's file.
        if not is_pair or not all(isinstance(edge, int | float) and math.isfinite(edge) for edge in interval):
            raise InputError(f"a time of device {name} is {shortened(interval)}, not a pair of numbers")
        first, last = interval
        covered += max(0.0, min(last, end) - max(first, start))
    # Intervals of a trace may overlap.
    return min(1.0, covered / (end - start))


def _those_above_zero(shares: Sequence[float]) -> list[float]:
    usable = [share for share in shares if share > 0]
    if not usable:
        raise InputError("no device of the trace is ever active")
    return usable


def from_flhetbench(
    devices: object, timers: object, states: object, clients: int, seed: int, rtt_ms: float
) -> Document:
    """Returns a network from the data of FLHetBench.

    Args:
        devices: A list of devices with "tcp_speed_results", such as `cached_sample_data/device/case1.json`.
        timers: `cached_timers.json`: "isSuccess", "trace_start", "trace_end" and "ready_time" by device; None for
            always ready.
        states: A list of names in `timers`, such as `cached_sample_data/state/case1.json`; None for all of them.
        clients: Number of clients.
        seed: Seed of the choice of devices.
        rtt_ms: Round-trip time of all clients in milliseconds.

    Raises:
        InputError: A trace is malformed.

    Example:
        >>> network = from_flhetbench([{"tcp_speed_results": [4000, 6000]}], None, None, clients=2, seed=0, rtt_ms=50)
        >>> [one["downlink_mbps"] for one in network["clients"]]
        [5.0, 5.0]
    """
    if not isinstance(devices, list) or not devices:
        raise InputError("the trace of devices is no list of devices")
    speeds = []
    for place, device in enumerate(devices):
        results = device.get("tcp_speed_results") if isinstance(device, Mapping) else None
        if not isinstance(results, list) or not results:
            raise InputError(f"device {place} has no list tcp_speed_results")
        speeds.append(statistics.fmean(_number(one, f"a speed of device {place}") for one in results) / 1000)
    shares = [1.0] if timers is None else _ready_shares(timers, states)
    rows = []
    for mbps, share in zip(
        _drawn(speeds, clients, seed, "devices"), _drawn(shares, clients, seed, "behaviour"), strict=True
    ):
        rows.append({"uplink_mbps": mbps, "downlink_mbps": mbps, "availability": share})
    return _document(rows, rtt_ms)


def _ready_shares(timers: object, states: object) -> list[float]:
    """Returns the share of its trace in which each device of FLHetBench is ready.

    Raises:
        InputError: The trace is malformed, or no device is ever ready.
    """
    by_name = dict(_items(timers, "the trace of timers"))
    names = list(by_name) if states is None else states
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("the states are no list of names")
    shares = []
    for name in names:
        one = by_name.get(name)
        if one is None:
            raise InputError(f"the timers have no device {shortened(name)}")
        if one.get("isSuccess") is not True:  # FLHetBench could not read the trace of the device
            continue
        start, end = _edges(one, shortened(name))
        ready = one.get("ready_time")
        if not isinstance(ready, list):
            raise InputError(f"ready_time of device {shortened(name)} is no list")
        shares.append(_share(ready, start, end, shortened(name)))
    return _those_above_zero(shares)


def _edges(device: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Returns the times at which the trace of a device of FLHetBench begins and ends.

    Raises:
        InputError: The times are no numbers in order.
    """
    start, end = device.get("trace_start"), device.get("trace_end")
    are_numbers = all(isinstance(edge, int | float) and math.isfinite(edge) for edge in (start, end))
    if not are_numbers or start >= end:  # type: ignore[operator]  # numbers by now
        raise InputError(f"trace_start and trace_end of device {name} are no two times in order")
    return float(start), float(end)  # type: ignore[arg-type]  # numbers by now


def _document(rows: Sequence[Mapping[str, float]], rtt_ms: float) -> Document:
    """Returns the tables of a network file, with a table for each client."""
    # A network file must have a default, though each client has a table of its own here.
    first = rows[0]
    default = {"uplink_mbps": first["uplink_mbps"], "downlink_mbps": first["downlink_mbps"], "rtt_ms": rtt_ms}
    tables = [{"clients": [client], **row} for client, row in enumerate(rows)]
    return {"default": default, "clients": tables}
