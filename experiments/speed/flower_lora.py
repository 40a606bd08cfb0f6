"""Federated LoRA on the whole model: Flower's FedAvg in Flower's simulation engine.

    python -m experiments.speed.flower_lora --log metrics.jsonl -- --clients 8 --rounds 3

After `--` come flags of fedsplit. Logs an event when a round begins and one when all clients have answered,
with what fedsplit logs: tokens and seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsplit.environment import prepare

OBJECT_STORE = 512 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=2, help="client processes, of one core each")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    prepare()  # before the libraries are imported, which read it then

    import peft
    import ray
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from experiments.speed.flower_client import app
    from experiments.speed.whole import Trainer
    from fedsplit.settings.flags import parse

    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)
    config = parse(args.flags)
    tokens = config.clients * config.train.steps * config.train.batch_size * config.train.max_length

    def log(**event: Any) -> None:
        with open(args.log, "a") as file:
            file.write(json.dumps(event) + "\n")

    class Timed(FedAvg):
        """FedAvg that logs; nothing else is its own."""

        def configure_train(self, server_round: int, *others: Any) -> Iterable[Message]:
            self.started = time.perf_counter()
            log(event="start", round=server_round)
            return super().configure_train(server_round, *others)

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            seconds = time.perf_counter() - self.started
            if failed := [reply.error.reason for reply in replies if reply.has_error()]:
                print(failed[0], file=sys.stderr)
                raise SystemExit(1)
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert metrics is not None
            log(event="train", round=server_round, tokens=tokens, seconds=seconds, loss=metrics["loss"])
            return arrays, metrics

    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(peft.get_peft_model_state_dict(Trainer(config, args.dtype).model))
        everyone = config.clients
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone)
        instructions = ConfigRecord({"flags": json.dumps(args.flags), "dtype": args.dtype, "threads": 1})
        strategy.start(grid, arrays, num_rounds=config.rounds, train_config=instructions)

    ray.init(
        address="local",
        num_cpus=args.workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        object_store_memory=OBJECT_STORE,
    )
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    try:
        run_simulation(server, app, config.clients, backend_config={"client_resources": resources})
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
