"""Flower's mods around training: what they see, what they change, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedsplit.errors import SettingError
from fedsplit.federation import messages, records
from fedsplit.federation.messages import ADAPTERS, Briefing, Reply, Train
from fedsplit.federation.mods import ModChain, ModFailed, load_mods, tried
from fedsplit.federation.replies import NORM_BIT
from fedsplit.scores import Score
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters, ClientUpdate, Task

GIVEN = {"b": torch.ones(40, 50), "a": torch.zeros(40, 50)}  # not in the order of the names
BY = {"a": 0.5, "b": -0.25}
NORM = math.sqrt(2000 * (0.5**2 + 0.25**2))


@pytest.fixture(autouse=True)
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of Flower's simulation engine, in which no run has a name."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


def asked(**settings: Any) -> Train:
    return Train(Briefing("{}", "t", "i", 1, "/nowhere"), client=3, round=2, task=Task(settings=settings))


def train(given: Mapping[str, Tensor]) -> Reply:
    """Adds a constant to each tensor. The reply has its tensors in another order."""
    ends = {name: given[name] + BY[name] for name in sorted(given)}
    return messages.trained(ClientUpdate(3, Adapters(ends, {}), examples=4), [*ends], Score(), peak_memory=0)


def behind(*mods: Callable[..., Any], **settings: Any) -> Reply:
    """Trains behind mods."""
    with records.named_run():
        message = Message(RecordDict(), dst_node_id=77, message_type="train")
    context = Context(1, 77, {"partition-id": 3}, RecordDict(), {})
    return ModChain(mods, message, context)(asked(**settings), GIVEN, train)


def change(reply: Reply) -> dict[str, Tensor]:
    return {name: tensor - GIVEN[name] for name, tensor in reply.tensors[ADAPTERS].items()}


def norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def test_without_a_change_of_theirs_the_reply_is_what_training_made() -> None:
    def passes(message: Message, context: Context, call_next: Any) -> Message:
        return call_next(message, context)

    reply = behind(passes)
    plain = train(GIVEN)
    assert reply.metrics == plain.metrics and reply.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(reply.tensors[ADAPTERS][name], plain.tensors[ADAPTERS][name]) for name in GIVEN)


def test_a_mod_sees_the_start_the_settings_and_the_node() -> None:
    seen = {}

    def looks(message: Message, context: Context, call_next: Any) -> Message:
        seen["names"] = list(message.content.array_records[ADAPTERS])
        seen["settings"] = dict(message.content.config_records[records.CONFIG])
        seen["node"] = (message.metadata.dst_node_id, message.metadata.message_type, context.node_config)
        return call_next(message, context)

    behind(looks, clipping_norm=0.5, by=["a", "b"])
    assert seen["names"] == ["b", "a"]
    assert seen["settings"] == {"clipping_norm": 0.5, "by": ["a", "b"], "server-round": 2}
    assert seen["node"] == (77, "train", {"partition-id": 3})


def test_the_first_mod_is_the_outermost() -> None:
    order = []

    def named(name: str) -> Callable[..., Message]:
        def mod(message: Message, context: Context, call_next: Any) -> Message:
            order.append(name)
            return call_next(message, context)

        return mod

    behind(named("first"), named("second"))
    assert order == ["first", "second"]


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("bound", [0.1, 5.0])
def test_an_update_is_clipped_to_the_norm_that_the_strategy_sends(mod: Any, bound: float) -> None:
    reply = behind(mod, clipping_norm=bound)
    assert norm(change(reply)) == pytest.approx(bound, rel=1e-4)
    scale = bound / NORM
    for name, tensor in change(reply).items():
        assert torch.allclose(tensor, torch.full_like(tensor, BY[name] * scale), rtol=1e-3)
    assert reply.metrics.get(NORM_BIT) == (1 if mod is adaptiveclipping_mod else None)


@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod], ids=["fixed", "adaptive"])
def test_a_norm_that_nothing_reaches_changes_nothing(mod: Any) -> None:
    reply = behind(mod, clipping_norm=1e6)
    plain = train(GIVEN)
    # Flower computes start + (end - start), which is the end to the bit where the difference is exact, as here.
    assert all(torch.equal(reply.tensors[ADAPTERS][name], plain.tensors[ADAPTERS][name]) for name in GIVEN)
    assert reply.metrics.get(NORM_BIT) == (0 if mod is adaptiveclipping_mod else None)


def test_local_noise_has_the_deviation_of_the_formula() -> None:
    np.random.seed(3)
    sensitivity, epsilon, delta = 0.5, 2.0, 1e-5
    clipped = change(behind(LocalDpMod(1.0, 0.0, epsilon, delta)))
    noisy = change(behind(LocalDpMod(1.0, sensitivity, epsilon, delta)))
    noise = torch.cat([(noisy[name] - clipped[name]).flatten() for name in GIVEN])
    expected = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert norm(clipped) == pytest.approx(1.0, rel=1e-4)
    assert float(noise.std()) == pytest.approx(expected, rel=0.05)  # 4,000 draws: one part in 90 is one deviation
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(4000)


def test_an_error_of_a_mod_is_the_reason() -> None:
    with pytest.raises(ModFailed, match="fixedclipping_mod requires the key 'clipping_norm'"):
        behind(fixedclipping_mod)

    def refuses(message: Message, context: Context, call_next: Any) -> Message:
        return Message(Error(0, "not today"), reply_to=message)

    with pytest.raises(ModFailed, match="not today"):
        behind(refuses)


def test_a_setting_that_no_mod_reads_is_refused() -> None:
    """A strategy that clips at the client would otherwise go on without clipping."""

    def counts(message: Message, context: Context, call_next: Any) -> Message:
        assert len(message.content.config_records[records.CONFIG]) == 2
        return call_next(message, context)

    with pytest.raises(ModFailed, match="no mod of --mods reads clipping_norm, which the strategy sends"):
        behind(counts, clipping_norm=1.0)


def test_mods_keep_state_in_the_context_of_the_node() -> None:
    def counts(message: Message, context: Context, call_next: Any) -> Message:
        context.state["seen"] = ArrayRecord([np.ones(2)])
        return call_next(message, context)

    with records.named_run():
        message = Message(RecordDict(), dst_node_id=77, message_type="train")
        context = Context(1, 77, {"partition-id": 3}, RecordDict(), {})
        ModChain([counts], message, context)(asked(), GIVEN, train)
    assert "seen" in context.state


def test_mods_are_loaded_by_name_with_their_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(message, context, call_next):\n    return call_next(message, context)\n")
    options = {"LocalDpMod.clipping_norm": 1.0, "LocalDpMod.sensitivity": 1.0, "LocalDpMod.epsilon": 2.0}
    names = ("fixedclipping_mod", f"{file}:mine", "LocalDpMod", "flwr.clientapp.mod:message_size_mod")
    mods = load_mods(Config(mods=names, mod_options={**options, "LocalDpMod.delta": 0.1}))
    assert [getattr(mod, "__name__", type(mod).__name__) for mod in mods] == [
        "fixedclipping_mod",
        "mine",
        "LocalDpMod",
        "message_size_mod",
    ]
    assert isinstance(mods[2], LocalDpMod) and mods[2].epsilon == 2.0


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("clipping",), {}, r"mods: clipping is not possible; allowed: LocalDpMod \| adaptiveclipping_mod"),
        (("fixedclipping_mod",), {"fixedclipping_mod.norm": 1}, "no option, since fixedclipping_mod is a function"),
        (("LocalDpMod",), {}, "mods: LocalDpMod is not possible; allowed: options that it takes"),
        ((), {"LocalDpMod.delta": 1}, "no option, since mods is empty"),
    ],
    ids=["name", "function", "missing", "empty"],
)
def test_what_is_no_mod_is_refused(names: tuple[str, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_mods(Config(mods=names, mod_options=options))


def test_an_error_in_a_trial_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(message, context, call_next):\n    return missing\n")
    with pytest.raises(ModFailed, match=r"NameError: name 'missing' is not defined \(mine\.py, line 2\)"):
        tried(Config(mods=(f"{file}:mine",)), asked(), GIVEN, train)
