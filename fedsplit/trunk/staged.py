"""A trunk in stages behind one port: control messages reach every stage, and the replies are joined.

Packets go to the first stage, which passes them on (`fedsplit.trunk.route`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import Tensor

from fedsplit.network.trace import joined_stages
from fedsplit.trunk import port
from fedsplit.trunk.copies import Copy, Start
from fedsplit.trunk.port import Control, Reply, TrunkPort, union
from fedsplit.trunk.status import Bytes, Count, RoundCounts, Traffic, TrunkStatus, with_joint_memory
from fedsplit.updates import Adapters
from fedsplit.wire.packets import Packet
from fedsplit.wire.transport import PendingAnswer

T = TypeVar("T")


class StagedTrunk(TrunkPort):
    """A trunk whose blocks are spread over several trunks, from the bottom to the top.

    Adapters, copies and moments are those of the whole trunk: a run may go on with other stages, or with none.
    """

    def __init__(self, stages: Sequence[TrunkPort]) -> None:
        """Joins stages.

        Args:
            stages: Trunks with the blocks of one stage each. The first passes packets on to the others.
        """
        self._stages = stages

    @functools.cached_property
    def _names(self) -> list[frozenset[str]]:
        """Names of the adapter's tensors, by stage."""
        # Kept, since the names never change, and each stage sends its whole adapter for them.
        return [frozenset(stage.read().tensors) for stage in self._stages]

    def send(self, packet: Packet) -> PendingAnswer:
        """Sends a packet to the first stage, and returns a function that waits for the answer."""
        return self._stages[0].send(packet)

    def control(self, message: Control[Reply]) -> Reply:
        """Sends a control message to each stage, and returns the joined reply."""
        replies: list[Any] = []
        for number, stage in enumerate(self._stages):
            replies.append(stage.control(self._for_stage(message, number)))
        joined: Any = joined_stages(replies) if isinstance(message, port.TakeTrace) else _joined(replies)
        return joined

    def _for_stage(self, message: Control[Reply], number: int) -> Control[Reply]:
        """Returns the share of a message that concerns the adapter of one stage."""

        def select(tensors: Mapping[str, T]) -> dict[str, T]:
            names = self._names[number]
            return {name: value for name, value in tensors.items() if _parameter_of(name) in names}

        of_stage: Control[Any] = message
        match message:
            case port.AssignCopies(starts):
                selected = {client: _start_of(start, select) for client, start in starts.items()}
                of_stage = port.AssignCopies(selected)
            case port.AssignAgain(client, start):
                of_stage = port.AssignAgain(client, _start_of(start, select))
            case port.WriteAdapter(tensors, personal):
                own = {client: select(adapter) for client, adapter in personal.items()}
                of_stage = port.WriteAdapter(select(tensors), own)
            case port.Restore(tensors, moments):
                # To every stage: names of a codec's state carry the side, and each stage picks out its own (`ByRole`).
                codecs = {name: value for name, value in moments.items() if name.startswith(port.CODEC)}
                of_stage = port.Restore(select(tensors), {**select(moments), **codecs})
        return of_stage


def _parameter_of(name: str) -> str:
    """Returns the name of the parameter in a name among moments: without a client before it, or a kind behind it.

    Example:
        >>> _parameter_of("3/layer.lora_A.weight:exp_avg")
        'layer.lora_A.weight'
    """
    return name.rpartition("/")[2].partition(":")[0]


