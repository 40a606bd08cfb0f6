"""A client's side of a federation: a request in, a client's work, an answer out; no engine is known here.

All clients of a process share one copy of the frozen base.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.adaptation import folding, lora
from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.client.client import Client
from fedsplit.client.heldout import held_out_batches, sample, through_split
from fedsplit.client.link import Link, TrunkLike
from fedsplit.client.measures import load_measures
from fedsplit.corpora.shards import Shard, read_shard
from fedsplit.durable import NotWritten
from fedsplit.federation import messages, replies
from fedsplit.federation.messages import Answer, Briefing, Evaluate, Failure, Introduce, Reply, Request, Train
from fedsplit.federation.travel import TravelRule, draw
from fedsplit.lowrank import LowRank
from fedsplit.metrics.metric import Metric
from fedsplit.model.families import read_facts
from fedsplit.model.parts import Bottom, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.model.sources import config_folder
from fedsplit.objectives.objective import Objective
from fedsplit.objects import NOTHING, Objects
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.optimization.terms import moved
from fedsplit.scores import pooled
from fedsplit.settings.config import Config
from fedsplit.settings.documents import from_document
from fedsplit.stages import RoundStart, StageMaker
from fedsplit.state.client_store import ClientState, ClientStore, LostState
from fedsplit.state.fold_log import FOLDS, FoldLog
from fedsplit.trunk.memory import peak_memory
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, ClientUpdate
from fedsplit.wire.codecs import copy_of_state, make_codec

Connect = Callable[[str], TrunkLike]
"""Finds a trunk by its name."""


@dataclass
class _Site:
    """Objects that the clients of one process have in common.

    Attributes:
        config: Configuration of the run.
        bottom: First blocks, with adapters.
        top: Last blocks and the head, with adapters.
        trunk: Way to the trunk.
        start: Adapters of bottom and top that training starts from, at the largest rank.
        rule: Which of them cross, and which are personal.
        router_aux_loss: Coefficient of the routers' loss; 0 where there is none.
        objective: Loss that training minimises; None for cross-entropy.
        metrics: Metrics of the held-out text, by name.
        make_stage: Makes the strategy's own gradient stage; None where the strategy has none.
        folded: Last round whose changes of base weights have been made here.
        folds: Number of rounds whose changes have been made here.
        unwritten: Changes by round that could not be written to the log yet.
        discarded: Number of discarded attempts that the server had counted as the base weights were loaded.
    """

    config: Config
    bottom: Bottom
    top: Top
    trunk: TrunkLike
    start: Adapters
    rule: TravelRule
    router_aux_loss: float = 0.0
    objective: Objective | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    make_stage: StageMaker | None = None
    folded: int = 0
    folds: int = 0
    unwritten: dict[int, Mapping[str, LowRank]] = field(default_factory=dict)
    discarded: int = 0

    def client(self, request: Request, shard: Shard) -> Client:
        """Returns the client that a request is for, with its data and its way to the trunk."""
        config, briefing = self.config, request.briefing
        link = Link(
            self.trunk,
            make_codec(config.wire.codec),
            SCHEDULES[config.trunk.schedule],
            briefing.trunk,
            briefing.incarnation,
            attempt=request.attempt,  # the trunk refuses steps that it has served in an attempt before
            asks=bool(config.trunk.memory),
        )
        routers = RouterLoss(self.router_aux_loss)
        return Client(
            request.client,
            shard,
            self.bottom,
            self.top,
            link,
            config.train,
            config.seed,
            config.rounds,
            routers,
            self.objective,
        )

    def personalised(self, given: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the adapter with which a client measures its held-out text.

        Args:
            given: Adapter that all clients have.
            kept: State of the client's own gradient stage.
        """
        return given if self.make_stage is None else self.make_stage().personalise(RoundStart(given, kept))

    def catch_up(self, request: Request) -> None:
        """Makes the changes of base weights that were not made here yet, in the order of the rounds.

        Raises:
            LostState: The log lacks changes, without which the weights would be others than at the other clients.
        """
        log = FoldLog(Path(request.briefing.store) / FOLDS)
        if isinstance(request, Evaluate) and request.changes:
            self.unwritten[request.folded] = request.changes
        self._write_down(log)
        rounds = range(self.folded + 1, request.folded + 1)
        missing = [self.unwritten.get(round) or log.read(round) for round in rounds]
        folds = self.folds + sum(map(bool, missing))
        if rounds and folds < request.folds:
            reason = f"only {folds} of {request.folds} rounds that changed base weights until round {request.folded}"
            raise LostState(f"{request.briefing.store}/folds has {reason}")
        for changes in missing:
            folding.fold(self.bottom, changes)
            folding.fold(self.top, changes)
        self.folds = folds
        self.folded = max(self.folded, request.folded)

    def _write_down(self, log: FoldLog) -> None:
        """Writes changes of base weights to the log, from which other processes read them.

        On a full disk they wait here for the next request. A process that lacks them fails, and says so.
        """
        with contextlib.suppress(NotWritten):
            for round in sorted(self.unwritten):
                log.append(round, self.unwritten[round])
                del self.unwritten[round]


