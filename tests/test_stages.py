"""Gradient stages in a chain."""

from __future__ import annotations

import torch

from fedsplit.stages import GradientStage, LocalStep, Outcome, RoundStart, Rows, Stages

START = {"w": torch.tensor([1.0, 2.0])}


class Counting(GradientStage):
    """Adds the number that it was called with, keeps how often that was, and sends what it saw last."""

    def begin(self, start: RoundStart) -> None:
        self.calls = start.kept.get("calls", torch.tensor(0.0))

    def __call__(self, gradients, step):
        self.calls = self.calls + 1
        self.seen = gradients
        return {name: gradient + self.calls for name, gradient in gradients.items()}

    def end(self, parameters) -> Outcome:
        return Outcome(kept={"calls": self.calls, "w": parameters["w"]}, sent=self.seen)


def test_a_plain_stage_changes_nothing() -> None:
    stage = GradientStage()
    stage.begin(RoundStart(START))
    assert stage(START, LocalStep(START)) is START
    assert stage.end(START) == Outcome()


def test_stages_follow_each_other_and_their_outcomes_are_joined() -> None:
    class Double(GradientStage):
        def __call__(self, gradients, step):
            return {name: gradient * 2 for name, gradient in gradients.items()}

    chain = Stages(Double(), Counting())
    chain.begin(RoundStart(START, {"calls": torch.tensor(4.0)}))
    assert chain({"w": torch.tensor([1.0, 3.0])}, LocalStep(START))["w"].tolist() == [7.0, 11.0]
    outcome = chain.end(START)
    assert float(outcome.kept["calls"]) == 5.0
    assert outcome.sent["w"].tolist() == [2.0, 6.0]


def test_what_is_kept_does_not_change_with_the_parameters() -> None:
    parameters = {"w": torch.zeros(2)}
    chain = Stages(Counting())
    chain.begin(RoundStart(parameters))
    chain({"w": torch.zeros(2)}, LocalStep(parameters))
    kept = chain.end(parameters).kept["w"]
    parameters["w"] += 1
    assert kept.tolist() == [0.0, 0.0]


def test_a_chain_records_no_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(2))

    class Decay(GradientStage):
        def __call__(self, gradients, step):
            return {name: gradient + step.parameters[name] for name, gradient in gradients.items()}

    found = Stages(Decay())({"w": torch.zeros(2)}, LocalStep({"w": weight}))
    assert not found["w"].requires_grad


def test_terms_of_the_loss_are_summed_and_none_is_none() -> None:
    class Norm(GradientStage):
        def loss_term(self, rows):
            return lambda states: states.square().sum()

    ids = torch.ones(1, 2, dtype=torch.long)
    rows = Rows(ids, ids, None, states_at=lambda adapter: torch.zeros(1, 2, 3))
    assert Stages(Counting(), Stages()).loss_term(rows) is None
    states = torch.ones(1, 2, 3, requires_grad=True)
    term = Stages(Norm(), Counting(), Norm()).loss_term(rows)
    assert term is not None
    term(states).backward()
    assert term(states).item() == 12 and states.grad.unique().tolist() == [4]