def _start_of(start: Start, select: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Start:
    """Returns the start of a client's copy for one stage."""
    task = start.task
    if task.control is not None:
        task = replace(task, control=select(task.control))
    return replace(
        start,
        tensors=select(start.tensors),
        task=task,
        own=select(start.own),
        kept=select(start.kept),
    )


def _joined(replies: Sequence[Any]) -> Any:
    """Joins the replies of all stages to one message."""
    first = replies[0]
    if isinstance(first, RoundCounts):
        return _joined_counts(replies)
    if isinstance(first, TrunkStatus):
        return _joined_status(replies)
    if isinstance(first, Adapters):
        return _joined_adapters(replies)
    if isinstance(first, float):  # seconds of a step, which goes through all stages
        return sum(replies)
    if isinstance(first, dict):
        has_copies = any(isinstance(value, Copy) for reply in replies for value in reply.values())
        return _joined_copies(replies) if has_copies else union(replies)
    return first


def _joined_copies(replies: Sequence[Mapping[int, Copy]]) -> dict[int, Copy]:
    """Returns the copies of the clients that have a copy at every stage."""
    clients = set.intersection(*map(set, replies))
    joined = {}
    for client in sorted(clients):
        joined[client] = _joined_copy([reply[client] for reply in replies])
    return joined


def _joined_counts(counts: Sequence[RoundCounts]) -> RoundCounts:
    """Returns the largest count of any stage: each stage counts all steps."""
    joined = RoundCounts()
    for event in fields(RoundCounts):
        setattr(joined, event.name, max(getattr(count, event.name) for count in counts))
    return joined


def _joined_status(statuses: Sequence[TrunkStatus]) -> TrunkStatus:
    """Returns the state of the whole trunk, with the memory of all processes."""
    first = statuses[0]
    totals = [status.parameters for status in statuses]
    joined = replace(
        first,
        traffic=_joined_traffic([status.traffic for status in statuses]),
        pending=max(status.pending for status in statuses),
        # Stages have disjoint parameters. Every stage holds all pending steps, so that those are not summed.
        parameters={name: sum(counts[name] for counts in totals) for name in first.parameters},
        least_memory=max(status.least_memory for status in statuses),
    )
    return with_joint_memory(joined, statuses)


def _joined_traffic(traffics: Sequence[Traffic]) -> Traffic:
    """Returns the bytes between clients and trunk, and apart from them the bytes between stages."""
    first = traffics[0]
    last = traffics[-1]
    # Gradients enter the trunk at the last stage, and leave at the first.
    joined = Traffic(gradient=_through(last.gradient, first.gradient))
    most_up = max((traffic.repeated for traffic in traffics), key=lambda crossed: crossed.up)
    most_down = max((traffic.repeated for traffic in traffics), key=lambda crossed: crossed.down)
    joined.repeated = _through(most_up, most_down)
    # Hidden states enter at the first stage, and leave at the last.
    for purpose in ("activation", "evaluation_activation", "reference", "prompt", "token"):
        setattr(joined, purpose, _through(getattr(first, purpose), getattr(last, purpose)))
    for with_a_stage_below in traffics[1:]:
        for crossed in vars(with_a_stage_below).values():
            inside = joined.between_stages.counts()
            for prefix, count in crossed.counts().items():
                inside[prefix].up += count.up
                inside[prefix].down += count.down
    return joined


def _through(entered: Bytes, left: Bytes) -> Bytes:
    """Returns the bytes that clients sent to one stage, and got from another."""
    joined = Bytes()
    for prefix, count in joined.counts().items():
        up, down = entered.counts()[prefix], left.counts()[prefix]
        count.include(Count(up.up, down.down, up.up_by_client, down.down_by_client))
    return joined


def _joined_adapters(adapters: Sequence[Adapters]) -> Adapters:
    """Returns the adapters of all stages together."""
    tensors = union(stage.tensors for stage in adapters)
    layers = union(stage.layers for stage in adapters)
    return Adapters(tensors, layers)


def _joined_copy(copies: Sequence[Copy]) -> Copy:
    """Returns a client's copy of the whole trunk's adapter."""
    steps = [copy.steps for copy in copies if copy.steps is not None]
    return Copy(
        _joined_adapters([copy.adapters for copy in copies]),
        control=union([copy.control for copy in copies]),
        kept=union([copy.kept for copy in copies]),
        steps=min(steps, default=None),  # a stage that lacks a step is noticed
    )
