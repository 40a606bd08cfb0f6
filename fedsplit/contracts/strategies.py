"""The contract of a strategy, tried on tiny adapters: two layers, five clients, three rounds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.contracts.rules import BrokenError, Check, Trial, globals_changed_by, require_equal, seed_all, tried
from fedsplit.federation.aggregation import OwnAggregation
from fedsplit.federation.clients import ClientNode
from fedsplit.federation.rehearsal import InventedRoster, invented_update, rehearse, undisturbed
from fedsplit.federation.strategy import FlowerLike, traits_of
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings
from fedsplit.tensor_files import load_tensors, write_tensors
from fedsplit.updates import Adapters, ClientUpdate, Layer, fresh_factor

LAYERS = {"linear": (6, 5, False), "conv": (4, 7, True)}
"""Adapted layers of the trial, as (out, in, stored transposed)."""

RANK = 4
"""Rank of the adapters."""

CLIENTS = 5
"""Clients of the trial, unless the strategy needs more."""

ROUNDS = 3
"""Rounds of the trial."""

MIXED = (2, 4, 3, 4, 1)
"""Ranks of clients whose ranks differ, in turn."""

HEAD = "lm_head.weight"
"""A tensor without factors, such as of a head that trains whole."""

FURTHEST = 2.0
"""Largest change by clients that all send one adapter, as a multiple of their change, that is never a fault."""

GROWTH = 1.5
"""Largest growth of such a change, where twice as many clients send the adapter. A sum grows twofold or more."""

Make = Callable[[], Any]
"""Makes a fresh strategy."""


def check_strategy(make: Make, config: Config) -> list[Check]:
    """Puts a strategy to its contract.

    Args:
        make: Makes a fresh strategy.
        config: Settings with the name and the options of the strategy, for the trial round with the bundled model.
    """
    strategy = make()
    rehearsal = ("trial round", "One round with the bundled model's adapters works.", lambda: rehearse(make, config))
    if isinstance(strategy, FlowerLike):  # a strategy of Flower's keeps Flower's contract, which has no state
        return tried([rehearsal])
    with undisturbed(seed=0):
        return tried([*_trials(make, strategy), rehearsal])


def _trials(make: Make, strategy: Any) -> list[Trial]:
    """Returns the checks that a strategy is put to, by its traits."""
    traits = traits_of(strategy)
    trials: list[Trial] = [
        ("rounds", "Three rounds keep names and shapes, and all values are finite.", lambda: _played(make)),
        ("same result", "The same updates give the same result to the bit.", lambda: _same_twice(make)),
        ("inputs", "State, adapters and updates are not changed in place.", lambda: _inputs_stay(make)),
        ("saved state", "A new object goes on from the saved state to the bit.", lambda: _goes_on(make)),
        ("order", "The order of the updates does not matter, up to rounding.", lambda: _any_order(make)),
        ("absent clients", "Rounds with other clients each time work.", lambda: _with_absent(make)),
        ("no examples", "A client without examples counts for nothing.", lambda: _without_examples(make)),
        ("same adapter", "Clients that all send one adapter do not add up.", lambda: _alike(make)),
        ("learning", "What clients send changes what they get.", lambda: _learns(make)),
        ("head", "A tensor without factors A and B is aggregated, too.", lambda: _played(make, head=True)),
    ]
    trials.append(("side effects", "Random states and settings of torch stay as they are.", lambda: _leaves(make)))
    if traits.fewest <= 1:
        trials.append(("one client", "A round with one client works.", lambda: _played(make, clients=1)))
    if traits.mixed_ranks:
        trials.append(("mixed ranks", "Clients of different ranks work.", lambda: _played(make, ranks=MIXED)))
    return trials


def adapters_of_trial(head: bool = False) -> Adapters:
    """Returns adapters as a run starts with: A drawn, and B zero.

    Args:
        head: True for a tensor without factors beside them.

    Example:
        >>> sorted(adapters_of_trial().layers)
        ['conv', 'linear']
    """
    tensors: dict[str, Tensor] = {}
    layers = {}
    for layer, (outputs, inputs, transposed) in LAYERS.items():
        name = f"{layer}.lora_A.weight"
        tensors[name] = fresh_factor(name, (RANK, inputs), seed=0)
        tensors[f"{layer}.lora_B.weight"] = torch.zeros(outputs, RANK)
        layers[layer] = Layer(alpha=3.0, transposed=transposed)  # not the rank, so that a lost scaling shows
    if head:
        tensors[HEAD] = torch.arange(12.0).reshape(4, 3)
    return Adapters(tensors, layers)


class _Run:
    """A strategy in the middle of a run of a few clients."""

    def __init__(
        self,
        make: Make,
        clients: int = 0,
        ranks: Sequence[int] = (RANK,),
        head: bool = False,
    ) -> None:
        """Starts a run.

        Args:
            make: Makes a fresh strategy.
            clients: Number of clients; 0 for as many as the strategy needs, and `CLIENTS` at least.
            ranks: Ranks of the clients, in turn.
            head: True for a tensor without factors.
        """
        self.strategy = make()
        # One more than the strategy needs, since a client is left out of some rounds.
        clients = clients or max(CLIENTS, traits_of(self.strategy).fewest + 1)
        self._config = Config(clients=clients, lora=LoraSettings(rank=tuple(ranks)))
        self._roster = InventedRoster([ClientNode(client + 1, f"client {client}") for client in range(clients)])
        self.aggregation = OwnAggregation(self.strategy, self._config)
        self.adapters = adapters_of_trial(head)
        self.round = 0

    def updates(self) -> list[ClientUpdate]:
        """Begins a round, and returns an invented update of each client that trains."""
        self.round += 1
        assigned = self.aggregation.assign(self.round, self.adapters, self._roster)
        updates = []
        for client in sorted(assigned):
            # Forked, since a strategy that draws from the global state must not find it seeded.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(0, "contract", self.round, client))
                update = invented_update(client, assigned[client], self.aggregation.traits.personal)
            # Different numbers, so that the weights of the clients matter.
            updates.append(replace(update, examples=client + 1, weight=None))
        return updates

    def aggregate(self, updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
        """Ends a round, and returns all tensors of the result, changes of base weights included."""
        result = self.aggregation.aggregate(self.round, self.adapters, updates, [])
        self.adapters = result.with_tensors(result.tensors)
        tensors = dict(result.tensors)
        for layer, change in result.folded.items():
            tensors[f"{layer}, folded"] = change.up @ change.down
        return tensors

    def play(self, rounds: int) -> _Run:
        """Plays some rounds, and returns the run."""
        for _ in range(rounds):
            self.aggregate(self.updates())
        return self


def _played(
    make: Make,
    clients: int = 0,
    ranks: Sequence[int] = (RANK,),
    head: bool = False,
) -> None:
    """Plays three rounds. `OwnAggregation` refuses what no run could use."""
    _Run(make, clients, ranks, head).play(ROUNDS)


def _same_twice(make: Make) -> None:
    """Plays the same rounds twice."""
    one, other = (_Run(make).play(ROUNDS - 1) for _ in range(2))
    results = _each_from_another_random_state(one, other)
    cause = _drawn(make)
    require_equal(results[1], results[0], f"two equal runs differ{cause and f' ({cause})'}")


def _each_from_another_random_state(*runs: _Run) -> list[dict[str, Tensor]]:
    """Returns the results of one more round of each run."""
    results = []
    for seed, run in enumerate(runs):
        updates = run.updates()
        seed_all(seed)
        results.append(run.aggregate(updates))
    return results


def _drawn(make: Make) -> str:
    """Returns in words that a strategy draws from a global random state; empty for one that does not."""
    changed = globals_changed_by(lambda: _Run(make).play(1))
    states = [name for name in changed if name.endswith("random state")]
    return f"it uses {', '.join(states)}, not a generator with a seed of its own" if states else ""


def _leaves(make: Make) -> None:
    """Looks at what a round changes for all other code."""
    changed = globals_changed_by(lambda: _Run(make).play(1))
    if changed:
        raise BrokenError(f"a round changes {', '.join(changed)}")


def _alike(make: Make) -> None:
    """Lets few and twice as many clients send one adapter."""
    few = len(_Run(make).updates())
    if not few:  # nobody trains in the first round
        return
    sent, moved = _moved(make, few)
    _, moved_by_more = _moved(make, 2 * few)
    # Both, since a server's optimiser may go further than its clients, and a divisor may be fixed near their number.
    if sent and moved > FURTHEST * sent and moved_by_more > GROWTH * moved:
        words = f"change the weights by {moved / sent:.3g} times its change, {2 * few} by {moved_by_more / sent:.3g}"
        raise BrokenError(f"{few} clients that all send one adapter {words} (are they added, not averaged?)")


def _moved(make: Make, clients: int) -> tuple[float, float]:
    """Returns the sizes of two changes of the weights, as norms: a client's, and the result of all.

    Args:
        make: Makes a fresh strategy.
        clients: Number of clients, which all send what the first one has trained.
    """
    run = _Run(make, clients)
    first, *_ = updates = run.updates()
    alike = [replace(first, client=update.client, examples=update.examples) for update in updates]
    start = run.adapters
    sent = start.with_tensors({**start.tensors, **first.adapters.tensors})
    result = run.aggregation.aggregate(run.round, start, alike, [])
    return _size(sent), _size(result)


def _size(adapters: Adapters) -> float:
    """Returns the norm of what adapters add to the base weights. Factors B start at zero, so that all is new."""
    total = 0.0
    for layer in adapters.layers:
        change = adapters.change(layer)
        weights = change.up @ change.down
        if layer in adapters.folded:
            weights = weights + adapters.folded[layer].up @ adapters.folded[layer].down
        total += float(weights.double().square().sum())
    return math.sqrt(total)


def _learns(make: Make) -> None:
    """Looks at whether the updates of several rounds leave a trace."""
    run = _Run(make)
    # All tensors: a strategy may train one factor alone, or fold all changes into the base weights.
    before = dict(run.adapters.tensors)
    sent = False
    for _ in range(ROUNDS):
        updates = run.updates()
        sent |= any(update.adapters.tensors for update in updates)
        for name, tensor in run.aggregate(updates).items():
            if not torch.equal(tensor, before.get(name, torch.zeros_like(tensor))):
                return
    if sent:
        raise BrokenError(f"the adapters are those of the start after {ROUNDS} rounds of updates")


def _inputs_stay(make: Make) -> None:
    """Compares what a strategy was given before and after the call."""
    run = _Run(make).play(ROUNDS - 1)
    updates = run.updates()
    given = {"adapters": run.adapters.tensors, "the state": run.aggregation.state()}
    for update in updates:
        given[f"the update of client {update.client}"] = update.adapters.tensors
    before = {name: _copied(tensors) for name, tensors in given.items()}
    run.strategy.aggregate(run.aggregation.state(), run.adapters, updates)
    for name, tensors in given.items():
        require_equal(tensors, before[name], f"aggregate changed {name}")


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _goes_on(make: Make) -> None:
    """Saves the state in the middle of a run, and goes on with a new object."""
    straight = _Run(make).play(ROUNDS - 1)
    stopped = _Run(make)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        # Through a file, as a checkpoint does, so that a state that cannot be written shows.
        write_tensors(file, straight.aggregation.state())
        stopped.aggregation.restore(load_tensors(file))
    stopped.adapters = straight.adapters
    stopped.round = straight.round
    results = _each_from_another_random_state(straight, stopped)
    cause = _drawn(make) or "is something kept on the object?"
    require_equal(results[1], results[0], f"a run that goes on differs ({cause})")


def _any_order(make: Make) -> None:
    """Aggregates the same updates in three orders."""
    results = []
    for turn in range(3):
        seed_all(0)  # a strategy that draws breaks other rules
        run = _Run(make).play(1)
        updates = run.updates()
        updates = updates[::-1] if turn == 2 else updates[turn:] + updates[:turn]
        results.append(run.aggregate(updates))
    for other in results[1:]:
        require_equal(other, results[0], "another order of the updates gives another result", exact=False)


def _with_absent(make: Make) -> None:
    """Leaves out another client in each round."""
    run = _Run(make)
    for absent in range(ROUNDS):
        updates = [update for update in run.updates() if update.client != absent]
        if updates or run.aggregation.traits.idles:
            run.aggregate(updates)


def _without_examples(make: Make) -> None:
    """Aggregates with a client that trained on nothing, and without that client."""
    runs = []
    for _ in range(2):
        seed_all(0)  # as above
        runs.append(_Run(make).play(1))
    with_idle, without = runs
    updates = with_idle.updates()
    if len(updates) < 2:
        return
    idle = replace(updates[0], examples=0)
    expected_updates = without.updates()[1:]
    seed_all(0)
    found = with_idle.aggregate([idle, *updates[1:]])
    seed_all(0)
    expected = without.aggregate(expected_updates)
    require_equal(found, expected, "a client with examples=0 changed the result", exact=False)
