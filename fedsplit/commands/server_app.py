"""The server's side of `flwr run`: settings from the run configuration, then a run as by `fedsplit simulate`."""

from __future__ import annotations

import os
import sys
import warnings

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.commands.run_checks import checked
from fedsplit.commands.simulate import run
from fedsplit.corpora.sharding import Partition
from fedsplit.engines import flower_runtime, flower_sites
from fedsplit.environment import private_files
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.clients import FederationFailed
from fedsplit.settings.config import Config
from fedsplit.settings.flags import read_draft
from fedsplit.settings.run_config import ENGINE, Value, words_of
from fedsplit.watchdog import Hung

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Plays a run.

    Raises:
        InputError: The run configuration is wrong. Nothing has been written.
        FederationFailed, RefusedUpdate, TrunkLost: The run broke, or ended before its last round.
    """
    warnings.simplefilter("ignore")  # libraries warn of much that no user can change
    try:
        with private_files():
            config = config_of(dict(context.run_config), len(list(grid.get_node_ids())))
            if config.data.at == "site":
                summary = run(config, opens=flower_sites.opens(grid), read=unread)
            else:
                flower_runtime.wait_for_ray()
                summary = run(config, opens=flower_runtime.opens(grid))
    except InputError as error:
        for each in error.errors:
            print("fedsplit:", each, file=sys.stderr)  # the same line as that of the command, before Flower's traceback
        raise
    except Hung as hung:  # Flower takes a run for completed after an error that is no `Exception`
        raise FederationFailed(str(hung)) from hung
    if not summary["complete"]:
        raise FederationFailed(f"the run ended early: {summary['ended']}")


def unread(config: Config) -> Partition:
    """Returns the data of a run whose clients read their data at their own sites: nothing that the server knows."""
    return Partition([], config.data.format, packed=False, by="", cut=0, dropped=0)


def config_of(run_config: dict[str, Value], nodes: int) -> Config:
    """Returns the settings of a run configuration.

    Args:
        run_config: Values by key.
        nodes: Number of SuperNodes.

    Raises:
        InputError: A value is wrong, or the settings do not fit a run under Flower. All errors of the values are
            reported together.

    Example:
        >>> config_of({"num-server-rounds": 2, "local-steps": 3}, nodes=4).train.steps
        3
    """
    config = checked(read_draft(words_of(run_config, nodes)))
    if config.engine != ENGINE:
        raise SettingError("engine", config.engine, f"{ENGINE} under flwr run, since Flower starts the clients")
    if config.ray.address != "local":
        raise SettingError("ray.address", config.ray.address, "local under flwr run, whose Ray Flower starts")
    if config.clients != nodes and config.data.at != "site":  # sites may connect later
        how = f"flwr run . --federation-config 'num-supernodes={config.clients}' simulates another number"
        allowed = f"{nodes}, the number of SuperNodes, or 0; {how}"
        raise SettingError("clients", config.clients, allowed)
    if not os.path.isabs(config.out) and config.out:
        allowed = "an absolute path under flwr run, which works in the folder of the SuperLink"
        raise SettingError("out", config.out, allowed)
    return config
