"""The evaluation of a round: the loss of clients on their held-out text."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedsplit.client.measures import metrics_of
from fedsplit.events.event_types import Progress, RoundEvaluated
from fedsplit.federation.attempts import Attempt
from fedsplit.federation.clients import FederationFailed
from fedsplit.federation.messages import Evaluate, Reply, serialised_bytes
from fedsplit.federation.parties import Parties, Standing
from fedsplit.federation.replies import memory_of, sample_of, to_score
from fedsplit.federation.run_state import RunState
from fedsplit.federation.virtual_time import PhaseTraffic
from fedsplit.formatting import perplexity
from fedsplit.loading import name_of
from fedsplit.network.times import PhaseTime
from fedsplit.scores import Score, means, means_by_metric, pooled
from fedsplit.seeds import derive_seed
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config
from fedsplit.updates import RefusedUpdate


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        total: Score over all clients.
        scores: Scores by client with a usable measurement.
        forgotten: Rise of a client's loss since the end of local training, in nats, by the client's name.
        replies: Usable replies by client.
        seconds: Duration of the evaluation.
        virtual: The evaluation in virtual time; None without a network.
    """

    total: Score
    scores: Mapping[int, Score]
    forgotten: Mapping[str, float]
    replies: Mapping[int, Reply]
    seconds: float
    virtual: PhaseTime | None = None


def evaluate(
    parties: Parties,
    state: RunState,
    round: int,
    own: Mapping[int, Score],
    attempt: Attempt,
) -> Evaluation:
    """Lets clients measure the adapters of a state, and writes the result into the state.

    Args:
        parties: The parties.
        state: State with the adapters. Losses, accuracy, metrics and totals are brought up to date.
        round: Round of the adapters; 0 before the first round.
        own: Scores on the clients' samples right after local training, by client.
        attempt: Attempt at the round.

    Raises:
        RoundLost: All clients were lost, or late.
        FederationFailed: No client returned a usable measurement.
    """
    started = time.perf_counter()
    virtual = parties.virtual
    if virtual is not None:
        parties.trunk.take_trace()  # of an attempt that was discarded
    sent = PhaseTraffic()
    replies = _ask(parties, state, round, attempt, sent)
    replayed = None
    if virtual is not None:
        phases = sent.phases(parties.trunk.take_trace(), round)
        replayed = virtual.replay(phases, round, "evaluation")
    metric_names = [name_of(spec) for spec in metrics_of(parties.config)]

    usable: dict[int, Reply] = {}
    scores: dict[int, Score] = {}
    reason = ""
    for client, reply in sorted(replies.items()):  # in a fixed order, since a sum of floats depends on the order
        try:
            scores[client] = to_score(reply, parties.sender(client), parties.workloads[client], metric_names)
        except RefusedUpdate as refused:
            reason = str(refused)
            parties.report_failure("evaluating", round, attempt.number, client, reason, refused=True)
        else:
            usable[client] = reply
            state.totals.client_memory = max(state.totals.client_memory, memory_of(reply))
    if not scores:
        raise FederationFailed(f"no client measured anything that can be used: {reason}")

    # A client that measured its sample right after training measures the sample again now.
    forgotten = {}
    for client, then in own.items():
        if client not in usable:
            continue
        now = sample_of(usable[client])
        if then.tokens and now.tokens:  # --eval.after 0 asks for no sample
            forgotten[parties.name(client)] = now.loss - then.loss

    total = pooled(scores.values())
    state.after = total.loss
    state.measured = round
    state.forgotten = forgotten
    # "before" stays the value of the first evaluation, which is of the initial model.
    if parties.config.data.format == "classification":
        state.accuracy = {"before": total.accuracy, **state.accuracy, "after": total.accuracy}
    for name, mean in means(total.metrics).items():
        earlier = state.metrics.get(name, {})
        state.metrics[name] = {"before": mean, **earlier, "after": mean}
    return Evaluation(total, scores, forgotten, usable, time.perf_counter() - started, replayed)


def is_due(config: Config, round: int) -> bool:
    """Returns True if the adapters of a round are measured.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> config = build({"rounds": 7, "eval.every": 3})
        >>> [round for round in range(8) if is_due(config, round)]
        [0, 3, 6, 7]
    """
    return round % config.eval.every == 0 or round == config.rounds


