"""Who holds which adapters: what all share, what stays with a client, and what a client has already been given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation.methods import method_of
from fedsplit.allowed import PARTS
from fedsplit.config import Config
from fedsplit.lowrank import LowRank
from fedsplit.model.store import ClientStore, FoldLog
from fedsplit.trunk.learners import Copy, Start
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Traits, factor_of


class Holdings:
    """The server's account of a federation's adapters.

    To the strategy the adapters are one set: those of bottom and top, and with a copy of the trunk for each client
    the trunk's, too. Of these some are shared, the others personal, and those of the trunk never cross.

    Attributes:
        start: What the strategy's first round starts from: everything that is aggregated.
        accepted: By client, the last round of which its update was accepted.
        folded: What was folded into base weights in all, by layer.
        news: What was folded in the last round into layers at the clients, and has to reach all of them.
        last_fold: The last round in which anything was folded.
    """

    def __init__(self, config: Config, traits: Traits, parts: Mapping[str, Adapters], root: Path, log: Path) -> None:
        """Sorts the adapters.

        Args:
            config: The run's.
            traits: The strategy's.
            parts: The adapters of bottom, trunk and top that training starts from, at the largest rank.
            root: The folder of the clients' disks.
            log: Where the server remembers what was folded.
        """
        self._root, self._log = root, FoldLog(log)
        self._clients, self._trunk = parts["bottom"] | parts["top"], parts["trunk"]
        everything = self._clients | self._trunk if SCHEDULES[config.trunk.schedule].personal else self._clients
        self._at_clients = frozenset(self._clients.tensors)
        alone = {name for part in PARTS if part not in config.share for name in parts[part].tensors}
        self._personal = alone | {n for n in everything.tensors if factor_of(n) in traits.personal}
        self.start = everything.with_tensors({n: t for n, t in everything.tensors.items() if n not in alone})
        self.accepted: dict[int, int] = {}
        self.folded: dict[str, LowRank] = {}
        if method_of(config.lora).residual:  # every party has taken out of its base weights what it starts from
            starts = [(layer, part.change(layer)) for part in parts.values() for layer in part.complete]
            self.folded = {layer: start.times(-1.0).to(torch.float32) for layer, start in starts}
        self.news: dict[str, LowRank] = {}
        self.last_fold = 0
        self._held: dict[int, dict[str, Tensor]] = {}
        self._own: dict[int, dict[str, Tensor]] = {}
        self._control: dict[int, dict[str, Tensor]] = {}
        self._stage: dict[int, dict[str, Tensor]] = {}

    @property
    def has_personal(self) -> bool:
        """Whether clients have adapters of their own, which change whenever they train."""
        return bool(self._personal)

    def crossing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some tensors, by exported name, that a message to a client may hold."""
        return {n: t for n, t in tensors.items() if n in self._at_clients and n not in self._personal}

    def lacking(self, client: int, assignment: Assignment) -> dict[str, Tensor]:
        """What a client must be sent: what it cannot draw, and does not hold since an earlier round or the start."""
        tensors = self.crossing(assignment.adapters.tensors)
        unknown = client in self.accepted and client not in self._held
        known = self._held.get(client, {})
        start = _at_rank_of(assignment, self._clients)

        def has(name: str, tensor: Tensor) -> bool:
            if assignment.drawn is not None and factor_of(name) is not None:
                return True
            if unknown:
                return False
            held = known.get(name, start[name])
            return held.shape == tensor.shape and torch.equal(held, tensor)

        return {name: tensor for name, tensor in tensors.items() if not has(name, tensor)}

    def sent(self, assignment: Assignment) -> tuple[Adapters, set[str]]:
        """What a client starts from, as far as it is shared and at the client; and what of it must come back."""
        given = assignment.adapters.with_tensors(self.crossing(assignment.adapters.tensors))
        return given, {n for n in given.tensors if _trains(n, assignment)}

    def accept(self, client: int, round: int, assignment: Assignment) -> None:
        """A client's update counts: it now holds what it was given and did not train."""
        self.accepted[client] = round
        given = self.crossing(assignment.adapters.tensors)
        self._held[client] = {n: t for n, t in given.items() if not _trains(n, assignment)}

    def trunk_start(self, client: int, assignment: Assignment) -> Start:
        """What a client's copy of the trunk's adapter starts from."""
        start = _at_rank_of(assignment, self._trunk)
        given = {n: t for n, t in assignment.adapters.tensors.items() if n in self._trunk.tensors}
        own = self._own.get(client, {})
        control, afresh = self._control.get(client, {}), assignment.drawn is not None
        return Start({**start, **given, **own}, assignment.task, control, afresh, self._stage.get(client, {}))

    def with_copies(
        self, updates: Sequence[ClientUpdate], copies: Mapping[int, Copy], assigned: Mapping[int, Assignment]
    ) -> list[ClientUpdate]:
        """Updates with what the clients' copies of the trunk have become; what of it is personal stays here.

        Args:
            updates: Of the clients' own parts.
            copies: By client.
            assigned: What each of them began the round with.
        """
        whole = []
        for update in updates:
            copy, given = copies[update.client], assigned[update.client].adapters
            shared = {n: t for n, t in copy.adapters.tensors.items() if n not in self._personal}
            self._own[update.client] = {n: t for n, t in copy.adapters.tensors.items() if n in self._personal}
            self._stage[update.client] = dict(copy.kept)
            # Without a control variate, what came up is the own stage's, which the server does not add up.
            changes = {} if assigned[update.client].task.control is None else copy.control
            known = self._control.get(update.client, {})
            self._control[update.client] = {n: known[n] + t if n in known else t for n, t in changes.items()}
            whole.append(
                replace(
                    update,
                    adapters=update.adapters | copy.adapters.with_tensors(shared),
                    given=given.with_tensors({n: t for n, t in given.tensors.items() if n not in self._personal}),
                    control={**update.control, **{n: t for n, t in copy.control.items() if n in shared}},
                )
            )
        return whole

    def trunk_end(self, adapters: Adapters) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """What the trunk goes on with: the shared adapter, and a whole one for each client that has its own."""
        shared = {n: adapters.tensors.get(n, t) for n, t in self._trunk.tensors.items()}
        return shared, {client: {**shared, **own} for client, own in self._own.items() if own}

    def fold(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Takes note of what is folded into base weights at the end of a round."""
        sent = {layer: change.to(torch.float32) for layer, change in changes.items()}
        self.news = {layer: change for layer, change in sent.items() if layer in self._clients.layers}
        if sent:
            self._log.append(round, sent)
            self._remember(round, sent)

    def _remember(self, round: int, changes: Mapping[str, LowRank]) -> None:
        self.last_fold = round
        for layer, change in changes.items():
            whole = self.folded[layer] + change if layer in self.folded else change
            self.folded[layer] = whole.compressed().to(torch.float32) if whole.rank > min(whole.shape) else whole

    def everything(self, adapters: Adapters, trunk: Adapters) -> Adapters:
        """The whole model's adapters, with all that was folded; of what is not shared, where training starts from."""
        return replace(trunk | self._clients | adapters, folded=self.folded)

    def personal_adapters(self) -> dict[int, dict[str, Tensor]]:
        """By client, the adapters that are its own; for those that have any."""
        found = {}
        for client, round in self.accepted.items():
            own = {**ClientStore(self._root, client).load(round).personal, **self._own.get(client, {})}
            if own:
                found[client] = own
        return found

    def snapshot(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """What a run that goes on must know: facts, and groups of tensors."""
        groups = {f"own-{client}": own for client, own in self._own.items()}
        groups |= {f"control-{client}": control for client, control in self._control.items()}
        groups |= {f"stage-{client}": stage for client, stage in self._stage.items()}
        return {"accepted": {str(client): round for client, round in self.accepted.items()}}, groups

    def restore(
        self, round: int, facts: Mapping[str, Any], groups: Mapping[str, dict[str, Tensor]]
    ) -> list[dict[str, LowRank]]:
        """Goes on from a snapshot.

        What clients hold is not in it: they are sent everything again.

        Returns:
            What was folded until that round, in order, for the trunk to do again.
        """
        self.accepted = {int(client): accepted for client, accepted in facts["accepted"].items()}
        for name, tensors in groups.items():
            kind, _, client = name.partition("-")
            if (of_clients := {"own": self._own, "control": self._control, "stage": self._stage}.get(kind)) is not None:
                of_clients[int(client)] = tensors
        for log in (self._log, FoldLog(self._root / "folds")):  # of rounds that were not finished
            log.forget(round)
        past = [self._log.read(number) for number in range(1, round + 1)]
        for number, changes in enumerate(past, start=1):
            if changes:
                self._remember(number, changes)
        return past


def _at_rank_of(assignment: Assignment, start: Adapters) -> Mapping[str, Tensor]:
    """What training starts from, at the rank that a client is given; as it is where the client is given no factors."""
    rank = assignment.adapters.largest_rank
    return start.with_rank(rank).tensors if rank else start.tensors


def _trains(name: str, assignment: Assignment) -> bool:
    return factor_of(name) is None or factor_of(name) in assignment.task.trains
