"""Flower's client side: a message in, a client's work, a message out.

In one process all virtual clients share one copy of the frozen base, kept by this module.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from dataclasses import dataclass

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsplit import adapters, records
from fedsplit.actor import TrunkHandle, find_trunk
from fedsplit.client import Client
from fedsplit.config import Config, from_document
from fedsplit.evaluate import held_out_batches, pooled, sample, shards_of, through_split
from fedsplit.link import Link
from fedsplit.memory import peak_memory
from fedsplit.partition import Shard
from fedsplit.schedules import SCHEDULES
from fedsplit.split import TYPES, Bottom, Top, load_parts
from fedsplit.updates import Adapters
from fedsplit.wire import make_codec

app = ClientApp()


@dataclass(frozen=True)
class _Site:
    """What the clients of one process have in common."""

    config: Config
    bottom: Bottom
    top: Top
    trunk: TrunkHandle
    shards: list[Shard]
    start: Adapters

    def client(self, number: int, run: str, incarnation: str) -> Client:
        """The client of that partition, with its way to the trunk."""
        config = self.config
        codec, schedule = make_codec(config.wire.codec), SCHEDULES[config.trunk.schedule]
        link = Link(self.trunk, codec, schedule, run, incarnation, asks=bool(config.trunk.memory))
        return Client(number, self.shards[number], self.bottom, self.top, link, config.train, config.seed)


@functools.lru_cache(maxsize=1)
def _site(run: str, trunk: str, threads: int) -> _Site:
    """Loads bottom and top, and nothing of the trunk; once a process and run."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    config = from_document(json.loads(run))
    bottom, top = load_parts(config.model_path, config.bounds, ["bottom", "top"], TYPES[config.dtype], config.kernels)
    for part in (bottom, top):
        adapters.add(part, config.lora, config.seed)
    return _Site(config, bottom, top, find_trunk(trunk), shards_of(config), adapters.read(bottom, top))


def _meet(message: Message, context: Context) -> tuple[_Site, Client]:
    instructions = records.config_of(message)
    site = _site(instructions["run"], instructions["trunk"], instructions["threads"])
    number = int(context.node_config["partition-id"])
    return site, site.client(number, instructions["trunk"], instructions["incarnation"])


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Tells which partition this node is; the first one also tells what training starts from."""
    site, client = _meet(message, context)
    parameters = {"bottom": adapters.count(site.bottom), "top": adapters.count(site.top, elsewhere=[site.bottom])}
    if not SCHEDULES[site.config.trunk.schedule].returns_gradient:
        parameters["bottom"]["trainable"] = 0
    start = site.start if client.number == 0 else None
    return Message(records.introduction(client.number, client.shard.name, start, parameters), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training, and a look at what this client's own steps have made of the model."""
    site, client = _meet(message, context)
    config, round = site.config, records.config_of(message)[records.ROUND]
    update = client.train(records.tensors_of(message), round)
    if not config.deterministic:  # else the others wait, or what is measured would depend on them
        client.link.leave(client.number)
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    chosen = sample(batches, config.eval.after, config.train.batch_size)
    own = pooled(through_split(client, update.adapters.tensors, round, chosen))
    if config.deterministic:
        client.link.leave(client.number)
    return Message(records.from_update(update, own, peak_memory()), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on this client's held-out text; also on the part of it that is measured after its own steps."""
    site, client = _meet(message, context)
    config, round = site.config, records.config_of(message)[records.ROUND]
    batches = held_out_batches(client.shard, config.eval.samples, config.train.batch_size)
    measured = through_split(client, records.tensors_of(message), round, batches)
    chosen = [number for number, _ in sample(batches, config.eval.after, config.train.batch_size)]
    part = pooled(measured[number] for number in chosen)
    content: RecordDict = records.from_held_out(client.number, pooled(measured), part, peak_memory())
    return Message(content, reply_to=message)