def clients_that_measure(config: Config) -> list[int]:
    """Returns the clients that measure. They are the same in every round, so that losses can be compared.

    Example:
        >>> from fedsplit.settings.documents import build
        >>> len(clients_that_measure(build({"clients": 8, "eval.fraction": 0.25})))
        2
    """
    everyone = range(config.clients)
    if config.eval.fraction == 1:
        return list(everyone)
    count = max(1, round(config.eval.fraction * config.clients))
    # Without the round in the seed: the same clients in every round.
    generator = random.Random(derive_seed(config.seed, "evaluation"))
    return sorted(generator.sample(everyone, count))


def _ask(
    parties: Parties,
    state: RunState,
    round: int,
    attempt: Attempt,
    sent: PhaseTraffic,
) -> dict[int, Reply]:
    """Sends the shared adapters to the clients that measure, counts the bytes, and returns the replies by client."""
    ledger = state.ledger
    totals = state.totals
    measuring = clients_that_measure(parties.config)
    count = len(measuring)
    tensors = ledger.rule.crosses(state.adapters.tensors)
    # Serialised once, for the size: all clients get the same tensors.
    sample = Evaluate(parties.briefing, 0, tensors=tensors, changes=ledger.news)
    change_bytes = sample.change_bytes
    adapter_bytes = serialised_bytes(tensors)

    def make(client: int) -> Evaluate:
        # Changes of base weights are part of the round's result. The adapters are sent to be measured.
        totals.count("adapter_down", client, change_bytes)
        totals.count("evaluation_adapter_down", client, adapter_bytes)
        sent.down[client] = change_bytes + adapter_bytes
        return Evaluate(
            parties.briefing,
            client,
            round,
            attempt.of(client),
            accepted=ledger.accepted.get(client, 0),
            folded=ledger.last_fold,
            folds=ledger.folds_at_clients,
            discarded=ledger.discarded,
            tensors=tensors,
            changes=ledger.news,  # every client needs them, whether it trained or not
        )

    replies: dict[int, Reply] = {}

    def heard(reply: Reply, standing: Standing) -> None:
        replies[reply.client] = reply
        sent.up[reply.client] = reply.nbytes
        event = Progress(
            phase="evaluating",
            round=round,
            rounds=parties.config.rounds,
            done=standing.done,
            of=count,
            waiting=[parties.name(client) for client in standing.waiting],
            failed=[parties.name(client) for client in standing.failed],
        )
        parties.emit(event)

    def prepare_again(client: int) -> None:
        """Forgets nothing: an evaluation changes nothing at the trunk."""

    parties.ask(measuring, make, heard, "evaluating", round, attempt, prepare_again)
    return replies


def event_of(parties: Parties, state: RunState, round: int, found: Evaluation) -> RoundEvaluated:
    """Returns the event that reports an evaluation."""
    # Before the bytes of the event are read, so that the clients' files are among them.
    state.totals.traffic.update(parties.clients.take_shipped())
    sent = state.totals.bytes_since(RoundEvaluated.name, parties.trunk.status().traffic.document())
    has_classes = bool(state.accuracy)
    has_perplexity = not has_classes and parties.config.data.format != PAIRS
    metrics = means(found.total.metrics)
    by_name = ((parties.name(client), score.metrics) for client, score in found.scores.items())
    of_clients = means_by_metric(by_name)
    return RoundEvaluated(
        round=round,
        loss=found.total.loss,
        accuracy=found.total.accuracy if has_classes else None,
        perplexity=perplexity(found.total.loss) if has_perplexity else None,
        clients={parties.name(client): score.loss for client, score in found.scores.items()},
        metrics=metrics or None,
        client_metrics=of_clients or None,
        forgotten=dict(found.forgotten),
        adapter_bytes={way: sent[f"adapter_{way}"] for way in ("up", "down")},
        bytes=sent,
        tokens=sum(score.tokens for score in found.scores.values()),
        seconds=found.seconds,
        elapsed=state.totals.seconds,
    )
