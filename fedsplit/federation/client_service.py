"""Client side of a federation: a request comes in, the client does the work, and an answer goes out.

The module knows no engine. All clients of a process share one copy of the frozen base weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from fedsplit.federation import messages
from fedsplit.federation.adapter_codec import AdapterCodec
from fedsplit.federation.client_order import others_wait
from fedsplit.federation.introductions import Introduction, introduce
from fedsplit.federation.messages import (
    Answer,
    Briefing,
    Evaluate,
    Failure,
    Introduce,
    Reply,
    Request,
    Train,
    TrainFrom,
)
from fedsplit.federation.travel import TravelRule, draw
from fedsplit.lowrank import LowRank
from fedsplit.metrics.metric import Metric
from fedsplit.model.facts import read_facts
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
from fedsplit.wire.by_role import codec_of
from fedsplit.wire.codecs import copy_of_state

Connect = Callable[[str, Config], TrunkLike]
"""Returns the trunk with a name, for a run with some settings."""

Around = Callable[[Train, Mapping[str, Tensor], TrainFrom], Reply]
"""Code around the training of a client, such as Flower's mods (`fedsplit.federation.mods`).

Takes the request, the adapters that the client starts from as far as they are sent back, and the function that trains.
"""


@dataclass
class _Site:
    """Objects that all clients of one process share.

    Attributes:
        config: Configuration of the run.
        bottom: First blocks, with adapters.
        top: Last blocks and the head, with adapters.
        trunk: Way to the trunk.
        start: Adapters of bottom and top that training starts from, at the largest rank.
        rule: Names of the adapters that cross, and of the personal ones.
        router_aux_loss: Coefficient of the routers' loss; 0 for no such loss.
        objective: Loss that training minimises; None for cross-entropy.
        metrics: Metrics of the held-out text, by name.
        make_stage: Makes the gradient stage of the strategy; None for a strategy without one.
        folded: Last round whose changes of base weights this process has applied.
        folds: Number of rounds whose changes this process has applied.
        unwritten: Changes by round that are not in the log yet.
        discarded: Number of discarded attempts, as the server counted them when the base weights were loaded.
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
        """Returns the client of a request, with the client's data and a link to the trunk."""
        config, briefing = self.config, request.briefing
        link = Link(
            self.trunk,
            codec_of(config.wire, config.seed),
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

    def adapter_codec(self) -> AdapterCodec | None:
        """Returns a new codec of adapters; None if adapters cross as they are."""
        config = self.config
        if config.adapter.codec == "raw":
            return None
        return AdapterCodec(config.adapter.codec, config.seed, self.rule.crossing)

    def personalised(self, given: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the adapter for measurements of a client's held-out text.

        Args:
            given: Shared adapter.
            kept: State of the gradient stage at the client.
        """
        return given if self.make_stage is None else self.make_stage().personalise(RoundStart(given, kept))

    def catch_up(self, request: Request) -> None:
        """Applies changes of base weights that this process has not applied yet, in the order of the rounds.

        Raises:
            LostState: The log lacks changes. The weights would differ from the weights of other processes.
        """
        log = FoldLog(Path(request.briefing.store) / FOLDS)
        if isinstance(request, Evaluate) and request.changes:
            self.unwritten[request.folded] = request.changes
        self._write_down(log)
        rounds = range(self.folded + 1, request.folded + 1)
        # What a full disk did not take is in memory alone.
        missing = [self.unwritten.get(round) or log.read(round) for round in rounds]
        # A round without changes has no file. Only the number of all rounds with changes tells a lost file from none.
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
        """Writes changes of base weights to the log, from which other processes read the changes.

        If the disk is full, the changes stay in memory until the next request. A process that finds changes missing
        fails with an error.
        """
        with contextlib.suppress(NotWritten):
            for round in sorted(self.unwritten):
                log.append(round, self.unwritten[round])
                del self.unwritten[round]


@dataclass(frozen=True)
class _Visit:
    """Objects for one request: the site, the client, and the client's disk."""

    site: _Site
    client: Client
    store: ClientStore


class NotTrained(Exception):
    """A reply to a request to train is there, and the client has not trained."""


class ClientService:
    """Answers a server's requests to all clients of one process.

    The first request of a run loads bottom and top. The trunk's weights are never loaded.
    """

    def __init__(self, connect: Connect, objects: Objects = NOTHING) -> None:
        """Loads nothing yet.

        Args:
            connect: Returns the trunk with the name in a request.
            objects: Strategy, objective and metrics in place of names in the settings.
        """
        self._connect = connect
        self._objects = objects
        self._key: object = None
        self._site: _Site | None = None

    def answer(self, request: Request, around: Around | None = None) -> Answer:
        """Serves a request. An error becomes a `Failure`, so that the server decides how the run goes on."""
        try:
            return self.serve(request, around)
        except (Exception, SystemExit) as error:  # a client may fail in any way, and the others go on
            logging.getLogger(__name__).debug("client %d failed", request.client, exc_info=True)  # for --debug
            return failure_of(request.client, error)

    def serve(self, request: Request, around: Around | None = None) -> Reply:
        """Serves a request.

        Args:
            request: The request.
            around: Code around the training; None for none.

        Raises:
            TrunkLost: The trunk is gone.
            LostState: The client's disk lacks a round.
            Diverged: Training has produced a value that is not finite.
        """
        visit = self.visit(request)
        if isinstance(request, Train):
            return _train(visit, request, around)
        if isinstance(request, Evaluate):
            return _evaluate(visit, request)
        assert isinstance(request, Introduce)
        return _introduce(visit, request)

    def visit(self, request: Request) -> _Visit:
        """Brings the base weights to the state of a request, and returns the client of the request."""
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


def failure_of(client: int, error: BaseException) -> Failure:
    """Returns an error as a failure. The class of an error is named, except for fedsplit's errors."""
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
        connect(briefing.trunk, config),
        start=lora.read(bottom, top),
        rule=TravelRule.of(starts, config.share, briefing.personal),
        router_aux_loss=read_facts(config_folder(config.model)).coefficient(config.router_aux_loss),
        objective=objective,
        metrics=metrics,
        make_stage=stage_maker(config, objects.strategy) if briefing.stage else None,
    )


def _introduce(visit: _Visit, request: Introduce) -> Reply:
    """Returns a client's introduction, with the initial adapters if the server needs them from this client."""
    site = visit.site
    client = visit.client
    parameters = {
        "bottom": lora.count(site.bottom),
        "top": lora.count(site.top, elsewhere=[site.bottom]),  # a tied head counts once, at the bottom
    }
    if not SCHEDULES[site.config.trunk.schedule].returns_gradient:
        # Without a gradient from the trunk, nothing trains the bottom.
        parameters["bottom"]["trainable"] = 0
    start: dict[str, Adapters] = {}
    if client.number == 0 or request.wants_start:
        parts = (site.bottom, site.top)
        start = {str(part.kind): lora.read(part) for part in parts}
    return introduce(Introduction(client.number, client.shard.name, parameters, start, client.shard.size))


@dataclass(frozen=True)
class _Trained:
    """Outcome of local training.

    Attributes:
        update: The update.
        reply: The reply before mods and codec.
        codec: State of the codec of hidden states and gradients.
    """

    update: ClientUpdate
    reply: Reply
    codec: dict[str, Tensor]


def _train(visit: _Visit, request: Train, around: Around | None = None) -> Reply:
    """Trains for a round, and then measures a sample of the client's held-out text."""
    site = visit.site
    client = visit.client
    store = visit.store
    task = request.task
    rule = site.rule

    kept = store.load(request.accepted)
    adapter_codec = site.adapter_codec()
    if adapter_codec is not None:
        adapter_codec.restore(client.number, kept.codec)
        decoded = adapter_codec.decode_values(request.tensors, client.number, request.round)
        request = replace(request, tensors=decoded)
    start = site.start.with_rank(request.rank)
    given = assembled(start, request, kept)
    returned = sorted(rule.returned(given, task))

    trained: list[_Trained] = []

    def train(shown: Mapping[str, Tensor]) -> Reply:
        trained.append(_train_locally(visit, request, {**given, **shown}, kept, returned))
        return trained[-1].reply

    shown = {name: given[name] for name in returned}
    reply = train(shown) if around is None else around(request, shown, train)
    if not trained:
        raise NotTrained("the client's mods have sent a reply without training")

    # A mod may train more than once. The last training counts.
    update = trained[-1].update
    codec = trained[-1].codec
    untrained = rule.untrained(given, task)
    control = moved(kept.control, update.control) if task.control is not None else {}
    if adapter_codec is not None:
        # From the reply and not from the update: mods may have changed the tensors.
        changed = {name: reply.tensors[messages.ADAPTERS][name] for name in returned}
        encoded = adapter_codec.encode_changes(changed, given, client.number, request.round)
        reply = messages.with_adapters(reply, encoded)
        codec |= adapter_codec.state(client.number)
    state = to_keep(start, given, update, untrained, rule.personal, control, codec)
    # Before the answer: the server must not accept a round from which the client cannot go on.
    store.save(request.round, state, request.accepted, request.kept)
    return reply


def _train_locally(
    visit: _Visit,
    request: Train,
    given: Mapping[str, Tensor],
    kept: ClientState,
    returned: Sequence[str],
) -> _Trained:
    """Trains from adapters, and measures a sample.

    Args:
        visit: Objects for the request.
        request: The request.
        given: All adapters of bottom and top that training starts from.
        kept: Tensors on the client's disk.
        returned: Names of the adapters for the server, in order.
    """
    site = visit.site
    client = visit.client
    config = site.config
    task = request.task
    moments = kept.moments if request.drawn is None else {}  # a new draw has no history
    stage = None if site.make_stage is None else site.make_stage()
    # A client has a new codec for each request. Error feedback goes on where the last accepted round ended.
    client.link.codec.restore({client.number: kept.codec})
    started = time.perf_counter()
    update = client.train(given, request.round, task, kept.control, moments, stage, kept.stage)
    seconds = time.perf_counter() - started
    codec = copy_of_state(client.link.codec.state().get(client.number, {}))

    # Under --deterministic the others wait until this client has measured, or its score would depend on their steps.
    if not config.deterministic and others_wait(config.trunk):
        client.link.leave(client.number)
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size, client.demands.rows)
    chosen = sample(batches, config.eval.after, config.train.batch_size)
    measured_with = site.personalised(update.adapters.tensors, update.kept)
    started = time.perf_counter()
    own = pooled(through_split(client, measured_with, request.round, chosen))
    sample_seconds = time.perf_counter() - started
    if config.deterministic:
        client.link.leave(client.number)
    reply = messages.trained(update, returned, own, peak_memory(), seconds, sample_seconds)
    return _Trained(update, reply, codec)


