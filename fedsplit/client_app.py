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
from fedsplit.actor import find_trunk, peak_memory
from fedsplit.client import Client
from fedsplit.config import Config, from_document
from fedsplit.evaluate import shards_of, through_split
from fedsplit.link import Link
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
    link: Link
    shards: list[Shard]
    start: Adapters

    def client(self, number: int) -> Client:
        """The client of that partition."""
        config = self.config
        return Client(number, self.shards[number], self.bottom, self.top, self.link, config.train, config.seed)


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
    link = Link(find_trunk(trunk), make_codec(config.wire.codec), config.trunk.schedule)
    return _Site(config, bottom, top, link, shards_of(config), adapters.read(bottom, top))


def _meet(message: Message, context: Context) -> tuple[_Site, Client]:
    instructions = records.config_of(message)
    site = _site(instructions["run"], instructions["trunk"], instructions["threads"])
    return site, site.client(int(context.node_config["partition-id"]))


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
    """One round of local training."""
    _, client = _meet(message, context)
    update = client.train(records.tensors_of(message), records.config_of(message)[records.ROUND])
    return Message(records.from_update(update, peak_memory()), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on this client's held-out text."""
    site, client = _meet(message, context)
    round = records.config_of(message)[records.ROUND]
    measured = through_split(client, records.tensors_of(message), round, site.config.eval.samples)
    content: RecordDict = records.from_held_out(client.number, measured, peak_memory())
    return Message(content, reply_to=message)
