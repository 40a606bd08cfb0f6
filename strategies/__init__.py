"""Aggregation strategies: how the clients' adapters become one set again.

One file a strategy. Each needs torch and the lowest modules of fedsplit only: `updates`, `lowrank` and `seeds`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

STRATEGIES = {
    "fedavg": "strategies.fedavg:FedAvg",
    "ffa": "strategies.ffa_lora:FFALoRA",
    "rolora": "strategies.rolora:RoLoRA",
    "fedsa": "strategies.fedsa_lora:FedSALoRA",
    "flora": "strategies.flora:FLoRA",
    "fedex": "strategies.fedex_lora:FedExLoRA",
    "hetlora": "strategies.hetlora:HetLoRA",
    "flexlora": "strategies.flexlora:FlexLoRA",
    "lora_fair": "strategies.lora_fair:LoRAFAIR",
    "fedsvd": "strategies.fedsvd:FedSVD",
    "fedrot": "strategies.fedrot_lora:FedRotLoRA",
    "fedprox": "strategies.fedprox:FedProx",
    "scaffold": "strategies.scaffold:Scaffold",
    "fedavgm": "strategies.fedavgm:FedAvgM",
    "fedadagrad": "strategies.fedadagrad:FedAdagrad",
    "fedadam": "strategies.fedadam:FedAdam",
    "fedyogi": "strategies.fedyogi:FedYogi",
    "krum": "strategies.krum:Krum",
    "multikrum": "strategies.krum:MultiKrum",
    "median": "strategies.median:Median",
    "trimmed_mean": "strategies.trimmed_mean:TrimmedMean",
    "geometric_median": "strategies.geometric_median:GeometricMedian",
    "normclip": "strategies.normclip:NormClip",
    "fedbuff": "strategies.fedbuff:FedBuff",
}
"""The names that `--strategy` takes, and where the classes are."""


def make(name: str, defaults: Mapping[str, Any] | None = None, /, **options: Any) -> Any:
    """Makes a strategy of this package, for one that works around another.

    Args:
        name: One of `STRATEGIES`.
        defaults: Keyword arguments that are passed where its class takes them and `options` does not hold them.
        options: Keyword arguments that its class must take.

    Raises:
        ValueError: There is no such strategy, or it does not take an option.
    """
    if name not in STRATEGIES:
        raise ValueError(f"there is no strategy {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    module, _, cls = STRATEGIES[name].rpartition(":")
    made = getattr(importlib.import_module(module), cls)
    parameters = inspect.signature(made).parameters
    if unknown := sorted(options.keys() - parameters.keys()):
        known = ", ".join(parameters) or "no option at all"
        raise ValueError(f"{name} does not take the option {unknown[0]!r}, but {known}")
    return made(**{**{n: v for n, v in (defaults or {}).items() if n in parameters}, **options})
