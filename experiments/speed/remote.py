"""What a call of the trunk costs more through Ray.

A pair of forward and backward is timed on a trunk in the same process (local), on one in an actor that calls it
itself, so that only the process differs (inside), and through the actor as clients call it (remote).

    python -m experiments.speed.remote --cache runs/speed-cache

The three take turns; one thread each; nobody else asks.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.speed.models import folder_of
from experiments.speed.run import machine
from fedsplit.environment import prepare

HERE = Path(__file__).parent


Serve = Callable[[Any], Any]
"""A packet to its answer."""


def pairs_a_second(
    serve: Serve, hidden: Any, gradient: Any, seconds: float, attempt: int, run: str = "", life: str = ""
) -> float:
    """Asks for forward and backward in turn for so many seconds; each time as another attempt at the round."""
    from fedsplit.wire.packets import Packet, StepKey

    started, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        key = StepKey(1, 0, done, attempt, run=run)
        serve(Packet(key, {"hidden": hidden}, incarnation=life))
        serve(Packet(key, {"gradient": gradient}, incarnation=life))
        done += 1
    return done / elapsed


def make_trunk(model: Mapping[str, Any], folder: str) -> Serve:
    """A `TrunkServer` in this process, with one thread."""
    import torch

    from fedsplit.adaptation import lora
    from fedsplit.model.devices import TYPES
    from fedsplit.model.split import load_parts
    from fedsplit.settings.documents import build
    from fedsplit.trunk.server import TrunkServer
    from fedsplit.wire.codecs import make_codec

    torch.set_num_threads(1)
    config = build({"model": folder, "cut": model["cut"]})
    (part,) = load_parts(config.model_path, config.bounds, ["trunk"], TYPES[config.dtype], config.kernels)
    lora.add(part, config.lora, config.seed)
    codec = make_codec(config.wire.codec)
    server = TrunkServer(part, codec, config.trunk.schedule, config.train, config.seed)
    return lambda packet: (server.backward if "gradient" in packet.tensors else server.forward)(packet)


class Inside:
    """A trunk that is called from within an actor's process, where no call crosses."""

    def __init__(self, model: Mapping[str, Any], folder: str) -> None:
        self._serve = make_trunk(model, folder)

    def pairs_a_second(self, hidden: Any, gradient: Any, seconds: float, attempt: int) -> float:
        return pairs_a_second(self._serve, hidden, gradient, seconds, attempt)


def measure(model: Mapping[str, Any], folder: str, seconds: float, repeats: int) -> list[dict[str, float]]:
    """Pairs a second, local, inside and remote, once a repeat."""
    import ray
    import torch

    from fedsplit.settings.documents import build
    from fedsplit.trunk.actor import ActorSetup
    from fedsplit.trunk.ray_trunks import start_trunks
    from fedsplit.wire.codecs import Role, make_codec
    from fedsplit.wire.packets import StepKey

    local = make_trunk(model, folder)
    inside = ray.remote(num_cpus=0)(Inside).remote(model, folder)
    config = build({"model": folder, "cut": model["cut"]})
    handle = start_trunks(config, "trunk", ActorSetup(threads=1))
    life = handle.status().incarnation
    shape = (model["batch_size"], model["max_length"], model["width"])
    codec = make_codec(config.wire.codec)
    key = StepKey(1, 0, 0)
    hidden = codec.encode(torch.randn(shape), Role("activation", "up", key))
    # As small as gradients are: the trunk refuses steps whose gradients grow without bounds.
    gradient = codec.encode(1e-6 * torch.randn(shape), Role("gradient", "up", key))
    places: dict[str, Callable[[float, int], float]] = {
        "local": lambda time, attempt: pairs_a_second(local, hidden, gradient, time, attempt),
        "inside": lambda time, attempt: ray.get(inside.pairs_a_second.remote(hidden, gradient, time, attempt)),
        "remote": lambda time, attempt: pairs_a_second(
            lambda packet: handle.send(packet)(), hidden, gradient, time, attempt, "trunk", life
        ),
    }
    for place in places.values():
        place(1.0, 0)
    return [{name: place(seconds, attempt) for name, place in places.items()} for attempt in range(1, repeats + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--out", type=Path, default=HERE / "remote.json")
    parser.add_argument("--cache", type=Path, default=Path("runs/speed-cache"), help="where random models are kept")
    parser.add_argument("--models", type=lambda text: text.split(","), help="of the configuration's; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5, help="of every measurement")
    args = parser.parse_args()
    prepare()  # before Ray is imported, which reads it then

    from fedsplit.trunk import cluster

    models = tomllib.loads(args.config.read_text())["models"]
    records: list[dict[str, Any]] = []
    for name in args.models or models:
        folder = folder_of(models[name], args.cache)
        with cluster.running(workers=1):
            measured = measure(models[name], folder, args.seconds, args.repeats)
        records += [{"model": name, "repeat": repeat, **result} for repeat, result in enumerate(measured)]
        args.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
        print(name, *measured, sep="\n", flush=True)


if __name__ == "__main__":
    main()
