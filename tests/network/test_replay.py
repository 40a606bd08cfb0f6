"""The virtual clock against closed forms, worked by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.network.compute import TASKS, RecordedCompute
from fedsplit.network.fair_share import SharedLink
from fedsplit.network.fleet import TrunkLink
from fedsplit.network.profiles import Profile
from fedsplit.network.replay import Channel, ClientPhase, Field, replay
from fedsplit.network.times import PLACES
from fedsplit.network.trace import Crossing
from fedsplit.network.trunk_queue import Discipline

SECONDS = {
    "bottom-forward": 0.1,
    "trunk-forward": 0.2,
    "top-forward": 0.3,
    "top-backward": 0.4,
    "trunk-backward": 0.5,
    "bottom-backward": 0.6,
}
COMPUTE = RecordedCompute(SECONDS)  # of one row of one token
MEGABYTE = 1_000_000
LINE = Profile(uplink_mbps=8, downlink_mbps=16, rtt_ms=200)  # 1 and 2 MB/s, 0.1 s each way


def step(client: int, step: int = 0, micro: int = 0, last: bool = True, size: int = MEGABYTE) -> list[Crossing]:
    """A training step, or one of its micro-batches."""
    place = (1, client, 0, step, 0, micro)
    return [
        Crossing(*place, kind="forward", up=size, down=size, rows=1, length=1),
        Crossing(*place, kind="backward", up=size, down=size, rows=1, length=1, ends=last, returns_gradient=True),
    ]


def played(phases: dict[int, ClientPhase], profile: Profile = LINE, **settings: object):
    place = Field([profile] * len(phases), **({"link": TrunkLink(), "compute": COMPUTE} | settings))
    return replay(place, phases, round=1, phase="training")


def test_one_client_is_a_sum() -> None:
    """Every message takes its bytes at the bandwidth, and half a round trip; nothing overlaps."""
    found = played({0: ClientPhase(2 * MEGABYTE, 3 * MEGABYTE, step(0))})
    up, down = 1.0 + 0.1, 0.5 + 0.1
    adapters = (1.0 + 0.1) + (3.0 + 0.1)
    assert found.arrivals[0] == pytest.approx(adapters + 0.1 + up + 0.2 + down + 0.7 + up + 0.5 + down + 0.6)
    spent = found.spent[0].seconds
    assert spent == pytest.approx(
        {
            "client_compute": 0.1 + 0.7 + 0.6,
            "wire_up": 2 * up + 3.1,
            "others": 0,
            "trunk_queue": 0,
            "trunk_compute": 0.7,
            "wire_down": 2 * down + 1.1,
        }
    )


def test_a_device_of_half_the_speed_takes_twice_as_long() -> None:
    fast = played({0: ClientPhase(0, 0, step(0))})
    slow = played({0: ClientPhase(0, 0, step(0))}, Profile(8, 16, 200, compute=0.5))
    assert slow.arrivals[0] - fast.arrivals[0] == pytest.approx(1.4)  # the client's computing once more


def test_loss_shrinks_the_bandwidth_and_costs_round_trips() -> None:
    """With a fifth of the packets lost, 1 MB at 1 MB/s takes 1.25 s, and a quarter of a round trip for the last one."""
    lossy = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=200, loss=0.2)
    found = played({0: ClientPhase(0, MEGABYTE)}, lossy)
    assert found.arrivals[0] == pytest.approx((0.1 + 0.05) + (1.25 + 0.1 + 0.05))


def test_a_reference_of_held_out_text_is_not_taken_for_that_of_a_step() -> None:
    """Held-out batches are numbered like steps. Behind the steps nothing else is on the line: 3 MB take 3 s more."""
    reference = Crossing(1, 0, 0, 0, 0, 0, kind="reference", up=MEGABYTE, down=MEGABYTE, rows=1, length=1)
    held_out = replace(reference, up=0, down=3 * MEGABYTE)
    instant = RecordedCompute(dict.fromkeys(TASKS, 0.0))
    line = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=0)
    without_held_out = played({0: ClientPhase(0, 0, [reference, *step(0)])}, line, compute=instant)
    whole = played({0: ClientPhase(0, 0, [reference, *step(0), held_out])}, line, compute=instant)
    assert whole.arrivals[0] - without_held_out.arrivals[0] == pytest.approx(3.0)


def test_two_clients_share_the_trunks_link() -> None:
    """Both could send 1 MB/s, and the trunk takes 1 MB/s in all: each gets half, and then the longer one all of it."""
    narrow = TrunkLink(uplink_mbps=1000, downlink_mbps=8)
    line = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=0)
    phases = {0: ClientPhase(0, MEGABYTE), 1: ClientPhase(0, 2 * MEGABYTE)}
    found = played(phases, line, link=narrow)
    assert found.arrivals == pytest.approx({0: 2.0, 1: 3.0})
    assert played(phases, line).arrivals == pytest.approx({0: 1.0, 1: 2.0})  # a wide link


def test_the_second_of_two_clients_waits_for_the_trunk() -> None:
    """Forwards without bytes arrive together; the trunk takes 0.2 s for each, one after the other."""
    instant = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=0)
    forwards = {
        client: ClientPhase(0, 0, [Crossing(1, client, 0, 0, 0, 0, "evaluation", 0, 0, rows=1, length=1)])
        for client in range(2)
    }
    found = played(forwards, instant)
    assert found.arrivals == pytest.approx({0: 0.6, 1: 0.8})
    assert found.spent[1].seconds["trunk_queue"] == pytest.approx(0.2)


def test_two_micro_batches_overlap() -> None:
    """By hand, with messages of 1 s up and none down, no latency, and only the client's own parts taking time.

    Bottom 0.1 and 0.1; messages arrive at 1.1 and 2.1 (the line is busy until 1.1). The top works from 1.1 to 1.8, and
    from 2.1 to 2.8. The gradients use the line from 2.1 to 3.1 and on to 4.1. Bottom: 3.1 to 3.7, and 4.1 to 4.7.
    """
    line = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=0)
    own = RecordedCompute({task: 0.0 if task.startswith("trunk") else SECONDS[task] for task in TASKS})
    crossings = []
    for one in [*step(0, micro=0, last=False), *step(0, micro=1)]:
        crossings.append(Crossing(**{**vars(one), "down": 0}))
    found = played({0: ClientPhase(0, 0, crossings)}, line, compute=own)
    assert found.arrivals[0] == pytest.approx(4.7)
    spent = found.spent[0].seconds
    assert spent["client_compute"] == pytest.approx(2 * 1.4)
    assert spent["wire_up"] == pytest.approx(4.7 - 2.8)  # only what nothing overlaps


def test_a_gathered_batch_waits_for_the_slower_client() -> None:
    fast, slow = Profile(8, 8, 0), Profile(4, 8, 0)
    phases = {client: ClientPhase(0, 0, step(client)) for client in range(2)}
    place = Field([fast, slow], TrunkLink(), COMPUTE, Discipline(gathers=True))
    found = replay(place, phases, round=1, phase="training")
    # Forwards at 1.1 and 2.1; gradients, sent 1.1 + 0.7 later: see below.
    assert found.spent[0].seconds["others"] == pytest.approx(1.0 + 1.0)
    assert found.spent[1].seconds["others"] == 0
    assert found.spent[0].seconds["trunk_compute"] == pytest.approx(2 * 0.2 + 2 * 0.5)  # both in one batch


def test_a_barrier_waits_for_all() -> None:
    fast, slow = Profile(8, 8, 0), Profile(8, 8, 0, compute=0.1)
    phases = {client: ClientPhase(0, 0, [*step(client), *step(client, step=1)]) for client in range(2)}
    free = replay(Field([fast, slow], TrunkLink(), COMPUTE, Discipline(sums=True)), phases, 1, "training")
    held = replay(Field([fast, slow], TrunkLink(), COMPUTE, Discipline(sums=True, every=1)), phases, 1, "training")
    assert free.spent[0].seconds["others"] == 0
    # The fast client's second forward arrives at 7.2 s, and the trunk ends the slow one's first gradient at 11.7 s.
    assert held.spent[0].seconds["others"] == pytest.approx(4.5)
    assert held.arrivals[0] > free.arrivals[0]


def test_gradients_come_before_forwards_in_the_queue() -> None:
    """Three forwards come at once. The gradient of the first comes while the second is served, and passes the third."""
    line = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=0)
    compute = RecordedCompute(dict.fromkeys(TASKS, 0.0) | {"trunk-forward": 1.0, "trunk-backward": 1.0})
    phases = {
        0: ClientPhase(0, 0, step(0, size=0)),
        1: ClientPhase(0, 0, step(1, size=0)),
        2: ClientPhase(0, 0, step(2, size=0)),
    }
    found = played(phases, line, compute=compute)
    assert found.arrivals == pytest.approx({0: 3.0, 1: 4.0, 2: 6.0})


def test_jitter_depends_on_the_seed_alone() -> None:
    line = Profile(uplink_mbps=8, downlink_mbps=8, rtt_ms=10, jitter_ms=50)
    phases = {client: ClientPhase(MEGABYTE, MEGABYTE, step(client)) for client in range(3)}
    first = played(phases, line)
    assert played(dict(reversed(phases.items())), line) == first
    assert played(phases, line, seed=1) != first
    assert 0 < first.arrivals[0] - played(phases, Profile(8, 8, 10)).arrivals[0] < 1


@given(
    clients=st.integers(1, 4),
    steps=st.integers(1, 3),
    micros=st.integers(1, 3),
    trunk=st.sampled_from([4.0, 1000.0]),
    discipline=st.sampled_from([Discipline(), Discipline(lanes=2), Discipline(sums=True, every=1)]),
)
def test_the_places_of_a_client_add_up_to_its_arrival(
    clients: int, steps: int, micros: int, trunk: float, discipline: Discipline
) -> None:
    profiles = [Profile(8 + number, 16, 20, jitter_ms=5, loss=0.01, compute=1 + number) for number in range(clients)]
    phases = {}
    for client in range(clients):
        crossings = []
        for number in range(steps):
            for micro in range(micros):
                crossings += step(client, number, micro, last=micro == micros - 1, size=1000 * (1 + client))
        phases[client] = ClientPhase(500, 700, crossings)
    place = Field(profiles, TrunkLink(trunk, trunk), COMPUTE, discipline)
    found = replay(place, phases, round=1, phase="training")
    for client, arrival in found.arrivals.items():
        assert found.spent[client].total == pytest.approx(arrival)
        assert all(seconds >= 0 for seconds in found.spent[client].seconds.values())
    assert set(found.spent[0].seconds) == set(PLACES)


def test_without_a_phase_to_replay_no_library_is_loaded() -> None:
    code = "import sys, fedsplit.network.replay, fedsplit.network.network_checks; print('simpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_messages_of_a_client_keep_their_order_under_jitter() -> None:
    """The second message draws a smaller delay for some seeds, and still comes after the first."""
    line = Profile(uplink_mbps=800, downlink_mbps=800, rtt_ms=0, jitter_ms=1000)
    overtaking = 0
    for seed in range(8):
        env = simpy.Environment()
        channel = Channel(env, SharedLink(env, 1e9, 1e8), 1e8, line, seed, ("up",))
        arrived: dict[int, float] = {}

        def send(number: int, channel: Channel = channel, env: simpy.Environment = env, arrived: dict = arrived):
            yield from channel.carry(1000, (number,))
            arrived[number] = env.now

        for number in (0, 1):
            env.process(send(number))
        env.run()
        assert arrived[0] <= arrived[1]
        overtaking += arrived[0] == arrived[1]  # the second has waited for the first
    assert 0 < overtaking < 8


@pytest.mark.parametrize("discipline", [Discipline(gathers=True), Discipline(sums=True, every=1)])
def test_nobody_waits_for_a_client_with_fewer_steps(discipline: Discipline) -> None:
    longer = [crossing for number in range(3) for crossing in step(0, number)]
    phases = {0: ClientPhase(0, 0, longer), 1: ClientPhase(0, 0, step(1))}
    found = replay(Field([LINE, LINE], TrunkLink(), COMPUTE, discipline), phases, 1, "training")
    assert found.arrivals[0] > found.arrivals[1] > 0
