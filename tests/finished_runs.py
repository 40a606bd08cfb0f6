"""Finished runs of tiny models, for tests of what is done after a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_corpus
from local_federation import federate

from fedsplit.federation.strategy import load_strategy
from fedsplit.settings.documents import build


class Runs:
    """Runs federations, each only once; two rounds of three clients, a copy of the trunk for each."""

    def __init__(self, models: dict[str, Path], folder: Path) -> None:
        self._models, self._folder = models, folder
        self.corpus = write_corpus(folder / "corpus.jsonl")

    def __call__(self, model: str, strategy: str = "fedavg", **settings: object) -> Path:
        """The folder of a run.

        Args:
            model: A family's name, or a folder.
            strategy: A strategy's name.
            **settings: Settings by dotted name, two underscores for a dot; and `metric_options`.
        """
        words = [model.rpartition("/")[2], strategy, *(f"{name}={value}" for name, value in settings.items())]
        out = self._folder / "_".join(words).replace(" ", "")
        if out.exists():
            return out
        values: dict[str, object] = {"clients": 3, "rounds": 2, "cut": "1:2", "dataset": str(self.corpus)}
        values |= {
            "model": model if "/" in model else str(self._models[model]),
            "partition": "natural",
            "trunk.schedule": "copies",
        }
        values |= {"lora.rank": 2, "lora.alpha": 3.0, "lora.dropout": 0.0, "train.lr": 0.02, "strategy": strategy}
        values |= {"train.steps": 3, "train.batch_size": 2, "train.max_length": 16}
        metric_options: Any = settings.pop("metric_options", None)
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        config = build(values, metric_options=metric_options)
        rule = load_strategy(strategy, {}, {"seed": config.seed, "clients": config.clients})
        with pytest.MonkeyPatch.context() as patch:
            federate(config, out, rule, patch)
        return out
