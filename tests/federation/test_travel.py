"""The rule for what travels: both sides have the same one, and a client's start is what it was assigned."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.federation.adapter_ledger import AdapterLedger
from fedsplit.federation.client_service import assembled, to_keep
from fedsplit.federation.messages import Briefing, Train
from fedsplit.federation.travel import TravelRule, draw, is_drawn, is_held, stays
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings, TrunkSettings
from fedsplit.state.client_store import ClientState
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Layer, Task, Traits, fresh_factor

RANK = 3


def part(layer: str) -> Adapters:
    """Returns a layer's factors, and a tensor that is no factor, as a head that trains whole has one."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(RANK, 4, generator=generator),
        f"{layer}.lora_B.weight": torch.zeros(5, RANK),
        f"{layer}.bias": torch.randn(5, generator=generator),
    }
    return Adapters(tensors, {layer: Layer(2.0, False)})


PARTS = {"bottom": part("b"), "trunk": part("t"), "top": part("p")}
ENDS = PARTS["bottom"] | PARTS["top"]
BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")


def client_rule(config: Config, traits: Traits) -> TravelRule:
    """Builds the rule as a client does: from its parts, the settings and the briefing's letters."""
    letters = "".join(sorted(traits.personal))
    return TravelRule.of({"bottom": PARTS["bottom"], "top": PARTS["top"]}, config.share, letters)


def changed(tensors: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: tensor + by for name, tensor in tensors.items()}


class Played:
    """One client and its server over some rounds: what each remembers, with nothing between them but requests."""

    def __init__(self, config: Config, traits: Traits, folder: Path) -> None:
        self.config, self.traits, self.folder = config, traits, folder
        self.ledger = self.new_ledger()
        self.rule = client_rule(config, traits)
        self.disk: dict[int, ClientState] = {0: ClientState()}
        self.own: dict[str, Tensor] = {}

    def new_ledger(self) -> AdapterLedger:
        return AdapterLedger(self.config, self.traits, PARTS, self.folder / "clients", self.folder / "folds")

    def resume(self, round: int) -> None:
        """Starts the server again from its checkpoint: it does not know any more what clients hold."""
        facts, groups = self.ledger.snapshot()
        self.ledger = self.new_ledger()
        self.ledger.restore(round, facts, groups)

    def play(self, round: int, assignment: Assignment, is_accepted: bool) -> None:
        accepted = self.ledger.accepted.get(0, 0)
        rank = assignment.adapters.largest_rank or RANK
        sent = self.ledger.lacking(0, assignment)
        assert sent.keys() <= self.rule.crossing
        request = Train(
            BRIEFING, 0, round, accepted=accepted, tensors=sent, task=assignment.task, drawn=assignment.drawn, rank=rank
        )

        kept = self.disk[accepted]
        start = ENDS.with_rank(rank)
        found = assembled(start, request, kept)
        assert found.keys() == ENDS.tensors.keys()
        for name, tensor in self.ledger.given(assignment).tensors.items():
            assert torch.equal(found[name], tensor), f"{name} is not as it was assigned"
        for name in self.rule.personal:
            fresh = {**start.tensors, **draw(start, assignment.drawn)}  # as long as the client has none of its own
            expected = self.own.get(name, fresh[name])
            assert torch.equal(found[name], expected), f"{name} is not the client's own"

        trained = {name: t + round if assignment.task.teaches(name) else t for name, t in found.items()}
        update = ClientUpdate(0, ENDS.with_tensors(trained), 1)
        untrained = self.rule.untrained(found, assignment.task)
        self.disk[round] = to_keep(start, found, update, untrained, self.rule.personal, kept.control, {})
        if is_accepted:
            self.ledger.accept(0, round, assignment)
            self.own = {name: trained[name] for name in self.rule.personal}


ROUND = st.fixed_dictionaries(
    {
        "moved": st.sampled_from([0.0, 0.0, 1.0, 2.0]),  # often nothing has changed, so that nothing is sent
        "trains": st.sampled_from(["AB", "A", "B"]),
        "drawn": st.none() | st.integers(0, 3),
        "accepted": st.booleans(),
        "resumes": st.booleans(),
    }
)


