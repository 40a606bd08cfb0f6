"""Flower's client side: a message in, a client's work, a message out.

In one process all virtual clients share one copy of the frozen base, kept by this module.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.adaptation.adapting import adapt, bare_parts
from fedsplit.client.client import Client
from fedsplit.client.heldout import held_out_batches, sample, through_split
from fedsplit.client.link import Link
from fedsplit.client.measures import load_measures
from fedsplit.config import Config
from fedsplit.corpora.shards import Shard, read_shard
from fedsplit.documents import from_document
from fedsplit.federation import records
from fedsplit.metrics.metric import Metric
from fedsplit.model.families import read_facts
from fedsplit.model.parts import Bottom, Top
from fedsplit.model.routers import RouterLoss
from fedsplit.model.sources import about
from fedsplit.model.store import ClientStore, FoldLog, Kept
from fedsplit.objectives.objective import Objective
from fedsplit.optimization.own_stage import stage_maker
from fedsplit.scores import pooled
from fedsplit.stages import RoundStart, StageMaker
from fedsplit.trunk.actor import TrunkHandle, find_trunk
from fedsplit.trunk.memory import peak_memory
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, ClientUpdate, factor_of, fresh_factor
from fedsplit.wire.codecs import make_codec

app = ClientApp()


@dataclass
class _Site:
    """What the clients of one process have in common.

    Attributes:
        start: The adapters of bottom and top that training starts from, at the largest rank.
        folded: The last round whose changes of the base weights have been folded in.
        router_aux_loss: The coefficient of the routers' loss; 0 where there is none.
        objective: The loss that training minimises; cross-entropy where None.
        metrics: Metrics of the held-out text, by name.
        make_stage: Makes the strategy's own gradient stage; None where it has none.
    """

    config: Config
    bottom: Bottom
    top: Top
    trunk: TrunkHandle
    start: Adapters
    folded: int = 0
    router_aux_loss: float = 0.0
    objective: Objective | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    make_stage: StageMaker | None = None

    def client(self, number: int, shard: Shard, run: str, incarnation: str) -> Client:
        """The client of that partition, with its data and its way to the trunk."""
        config = self.config
        codec, schedule = make_codec(config.wire.codec), SCHEDULES[config.trunk.schedule]
        link = Link(self.trunk, codec, schedule, run, incarnation, asks=bool(config.trunk.memory))
        rounds, routers = config.rounds, RouterLoss(self.router_aux_loss)
        parts = self.bottom, self.top
        return Client(number, shard, *parts, link, config.train, config.seed, rounds, routers, self.objective)

    def personal(self, factors: str) -> set[str]:
        """The names of the adapters that stay with each client: parts that are not shared, and some factors."""
        alone = [part for part in (self.bottom, self.top) if part.kind not in self.config.share]
        whole = {name for part in alone for name in lora.parameters(part)}
        return whole | {name for name in self.start.tensors if (factor_of(name) or "-") in factors}

    def personalised(self, given: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the adapter with which a client measures its held-out text.

        Args:
            given: The adapter that all clients have.
            kept: State of the client's own gradient stage.
        """
        return given if self.make_stage is None else self.make_stage().personalise(RoundStart(given, kept))

    def catch_up(self, store: Path, message: Message) -> None:
        """Folds into the base weights what this process has not folded yet, in the order of the rounds."""
        log, last = FoldLog(store / "folds"), int(records.config_of(message)["folded"])
        if changes := records.read_fold(message):
            log.append(last, changes)
        for round in range(self.folded + 1, last + 1):
            for part in (self.bottom, self.top):
                lora.fold(part, log.read(round))
        self.folded = max(self.folded, last)


