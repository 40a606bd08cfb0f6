"""Where the time of one client's step goes, in one process with one thread: every part of it, and what is left over.

    python -m experiments.speed.account --cache runs/speed-cache

Client and trunk are the classes of a run, with nothing between them; what a call through Ray adds is `remote.py`'s.
Parts are timed within the step by wrapping the functions that it calls; "left over" is the whole less their sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.speed.models import folder_of
from experiments.speed.run import machine
from fedsplit.environment import prepare

HERE = Path(__file__).parent


class Account:
    """Seconds by name; what is timed within something else is taken off it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[float] = []
        self._names: list[str] = []

    def is_open(self, name: str) -> bool:
        """Whether something of that name is being timed."""
        return name in self._names

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its own time put down under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._open.append(0.0)
            self._names.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self._names.pop()
                self.seconds[name] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took

        return call


def measure(model: Mapping[str, Any], folder: str, dtype: str, steps: int, warmup: int) -> dict[str, float]:
    """Milliseconds of each part of a step, the median over the steps."""
    import torch

    from fedsplit.adaptation import lora
    from fedsplit.client import client, link
    from fedsplit.client.link import Link
    from fedsplit.corpora.sequences import Sequences
    from fedsplit.corpora.shards import Shard
    from fedsplit.model.devices import TYPES
    from fedsplit.model.split import load_parts
    from fedsplit.optimization.optim import make_optimizer
    from fedsplit.settings.documents import build
    from fedsplit.trunk import server as trunk
    from fedsplit.trunk import trainable
    from fedsplit.trunk.schedules import SCHEDULES
    from fedsplit.wire.codecs import make_codec
    from fedsplit.wire.packets import StepKey

    torch.set_num_threads(1)
    shape = (model["batch_size"], model["max_length"])
    config = build({"model": folder, "cut": model["cut"], "dtype": dtype, "train.batch_size": shape[0]})
    bottom, middle, top = load_parts(
        config.model_path, config.bounds, ["bottom", "trunk", "top"], TYPES[dtype], config.kernels
    )
    for part in (bottom, middle, top):
        lora.add(part, config.lora, config.seed)
    server = trunk.TrunkServer(middle, make_codec("raw"), "shared", config.train, config.seed)
    account = Account()

    class Direct:
        def send(self, packet: Any) -> Callable[[], Any]:
            what = "backward" if "gradient" in packet.tensors else "forward"
            answer = account.timed(f"trunk: {what}", getattr(server, what))(packet)
            return lambda: answer

        def leave(self, number: int) -> None:
            server.leave(number)

    codec_type = type(make_codec("raw"))
    for name in ("encode", "decode"):
        setattr(codec_type, name, account.timed("wire: encode and decode", getattr(codec_type, name)))
    trainable.TrainableAdapter.step = account.timed("trunk: optimiser, new version", trainable.TrainableAdapter.step)  # type: ignore[method-assign]
    link.PendingStep.finish = account.timed("bottom: backward", link.PendingStep.finish)  # type: ignore[method-assign]
    for part, name in ((bottom, "bottom: forward"), (top, "top: forward and loss, with its gradient")):
        part.forward = account.timed(name, part.forward)
    ids = torch.randint(0, 1000, shape)
    party = client.Client(
        0,
        Shard("nobody", Sequences.packed(ids), Sequences.packed(ids)),
        bottom,
        top,
        Link(Direct(), make_codec("raw"), SCHEDULES["shared"]),
        config.train,
        config.seed,
    )
    for part in (bottom, top):
        part.train()
    trained = [*lora.parameters(bottom).values(), *lora.parameters(top).values()]
    optimizer = make_optimizer(trained, config.train)
    assert optimizer is not None
    backward = torch.Tensor.backward
    of_top = account.timed("top: backward", backward)
    torch.Tensor.backward = lambda *a, **k: (backward if account.is_open("bottom: backward") else of_top)(*a, **k)  # type: ignore[method-assign]
    found: list[dict[str, float]] = []
    for step in range(warmup + steps):
        account.seconds.clear()
        started = time.perf_counter()
        account.timed("left over", party.step)(ids, StepKey(1, 0, step))
        account.timed("client: optimiser", optimizer.step)()
        optimizer.zero_grad()
        account.seconds["whole step"] = time.perf_counter() - started
        found.append(dict(account.seconds))
    torch.Tensor.backward = backward  # type: ignore[method-assign]
    return {name: 1000 * statistics.median(one.get(name, 0.0) for one in found[warmup:]) for name in found[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--out", type=Path, default=HERE / "account.json")
    parser.add_argument("--cache", type=Path, default=Path("runs/speed-cache"), help="where random models are kept")
    parser.add_argument("--model", default="default", help="one of the configuration's")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    prepare()
    model = tomllib.loads(args.config.read_text())["models"][args.model]
    parts = measure(model, folder_of(model, args.cache), args.dtype, args.steps, warmup=5)
    kept = json.loads(args.out.read_text())["records"] if args.out.exists() else []
    kept = [record for record in kept if (record["model"], record["dtype"]) != (args.model, args.dtype)]
    records = [*kept, {"model": args.model, "dtype": args.dtype, "milliseconds": parts}]
    args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{name:45} {value:9.2f} ms {100 * value / parts['whole step']:6.1f} %")


if __name__ == "__main__":
    main()