@settings(max_examples=40)
@given(
    share=st.sets(st.sampled_from(["bottom", "trunk", "top"]), min_size=1),
    personal=st.sampled_from(["", "A", "B", "AB"]),
    schedule=st.sampled_from(["shared", "copies"]),
    rank=st.integers(1, RANK),
    rounds=st.lists(ROUND, min_size=1, max_size=4),
)
def test_a_clients_start_is_what_it_was_assigned(
    share: set[str], personal: str, schedule: str, rank: int, rounds: list[dict[str, object]]
) -> None:
    """Drawn, held, sent or its own: over rounds that count or not, with factors that rest, and after a resume.

    A strategy with personal factors gives every client the same rank, as `check_strategy` sees to.
    """
    traits = Traits(personal=frozenset(personal))
    config = Config(lora=LoraSettings(rank=(RANK,)), trunk=TrunkSettings(schedule=schedule))
    config = replace(config, share=tuple(name for name in PARTS if name in share))
    with tempfile.TemporaryDirectory() as folder:
        played = Played(config, traits, Path(folder))
        assert played.rule == played.ledger.rule
        for number, how in enumerate(rounds, start=1):
            start = played.ledger.start
            if not personal and set(PARTS) == share:
                start = start.with_rank(rank)
            adapters = start.with_tensors(changed(dict(start.tensors), float(str(how["moved"]))))
            drawn = how["drawn"] if isinstance(how["drawn"], int) and not personal else None
            adapters = adapters.with_tensors({**adapters.tensors, **draw(adapters, drawn)})
            task = Task(trains=frozenset(str(how["trains"])))
            played.play(number, Assignment(adapters, task, drawn), bool(how["accepted"]))
            if how["resumes"]:
                played.resume(number)


def test_parts_and_factors_decide_what_crosses() -> None:
    parts = {"bottom": PARTS["bottom"], "top": PARTS["top"]}
    everything = set(ENDS.tensors)
    assert TravelRule.of(parts, ("bottom", "trunk", "top"), "") == TravelRule(frozenset(), frozenset(everything))
    rule = TravelRule.of(parts, ("bottom", "trunk"), "B")
    assert rule.crossing == {"b.lora_A.weight", "b.bias"}
    assert rule.personal == everything - rule.crossing
    assert rule.crosses(dict(PARTS["trunk"].tensors)) == {}  # the trunk's adapters do not live at clients
    task = Task(trains=frozenset("B"))
    assert rule.returned(everything, task) == {"b.bias"}
    assert rule.untrained(everything, task) == {"b.lora_A.weight"}


def test_a_tensor_that_is_no_factor_trains_always_and_is_never_drawn() -> None:
    nothing = Task(trains=frozenset())
    assert nothing.teaches("b.bias") and not nothing.teaches("b.lora_A.weight")
    assert not stays("b.bias", "AB") and stays("b.lora_B.weight", "B") and not stays("b.lora_A.weight", "B")
    assert is_drawn("b.lora_A.weight", 0) and not is_drawn("b.lora_A.weight", None) and not is_drawn("b.bias", 0)


def test_a_draw_is_every_a_from_the_seed_and_every_b_zero() -> None:
    moved = ENDS.with_tensors(changed(dict(ENDS.tensors), 1.0))
    drawn = draw(moved, 7)
    assert drawn.keys() == {name for name in ENDS.tensors if "lora" in name}
    assert torch.equal(drawn["b.lora_A.weight"], fresh_factor("b.lora_A.weight", (RANK, 4), 7))
    assert torch.equal(drawn["b.lora_B.weight"], torch.zeros(5, RANK))
    assert draw(moved, None) == {}


def test_equal_means_to_the_bit_and_of_the_same_shape() -> None:
    tensor = torch.ones(2, 3)
    assert is_held(tensor, tensor.clone())
    assert not is_held(tensor, tensor + 1e-7)
    assert not is_held(tensor, torch.ones(1, 3))
