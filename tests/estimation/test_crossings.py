"""Messages of a client, by hand; test_phase_clock.py compares them with runs."""

from __future__ import annotations

from fedsplit.estimation.crossings import RoundCrossings
from fedsplit.estimation.party_shapes import Parties
from fedsplit.estimation.step_traffic import StepTraffic
from fedsplit.settings.documents import build


def test_messages_of_a_step_with_clipping() -> None:
    settings = {"train.micro_batches": 2, "train.batch_size": 4, "train.clip": 1.0, "train.steps": 1, "eval.after": 4}
    parties = Parties(build(settings))
    counted = StepTraffic(parties)
    crossings = RoundCrossings(parties, counted)
    found = [(one.kind, one.micro, one.rows) for one in crossings.training(crossings.sizes)]
    pairs = [(kind, micro, 2) for micro in (0, 1) for kind in ("backward", "forward")]
    assert sorted(found) == sorted([*pairs, ("coefficient", 2, 0), ("evaluation", 0, 4)])
    up = sum(one.up for one in crossings.training(crossings.sizes) if one.kind != "evaluation")
    assert up == sum(nbytes for kind, nbytes in counted.step(4).items() if kind.endswith("_up"))


def test_an_evaluation_has_a_message_for_each_batch() -> None:
    parties = Parties(build({"eval.samples": 6, "train.batch_size": 4}))
    crossings = RoundCrossings(parties, StepTraffic(parties))
    assert [(one.step, one.rows) for one in crossings.evaluation(crossings.batches)] == [(0, 4), (1, 2)]
