"""`python -m fedsplit.evaluate`: how well a finished run's model predicts text, against the base without its adapter.

Everything is measured on the unsplit model, which whoever evaluates a finished run holds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.allowed import DEVICE, InputError, SettingError
from fedsplit.command import exit_code
from fedsplit.config import LEAVES, Config, DataSettings
from fedsplit.documents import build, from_document
from fedsplit.environment import quieten
from fedsplit.flags import Parser, add_setting, flag_of
from fedsplit.results.finished import Adapter, Run, open_run
from fedsplit.scores import Score, pooled

if TYPE_CHECKING:
    from fedsplit.corpora.sequences import Sequences


OF_ITS_OWN = ("data.config", "data.split")
"""Settings of a data set that do not follow the run's where they are not given: another one has others."""

READING = tuple(name for name in LEAVES if name.startswith("data.") and name not in ("data.held_out", "data.show"))
"""Settings of how another data set is read."""


@dataclass(frozen=True)
class Result:
    """What was measured on one text.

    Attributes:
        name: Whose text it is.
        base: The base model alone.
        tuned: The base with the adapter.
    """

    name: str
    base: Score
    tuned: Score


def held_out_loss(model: Any, run: str | Path, clients: Collection[int] | None = None) -> float:
    """The loss of an unsplit model on the held-out text of a finished run's clients.

    Args:
        model: A causal LM, or a classifier where the run trained one, such as the base with the run's adapter opened
            by PEFT.
        run: The run's folder.
        clients: The numbers of those whose text counts, such as the one whose own adapter it is; all where None.

    Returns:
        The mean over all predicted tokens, or sequences, in nats; of the run's own model, `eval_loss.after` in its
        summary.
    """
    from fedsplit.model.families import read_facts, read_pad
    from fedsplit.model.sources import config_folder
    from fedsplit.results.whole import score

    config = from_document(tomllib.loads((Path(run) / "config.toml").read_text(encoding="utf-8")))
    model.eval()
    if config.data.format == "classification":  # the library finds the last token of a sequence by this
        path = config_folder(config.model)
        model.config.pad_token_id = read_pad(path, read_facts(path).end)
    texts = _held_out(config, config.eval.samples)
    counted = [batches for client, (_, batches) in enumerate(texts) if clients is None or client in clients]
    return pooled(score(model, batches) for batches in counted).loss


def _held_out(config: Config, samples: int) -> list[tuple[str, list[Sequences]]]:
    """The name of every client, and its held-out text in the batches in which the run measured it."""
    from fedsplit.client.heldout import held_out_batches
    from fedsplit.corpora.partition import shards_of

    size = config.train.batch_size
    return [(shard.name, [rows for _, rows in held_out_batches(shard, samples, size)]) for shard in shards_of(config)]


def other_data(config: Config, given: Mapping[str, object]) -> DataSettings:
    """How another data set is read: as is said, and where nothing is, as that of the run.

    Args:
        config: The run's.
        given: What is said, by the settings' dotted names; of `READING` only.

    Raises:
        SettingError: A value is not allowed.
    """
    said, plain = build(given).data, DataSettings()
    data = replace(config.data, held_out=plain.held_out, show=plain.show)
    leaves = {name.removeprefix("data.") for name in (*OF_ITS_OWN, *given)}
    return replace(data, **{leaf: getattr(said, leaf) for leaf in leaves})


def _check_format(config: Config, data: DataSettings) -> None:
    """Makes sure that another data set is read as what the run's model predicts.

    Raises:
        SettingError: It predicts tokens and the data set has classes, or the other way round.
    """
    sorts = config.data.format == "classification"
    if sorts != (data.format == "classification"):
        tokens = "auto | text | completion | chat, since the run's model predicts tokens"
        words = "classification, since the run's model tells classes" if sorts else tokens
        raise SettingError("data.format", data.format, words)


