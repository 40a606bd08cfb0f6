"""The server's ledger of adapters: the tensors that each client holds, and so the tensors still to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.adaptation.methods import method_of
from fedsplit.factors import select
from fedsplit.federation.travel import TravelRule, is_drawn, is_held, stays
from fedsplit.lowrank import LowRank
from fedsplit.optimization.terms import moved
from fedsplit.settings.choices import PARTS
from fedsplit.settings.config import Config
from fedsplit.state.client_store import ClientStore
from fedsplit.state.fold_log import FOLDS, FoldLog
from fedsplit.trunk.copies import Copy, Start
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Adapters, Assignment, ClientUpdate, Traits


class AdapterLedger:
    """The server's account of all adapters.

    A strategy sees a single set of adapters: bottom, top, and under `copies` also the trunk. Each tensor is either
    shared or personal. Tensors of the trunk never cross to clients.

    Attributes:
        rule: Names of the adapters of bottom and top that cross, and of the personal ones.
        start: All aggregated adapters, at the start of the first round.
        accepted: Last round in which the server accepted an update, by client.
        folded: Sum of all changes of base weights, by layer.
        news: Changes of the last round in layers of the clients. Every client must receive them.
        last_fold: Last round in which base weights changed.
        folds_at_clients: Number of rounds in which base weights changed at the clients.
        discarded: Number of discarded rounds that had changed base weights.
    """

    def __init__(
        self,
        config: Config,
        traits: Traits,
        parts: Mapping[str, Adapters],
        root: Path,
        log: Path,
    ) -> None:
        """Divides the adapters into shared and personal tensors.

        Args:
            config: Configuration of the run.
            traits: Traits of the strategy.
            parts: Initial adapters of bottom, trunk and top, at the largest rank.
            root: Folder of the clients' disks.
            log: Folder of the server's log of changes of base weights.
        """
        self._root = root
        self._are_pinned = config.data.stays_with_clients
        self._logs = [FoldLog(log), FoldLog(root / FOLDS)]  # the server's own, and the one that clients read
        self._clients = parts["bottom"] | parts["top"]
        self._trunk = parts["trunk"]
        at_clients = {part: parts[part] for part in ("bottom", "top")}
        self.rule = TravelRule.of(at_clients, config.share, traits.personal)

        has_copies = SCHEDULES[config.trunk.schedule].personal
        everything = self._clients | self._trunk if has_copies else self._clients
        unshared = {name for part in PARTS if part not in config.share for name in parts[part].tensors}
        self._personal = unshared | {name for name in everything.tensors if stays(name, traits.personal)}
        aggregated = {name: tensor for name, tensor in everything.tensors.items() if name not in unshared}
        self.start = everything.with_tensors(aggregated)

        self.accepted: dict[int, int] = {}
        self.folded: dict[str, LowRank] = {}
        if method_of(config.lora).residual:  # every party has subtracted its initial adapter from its base weights
            for part in parts.values():
                for layer in part.complete:
                    self.folded[layer] = part.change(layer).times(-1.0).to(torch.float32)
        self.news: dict[str, LowRank] = {}
        self.last_fold = 0
        self.folds_at_clients = 0
        self.discarded = 0
        self._unwritten: dict[int, Mapping[str, LowRank]] = {}  # changes of base weights by round
        self._held: dict[int, dict[str, Tensor]] = {}  # received and not trained, by client
        self._own: dict[int, dict[str, Tensor]] = {}  # of the trunk's copies, held for the clients
        self._control: dict[int, dict[str, Tensor]] = {}
        self._stage: dict[int, dict[str, Tensor]] = {}

    def copy(self) -> AdapterLedger:
        """Returns an independent copy. The tensors are shared, since no code writes to them."""
        twin = copy(self)
        for name in ("accepted", "folded", "news", "_unwritten", "_held", "_own", "_control", "_stage"):
            setattr(twin, name, dict(getattr(self, name)))
        return twin

    @property
    def has_personal(self) -> bool:
        """Returns True if clients have personal tensors."""
        return bool(self._personal)

    def lacking(self, client: int, assignment: Assignment) -> dict[str, Tensor]:
        """Returns the tensors of an assignment that the client neither draws nor holds."""
        tensors = self.rule.crosses(assignment.adapters.tensors)
        # After a resume, nobody knows which tensors the client holds.
        if client in self.accepted and client not in self._held:
            return {name: tensor for name, tensor in tensors.items() if not is_drawn(name, assignment.drawn)}

        # Clients make the initial adapters from the run's seed, as the server knows, so that nobody needs to send them.
        start = _at_rank_of(assignment, self._clients)
        held = {**start, **self._held.get(client, {})}
        missing = {}
        for name, tensor in tensors.items():
            if not is_drawn(name, assignment.drawn) and not is_held(tensor, held[name]):
                missing[name] = tensor
        return missing

    def crossing(self, assignment: Assignment) -> dict[str, Tensor]:
        """Returns the tensors of an assignment that may cross, and that the client does not draw."""
        tensors = self.rule.crosses(assignment.adapters.tensors)
        return {name: tensor for name, tensor in tensors.items() if not is_drawn(name, assignment.drawn)}

    def given(self, assignment: Assignment) -> Adapters:
        """Returns the crossing tensors of the adapters that a client starts from."""
        return assignment.adapters.with_tensors(self.rule.crosses(assignment.adapters.tensors))

    def accept(self, client: int, round: int, assignment: Assignment) -> None:
        """Records an accepted update. The client now holds the tensors that it received and did not train."""
        given = self.rule.crosses(assignment.adapters.tensors)
        untrained = self.rule.untrained(given, assignment.task)
        self.accepted[client] = round
        self._held[client] = select(given, untrained)

    def trunk_start(self, client: int, assignment: Assignment) -> Start:
        """Returns the start of a client's copy of the trunk's adapter."""
        # A later group replaces tensors of an earlier one.
        start = _at_rank_of(assignment, self._trunk)
        given = select(assignment.adapters.tensors, self._trunk.tensors)
        tensors = {**start, **given, **self._own.get(client, {})}
        return Start(
            tensors,
            replace(assignment.task, settings={}),  # for mods, which work at the client alone
            own=self._control.get(client, {}),
            afresh=assignment.drawn is not None,
            kept=self._stage.get(client, {}),
        )

    def with_copies(
        self, updates: Sequence[ClientUpdate], copies: Mapping[int, Copy], assigned: Mapping[int, Assignment]
    ) -> list[ClientUpdate]:
        """Adds the clients' copies of the trunk's adapter to the updates. The ledger keeps a copy's personal tensors.

        Args:
            updates: Updates of bottom and top.
            copies: Copies at the end of the round, by client.
            assigned: Assignments at the start of the round, by client.
        """
        extended = []
        for update in updates:
            client = update.client
            extended.append(self._with_copy(update, copies[client], assigned[client]))
        return extended

    def _with_copy(self, update: ClientUpdate, trunk: Copy, assignment: Assignment) -> ClientUpdate:
        client = update.client
        self._stage[client] = dict(trunk.kept)
        # Without a control variate the tensors belong to the strategy's stage, and are no sum over the rounds.
        changes = {} if assignment.task.control is None else trunk.control
        self._control[client] = moved(self._control.get(client, {}), changes)
        self._own[client] = select(trunk.adapters.tensors, self._personal)

        shared = self._without_personal(trunk.adapters)
        given = self._without_personal(assignment.adapters)
        shared_control = select(trunk.control, shared.tensors)
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
        """Returns the trunk's shared adapter after a round, and the adapters by client with personal tensors."""
        shared = {}
        for name, tensor in self._trunk.tensors.items():
            shared[name] = adapters.tensors.get(name, tensor)
        of_clients = {client: {**shared, **own} for client, own in self._own.items() if own}
        return shared, of_clients

    def fold(self, round: int, changes: Mapping[str, LowRank]) -> None:
        """Records the changes of base weights of a round in memory. `write_folds` writes them to the disk."""
        # The type of base weights under such strategies. All parties must add the same numbers, now and after a resume.
        sent = {layer: change.to(torch.float32) for layer, change in changes.items()}
        self.news = self._at_clients(sent)
        if sent:
            self._unwritten[round] = sent
            self._remember(round, sent)

    def write_folds(self) -> None:
        """Writes changes of base weights to the server's disk.

        Raises:
            NotWritten: Writing failed. The next call tries again.
        """
        for round, changes in sorted(self._unwritten.items()):  # a list, since the loop deletes entries
            self._logs[0].append(round, changes)
            del self._unwritten[round]

    def past_changes(self, round: int) -> list[dict[str, LowRank]]:
        """Returns the changes of base weights for each round up to `round`; empty for a round without changes."""
        changes = []
        for number in range(1, round + 1):
            unwritten = self._unwritten.get(number)
            changes.append(self._logs[0].read(number) if unwritten is None else dict(unwritten))
        return changes

    def _at_clients(self, changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
        return {layer: change for layer, change in changes.items() if layer in self._clients.layers}

    def _remember(self, round: int, changes: Mapping[str, LowRank]) -> None:
        self.last_fold = round
        # A client compares this number with its log's, where a round without changes for clients has no file.
        self.folds_at_clients += bool(self._at_clients(changes))
        for layer, change in changes.items():
            total = self.folded[layer] + change if layer in self.folded else change
            # Ranks add up, round after round. A matrix needs no more than its smaller side.
            if total.rank > min(total.shape):
                total = total.compressed().to(torch.float32)
            self.folded[layer] = total

    def discard(self, round: int) -> None:
        """Drops the changes of base weights of a discarded round.

        Args:
            round: Last committed round.
        """
        self.discarded += 1
        self._forget(round)

    def _forget(self, round: int) -> None:
        for log in self._logs:
            log.forget(round)

    def everything(self, adapters: Adapters, trunk: Adapters) -> Adapters:
        """Returns the whole model's adapters with all changes of base weights. Unshared tensors are the initial."""
        # Of equal names the last counts: aggregated tensors replace the initial ones.
        return replace(trunk | self._clients | adapters, folded=self.folded)

    def personal_adapters(self) -> dict[int, dict[str, Tensor]]:
        """Returns the personal tensors by client, as far as the clients' disks are on this machine."""
        if self._are_pinned:
            return {}
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
        accepted = {str(client): round for client, round in self.accepted.items()}
        return {"accepted": accepted}, groups

    def restore(
        self,
        round: int,
        facts: Mapping[str, Any],
        groups: Mapping[str, dict[str, Tensor]],
    ) -> None:
        """Goes on from a checkpoint.

        A checkpoint does not say which tensors the clients hold, so that all tensors are sent again.
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
