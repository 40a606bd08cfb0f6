"""Aggregation strategies: from the clients' adapters to the adapters of the next round.

Each strategy is one file, a page to be copied. A strategy needs torch and the lowest modules of fedsplit only:
`updates`, `lowrank`, `stages` and `seeds`.

Example:
    >>> strategy = make("fedprox", mu=0.1)
    >>> strategy.mu
    0.1
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
"""Modules and classes of strategies, by the names for `--strategy`. A module is imported when a run needs it."""


# Positional only, so that a strategy may have options called `name` and `defaults`.
def make(name: str, defaults: Mapping[str, Any] | None = None, /, **options: Any) -> Any:
    """Makes a strategy of this package by name.

    Args:
        name: A key of `STRATEGIES`.
        defaults: Keyword arguments for a class with parameters of these names. Further arguments are ignored.
        options: Keyword arguments that the class must take. An option takes precedence over a default.

    Raises:
        ValueError: The strategy does not exist, or does not take an option.

    Example:
        >>> make("fedprox", mu=0.5).mu
        0.5
    """
    if name not in STRATEGIES:
        raise ValueError(f"there is no strategy {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    module, _, class_name = STRATEGIES[name].rpartition(":")
    strategy_class = getattr(importlib.import_module(module), class_name)

    parameters = inspect.signature(strategy_class).parameters
    unknown = sorted(options.keys() - parameters.keys())
    if unknown:
        known = ", ".join(parameters) or "no option at all"
        raise ValueError(f"{name} does not take the option {unknown[0]!r}, but {known}")

    # Defaults are facts of the run, such as the seed. Only some strategies take them.
    keywords = {}
    for key, value in (defaults or {}).items():
        if key in parameters:
            keywords[key] = value
    keywords |= options
    return strategy_class(**keywords)