def _other_text(config: Config, dataset: str, samples: int, data: DataSettings) -> list[tuple[str, list[Sequences]]]:
    """Every owner in another data set, and all its text in batches."""
    from fedsplit.corpora.partition import all_text
    from fedsplit.corpora.shards import spread
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import config_folder

    _check_format(config, data)
    check_packing(data)
    check_dataset(dataset, data)
    path, length = config_folder(config.model), config.train.max_length
    texts = all_text(dataset, length, path, read_facts(path).end, data, config.seed, _classes(config))
    return [
        (name, list(spread(blocks, samples or len(blocks)).split(config.train.batch_size)))
        for name, blocks in texts.items()
    ]


def _work(
    run: Run, dataset: str, client: int | None, samples: int, data: DataSettings
) -> list[tuple[Adapter, list[tuple[str, list[Sequences]]]]]:
    """Which adapter is measured on which texts.

    Raises:
        InputError: There is no such client, or no single adapter for a data set that is nobody's.
    """
    if client is not None and not 0 <= client < run.config.clients:
        raise SettingError("client", client, f"0 to {run.config.clients - 1}, the clients of the run")
    if dataset:
        if client is None and run.personal:
            numbers = ", ".join(map(str, run.personal))
            raise InputError(f"in this run every client has an adapter of its own: say --client, one of {numbers}")
        own = run.adapter(client if run.personal else None)
        return [(own, _other_text(run.config, dataset, samples, data))]
    texts = _held_out(run.config, samples or run.config.eval.samples)
    numbered = [(n, text) for n, text in enumerate(texts) if client is None or n == client]
    if run.personal:
        return [(run.adapter(n), [text]) for n, text in numbered]
    return [(run.adapter(), [text for _, text in numbered])]


def _check_tokens(run: Run, work: list[tuple[Adapter, list[tuple[str, list[Sequences]]]]]) -> None:
    """Makes sure that the model's embedding has a row for every token of what it is measured on.

    Raises:
        SettingError: It has not.
    """
    from fedsplit.model.sources import config_folder
    from fedsplit.model.token_ids import check_largest

    largest = max(int(rows.ids.max()) for _, texts in work for _, batches in texts for rows in batches)
    check_largest(config_folder(run.config.model), run.config.model, largest)


def evaluate(
    run: Run,
    dataset: str = "",
    client: int | None = None,
    samples: int = 0,
    data: DataSettings | None = None,
    device: str = "cpu",
    tell: Callable[[str, int, int], object] = lambda text, done, of: None,
) -> list[Result]:
    """Measures a finished run's model.

    Args:
        run: The run.
        dataset: Another data set, as `fedsplit.simulate --dataset` takes it, of which all text counts; the held-out
            text of the run's clients where empty.
        client: The one client whose text, or whose own adapter, counts; all where None.
        samples: Sequences a client or owner at most; where 0, those of the run, or all of another data set.
        data: How another data set is read; as the run's where None (see `other_data`).
        device: What to compute on, as the setting of that name.
        tell: Is told what is measured next, how many measurements are done, and how many there are.

    Returns:
        A result for every client, or every owner in another data set.

    Raises:
        InputError: There is no such client, data set or device, or the run's model is not there.
    """
    from fedsplit.model.devices import check_device, resolve
    from fedsplit.results.fitting import leaves_base
    from fedsplit.results.whole import attach, detach, open_held, restore_head, score

    results = []
    check_device("device", device)
    work = _work(run, dataset, client, samples, data or other_data(run.config, {}))
    _check_tokens(run, work)
    classes = _classes(run.config)
    place, seed = resolve(device), run.config.seed
    done, total = itertools.count(), 2 * sum(len(texts) for _, texts in work)

    def measured(model: Any, what: str, name: str, batches: Sequence[Sequences]) -> Score:
        tell(f"{what}, text of {name}", next(done), total)
        return score(model, batches)

    base = open_held(work[0][0], place, classes=len(classes), seed=seed)
    for number, (adapter, texts) in enumerate(work, 1):
        alone = [measured(base, "base model", name, batches) for name, batches in texts]
        model = attach(base, adapter)
        for (name, batches), before in zip(texts, alone, strict=True):
            results.append(Result(name, before, measured(model, "with the adapter", name, batches)))
        if number == len(work):
            break
        base = detach(model) if leaves_base(adapter) else open_held(adapter, place, classes=len(classes), seed=seed)
        if classes:  # PEFT leaves the adapter's head where it was
            restore_head(base, run.config.seed)
    return results