@dataclass(frozen=True)
class _Visit:
    """Everything that one request needs: the site, the client, and the client's disk."""

    site: _Site
    client: Client
    store: ClientStore


class ClientService:
    """Answers the requests of a server for all clients of one process.

    Bottom and top are loaded with the first request of a run, and nothing of the trunk.
    """

    def __init__(self, connect: Connect, objects: Objects = NOTHING) -> None:
        """Loads nothing yet.

        Args:
            connect: Finds the trunk by the name that requests carry.
            objects: Strategy, objective and metrics, where they are not to be loaded by their names.
        """
        self._connect = connect
        self._objects = objects
        self._key: object = None
        self._site: _Site | None = None

    def answer(self, request: Request) -> Answer:
        """Does what a request asks; an error becomes a `Failure`, since it is the server's to judge."""
        try:
            return self.serve(request)
        except (Exception, SystemExit) as error:  # a client may fail in any way, and the others go on
            logging.getLogger(__name__).debug("client %d failed", request.client, exc_info=True)  # for --debug
            return _failure(request.client, error)

    def serve(self, request: Request) -> Reply:
        """Does what a request asks.

        Raises:
            TrunkLost: The trunk is gone.
            LostState: The client's disk lacks a round.
            Diverged: Training has come to values that are not finite.
        """
        visit = self.visit(request)
        if isinstance(request, Train):
            return _train(visit, request)
        if isinstance(request, Evaluate):
            return _evaluate(visit, request)
        assert isinstance(request, Introduce)
        return _introduce(visit, request)

    def visit(self, request: Request) -> _Visit:
        """Brings the site to the state that a request is about, and finds the client."""
        briefing = request.briefing
        root = Path(briefing.store)
        shard = read_shard(root, request.client)
        # Changes of base weights cannot be undone: after a discarded attempt the weights are loaded anew.
        key = (briefing.run, briefing.trunk, briefing.threads, shard.classes, request.discarded)
        if self._site is None or self._key != key:
            self._site = None  # the old weights go before the new ones come
            self._site = _load(briefing, shard.classes, self._connect, self._objects)
            self._key = key
        site = self._site
        site.catch_up(request)
        client = site.client(request, shard)
        return _Visit(site, client, ClientStore(root, request.client))


def _failure(client: int, error: BaseException) -> Failure:
    """Returns an error as a failure; an error of our own says enough without the name of its class."""
    kind = type(error).__name__
    reason = " ".join(str(error).split())
    is_ours = type(error).__module__.partition(".")[0] == "fedsplit"
    return Failure(client, kind, reason if is_ours and reason else f"{kind}: {reason}")


