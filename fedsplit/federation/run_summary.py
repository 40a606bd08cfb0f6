"""The content of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.federation.evaluation import clients_that_measure
from fedsplit.federation.run_state import RunState
from fedsplit.federation.strategy import aggregated_parts
from fedsplit.federation.training import mean
from fedsplit.settings.config import Config
from fedsplit.trunk.status import TrunkStatus
from fedsplit.updates import Adapters


def summarise(
    config: Config,
    state: RunState,
    parameters: Mapping[str, Any],
    left: int,
    trunk: TrunkStatus,
    ended_early: str,
) -> dict[str, Any]:
    """Returns the content of summary.json.

    Args:
        config: Configuration of the run.
        state: State at the end of the run.
        parameters: Counts of parameters by part.
        left: Round whose adapters the run leaves.
        trunk: Status of the trunk.
        ended_early: Reason why the run ends before its last round; empty for a run that is complete.
    """
    return {
        "seed": config.seed,
        "model": config.model,
        "clients": config.clients,
        "rounds": config.rounds,
        "last_round": state.stopping.last,
        "best_round": state.stopping.best,
        "adapter_round": left,
        "complete": not ended_early,
        "ended": ended_early or state.stopping.reason,
        "strategy": config.strategy,
        "aggregated_parts": aggregated_parts(config),
        "schedule": config.trunk.schedule,
        "cut": config.cut,
        **({"unproved": True} if config.unproved else {}),
        **({"at_sites": True} if config.data.at == "site" else {}),
        "parameters": dict(parameters),
        "eval_loss": {"before": state.before, "after": state.after},
        "eval_round": state.measured,
        "eval_clients": len(clients_that_measure(config)),
        **({"accuracy": state.accuracy} if state.accuracy else {}),
        **({"metrics": state.metrics} if state.metrics else {}),
        "forgotten": mean(list(state.forgotten.values())) if state.forgotten else None,
        "aggregation_error": state.error,
        **state.totals.summary(trunk.traffic.ledger()),
        **({} if state.virtual is None else {"virtual": state.virtual.summary()}),
        "peak_memory": {"client": state.totals.client_memory, "trunk": trunk.peak_memory},
    }


def norms_of(adapters: Adapters) -> dict[str, float]:
    """Returns the Frobenius norm of the change that an adapter makes to a layer's weights, by layer.

    Args:
        adapters: Adapter of the whole model, with the changes that were folded into base weights. Layers without two
            factors are left out.
    """
    norms = {}
    for layer in adapters.complete:
        change = adapters.change(layer)
        if layer in adapters.folded:
            change = change + adapters.folded[layer].to(change.up.dtype)
        norms[layer] = change.norm()
    return norms