def _classes(config: Config) -> tuple[str, ...]:
    """The names of the classes that a run learned to tell; none where it predicted tokens."""
    from fedsplit.corpora.partition import partition_of

    return partition_of(config).classes if config.data.format == "classification" else ()


def lines(results: Sequence[Result], sorts: bool = False) -> list[str]:
    """Results as a table, with all of them as one in its last line.

    Args:
        results: One or more.
        sorts: Whether the classes of texts were predicted, and not tokens.
    """
    from fedsplit.report import aligned, perplexity

    base, tuned = pooled(r.base for r in results), pooled(r.tuned for r in results)
    rows = [("", "texts" if sorts else "tokens", "loss", *(() if sorts else ("perplexity",)), "accuracy")]
    for name, before, after in [*((r.name, r.base, r.tuned) for r in results), ("all", base, tuned)]:
        loss = f"{before.loss:.4f} -> {after.loss:.4f}"
        perplexities = f"{perplexity(before.loss):.2f} -> {perplexity(after.loss):.2f}"
        accuracy = f"{before.accuracy:.2%} -> {after.accuracy:.2%}"
        rows.append((name, f"{after.tokens:,}", loss, *(() if sorts else (perplexities,)), accuracy))
    return aligned(rows)


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.evaluate",
        description="Perplexity and accuracy of a finished run's model: base alone -> with the adapter.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the folder of a finished run")
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="another data set, all of it, owner by owner, as fedsplit.simulate takes it "
        "(default: what the run's clients held out)",
    )
    parser.add_argument(
        "--client", type=int, metavar="N", help="this client alone, with its own adapter where it has one"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="sequences each at most (default: the run's; all of others)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help=f"what to compute on: {DEVICE.words} (default: cpu)"
    )
    parser.add_argument("--model", default="", metavar="DIR", help="the base model, if it lies elsewhere now")
    data = parser.add_argument_group("data", "How the other data set is read.")
    for name in READING:
        add_setting(data, name, None if name in OF_ITS_OWN else "the run's")
    return parser


def _given(asked: argparse.Namespace) -> dict[str, object]:
    """What is said of another data set.

    Raises:
        SettingError: It is said of none.
    """
    given = {name: value for name, value in vars(asked).items() if name in READING}
    for name, value in given.items() if not asked.dataset else ():
        words = f"no {flag_of(name)} without --dataset: what the clients held out is read as the run read it"
        raise SettingError(name, str(value), words)
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where it ended well, 2 where it was asked for wrongly, 130 on Ctrl-C."""

    def work() -> None:
        asked = make_parser().parse_args(argv)
        if asked.samples < 0:
            raise SettingError("samples", asked.samples, "a whole number of at least 0")
        if not DEVICE.test(asked.device):
            raise SettingError("device", asked.device, DEVICE.words)
        run = open_run(Path(asked.run))
        if asked.model:
            run = replace(run, config=replace(run.config, model=asked.model))
        data = other_data(run.config, _given(asked))
        quieten(offline=not asked.dataset)
        how = asked.dataset, asked.client, asked.samples, data, asked.device

        from fedsplit.events.screen import make_screen

        with make_screen(errors=True) as screen:
            results = evaluate(run, *how, screen.phase)
        print(*lines(results, run.config.data.format == "classification"), sep="\n")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