def _load(briefing: Briefing, classes: int, connect: Connect, objects: Objects) -> _Site:
    """Loads bottom and top with their adapters."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(briefing.threads)
    config = from_document(json.loads(briefing.run))
    bottom, top = bare_parts(config, ["bottom", "top"], classes)
    for part in (bottom, top):
        adapt(part, config)
    starts = {"bottom": lora.read(bottom), "top": lora.read(top)}
    objective, metrics = load_measures(config, objects)
    return _Site(
        config,
        bottom,
        top,
        connect(briefing.trunk),
        start=lora.read(bottom, top),
        rule=TravelRule.of(starts, config.share, briefing.personal),
        router_aux_loss=read_facts(config_folder(config.model)).coefficient(config.router_aux_loss),
        objective=objective,
        metrics=metrics,
        make_stage=stage_maker(config, objects.strategy) if briefing.stage else None,
    )


def _introduce(visit: _Visit, request: Introduce) -> Reply:
    """Tells the client's name; the first client, or one that is asked to, also tells what training starts from."""
    site, client = visit.site, visit.client
    parameters = {"bottom": lora.count(site.bottom), "top": lora.count(site.top, elsewhere=[site.bottom])}
    if not SCHEDULES[site.config.trunk.schedule].returns_gradient:
        parameters["bottom"]["trainable"] = 0
    start: dict[str, Adapters] = {}
    if client.number == 0 or request.wants_start:
        start = {str(part.kind): lora.read(part) for part in (site.bottom, site.top)}
    return replies.introduce(replies.Introduction(client.number, client.shard.name, parameters, start))


def _train(visit: _Visit, request: Train) -> Reply:
    """Trains for a round, and measures what the client's own steps have made of the model."""
    site, client, store = visit.site, visit.client, visit.store
    config, task, rule = site.config, request.task, site.rule

    kept = store.load(request.accepted)
    start = site.start.with_rank(request.rank)
    given = assembled(start, request, kept)
    moments = kept.moments if request.drawn is None else {}  # a new draw has no history
    stage = None if site.make_stage is None else site.make_stage()
    client.link.codec.restore({client.number: kept.codec})
    update = client.train(given, request.round, task, kept.control, moments, stage, kept.stage)
    codec = copy_of_state(client.link.codec.state().get(client.number, {}))

    # Under --deterministic the others wait until this client has measured, or its score would depend on their steps.
    if not config.deterministic:
        client.link.leave(client.number)
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    chosen = sample(batches, config.eval.after, config.train.batch_size)
    measured_with = site.personalised(update.adapters.tensors, update.kept)
    own = pooled(through_split(client, measured_with, request.round, chosen))
    if config.deterministic:
        client.link.leave(client.number)

    untrained = rule.untrained(given, task)
    control = moved(kept.control, update.control) if task.control is not None else {}
    state = to_keep(start, given, update, untrained, rule.personal, control, codec)
    store.save(request.round, state, request.accepted, request.kept)
    returned = rule.returned(update.adapters.tensors, task)
    return messages.trained(update, returned, own, peak_memory())


def assembled(start: Adapters, request: Train, kept: ClientState) -> dict[str, Tensor]:
    """Returns the adapters that a client starts from: held, drawn, sent and its own, each in place of those before.

    Args:
        start: Adapters that the run started from, at the client's rank.
        request: Request to train.
        kept: Tensors on the client's disk since the last round that the server accepted.
    """
    return {**start.tensors, **kept.held, **draw(start, request.drawn), **request.tensors, **kept.personal}


def to_keep(
    start: Adapters,
    given: Mapping[str, Tensor],
    update: ClientUpdate,
    untrained: set[str],
    personal: frozenset[str],
    control: Mapping[str, Tensor],
    codec: Mapping[str, Tensor],
) -> ClientState:
    """Returns what a client writes to its disk at the end of a round."""
    held = {name: given[name] for name in untrained if not torch.equal(given[name], start.tensors[name])}
    own = {name: update.adapters.tensors[name] for name in sorted(personal)}
    return ClientState(held, own, control, update.moments, update.kept, codec)


def _evaluate(visit: _Visit, request: Evaluate) -> Reply:
    """Measures the loss on the client's held-out text, and on the sample that is measured after its own steps."""
    site, client, config = visit.site, visit.client, visit.site.config
    kept = visit.store.load(request.accepted)
    given = {**site.start.tensors, **request.tensors, **kept.personal}
    given = {**given, **site.personalised(given, kept.stage)}
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    scores = through_split(client, given, request.round, batches, site.metrics)
    chosen = [number for number, _ in sample(batches, config.eval.after, config.train.batch_size)]
    part = pooled(scores[number] for number in chosen)
    return messages.measured(client.number, pooled(scores), part, peak_memory())