def assembled(start: Adapters, request: Train, kept: ClientState) -> dict[str, Tensor]:
    """Returns the adapters that a client starts from.

    Args:
        start: Initial adapters of the run, at the client's rank.
        request: Request to train.
        kept: Tensors on the client's disk since the last update that the server accepted.
    """
    # A later group replaces tensors of an earlier one.
    return {
        **start.tensors,
        **kept.held,
        **draw(start, request.drawn),
        **request.tensors,
        **kept.personal,
    }


def to_keep(
    start: Adapters,
    given: Mapping[str, Tensor],
    update: ClientUpdate,
    untrained: set[str],
    personal: frozenset[str],
    control: Mapping[str, Tensor],
    codec: Mapping[str, Tensor],
) -> ClientState:
    """Returns the state that a client writes to disk at the end of a round."""
    # A tensor that is as it was at the start is made from the run's seed again, and needs no room on the disk.
    held = {}
    for name in untrained:
        if not torch.equal(given[name], start.tensors[name]):
            held[name] = given[name]
    # Sorted: the order of a set differs from process to process, and equal states should be equal files.
    own = {name: update.adapters.tensors[name] for name in sorted(personal)}
    return ClientState(held, own, control, update.moments, update.kept, codec)


def _evaluate(visit: _Visit, request: Evaluate) -> Reply:
    """Measures a client's held-out text. The score of the sample, as after training, is reported separately."""
    site = visit.site
    client = visit.client
    config = site.config
    kept = visit.store.load(request.accepted)
    # Without `kept.held`: an evaluation sends all shared tensors, since they are new to every client.
    given = {**site.start.tensors, **request.tensors, **kept.personal}
    given = {**given, **site.personalised(given, kept.stage)}
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size, client.demands.rows)
    started = time.perf_counter()
    scores = through_split(client, given, request.round, batches, site.metrics)
    seconds = time.perf_counter() - started
    chosen = [number for number, _ in sample(batches, config.eval.after, config.train.batch_size)]
    part = pooled(scores[number] for number in chosen)
    return messages.measured(client.number, pooled(scores), part, peak_memory(), seconds)