@functools.lru_cache(maxsize=1)
def _site(run: str, trunk: str, threads: int, classes: int) -> _Site:
    """Loads bottom and top, and nothing of the trunk; once a process and run."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    config = from_document(json.loads(run))
    bottom, top = bare_parts(config, ["bottom", "top"], classes)
    for part in (bottom, top):
        adapt(part, config)
    coefficient = read_facts(about(config)).coefficient(config.router_aux_loss)
    start = lora.read(bottom, top)
    objective, metrics = load_measures(config)
    return _Site(
        config,
        bottom,
        top,
        find_trunk(trunk),
        start,
        router_aux_loss=coefficient,
        objective=objective,
        metrics=metrics,
        make_stage=stage_maker(config),
    )


def _meet(message: Message, context: Context) -> tuple[_Site, Client, ClientStore, set[str]]:
    """Who is asked: the site, the client, its disk, and the names of what never leaves it."""
    facts, number = records.config_of(message), int(context.node_config["partition-id"])
    root = Path(facts["store"])
    shard = read_shard(root, number)
    site = _site(facts["run"], facts["trunk"], facts["threads"], shard.classes)
    site.catch_up(root, message)
    client = site.client(number, shard, facts["trunk"], facts["incarnation"])
    return site, client, ClientStore(root, number), site.personal(facts["personal"])


def _drawn(start: Adapters, seed: int | None) -> dict[str, Tensor]:
    """The factors that a client draws itself: A anew, and B zero."""
    if seed is None:
        return {}
    a = {n: fresh_factor(n, t.shape, seed) for n, t in start.tensors.items() if factor_of(n) == "A"}
    return a | {n: torch.zeros_like(t) for n, t in start.tensors.items() if factor_of(n) == "B"}


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tells which partition this node is; the first one also tells what training starts from."""
    site, client, _, _ = _meet(message, context)
    parameters = {"bottom": lora.count(site.bottom), "top": lora.count(site.top, elsewhere=[site.bottom])}
    if not SCHEDULES[site.config.trunk.schedule].returns_gradient:
        parameters["bottom"]["trainable"] = 0
    start = {str(part.kind): lora.read(part) for part in (site.bottom, site.top)}
    return Message(
        records.introduction(client.number, client.shard.name, None if client.number else start, parameters),
        reply_to=message,
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training, and a look at what this client's own steps have made of the model."""
    site, client, store, personal = _meet(message, context)
    config, facts = site.config, records.config_of(message)
    round, (task, drawn, rank) = facts[records.ROUND], records.read_task(message)
    kept, start = store.load(facts["accepted"]), site.start.with_rank(rank)
    given = {**start.tensors, **_drawn(start, drawn), **kept.held, **records.tensors_of(message), **kept.personal}
    moments = {} if drawn is not None else kept.moments  # of adapters that begin anew there is nothing to remember
    stage = None if site.make_stage is None else site.make_stage()
    update = client.train(given, round, task, kept.control, moments, stage, kept.stage)
    if not config.deterministic:  # else the others wait, or what is measured would depend on them
        client.link.leave(client.number)
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    chosen = sample(batches, config.eval.after, config.train.batch_size)
    own = pooled(through_split(client, site.personalised(update.adapters.tensors, update.kept), round, chosen))
    if config.deterministic:
        client.link.leave(client.number)
    untouched = {n for n in given if factor_of(n) and factor_of(n) not in task.trains} - personal
    control = _moved(kept.control, update.control) if task.control is not None else {}
    store.save(round, _kept(start, given, update, untouched, personal, control), facts["accepted"])
    shared = update.adapters.tensors.keys() - untouched - personal
    return Message(records.from_update(update, shared, own, peak_memory()), reply_to=message)


def _kept(
    start: Adapters,
    given: Mapping[str, Tensor],
    update: ClientUpdate,
    untouched: set[str],
    personal: set[str],
    control: Mapping[str, Tensor],
) -> Kept:
    """Returns what a client writes to its disk at the end of a round."""
    held = {n: given[n] for n in untouched if not torch.equal(given[n], start.tensors[n])}
    own = {n: update.adapters.tensors[n] for n in personal}
    return Kept(held, own, control, update.moments, update.kept)


def _moved(control: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a client's control variate after a round that changed it."""
    return {name: control[name] + change if name in control else change for name, change in changes.items()}


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on this client's held-out text; also on the part of it that is measured after its own steps."""
    site, client, store, _ = _meet(message, context)
    config, facts = site.config, records.config_of(message)
    kept = store.load(facts["accepted"])
    given = {**site.start.tensors, **records.tensors_of(message), **kept.personal}
    given = {**given, **site.personalised(given, kept.stage)}
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    measured = through_split(client, given, facts[records.ROUND], batches, site.metrics)
    chosen = [number for number, _ in sample(batches, config.eval.after, config.train.batch_size)]
    part = pooled(measured[number] for number in chosen)
    content: RecordDict = records.from_held_out(client.number, pooled(measured), part, peak_memory())
    return Message(content, reply_to=message)
