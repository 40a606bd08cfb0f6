"""One round of a strategy on invented updates, so that its mistakes show before any process is started."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedsplit.adaptation.adapting import outline
from fedsplit.adaptation.methods import method_of
from fedsplit.allowed import SettingError
from fedsplit.config import Config
from fedsplit.federation import records
from fedsplit.federation.aggregation import FederationFailed, Member, make_aggregation
from fedsplit.federation.strategy import FlowerLike, aggregated_parts
from fedsplit.optimization.own_stage import OwnStage, StageFailed
from fedsplit.scores import Score
from fedsplit.seeds import derive_seed
from fedsplit.stages import LocalStep, RoundStart
from fedsplit.updates import Adapters, Assignment, ClientUpdate, RefusedUpdate, factor_of

_EXAMPLES, _TOKENS = 4, 64
"""What each client is said to have trained on."""


class _Nodes:
    """A grid that has nodes and carries nothing."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._count + 1)


def rehearse(make: Callable[[], Any], config: Config) -> None:
    """Plays one round of a strategy: every client answers with what it was given and some noise.

    The names, shapes and layers are those of the run. Virtual tokens, and adapters that begin with a decomposition of
    the base weights, are passed over: their shapes are known only when the weights are loaded.

    Args:
        make: Makes a strategy of ours or of Flower's. The run needs another one, since a strategy may remember.
        config: The run's.

    Raises:
        SettingError: The strategy raises an error, ends the program, waits for nodes that will never be there, returns
            what cannot be used, or asks clients for what they cannot do.
    """
    if config.prompt.kind != "off" or method_of(config.lora).residual:
        return
    with _undisturbed(config.seed):
        start = _invented(outline(config, aggregated_parts(config)))
        try:
            _play(make(), config, start)
        except (FederationFailed, RefusedUpdate, StageFailed) as error:
            words = f"a strategy that can play a round ({error}, on a trial before the first one)"
            raise SettingError("strategy", config.strategy, words) from error


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Leaves all random numbers, Flower's log and the run that messages name as they were."""
    log = logging.getLogger("flwr")
    level, drawn, of_numpy = log.level, random.getstate(), np.random.get_state()
    # Flower's engine names the run later; until then its properties can be set and not read.
    names = {name: getattr(TaskIdentity, name, None) for name in ("_run_id", "_node_id", "_task_id")}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "rehearsal"))
            log.setLevel(logging.CRITICAL + 1)
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
            yield
    finally:
        log.setLevel(level)
        random.setstate(drawn)
        np.random.set_state(of_numpy)
        for name, value in names.items():
            setattr(TaskIdentity, name, value)


def _invented(shapes: Adapters) -> Adapters:
    """Adapters with values such as training starts from: factors B are zero."""
    zero = [name for name in shapes.tensors if factor_of(name) == "B"]
    values = {name: _noise(tensor) for name, tensor in shapes.tensors.items()}
    return shapes.with_tensors(values | {name: torch.zeros_like(values[name]) for name in zero})


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape) / 100


def _play(strategy: Any, config: Config, start: Adapters) -> None:
    """One round, from the strategy's assignments to what it makes of the answers."""
    members = [Member(node, f"client {node - 1}") for node in range(1, config.clients + 1)]
    aggregation = make_aggregation(strategy, config, members)
    assigned = aggregation.assign(1, start, cast(Grid, _Nodes(config.clients)))
    if not assigned:
        return
    personal = aggregation.traits.personal
    updates = [_update(client, assigned[client], personal) for client in sorted(assigned)]
    if callable(getattr(strategy, "stage", None)):
        _try_stage(OwnStage(strategy, config.strategy), updates[0])
    replies = [_reply(update, members[update.client]) for update in updates] if isinstance(strategy, FlowerLike) else []
    aggregation.aggregate(1, start, replies, updates)


def _try_stage(stage: OwnStage, update: ClientUpdate) -> None:
    """Has a strategy's own stage take one step of a round, and measure after it.

    Args:
        stage: The stage.
        update: A client's answer, for names and shapes.

    Raises:
        StageFailed: The stage raises an error, or returns an unusable value.
    """
    start, parameters = update.given or update.adapters, update.adapters.tensors
    gradients = {name: _noise(tensor) for name, tensor in parameters.items()}
    stage.begin(RoundStart(start.tensors))
    stage(gradients, LocalStep(parameters, gradient_at=lambda adapter: gradients))
    outcome = stage.end(parameters)
    stage.personalise(RoundStart(start.tensors, outcome.kept))


def _update(client: int, assignment: Assignment, personal: frozenset[str]) -> ClientUpdate:
    """A client's answer: what trained has changed a little."""
    task, whole = assignment.task, assignment.adapters
    given = whole.with_tensors({n: t for n, t in whole.tensors.items() if factor_of(n) not in personal})
    trained = {n: t + _noise(t) for n, t in given.tensors.items() if factor_of(n) in {*task.trains, None}}
    changes = {} if task.control is None else {name: _noise(tensor) for name, tensor in task.control.items()}
    return ClientUpdate(
        client=client,
        adapters=given.with_tensors({**given.tensors, **trained}),
        examples=_EXAMPLES,
        tokens=_TOKENS,
        loss=1.0,
        weight=float(_EXAMPLES),
        given=given,
        control=changes,
    )


def _reply(update: ClientUpdate, member: Member) -> Message:
    """The message that brings a client's answer to a strategy of Flower's."""
    question = records.message_to(member.node, "train", RecordDict())
    names = update.adapters.tensors.keys()
    content = records.from_update(replace(update, control={}), names, Score(), peak_memory=0)
    return Message(content, reply_to=question)
