"""Measures a split on one device: exactness, speed, the trunk's batches, and memory.

    python -m experiments.gpu.measure --device cuda --out experiments/gpu/result.json
    python -m experiments.gpu.measure --device cpu --small --out /tmp/result.json

Needs torch, transformers, peft and safetensors; bitsandbytes for the rows of 4 bits. Neither Ray nor Flower nor
datasets nor a network is used: models are random, of tiny shapes for exactness and of GPT-2 small's shape for speed.
A stage that fails is recorded with its reason, and the next one runs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.client.client import Client
from fedsplit.client.link import Link
from fedsplit.corpora.sequences import Sequences
from fedsplit.corpora.shards import Shard
from fedsplit.model.facts import read_facts
from fedsplit.model.parts import Kind
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit, quantize_unsplit
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.wire.codecs import Role, make_codec
from fedsplit.wire.packets import Packet, StepKey

KINDS: tuple[Kind, ...] = ("bottom", "trunk", "top")

VOCABULARY = 97

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
    "mixtral": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
    },
}
"""Configurations of the tiny models, by type."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements of speed.

    Attributes:
        shape: Fields of GPT-2's configuration; none: those of GPT-2 small.
        cut: Blocks of the trunk.
        batch: Sequences of a step.
        length: Tokens of a sequence.
        steps: Steps of a measurement.
        repeats: Measurements of each side, interleaved.
        clients: Clients of the larger federation.
        together: Clients whose steps the trunk computes as one.
    """

    shape: dict[str, int]
    cut: str
    batch: int
    length: int
    steps: int
    repeats: int
    clients: int
    together: int


LARGE = Sizes({}, "2:10", batch=8, length=256, steps=20, repeats=3, clients=8, together=16)
SMALL = Sizes({"n_embd": 48, "n_layer": 3, "n_head": 4}, "1:2", 2, 16, steps=2, repeats=1, clients=2, together=4)


def write_model(folder: Path, kind: str, **fields: Any) -> Path:
    """Writes a model with random weights, and without a tokenizer."""
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**TINY.get(kind, {}), **fields})
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


def largest_difference(one: Tensor, other: Tensor | None) -> float:
    """Returns the largest absolute difference of two tensors; a missing gradient is all zeros."""
    if other is None:
        return float(one.float().abs().max())
    return float((one.float() - other.float()).abs().max())


class Bench:
    """The measurements on one device."""

    def __init__(self, device: torch.device, sizes: Sizes, scratch: Path) -> None:
        self.device = device
        self.sizes = sizes
        self.scratch = scratch

    # Exactness.

    def exactness(self, kind: str, dtype: torch.dtype, kernels: str, bits: dict[str, int] | None = None) -> Any:
        """Compares a split with the unsplit model under PEFT: logits, and the gradients of every adapter."""
        if bits and importlib.util.find_spec("bitsandbytes") is None:
            return {"skipped": "bitsandbytes is not installed"}
        path = self.scratch / kind
        if not path.exists():
            write_model(path, kind)
        parts = load_parts(path, (1, 2), KINDS, dtype, kernels, device=self.device, bits=bits)
        settings = LoraSettings(rank=(4,), dropout=0.0)
        for part in parts:
            lora.add(part, settings, seed=0)
        start = self._moved(lora.read(*parts).tensors)
        lora.write(start, *parts)
        whole = self._whole(path, dtype, settings, start, bits)

        ids = torch.randint(1, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1)).to(self.device)
        bottom, trunk, top = parts
        with torch.no_grad():
            logits = top.logits(trunk(bottom(ids, None), None), None)
        loss = top(trunk(bottom(ids, None), None), ids, None)
        loss.backward()
        # Parts multiply float32 adapters with 16-bit hidden states in 16 bits, as autocast does for the unsplit model.
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                expected_logits = whole(input_ids=ids, use_cache=False).logits
            expected_loss = whole(input_ids=ids, labels=ids, use_cache=False).loss
        expected_loss.backward()

        expected = {self._exported(name): p.grad for name, p in whole.named_parameters() if p.grad is not None}
        gradients = {name: p.grad for part in parts for name, p in lora.parameters(part).items()}
        assert gradients.keys() == expected.keys()
        differences = [largest_difference(gradient, gradients[name]) for name, gradient in expected.items()]
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        return {
            "logits": largest_difference(logits, expected_logits),
            "loss": abs(float(loss) - float(expected_loss)),
            "gradients": max(differences),
            "largest_gradient": scale,
        }

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns adapters that differ from those of the start, whose factors B are zero."""
        generator = torch.Generator().manual_seed(2)
        return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    def _whole(
        self,
        path: Path,
        dtype: torch.dtype,
        settings: LoraSettings,
        start: dict[str, Tensor],
        bits: dict[str, int] | None = None,
    ) -> Any:
        """Returns the unsplit model under PEFT with the same adapters."""
        base = load_unsplit(path, dtype).to(self.device)
        if bits:
            base = quantize_unsplit(base, (1, 2), bits, self.device)
        model = peft.get_peft_model(base, make_config(settings, read_facts(path).family))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.data = start[self._exported(name)].to(self.device)
        return model

    @staticmethod
    def _exported(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".default", "")

    # Speed.

    def _model(self) -> Path:
        path = self.scratch / "large"
        if not path.exists():
            fields = {"n_positions": max(64, self.sizes.length), **self.sizes.shape}
            write_model(path, "gpt2", **fields)
        return path

    def _config(self, dtype: str, **values: Any) -> Config:
        sizes = self.sizes
        settings: dict[str, Any] = {"model": str(self._model()), "cut": sizes.cut, "dtype": dtype}
        settings |= {"device": str(self.device), "lora.dropout": 0.0, "train.steps": sizes.steps}
        settings |= {"train.batch_size": sizes.batch, "train.max_length": sizes.length, "trunk.schedule": "shared"}
        return build({**settings, **values})

    def _rows(self, count: int) -> Sequences:
        generator = torch.Generator().manual_seed(3)
        return Sequences.packed(torch.randint(1, VOCABULARY, (count, self.sizes.length), generator=generator))

    def _clients(self, config: Config, count: int) -> list[Client]:
        """Returns clients of one process that share bottom and top, and a trunk beside them."""
        bottom, top = bare_parts(config, ["bottom", "top"])
        for part in (bottom, top):
            adapt(part, config)
        trunk = LocalTrunk(config)
        incarnation = trunk.status().incarnation
        link = Link(trunk, make_codec("raw"), SCHEDULES[config.trunk.schedule], incarnation=incarnation)
        shard = Shard("random", self._rows(4 * self.sizes.batch), self._rows(1))
        return [Client(number, shard, bottom, top, link, config.train, 0) for number in range(count)]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _tokens_a_second(self, tokens: int, work: Callable[[], object]) -> float:
        self._synchronise()
        started = time.perf_counter()
        work()
        self._synchronise()
        return tokens / (time.perf_counter() - started)

    def speed(self, dtype: str) -> Any:
        """Measures one client, several clients in turn, and the bare PEFT loop, interleaved."""
        sizes, config = self.sizes, self._config(dtype)
        tokens = sizes.steps * sizes.batch * sizes.length
        clients = self._clients(config, sizes.clients)
        start = lora.read(clients[0].bottom, clients[0].top).tensors
        rounds = {client.number: 0 for client in clients}

        def train(client: Client) -> None:
            rounds[client.number] += 1
            client.train(start, rounds[client.number])
            client.link.leave(client.number)

        def train_all() -> None:
            for client in clients:
                train(client)

        plain = self._plain_loop(dtype)
        sides: dict[str, tuple[int, Callable[[], object]]] = {
            "peft": (tokens, plain),
            "one client": (tokens, lambda: train(clients[0])),
            f"{sizes.clients} clients": (tokens * sizes.clients, train_all),
        }
        for _, work in sides.values():
            work()  # kernels are compiled and caches filled
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(sizes.repeats):
            for name, (count, work) in sides.items():
                found[name].append(self._tokens_a_second(count, work))
        return found

    def _plain_loop(self, dtype: str) -> Callable[[], object]:
        """Returns a round of training of the unsplit model under PEFT, in a bare loop."""
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        base = load_unsplit(self._model(), types[dtype]).to(self.device)
        model = peft.get_peft_model(base, make_config(LoraSettings(), read_facts(self._model()).family)).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
        ids = self._rows(self.sizes.batch).ids.to(self.device)

        def work() -> None:
            for _ in range(self.sizes.steps):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bf16"):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return work

    # The trunk.

    def trunk(self, dtype: str) -> Any:
        """Measures the trunk with many clients: one forward and one backward for all, and for one after the other."""
        sizes = self.sizes
        found: dict[str, list[float]] = {"batched": [], "sequential": []}
        tokens = sizes.together * sizes.batch * sizes.length
        trunks = {name: LocalTrunk(self._config(dtype, **{"trunk.schedule": "batched"})) for name in found}
        for step in range(sizes.repeats + 1):
            for name, trunk in trunks.items():
                size = sizes.together if name == "batched" else 1
                speed = self._tokens_a_second(tokens, functools.partial(self._step, trunk, step, size))
                if step:  # the first one compiles
                    found[name].append(speed)
        return found

    def _step(self, trunk: LocalTrunk, step: int, size: int) -> None:
        """Serves one step of all clients, so many at a time."""
        sizes = self.sizes
        codec = make_codec("raw")
        width = trunk.server.part.config.hidden_size
        shape = (sizes.batch, sizes.length, width)
        incarnation = trunk.status().incarnation
        keys = [StepKey(1, client, step) for client in range(sizes.together)]
        for begin in range(0, len(keys), size):
            group = keys[begin : begin + size]
            states = torch.randn(shape).to(trunk.server.part.dtype)
            hidden = {"hidden": codec.encode(states, Role("activation", "up", group[0]))}
            up = [Packet(key, hidden, True, True, 1, incarnation) for key in group]
            trunk.server.forward_together(up)
            gradient = {"gradient": codec.encode(torch.randn_like(states), Role("gradient", "up", group[0]))}
            back = [Packet(key, gradient, True, True, 1, incarnation) for key in group]
            trunk.server.backward_together(back)

    # Memory.

    def memory(self, dtype: str) -> Any:
        """Measures the memory of each party's weights, and of a step of each."""
        if self.device.type != "cuda":
            return {"note": "measured on a GPU only; experiments/memory has the CPU"}
        config = self._config(dtype)
        found = {}

        def client_parts() -> None:
            for part in bare_parts(config, ["bottom", "top"]):
                adapt(part, config)

        sides: dict[str, Callable[[], object]] = {
            "client": client_parts,
            "trunk": lambda: LocalTrunk(config),
            "peft, a step": lambda: self._plain_loop(dtype)(),
            "client and trunk, a step": lambda: self._one_step(config),
        }
        for name, work in sides.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            held = work()
            found[name] = torch.cuda.max_memory_allocated() - before
            del held
        return found

    def _one_step(self, config: Config) -> None:
        (client,) = self._clients(config, 1)
        client.train(lora.read(client.bottom, client.top).tensors, 1)


