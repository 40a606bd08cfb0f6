"""The server's ledger of adapters: who has which tensors, and what each client must still be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation.methods import method_of
from fedsplit.federation.travel import TravelRule, is_drawn, is_held, stays
from fedsplit.lowrank import LowRank
from fedsplit.optimization.terms import moved
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.state.client_store import ClientStore
from fedsplit.state.fold_log import FOLDS, FoldLog
from fedsplit.trunk.registry import Copy, Start
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Traits


class AdapterLedger:
    """The server's account of a federation's adapters.

    To the strategy the adapters are one set: those of bottom and top, and with a copy of the trunk for each client
    the trunk's, too. Some of these are shared, the others personal. Those of the trunk never cross.

    Attributes:
        rule: Which adapters of bottom and top cross, and which stay with their client.
        start: Adapters that the strategy's first round starts from: all that are aggregated.
        accepted: By client, the last round of which its update was accepted.
        folded: Sum of all changes of base weights, by layer.
        news: Changes of the last round in layers at the clients, which all of them must receive.
        last_fold: Last round in which base weights changed.
        folds_at_clients: Number of rounds in which base weights changed at the clients.
        discarded: Number of discarded rounds that had changed base weights.
    """

    def __init__(self, config: Config, traits: Traits, parts: Mapping[str, Adapters], root: Path, log: Path) -> None:
        """Sorts the adapters.

        Args:
            config: Configuration of the run.
            traits: Traits of the strategy.
            parts: Adapters of bottom, trunk and top that training starts from, at the largest rank.
            root: Folder of the clients' disks.
            log: Folder in which the server keeps the changes of base weights.
        """
        self._root = root
        self._logs = [FoldLog(log), FoldLog(root / FOLDS)]
        self._clients = parts["bottom"] | parts["top"]
        self._trunk = parts["trunk"]
        self.rule = TravelRule.of({part: parts[part] for part in ("bottom", "top")}, config.share, traits.personal)

        has_copies = SCHEDULES[config.trunk.schedule].personal
        everything = self._clients | self._trunk if has_copies else self._clients
        unshared = {name for part in PARTS if part not in config.share for name in parts[part].tensors}
        self._personal = unshared | {name for name in everything.tensors if stays(name, traits.personal)}
        aggregated = {name: tensor for name, tensor in everything.tensors.items() if name not in unshared}
        self.start = everything.with_tensors(aggregated)

        self.accepted: dict[int, int] = {}
        self.folded: dict[str, LowRank] = {}
        if method_of(config.lora).residual:  # every party has taken its start out of its base weights
            for part in parts.values():
                for layer in part.complete:
                    self.folded[layer] = part.change(layer).times(-1.0).to(torch.float32)
        self.news: dict[str, LowRank] = {}
        self.last_fold = 0
        self.folds_at_clients = 0
        self.discarded = 0
        self._unwritten: dict[int, Mapping[str, LowRank]] = {}  # changes of base weights by round
        self._held: dict[int, dict[str, Tensor]] = {}
        self._own: dict[int, dict[str, Tensor]] = {}
        self._control: dict[int, dict[str, Tensor]] = {}
        self._stage: dict[int, dict[str, Tensor]] = {}

    def copy(self) -> AdapterLedger:
        """Returns a ledger that can change without this one; tensors are shared, since none is written to."""
        twin = copy(self)
        for name in ("accepted", "folded", "news", "_unwritten", "_held", "_own", "_control", "_stage"):
            setattr(twin, name, dict(getattr(self, name)))
        return twin

    @property
    def has_personal(self) -> bool:
        """Returns whether clients have adapters of their own, which change with every training."""
        return bool(self._personal)

    def lacking(self, client: int, assignment: Assignment) -> dict[str, Tensor]:
        """Returns the tensors of an assignment that the client neither draws nor holds already."""
        tensors = self.rule.crosses(assignment.adapters.tensors)
        if client in self.accepted and client not in self._held:  # after a resume it is not known what clients hold
            return {name: tensor for name, tensor in tensors.items() if not is_drawn(name, assignment.drawn)}

        start = _at_rank_of(assignment, self._clients)
        held = {**start, **self._held.get(client, {})}
        missing = {}
        for name, tensor in tensors.items():
            if not is_drawn(name, assignment.drawn) and not is_held(tensor, held[name]):
                missing[name] = tensor
        return missing

    def given(self, assignment: Assignment) -> Adapters:
        """Returns the adapters that a client starts from, as far as they cross."""
        return assignment.adapters.with_tensors(self.rule.crosses(assignment.adapters.tensors))

    def accept(self, client: int, round: int, assignment: Assignment) -> None:
        """Records that a client's update counts: the client holds what it was given and did not train."""
        given = self.rule.crosses(assignment.adapters.tensors)
        untrained = self.rule.untrained(given, assignment.task)
        self.accepted[client] = round
        self._held[client] = {name: tensor for name, tensor in given.items() if name in untrained}

    def trunk_start(self, client: int, assignment: Assignment) -> Start:
        """Returns the start of a client's copy of the trunk's adapter."""
        start = _at_rank_of(assignment, self._trunk)
        given = {name: t for name, t in assignment.adapters.tensors.items() if name in self._trunk.tensors}
        tensors = {**start, **given, **self._own.get(client, {})}
        return Start(
            tensors,
            assignment.task,
            own=self._control.get(client, {}),
            afresh=assignment.drawn is not None,
            kept=self._stage.get(client, {}),
        )

    def with_copies(
        self, updates: Sequence[ClientUpdate], copies: Mapping[int, Copy], assigned: Mapping[int, Assignment]
    ) -> list[ClientUpdate]:
        """Adds the clients' copies of the trunk's adapter to their updates; personal tensors of a copy stay here.

        Args:
            updates: Updates of the clients' own parts.
            copies: Copies at the end of the round, by client.
            assigned: Assignments that the clients began the round with.
        """
        return [self._with_copy(update, copies[update.client], assigned[update.client]) for update in updates]

    def _with_copy(self, update: ClientUpdate, trunk: Copy, assignment: Assignment) -> ClientUpdate:
        client = update.client
        self._stage[client] = dict(trunk.kept)
        # Without a control variate the tensors are of the strategy's own stage, and do not add up from round to round.
        changes = {} if assignment.task.control is None else trunk.control
        self._control[client] = moved(self._control.get(client, {}), changes)
        self._own[client] = {name: t for name, t in trunk.adapters.tensors.items() if name in self._personal}

        shared = self._without_personal(trunk.adapters)
        given = self._without_personal(assignment.adapters)
        shared_control = {name: tensor for name, tensor in trunk.control.items() if name in shared.tensors}
        return replace(
            update,
            adapters=update.adapters | shared,
            given=given,
            control={**update.control, **shared_control},
        )

    def _without_personal(self, adapters: Adapters) -> Adapters:
        tensors = {name: tensor for name, tensor in adapters.tensors.items() if name not in self._personal}
        return adapters.with_tensors(tensors)

    def trunk_end(self, adapters: Adapters) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """Returns the trunk's adapters after a round: the shared one, and those of clients that have their own."""
        shared = {name: adapters.tensors.get(name, tensor) for name, tensor in self._trunk.tensors.items()}
        return shared, {client: {**shared, **own} for client, own in self._own.items() if own}

    def fold(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Records the changes of base weights at the end of a round; `write_folds` writes them to the disk."""
        sent = {layer: change.to(torch.float32) for layer, change in changes.items()}
        self.news = self._at_clients(sent)
        if sent:
            self._unwritten[round] = sent
            self._remember(round, sent)

    def write_folds(self) -> None:
        """Writes the changes of base weights that are not on the server's disk yet.

        Raises:
            NotWritten: They could not be written; the next call tries again.
        """
        for round, changes in sorted(self._unwritten.items()):
            self._logs[0].append(round, changes)
            del self._unwritten[round]

    def past_changes(self, round: int) -> list[dict[str, LowRank]]:
        """Returns the changes of base weights of every round up to one, in order; empty for a round without any."""
        numbers = range(1, round + 1)
        unwritten = self._unwritten
        return [dict(unwritten[n]) if n in unwritten else self._logs[0].read(n) for n in numbers]

    def _at_clients(self, changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
        return {layer: change for layer, change in changes.items() if layer in self._clients.layers}

    def _remember(self, round: int, changes: Mapping[str, LowRank]) -> None:
        self.last_fold = round
        self.folds_at_clients += bool(self._at_clients(changes))
        for layer, change in changes.items():
            total = self.folded[layer] + change if layer in self.folded else change
            self.folded[layer] = total.compressed().to(torch.float32) if total.rank > min(total.shape) else total

    def discard(self, round: int) -> None:
        """Drops the changes of base weights that were written down by a round that does not count.

        Args:
            round: The last round that counts.
        """
        self.discarded += 1
        self._forget(round)

    def _forget(self, round: int) -> None:
        for log in self._logs:
            log.forget(round)

    def everything(self, adapters: Adapters, trunk: Adapters) -> Adapters:
        """Returns the whole model's adapters with all changes of base weights; unshared ones are those of the start."""
        return replace(trunk | self._clients | adapters, folded=self.folded)

    def personal_adapters(self) -> dict[int, dict[str, Tensor]]:
        """Returns the personal tensors by client, for clients that have any."""
        found = {}
        for client, round in self.accepted.items():
            stored = ClientStore(self._root, client).load(round).personal
            own = {**stored, **self._own.get(client, {})}
            if own:
                found[client] = own
        return found

    def snapshot(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Returns the ledger for a checkpoint: plain values, and tensors by group."""
        groups = {f"own-{client}": own for client, own in self._own.items()}
        groups |= {f"control-{client}": control for client, control in self._control.items()}
        groups |= {f"stage-{client}": stage for client, stage in self._stage.items()}
        return {"accepted": {str(client): round for client, round in self.accepted.items()}}, groups

    def restore(self, round: int, facts: Mapping[str, Any], groups: Mapping[str, dict[str, Tensor]]) -> None:
        """Goes on from a checkpoint.

        Tensors that clients hold are not in it: they are sent again.
        """
        self.accepted = {int(client): accepted for client, accepted in facts["accepted"].items()}
        for name, tensors in groups.items():
            kind, _, client = name.partition("-")
            if kind == "own":
                self._own[int(client)] = tensors
            elif kind == "control":
                self._control[int(client)] = tensors
            elif kind == "stage":
                self._stage[int(client)] = tensors

        self._forget(round)  # rounds that were not finished
        for number, changes in enumerate(self.past_changes(round), start=1):
            if changes:
                self._remember(number, changes)
                self._logs[1].restore(number, self._at_clients(changes))


def _at_rank_of(assignment: Assignment, start: Adapters) -> Mapping[str, Tensor]:
    """Returns the start of training at the rank of an assignment; as it is where the assignment has no factors."""
    rank = assignment.adapters.largest_rank
    return start.with_rank(rank).tensors if rank else start.tensors
