"""What clients say is read to the last bit where it can be, and refused in one line where it cannot."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.federation import replies
from fedsplit.federation.messages import CLIENT_LOST, LATE, TRUNK_LOST, Failure, Reply, measured, trained
from fedsplit.federation.replies import LARGEST_CHANGE, Control
from fedsplit.federation.workload import Workload
from fedsplit.scores import Score, means
from fedsplit.updates import Adapters, ClientUpdate, Layer, RefusedUpdate

START = Adapters({"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(4, 2)}, {"l": Layer(2.0, True)})
NAMES = set(START.tensors)


def work(examples: int = 1, routers: bool = False) -> Workload:
    return Workload(examples, tokens=128 * examples, held_out=20, sample=4, routers=routers)


def with_metrics(reply: Reply, changes: dict[str, object]) -> Reply:
    """Returns a reply with other metrics; None takes one away."""
    metrics = {**reply.metrics, **changes}
    return replace(reply, metrics={name: value for name, value in metrics.items() if value is not None})


def told(**metrics: object) -> Reply:
    """Returns a reply to a request to train whose metrics say something else."""
    update = ClientUpdate(3, START, examples=8, tokens=64, loss=2.5)
    return with_metrics(trained(update, NAMES, Score(2.5, 3), peak_memory=7), metrics)


def read(
    reply: Reply, given: Adapters = START, examples: int = 8, control: Control = "none", routers: bool = False
) -> ClientUpdate:
    return replies.to_update(reply, given, NAMES, "client 3 (ann)", work(examples, routers), control)


def test_updates_come_back() -> None:
    update = ClientUpdate(3, START, examples=40, tokens=5120, loss=3.25, router_loss=0.25)
    back = read(trained(update, NAMES, Score(2.5, 3), peak_memory=7), examples=40, routers=True)
    assert (back.client, back.examples, back.tokens, back.loss) == (3, 40, 5120, 3.25)
    assert back.router_loss == 0.25
    assert back.adapters.layers == START.layers
    assert back.given is START


def test_only_what_is_shared_goes_up_and_the_rest_is_what_was_given() -> None:
    changed = START.with_tensors({n: t + 1 for n, t in START.tensors.items()})
    control = {name: 2 * tensor for name, tensor in START.tensors.items()}
    names = {"l.lora_B.weight"}
    reply = trained(ClientUpdate(0, changed, 1, 16, control=control), names, Score(0.0, 0), 0)
    back = replies.to_update(reply, START, names, "ann", work(), "required")
    assert torch.equal(back.adapters.tensors["l.lora_A.weight"], START.tensors["l.lora_A.weight"])
    assert torch.equal(back.adapters.tensors["l.lora_B.weight"], changed.tensors["l.lora_B.weight"])
    assert list(back.control) == ["l.lora_B.weight"]
    with pytest.raises(RefusedUpdate, match="ann sent other layers"):
        replies.to_update(reply, START, NAMES, "ann", work(), "required")


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (ClientUpdate(3, START.with_tensors({n: t * math.nan for n, t in START.tensors.items()}), 8), "sent NaN"),
        (ClientUpdate(3, START.with_tensors({}), 8), "sent other layers"),
        (ClientUpdate(3, START, -5), "sent -5 as its number of examples"),
    ],
    ids=["not finite", "no tensors", "too few examples"],
)
def test_updates_that_do_not_fit_are_refused_by_name(update: ClientUpdate, message: str) -> None:
    with pytest.raises(RefusedUpdate, match=rf"client 3 \(ann\) {message}"):
        read(trained(update, NAMES, Score(0.0, 0), 0))


def changed_by(norm: float) -> dict[str, torch.Tensor]:
    """Returns both factors, changed by one value each, so that the norm over both is as given."""
    moved = {name: tensor.clone() for name, tensor in START.tensors.items()}
    for tensor in moved.values():
        tensor[0, 0] += norm / math.sqrt(2)
    return moved


@pytest.mark.parametrize("norm", [1.01 * LARGEST_CHANGE, 1e30])
def test_what_others_cannot_compute_with_is_refused_by_name(norm: float) -> None:
    """By the change from what was given, over all tensors; of adapters, and of a control variate."""
    large = START.with_tensors({name: tensor + 1e7 for name, tensor in START.tensors.items()})
    update = ClientUpdate(3, START.with_tensors(changed_by(0.99 * LARGEST_CHANGE)), 8, 16)
    fits = trained(update, NAMES, Score(), 0)
    assert read(fits).examples == 8
    words = r"^client 3 \(ann\) sent adapters that changed by a norm of .*, not by up to 1e\+04$"
    with pytest.raises(RefusedUpdate, match=words):
        read(fits, large)
    for kind in ("adapters", "a control variate"):
        adapters = changed_by(norm) if kind == "adapters" else START.tensors
        control = {} if kind == "adapters" else changed_by(norm)
        spoilt = ClientUpdate(3, START.with_tensors(adapters), 8, 16, control=control)
        with pytest.raises(RefusedUpdate, match=rf"^client 3 \(ann\) sent {kind} that changed by a norm of "):
            read(trained(spoilt, NAMES, Score(), 0), control="optional")


def test_a_control_variate_that_is_not_finite_is_refused() -> None:
    control = {name: tensor * math.inf for name, tensor in START.tensors.items()}
    spoilt = ClientUpdate(3, START, 8, 16, control=control)
    with pytest.raises(RefusedUpdate, match=r"client 3 \(ann\), as its control variate, sent NaN or infinite values"):
        read(trained(spoilt, NAMES, Score(), 0), control="required")


def test_measurements_come_back() -> None:
    reply = measured(2, Score(12.5, 5, 4), Score(4.5, 2), 7)
    assert replies.to_score(reply, "ann", work()) == Score(12.5, 5, 4)
    assert replies.sample_of(reply) == Score(4.5, 2)
    assert replies.memory_of(reply) == 7
    after_own_steps = trained(ClientUpdate(0, START, 1), NAMES, Score(2.5, 3), 9)
    assert replies.sample_of(after_own_steps) == Score(2.5, 3)
    assert replies.memory_of(after_own_steps) == 9


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": math.inf}, "sent inf as its number of examples, not a whole number"),
        ({"num-examples": 9}, "sent 9 as its number of examples, not 8"),
        ({"num-examples": 8.0}, "sent 8.0 as its number of examples"),
        ({"client": 99}, "says that it is client 99"),
        ({"client": None}, "says that it is client nothing"),
        ({"client": [3]}, "says that it is client a list"),
        ({"loss": None}, "sent nothing as its loss"),
        ({"loss": [1.0]}, "sent a list as its loss"),
        ({"loss": -1.0}, "sent -1.0 as its loss"),
        ({"loss": math.nan}, "sent nan as its loss"),
        ({"loss": 1e308}, r"sent 1e\+308 as its loss, not a number from 0 to 1e\+09"),
        ({"tokens": -1}, "sent -1 as its tokens"),
        ({"tokens": 0}, "sent 0 as its tokens, not a whole number from 1 to 1024"),
        ({"tokens": 1025}, "sent 1025 as its tokens, not a whole number from 1 to 1024"),
        ({"num-examples": 10**15}, "sent 1000000000000000 as its number of examples, not 8"),
        ({"sample-nats": math.inf}, "sent inf as its sample-nats"),
        ({"sample-nats": 1e100}, r"sent 1e\+100 as its sample-nats, not a number from 0 to 3e\+09"),
        ({"sample-tokens": 5}, "sent 5 as its sample-tokens, not a whole number from 0 to 4"),
        ({"router-loss": 1e300}, r"sent 1e\+300 as its router-loss"),
        ({"sample-tokens": None}, "sent nothing as its sample-tokens"),
        ({"peak-memory": math.inf}, "sent inf as its peak-memory"),
        ({"seconds": math.inf}, "sent inf as its seconds"),
        ({"sample-seconds": None}, "sent nothing as its sample-seconds"),
        ({"router-loss": [0.0]}, "sent a list as its router-loss"),
        ({"norm_bit": 2}, "sent 2 as its bit of clipping, not a whole number from 0 to 1"),
        ({"norm_bit": math.nan}, "sent nan as its bit of clipping"),
    ],
    ids=str,
)
def test_what_a_client_says_of_itself_is_not_believed(metrics: dict[str, object], words: str) -> None:
    assert read(told(tokens=1024)).tokens == 1024
    with pytest.raises(RefusedUpdate, match=rf"^client 3 \(ann\) {words}"):
        read(told(**metrics), routers="router-loss" in metrics)


def test_a_reply_without_readable_tensors_is_refused() -> None:
    with pytest.raises(RefusedUpdate, match="sent no arrays"):
        read(replace(told(), tensors={}))
    malformed = replace(told(), tensors={}, malformed="l.lora_A.weight is no array (ValueError)")
    with pytest.raises(RefusedUpdate, match=r"sent what cannot be used: l.lora_A.weight is no array"):
        read(malformed)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"num-examples": 0}, "measured 0 tokens"),
        ({"num-examples": 21}, "sent 21 as its number of tokens, not a whole number from 0 to 20"),
        ({"num-examples": 10**15, "nats": 0.0}, "sent 1000000000000000 as its number of tokens"),
        ({"nats": 1e300}, r"sent 1e\+300 as its nats, not a number from 0 to 5e\+09"),
        ({"sample-tokens": 5}, "sent 5 as its sample-tokens"),
        ({"num-examples": 1, "right": 2}, "measured 1 tokens, 2 of them predicted rightly"),
        ({"nats": math.nan}, "sent nan as its nats"),
        ({"nats": -1.0}, "sent -1.0 as its nats"),
        ({"client": 1}, "says that it is client 1"),
        ({"sample-tokens": 0.5}, "sent 0.5 as its sample-tokens"),
        ({"peak-memory": None}, "sent nothing as its peak-memory"),
        ({"seconds": -1.0}, "sent -1.0 as its seconds"),
    ],
    ids=str,
)
def test_a_measurement_that_cannot_be_is_refused(metrics: dict[str, object], words: str) -> None:
    reply = measured(2, Score(12.5, 5), Score(4.5, 2), 0)
    with pytest.raises(RefusedUpdate, match=f"^ann {words}"):
        replies.to_score(with_metrics(reply, metrics), "ann", work())


def test_no_strategy_sees_metrics_that_others_do_not_send() -> None:
    """Flower's own refuse to aggregate replies of different names: one client would end the run of all."""
    kept = replies.without_tensors(told(**{"a name of its own": 1.0, "router-loss": 0.5}))
    plain = replies.without_tensors(told())
    assert kept.metrics == plain.metrics and kept.tensors == plain.tensors == {}
    assert tuple(plain.metrics) == replies.KEPT_METRICS
    assert kept.nbytes == told().nbytes  # what it cost stays known


