"""Measures the compute times of all parts once, for a virtual clock that is then the same on every machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fedsplit.adaptation.run_adapters import adapt, bare_parts
from fedsplit.network.compute import TASKS
from fedsplit.settings.config import Config
from fedsplit.settings.validators import COMPUTE_TABLE

REPETITIONS = 7
"""Number of measured steps, after one that is not counted."""


def measured(config: Config, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Returns the compute times of a run's parts on this machine, in the form of `--network.compute`.

    Every value is the median over some steps of one client, divided by the tokens of its batch. All parts compute on
    the CPU, with torch's present number of threads.

    Args:
        config: Configuration, with model, cut, adapters, batch size and length.
        repetitions: Number of measured steps.

    Raises:
        InputError: The model cannot be found.
    """
    bottom, trunk, top = bare_parts(config, ["bottom", "trunk", "top"])
    for part in (bottom, trunk, top):
        adapt(part, config)
        part.train()
    shape = (config.train.batch_size, config.train.max_length)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % bottom.config.vocab_size
    seconds: dict[str, list[float]] = {task: [] for task in TASKS}

    def timed(task: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        seconds[task].append(time.perf_counter() - began)
        return result

    for _ in range(repetitions + 1):
        hidden = timed("bottom-forward", bottom, ids)
        # Detached at each cut, as between processes, so that the backward of each part is timed alone.
        below = hidden.detach().requires_grad_()
        middle = timed("trunk-forward", trunk, below)
        above = middle.detach().requires_grad_()
        loss = timed("top-forward", top, above, ids)
        timed("top-backward", loss.backward)
        timed("trunk-backward", middle.backward, above.grad)
        timed("bottom-backward", hidden.backward, below.grad)
    tokens = ids.numel()
    medians = {}
    for task, times in seconds.items():
        # The first step allocates memory.
        medians[task] = statistics.median(times[1:]) / tokens
    return {"model": config.model, "cut": config.cut, "threads": torch.get_num_threads(), COMPUTE_TABLE: medians}