def stages(bench: Bench, only: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Returns the measurements by name."""
    found: dict[str, Callable[[], Any]] = {}
    for kind in TINY:
        found[f"exact, {kind}, fp32"] = lambda kind=kind: bench.exactness(kind, torch.float32, "library")  # type: ignore[misc]
        found[f"exact, {kind}, bf16"] = lambda kind=kind: bench.exactness(kind, torch.bfloat16, "library")  # type: ignore[misc]
        found[f"fused, {kind}, fp32"] = lambda kind=kind: bench.exactness(kind, torch.float32, "fused")  # type: ignore[misc]
    bits = {"bottom": 4, "trunk": 4, "top": 4}
    found["exact, llama, 4 bits"] = lambda: bench.exactness("llama", torch.float32, "library", bits)
    for dtype in ("fp32", "bf16"):
        found[f"speed, {dtype}"] = lambda dtype=dtype: bench.speed(dtype)  # type: ignore[misc]
        found[f"trunk, {dtype}"] = lambda dtype=dtype: bench.trunk(dtype)  # type: ignore[misc]
        found[f"memory, {dtype}"] = lambda dtype=dtype: bench.memory(dtype)  # type: ignore[misc]
    return {name: work for name, work in found.items() if not only or any(name.startswith(one) for one in only)}


def environment(device: torch.device) -> dict[str, str]:
    """Returns the machine and the versions of what was measured with."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {"device": card, "python": platform.python_version(), **versions}


def main() -> None:
    """Runs all measurements, and writes the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a quick look on any machine")
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose names begin so")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    transformers.logging.set_verbosity_error()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "small": args.small,
        "environment": environment(device),
        "seconds": {},
        "measured": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, SMALL if args.small else LARGE, Path(scratch))
        for name, work in stages(bench, args.only).items():
            started = time.perf_counter()
            try:
                found = work()
            except Exception as error:  # noqa: BLE001  # recorded, and the other stages still run
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
            result["measured"][name] = found
            result["seconds"][name] = round(time.perf_counter() - started, 2)
            print(name, json.dumps(found), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