NUMBERS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.floats(), max_size=3)
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from([*replies.KEPT_METRICS, "router-loss", "nats", "right", "metric.m"]), NUMBERS))
def test_whatever_numbers_a_client_reports_they_are_usable_or_refused(metrics: dict[str, object]) -> None:
    try:
        update = read(told(**metrics), routers=True)
        assert math.isfinite(update.loss) and update.examples == 8 and 0 < update.tokens <= 1024
    except RefusedUpdate as refused:
        assert str(refused).startswith("client 3 (ann) ") and len(str(refused)) < 300
    reply = with_metrics(measured(2, Score(12.5, 5, 4, {"m": (1.0, 2.0)}), Score(4.5, 2), 7), metrics)
    try:
        score = replies.to_score(reply, "client 2 (bob)", work(), ["m"])
        assert math.isfinite(score.loss) and 0 < score.tokens <= 20 and 0 <= score.accuracy <= 1
        assert all(mean is None or math.isfinite(mean) for mean in means(score.metrics).values())
    except RefusedUpdate as refused:
        assert str(refused).startswith("client 2 (bob) ") and len(str(refused)) < 300


def test_a_failure_is_one_line_and_only_the_engine_knows_who_is_lost_or_late() -> None:
    """A client that says so of itself would have the round of all played again."""
    for kind in (CLIENT_LOST, LATE, "", "no name", "x\ny"):
        assert replies.reported_failure(3, kind, "a\nb\x1b[2J") == Failure(3, "Failed", "a b [2J")
    assert replies.reported_failure(3, TRUNK_LOST, "gone") == Failure(3, TRUNK_LOST, "gone")
    long = replies.reported_failure(3, "x" * 10**6, "y" * 10**6)
    assert (len(long.kind), len(long.reason)) == (100, 2000)
