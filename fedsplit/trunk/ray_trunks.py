"""All Ray actors of a run's trunk: the stages of each replica, behind one port."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.settings.config import Config
from fedsplit.trunk import actor
from fedsplit.trunk.actor import ActorSetup, RayTrunk, Seat, start_trunk
from fedsplit.trunk.doors import JoinedTrunks, join
from fedsplit.trunk.port import TrunkPort
from fedsplit.trunk.spans import spans_of
from fedsplit.wire.packets import new_incarnation


class RayTrunks(JoinedTrunks):
    """The actors of a run's trunk, called like one trunk."""

    def __init__(self, config: Config, actors: Sequence[Sequence[RayTrunk]]) -> None:
        """Joins actors.

        Args:
            config: Configuration of the run.
            actors: The actors of each replica, from the bottom to the top.
        """
        super().__init__(config, actors)
        self._actors = [stage for stages in actors for stage in stages]

    def nodes(self) -> list[str]:
        """Returns Ray's ids of the actors' nodes, in the order of the actors.

        Raises:
            TrunkLost: An actor is gone.
        """
        return [one.node() for one in self._actors]

    def kill(self) -> None:
        """Ends all processes of the trunk. Processes that are gone already do no harm."""
        for one in self._actors:
            one.kill()


def start_trunks(
    config: Config,
    run: str,
    setup: ActorSetup,
    options: Sequence[Mapping[str, Any]] | None = None,
) -> RayTrunks:
    """Starts the actors of a run's trunk. All actors load their blocks while the caller goes on.

    Args:
        config: Configuration of the run.
        run: Name of the run. Clients find the trunk by the name, and steps carry the name.
        setup: Threads, workers and further facts of every actor.
        options: Options of each Ray actor: the resources that Ray keeps, and the place. None for no resources.
    """
    incarnation = new_incarnation()
    shares = config.trunk.tensor_parallel
    remaining = list(options or [])
    replicas = []
    for replica in range(config.trunk.replicas):
        stages: list[RayTrunk] = []
        # From the last stage to the first: each stage connects to the next one.
        for seat in reversed(_seats(config, run, incarnation, replica)):
            places = [remaining.pop() for _ in range(shares)] if remaining else None
            stages.insert(0, start_trunk(config, seat, setup, places))
        replicas.append(stages)
    return RayTrunks(config, replicas)


def _seats(config: Config, run: str, incarnation: str, replica: int) -> list[Seat]:
    """Returns the seat of each stage of a replica, from the bottom to the top.

    Args:
        config: Configuration of the run.
        run: Name of the run.
        incarnation: Identity of this start of the trunk.
        replica: Number of the replica.
    """
    spans = spans_of(config)
    last = len(spans) - 1
    # Stage by stage: the master of a stage lives in the same stage of the first replica.
    joins_first_replica = replica > 0 and config.trunk.sync == "step"
    seats = []
    for stage, span in enumerate(spans):
        seat = Seat(
            name=_name(run, replica, stage),
            run=run,
            incarnation=incarnation,
            span=span,
            rest=_name(run, replica, stage + 1) if stage < last else "",
            replica=replica,
            master=_name(run, 0, stage) if joins_first_replica else "",
        )
        seats.append(seat)
    return seats


def find_trunk(run: str, config: Config) -> TrunkPort:
    """Returns the trunk of a run for clients, from any process of the cluster.

    Raises:
        TrunkLost: An actor is gone.
    """
    trunks = []
    for replica in range(config.trunk.replicas):
        names = [_name(run, replica, stage) for stage in range(len(spans_of(config)))]
        trunks.append([actor.find_trunk(name) for name in names])
    return join(config, trunks)


def _name(run: str, replica: int, stage: int) -> str:
    """Returns the name of an actor. The first actor has the name of the run.

    Example:
        >>> _name("run", replica=0, stage=0), _name("run", replica=1, stage=2)
        ('run', 'run/1/2')
    """
    return run if replica == stage == 0 else f"{run}/{replica}/{stage}"
