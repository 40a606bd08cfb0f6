"""The estimate's seconds are those of the virtual clock of a run with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.engines import in_process
from fedsplit.estimation.hardware import hardware_named
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.phase_clock import Clock, Field, Limits, compute_on
from fedsplit.estimation.run_cost import Estimate, estimate
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.events import Event, Sink
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.documents import build

SMALL: dict[str, Any] = {
    "clients": 2,
    "rounds": 2,
    "engine": "local",
    "dataset": "synthetic",
    "train.steps": 2,
    "train.batch_size": 2,
    "train.micro_batches": 1,
    "train.max_length": 16,
    "eval.samples": 4,
    "eval.after": 2,
    "network.profile": "home",
}

SLOW_DEVICE = """
[default]
profile = "home"
[[clients]]
clients = [1]
compute = 0.0001
"""

SLOW_LINE = SLOW_DEVICE.replace("compute = 0.0001", "rtt_ms = 60000")


class Replays(Sink):
    """Remembers the virtual seconds of each round."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float]] = []
        self.bytes: list[dict[str, int]] = []

    def handle(self, event: Event) -> None:
        found: Any = event
        if event.name == "network":
            self.rounds.append((found.training_seconds, found.evaluation_seconds))
        if event.name == "cost":
            self.bytes.append({kind: count for kind, count in found.bytes.items() if count})


def estimated(settings: dict[str, Any]) -> Estimate:
    """The estimate of a run, on the devices of its settings."""
    config = build({**SMALL, **settings})
    client, trunk = (
        hardware_named(repr(speed), "") for speed in (config.network.client_tflops, config.network.trunk_tflops)
    )
    return estimate(Parties(config), Field("", client, trunk))


def assert_equal(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Plays a run, and compares its virtual seconds and its bytes with the estimate, round by round."""
    config = build({**SMALL, **settings})
    strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    replays = Replays()
    federation = in_process.federate(config, tmp_path / "run", strategy, replays)
    found = estimated(settings)
    assert [(one.training, one.evaluation) for one in found.rounds] == replays.rounds
    assert [dict(+traffic) for traffic in found.traffic.rounds] == replays.bytes
    assert federation.summary is not None
    assert found.run_seconds == pytest.approx(federation.summary["virtual"]["seconds"], rel=1e-12)


def network(tmp_path: Path, text: str) -> str:
    """Writes a network, and returns its file."""
    file = tmp_path / "network.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    "settings", [{}, {"clients": 4, "trunk.replicas": 2, "network.trunk_tflops": 0.0001, "rounds": 1}], ids=str
)
def test_seconds_are_those_of_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(tmp_path, settings)


@pytest.mark.parametrize("text", [SLOW_DEVICE, SLOW_LINE], ids=["device", "line"])
def test_each_client_has_its_own_line_and_device(text: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, {"network.profile": network(tmp_path, text), "rounds": 1})


MORE: list[dict[str, Any]] = [
    {"eval.every": 2, "rounds": 3},
    {"trunk.schedule": "batched", "network.trunk_tflops": 0.0001},
    {"trunk.schedule": "accumulate", "trunk.every": 1, "train.accumulation": 2, "clients": 3},
    {"trunk.schedule": "forward-only"},
    {"trunk.schedule": "copies", "train.clip": 1.0, "train.micro_batches": 2, "train.batch_size": 4},
    {"trunk.schedule": "frozen", "cut": "0:5"},
    {"trunk.stages": "1:3:5", "train.clip": 1.0},
    {"prompt.kind": "prompt", "prompt.tokens": 3, "objective": "distillation", "metric": "token_accuracy"},
    {"wire.codec": "int8", "wire.gradient_up": "int4", "adapter.codec": "int4"},
    {"clients": 5, "fraction": 0.5, "rounds": 4, "eval.fraction": 0.5, "eval.every": 3, "strategy": "rolora"},
    {"clients": 5, "fraction": 0.4, "network.over_select": 1.5},
    {"clients": 3, "round_deadline": 0.51},
]
"""Schedules, strategies, codecs, and what else decides about time."""


@pytest.mark.slow
@pytest.mark.parametrize("settings", MORE, ids=str)
def test_seconds_are_those_of_a_run_under_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(tmp_path, settings)


@pytest.mark.slow
def test_absent_clients_are_those_of_the_run(tmp_path: Path) -> None:
    rare = '[default]\nprofile = "home"\navailability = 0.5\n'
    assert_equal(tmp_path, {"network.profile": network(tmp_path, rare), "clients": 4, "rounds": 4})


def test_recorded_times_are_used(tmp_path: Path) -> None:
    tasks = [f"{part}-{way} = 0.001" for part in ("bottom", "trunk", "top") for way in ("forward", "backward")]
    file = tmp_path / "compute.toml"
    file.write_text("\n".join(["[seconds_a_token]", *tasks]))
    assert_equal(tmp_path, {"network.compute": str(file), "rounds": 1})


def test_a_long_phase_is_extended() -> None:
    parties = Parties(build({**SMALL, "train.steps": 60, "rounds": 1}))
    hardware = hardware_named("0.001", "")
    compute = compute_on(parties, hardware, hardware)
    whole, part = (Clock(parties, StepTraffic(parties), compute, Limits(most)) for most in (10**6, 60))
    sent = {0: 1000, 1: 1000}
    exact, extended = (clock.training(1, sent, sent).seconds for clock in (whole, part))
    assert extended == pytest.approx(exact, rel=0.02)
    assert part.extends and not whole.extends


def test_some_clients_stand_for_many() -> None:
    parties = Parties(build({**SMALL, "clients": 40, "trunk.replicas": 1, "train.max_length": 64}))
    device, trunk = hardware_named("1", ""), hardware_named("0.0002", "")
    compute = compute_on(parties, device, trunk)
    everybody, some = (Clock(parties, StepTraffic(parties), compute, Limits(clients=most)) for most in (40, 8))
    sent = dict.fromkeys(range(40), 1000)
    exact, thinned = (clock.training(1, sent, sent) for clock in (everybody, some))
    assert thinned.seconds == pytest.approx(exact.seconds, rel=0.1)
    assert len(thinned.phase.arrivals) == 40 and some.thins
