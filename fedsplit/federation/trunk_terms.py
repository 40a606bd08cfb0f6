"""Terms of a run for a trunk in another process: the settings and the files that the trunk's numbers depend on."""

from __future__ import annotations

import json
from pathlib import Path

import fedsplit
from fedsplit.federation.manifest import code_of, digest, settings_of
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.model.weight_files import find_tensors
from fedsplit.settings.config import Config
from fedsplit.trunk.run_terms import Terms

OF_NO_MATTER = frozenset(
    {
        *("data", "eval", "objective", "metric", "adapter", "network"),
        *("partition", "fraction", "weights", "keep_best", "min_delta", "unproved", "max_update_norm"),
        *("router_aux_loss", "train.micro_batches", "train.samples"),
        *("trunk.order", "trunk.group", "trunk.replicas", "trunk.sync", "trunk.weights"),
    }
)
"""Settings and sections on which no number of a trunk in one piece depends, beside those that no result depends on.

Clients know the data and the losses, and the federation chooses clients and their order. A trunk with replicas or
stages is no trunk in another process.
"""


def terms_of(config: Config) -> Terms:
    """Returns the terms of a run.

    Args:
        config: Settings of the run.

    Raises:
        SettingError: The model does not exist, or cannot be fetched.
    """
    values = {**settings_of(config), "rounds": config.rounds}  # the learning rate may depend on the length of a run
    settings = {}
    for name, value in values.items():
        section, _, _ = name.partition(".")
        if name not in OF_NO_MATTER and section not in OF_NO_MATTER:
            settings[name] = json.dumps(value)
    # The trunk's party need not have all weights: only files that both have are compared.
    weights = weights_folder(config, ["trunk"])
    files = {config_folder(config.model) / "config.json", *find_tensors(weights).values()}
    model = {file.name: digest(file) for file in sorted(files) if file.is_file()}
    return Terms(settings, model, _digests_of_code(config), fedsplit.__version__)


def _digests_of_code(config: Config) -> dict[str, str]:
    """Returns digests of the user's strategy and of the initial adapter, by setting and file."""
    files = {}
    strategy = code_of(config).get("strategy")
    if strategy is not None:
        files["strategy"] = strategy
    if config.init_adapter:
        for file in sorted(Path(config.init_adapter).glob("adapter_*")):  # no README
            files[f"init_adapter/{file.name}"] = file
    return {name: digest(file) for name, file in files.items()}
