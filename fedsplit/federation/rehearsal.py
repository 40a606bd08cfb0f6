"""A trial round of a strategy on invented updates, which finds mistakes before any process is started."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.adaptation.run_adapters import outline
from fedsplit.errors import SettingError
from fedsplit.federation import messages
from fedsplit.federation.aggregation import make_aggregation
from fedsplit.federation.clients import ClientNode, FederationFailed
from fedsplit.federation.messages import Briefing, Reply, Train
from fedsplit.federation.replies import without_tensors
from fedsplit.federation.strategy import aggregated_parts
from fedsplit.federation.travel import stays
from fedsplit.model.facts import read_facts
from fedsplit.model.sources import config_folder
from fedsplit.optimization.own_stage import OwnStage, StageFailed
from fedsplit.scores import Score
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.stages import LocalStep, RoundStart, Rows
from fedsplit.updates import Adapters, Assignment, ClientUpdate, RefusedUpdate, Task, factor_of

_EXAMPLES = 4
"""Training examples that each invented client reports."""

_TOKENS = 64
"""Tokens that each invented client reports."""

_BRIEFING = Briefing(run="{}", trunk="", incarnation="", threads=1, store="")
"""Briefing of an invented request, which nobody reads."""


@dataclass(frozen=True)
class InventedRoster:
    """Invented clients, without a grid."""

    nodes: list[ClientNode]
    grid: None = None


def rehearse(make: Callable[[], Any], config: Config) -> None:
    """Plays one round of a strategy. Every client answers with its assigned adapters and some noise.

    Adapters have the names, shapes and layers of the run.

    Args:
        make: Makes a strategy. The run must make a new one, since a strategy may remember the trial.
        config: Configuration of the run.

    Raises:
        SettingError: The strategy raises an error, ends the program, waits for nodes that never come, returns an
            unusable value, or sends clients a setting that they do not know; or a mod fails.
    """
    with undisturbed(config.seed):
        start = _invented(outline(config, aggregated_parts(config)))
        try:
            _play(make(), config, start)
        except (FederationFailed, RefusedUpdate, StageFailed) as error:
            allowed = f"a strategy that can play a round ({error}, on a trial before the first one)"
            raise SettingError("strategy", config.strategy, allowed) from error


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Restores the states of all random generators, and the level of Flower's log, at the end of the context."""
    log = logging.getLogger("flwr")
    level = log.level
    drawn = random.getstate()
    drawn_by_numpy = np.random.get_state()
    try:
        # No devices: the trial computes on the CPU alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "rehearsal"))
            log.setLevel(logging.CRITICAL + 1)  # nothing of the trial is logged
            yield
    finally:
        log.setLevel(level)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)


def _invented(shapes: Adapters) -> Adapters:
    """Returns adapters with initial values: factors B are zero, other tensors random."""
    tensors = {}
    for name, tensor in shapes.tensors.items():
        tensors[name] = torch.zeros(tensor.shape) if factor_of(name) == "B" else _noise(tensor)
    return shapes.with_tensors(tensors)


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape) / 100


def _play(strategy: Any, config: Config, start: Adapters) -> None:
    """Plays one round, from the assignments to the aggregate."""
    roster = InventedRoster([ClientNode(client + 1, f"client {client}") for client in range(config.clients)])
    aggregation = make_aggregation(strategy, config)
    assigned = aggregation.assign(1, start, roster)
    if not assigned:  # a strategy may begin with a round in which nobody trains
        return
    personal = aggregation.traits.personal
    updates = [invented_update(client, assigned[client], personal) for client in sorted(assigned)]
    if callable(getattr(strategy, "stage", None)):
        stage = OwnStage(strategy, config.strategy)
        facts = read_facts(config_folder(config.model))
        _try_stage(stage, updates[0], facts.width)
    tasks = {client: one.task for client, one in assigned.items()}
    # Mods come between the updates and the strategy, as in a run.
    updates, replies = _sent(config, updates, tasks)
    aggregation.aggregate(1, start, updates, replies)


def _sent(
    config: Config, updates: Sequence[ClientUpdate], tasks: Mapping[int, Task]
) -> tuple[list[ClientUpdate], list[Reply]]:
    """Returns invented updates and their replies, as the mods of the run leave them.

    Raises:
        SettingError: A mod refuses a message, raises an error, or leaves a setting of the strategy unread.
    """
    if not config.mods:
        return list(updates), [without_tensors(_trained(update, (), {})) for update in updates]

    from fedsplit.federation import mods  # imports Flower, which takes seconds

    sent = []
    replies = []
    for update in updates:
        assert update.given is not None
        names = [name for name in update.adapters.tensors if tasks[update.client].teaches(name)]
        given = {name: update.given.tensors[name] for name in names}
        request = Train(_BRIEFING, update.client, round=1, task=tasks[update.client])
        try:
            reply = mods.tried(config, request, given, partial(_trained, update, names))
        except mods.ModFailed as error:
            allowed = f"mods that can play a round ({error}, on a trial before the first one)"
            raise SettingError("mods", ",".join(config.mods), allowed) from error
        tensors = {**update.adapters.tensors, **reply.tensors[messages.ADAPTERS]}
        update.adapters.check_fits(tensors, "a mod of --mods")
        sent.append(replace(update, adapters=update.adapters.with_tensors(tensors)))
        replies.append(without_tensors(reply))
    return sent, replies


def _trained(update: ClientUpdate, names: Sequence[str], given: Mapping[str, Tensor]) -> Reply:
    """Returns the reply of an invented client, whatever it starts from."""
    return messages.trained(update, names, Score(), peak_memory=0)


def _try_stage(stage: OwnStage, update: ClientUpdate, width: int) -> None:
    """Plays one local step of a strategy's stage, and a measurement.

    Args:
        stage: The stage.
        update: A client's update, with the names and shapes of the tensors.
        width: Size of a hidden state.

    Raises:
        StageFailed: The stage raises an error, or returns an unusable value.
    """
    start = update.given or update.adapters
    parameters = update.adapters.tensors
    gradients = {name: _noise(tensor) for name, tensor in parameters.items()}
    ids = torch.ones(2, 4, dtype=torch.long)
    states = torch.randn(2, 4, width, requires_grad=True)
    stage.begin(RoundStart(start.tensors))
    rows = Rows(ids, ids, None, states_at=lambda adapter: torch.randn(states.shape))
    term = stage.loss_term(rows)
    if term is not None:
        term(states)
    stage(gradients, LocalStep(parameters, gradient_at=lambda adapter: gradients))
    outcome = stage.end(parameters)
    stage.personalise(RoundStart(start.tensors, outcome.kept))


def invented_update(client: int, assignment: Assignment, personal: frozenset[str]) -> ClientUpdate:
    """Returns an invented update, in which every trained tensor has changed a little."""
    task = assignment.task
    adapters = assignment.adapters
    shared = {name: tensor for name, tensor in adapters.tensors.items() if not stays(name, personal)}
    trained = {name: tensor + _noise(tensor) for name, tensor in shared.items() if task.teaches(name)}
    control = {name: _noise(tensor) for name, tensor in (task.control or {}).items()}
    given = adapters.with_tensors(shared)
    return ClientUpdate(
        client=client,
        adapters=given.with_tensors({**shared, **trained}),
        examples=_EXAMPLES,
        tokens=_TOKENS,
        loss=1.0,
        weight=float(_EXAMPLES),
        given=given,
        control=control,
    )
