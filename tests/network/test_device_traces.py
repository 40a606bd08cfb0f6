"""Networks from device traces of other projects, in the forms that their repositories have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedsplit.errors import InputError
from fedsplit.network.device_traces import from_fedscale, from_flhetbench
from fedsplit.network.fleet import read_fleet

DEVICES = {number: {"computation": 50.0, "communication": 1000.0 * (number + 1)} for number in range(4)}
BEHAVIOUR = {
    0: {"duration": 9, "active": [0, 60], "inactive": [20, 80], "finish_time": 100, "model": "phone"},
    1: {"duration": 9, "active": [], "inactive": [], "finish_time": 100, "model": "never"},
}
TIMERS = {
    "37": {"isSuccess": True, "trace_start": 100.0, "trace_end": 200.0, "ready_time": [[110, 120], [150, 230]]},
    "576": {"isSuccess": False, "trace_start": None, "trace_end": None, "ready_time": []},
}


def test_fedscale() -> None:
    network = from_fedscale(DEVICES, BEHAVIOUR, clients=4, seed=0, rtt_ms=30)
    profiles = read_fleet(json.dumps(network)).profiles(["a", "b", "c", "d"], seed=0)
    assert sorted(profile.uplink_mbps for profile in profiles) == [1, 2, 3, 4]
    assert {(profile.rtt_ms, profile.availability) for profile in profiles} == {(30, 0.4)}
    assert from_fedscale(DEVICES, BEHAVIOUR, 4, 0, 30) == network != from_fedscale(DEVICES, BEHAVIOUR, 4, 1, 30)


def test_flhetbench() -> None:
    devices = [{"id": "a", "tcp_speed_results": [2000, 4000]}]
    network = from_flhetbench(devices, TIMERS, ["37", "576", "37"], clients=3, seed=0, rtt_ms=30)
    assert network["clients"][2] == {
        "clients": [2],
        "uplink_mbps": 3.0,
        "downlink_mbps": 3.0,
        "availability": pytest.approx(0.6),
    }


@pytest.mark.parametrize(
    ("devices", "behaviour", "words"),
    [
        ([], None, "must map each device to a table"),
        ({}, None, "must map each device to a table"),
        ({1: {"communication": 0, "computation": 1}}, None, "communication of device 1 is 0"),
        ({1: {"communication": 1}}, None, "computation of device 1 is None"),
        (DEVICES, {1: BEHAVIOUR[1]}, "no device of the trace is ever active"),
        (DEVICES, {1: {**BEHAVIOUR[0], "active": [1]}}, "not two lists of equal length"),
        (DEVICES, {1: {**BEHAVIOUR[0], "active": [1, "x"]}}, "not a pair of numbers"),
    ],
)
def test_malformed_traces_of_fedscale(devices: object, behaviour: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_fedscale(devices, behaviour, clients=2, seed=0, rtt_ms=30)


@pytest.mark.parametrize(
    ("devices", "timers", "states", "words"),
    [
        ({}, None, None, "no list of devices"),
        ([3], None, None, "device 0 has no list tcp_speed_results"),
        ([{"tcp_speed_results": [-1]}], None, None, "a speed of device 0 is -1"),
        (None, TIMERS, ["38"], "the timers have no device 38"),
        (None, TIMERS, [37], "the states are no list of names"),
        (None, TIMERS, ["576"], "no device of the trace is ever active"),
        (None, {"37": {**TIMERS["37"], "trace_end": 100}}, None, "no two times in order"),
    ],
)
def test_malformed_data_of_flhetbench(devices: Any, timers: object, states: object, words: str) -> None:
    devices = [{"tcp_speed_results": [1000]}] if devices is None else devices
    with pytest.raises(InputError, match=words):
        from_flhetbench(devices, timers, states, clients=2, seed=0, rtt_ms=30)
