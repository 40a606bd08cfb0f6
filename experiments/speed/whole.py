"""The unsplit model under PEFT in a bare PyTorch loop, in one process: what split learning is compared with.

    python -m experiments.speed.whole --threads 2 --steps 100 -- --train.batch-size 4

After `--` come flags of fedsplit, which give model, data, adapters and optimiser. Talks to `run.py`: prints a
line when it is ready, trains when it is sent one, prints the measurement, and trains on until it is sent
another, so that workers measured side by side load the machine until the last of them is through.
"""

from __future__ import annotations

import argparse
import json
import select
import sys
import time

import peft
import torch
from torch import Tensor

from fedsplit.adaptation.injection import make_config
from fedsplit.corpora.partition import shards_of
from fedsplit.corpora.shards import batch
from fedsplit.model.facts import read_facts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.optimization.optim import make_optimizer
from fedsplit.settings.config import Config
from fedsplit.settings.flags import parse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """A model with adapters, and the step of training it.

    Attributes:
        model: The PEFT model; its base in `dtype`, its adapters in float32.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        torch.manual_seed(config.seed)
        base = load_unsplit(config.model_path, DTYPES[dtype])
        self.model = peft.get_peft_model(base, make_config(config.lora, read_facts(config.model_path).family)).train()
        self._mixed, self._settings = dtype == "bf16", config.train
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Forgets the moments."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, self._settings)
        assert optimizer is not None
        self._optimizer = optimizer

    def step(self, ids: Tensor) -> Tensor:
        """Trains on tokens (B, T); returns the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._mixed):
            # Without a cache of keys and values, which nobody would read.
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def _told() -> bool:
    """Whether a line, or the end, waits on standard input."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--worker", type=int, default=0, help="which of the workers this is; each has its own data")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    config = parse(args.flags)
    torch.set_num_threads(args.threads)
    trainer = Trainer(config, args.dtype)
    data = torch.cat([shard.train.ids for shard in shards_of(config)[args.worker :: args.workers]])

    def train(steps: range) -> list[Tensor]:
        return [trainer.step(batch(data, step, config.train.batch_size, config.seed)) for step in steps]

    train(range(args.warmup))
    print("ready", flush=True)
    sys.stdin.readline()
    wall, cpu = time.perf_counter(), time.process_time()
    losses = train(range(args.warmup, args.warmup + args.steps))
    loss = float(torch.stack(losses).mean())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = args.steps * config.train.batch_size * config.train.max_length
    print(json.dumps({"tokens": tokens, "seconds": wall, "cpu_seconds": cpu, "loss": loss}), flush=True)
    while not _told():
        train(range(1))


if __name__ == "__main__":
    main()
