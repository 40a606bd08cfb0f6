"""Federated LoRA on the whole model: the client. What Flower alone does, without fedsplit's split.

In a module of its own, since Ray's workers import it; each loads the model once.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from typing import Any

import peft
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from experiments.speed.whole import Trainer
from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import Shard, batch
from fedsplit.settings.config import Config
from fedsplit.settings.flags import parse

app = ClientApp()


@functools.lru_cache(maxsize=1)
def _load(flags: str, dtype: str, threads: int) -> tuple[Config, Trainer, list[Shard]]:
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    config = parse(json.loads(flags))
    return config, Trainer(config, dtype), shards_of(config)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training, from the adapters that were sent."""
    instructions: Any = message.content["config"]  # its values may be of any kind for Flower, and are our server's
    config, trainer, shards = _load(instructions["flags"], instructions["dtype"], instructions["threads"])
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    peft.set_peft_model_state_dict(trainer.model, arrays.to_torch_state_dict())
    trainer.renew_optimizer()
    client = int(context.node_config["partition-id"])
    steps = config.train.steps or 0
    first = (instructions["server-round"] - 1) * steps
    losses = [
        trainer.step(batch(shards[client].train.ids, step, config.train.batch_size, config.seed))
        for step in range(first, first + steps)
    ]
    examples = steps * config.train.batch_size
    content = RecordDict()
    content["arrays"] = ArrayRecord(peft.get_peft_model_state_dict(trainer.model))
    content["metrics"] = MetricRecord({"num-examples": examples, "loss": float(torch.stack(losses).mean())})
    return Message(content, reply_to=message)
