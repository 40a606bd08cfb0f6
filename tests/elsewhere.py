"""A device that is not there: tensors with real values that say they are elsewhere, and that no other may meet.

Run as a script it registers itself with torch, which no process can undo, and runs federations on it and on the CPU:
`python elsewhere.py MODEL CORPUS FOLDER`. With `spread` behind it the trunk is spread over the device and the CPU.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "pretended"
torch.utils.rename_privateuse1_backend(NAME)
PLACE = torch.device(NAME, 0)
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Elsewhere(torch.Tensor):
    """Wraps a tensor of the CPU's. What `data` is set to does not reach it: adapters must keep their ranks."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=PLACE,
        )
        made.inside = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretence(TorchDispatchMode):
    """Makes the tensors that are asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes on the CPU what must be computed, and puts it where torch would."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [isinstance(tensor, Elsewhere) for tensor in tensors]
    left = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, Elsewhere)]
    if any(there) and left and func not in COPIES:
        raise RuntimeError(f"{func}: all tensors must be on one device, found some on {PLACE} and some on the CPU")
    device = kwargs.get("device")
    stays = any(there) if device is None else torch.device(device).type == NAME
    if func is COPIES[0]:
        stays = there[0]
    plain = kwargs if device is None else {**kwargs, "device": torch.device("cpu")}
    bare, named = pytree.tree_map_only(Elsewhere, lambda tensor: tensor.inside, (args, plain))
    out = func(*bare, **named)
    if not stays:
        return out
    out = pytree.tree_map_only(torch.Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any(there) else out


class _Module:
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: object) -> torch.Tensor:
        return torch.empty(0)

    def set_rng_state(self, state: torch.Tensor, device: object) -> None:
        pass


def register() -> None:
    """Tells torch of the device."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    make = torch.tensor

    def tensor(data: Any, *, device: torch.device | None = None, **how: Any) -> torch.Tensor:
        """Copied there: what torch itself does within `torch.tensor` passes the mode by."""
        made = make(data, **how)
        return made if device is None else made.to(device)

    torch.tensor = tensor


RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "shared": ("fedavg", {"train.micro_batches": 2}),
    "batched": ("fedprox", {"trunk.schedule": "batched", "kernels": "library"}),
    "accumulate": ("fedavg", {"trunk.schedule": "accumulate", "train.optimizer": "sgd"}),
    "copies": ("scaffold", {"trunk.schedule": "copies"}),
    "folded": ("fedex", {"trunk.schedule": "copies"}),
    "prefix": ("fedavg", {"prompt.kind": "prefix", "prompt.tokens": 2}),
}
"""What must put tensors where they belong: strategies and settings."""


def text(model: Path, cut: tuple[int, int], devices: list[torch.device]) -> list[list[int | None]]:
    """What a client on the CPU writes with a trunk on a device or on several, of prompts that are padded."""
    from split_models import SETTINGS, ends_of, parts_of

    from fedsplit.adaptation import lora
    from fedsplit.generation.decoding import Throughput, decode
    from fedsplit.generation.sampling import Chooser, Sampling
    from fedsplit.model.split import load_parts

    bottom, trunk, top = parts_of(model, cut)
    if len(devices) > 1:
        (there,) = load_parts(model, cut, ["trunk"], devices=devices)
        assert {parameter.device for parameter in there.parameters()} == {*devices}
    else:
        (there,) = load_parts(model, cut, ["trunk"], device=devices[0])
    lora.add(there, SETTINGS, seed=0)
    lora.write(lora.read(trunk).tensors, there)
    ends, _ = ends_of([bottom, there.eval(), top])
    return list(decode(ends, [[5, 9, 3], [7]], 6, [], Chooser(Sampling(), range(2)), Throughput()))


def main(model: str, corpus: str, folder: str, *spread: str) -> None:
    """Prints the losses of every run on the CPU and elsewhere, and a text of either."""
    cut = (1, 3) if spread else (1, 2)
    devices = [torch.device("cpu"), PLACE] if spread else [PLACE]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fedsplit.adaptation import run_adapters
    from fedsplit.engines.in_process import federate
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.settings.documents import build

    torch.set_num_threads(1)
    register()
    with Pretence():
        try:
            torch.ones(2, device=PLACE) + torch.ones(2)
        except RuntimeError:
            pass
        else:
            raise AssertionError("the device is of no use: it meets tensors of the CPU's")
    values: dict[str, object] = {"model": model, "dataset": corpus, "partition": "iid", "clients": 2, "rounds": 2}
    values |= {
        "cut": "{}:{}".format(*cut),
        "lora.rank": 2,
        "train.steps": 2,
        "train.batch_size": 2,
        "train.max_length": 16,
        "eval.samples": 2,
    }
    values |= {"train.lr": 0.01, "lora.dropout": 0.1, "deterministic": True}
    losses: dict[str, list[list[float]]] = {}
    for device in (torch.device("cpu"), PLACE):
        if not spread:
            run_adapters.resolve = lambda name, rank, device=device: device
        elif device == PLACE:
            run_adapters.trunk_devices = lambda config: devices
        for name, (strategy, more) in RUNS.items():
            config = build(values | more)
            rule = load_strategy(strategy, {}, {"seed": 0, "clients": 2})
            with Pretence() if device == PLACE else contextlib.nullcontext():
                done = federate(config, Path(folder) / f"{name}-{device.type}", rule)
            assert done.summary is not None
            losses.setdefault(name, []).append([*done.summary["eval_loss"].values()])
    with Pretence():
        there = text(Path(model), cut, devices)
    print(json.dumps({"losses": losses, "texts": [text(Path(model), cut, [torch.device("cpu")]), there]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
