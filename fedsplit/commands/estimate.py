"""`python -m fedsplit.estimate`: what a run would cost, from the model's config.json alone."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector, InputError, InputErrors, SettingError, one_line
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import Config
from fedsplit.settings.flags import read_draft

if TYPE_CHECKING:
    import argparse

    from fedsplit.estimation.party_shapes import Workload
    from fedsplit.estimation.phase_clock import Field

_END = "eos_token_id"

_MOST = 2**31 - 1

_MOST_CLIENTS = 100_000
"""Largest number of clients."""

_MOST_ROUNDS = 100_000
"""Largest number of rounds."""

_MOST_AT_ONCE = 1_000
"""Largest number of clients that train or measure in a round: each has adapters and messages of its own."""


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.estimate",
        description="Estimates a run from the model's config.json alone, without weights: parameters, bytes, memory, "
        "operations and seconds by party, and what other cuts, codecs and micro-batches would cost.",
        epilog="Takes all flags of python -m fedsplit.simulate; --network is home by default. --model may also be a "
        "config.json by itself.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--client.hardware",
        default="",
        dest="client_hardware",
        metavar="NAME",
        help="device of each client: cpu-core, phone, laptop, t4, rtx4090, a100, h100, or the TFLOP/s that it sustains "
        "(default: --network.client-tflops)",
    )
    parser.add_argument(
        "--trunk.hardware",
        default="",
        dest="trunk_hardware",
        metavar="NAME",
        help="device of the trunk (default: --network.trunk-tflops)",
    )
    parser.add_argument(
        "--sequences", default="", metavar="N", help="training sequences of each client; --epochs needs the number"
    )
    parser.add_argument(
        "--held-out", default="", metavar="N", help="held-out sequences of each client (default: --eval.samples)"
    )
    parser.add_argument(
        "--classes", default="", metavar="N", help="classes of texts, for --data.format classification (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, operations and seconds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code.

    Example:
        >>> main(["--rounds", "2", "--network", "lan"])  # doctest: +ELLIPSIS
        sotu-gpt2: gpt2, 6 blocks of width 128, fp32
        ...
        0
    """

    def work() -> None:
        # The parser knows the flags above. The rest are flags of simulate.
        call = make_parser().read_known(argv)
        # The config.json may have to be fetched.
        quieten(offline=False)
        flags = call.flags
        config = read_draft(call.rest, call.errors).checked(lambda config: _settle(config, flags))
        # Again, for the results: `checked` calls the function only where another setting is wrong.
        workload, field = _settle(config, flags)
        with _as_folder(config) as readable:
            lines = _report(readable, workload, field, flags)
        print(*(line.replace(readable.model, config.model) for line in lines), sep="\n")

    return exit_code(work, argv)


def _settle(config: Config, flags: argparse.Namespace) -> tuple[Workload, Field]:
    """Checks all settings and flags.

    Args:
        config: Settings of the run.
        flags: Flags of the command.

    Returns:
        Facts about the data, and where the run would take place.

    Raises:
        InputError: A setting or a flag is wrong. All errors are reported together, after those of counts.
    """
    # First and by itself, since a check below lists all clients.
    _check_counts(config)
    collector = ErrorCollector()
    field = workload = None
    with collector.collecting():
        field = _field_of(flags, config)
    with collector.collecting():
        workload = _workload_of(flags, config)
    with collector.collecting(), _as_folder(config) as readable:
        check(readable)
    collector.check()
    assert field is not None and workload is not None  # else the collector has raised an error
    return workload, field


def _report(config: Config, workload: Workload, field: Field, flags: argparse.Namespace) -> list[str]:
    """Estimates a run, and returns the lines to print."""
    from fedsplit.estimation.alternatives import alternatives_of
    from fedsplit.estimation.cost_lines import assumptions, lines_of, warnings
    from fedsplit.estimation.party_shapes import Parties
    from fedsplit.estimation.run_cost import estimate

    found = estimate(Parties(config, workload), field)
    compared = alternatives_of(found)
    if not flags.json:
        return lines_of(found, compared)
    others: list[dict[str, Any]] = []
    for one in compared:
        seconds = {**asdict(one.seconds), "round": one.seconds.round}
        others.append({**asdict(one), "seconds": seconds})
    document = {**found.document(), "alternatives": others, "assumptions": assumptions(found)}
    document["warnings"] = warnings(found)
    return [json.dumps(document, indent=2)]


def check(config: Config) -> None:
    """Checks the settings of a run that an estimate reads.

    Args:
        config: Settings of a run.

    Raises:
        InputError: A setting is wrong, or does not suit the model. All errors are reported together.

    Example:
        >>> check(Config(cut="1:9"))
        Traceback (most recent call last):
        fedsplit.errors.SettingError: cut: 1:9 is not possible; allowed: LO:HI with 0 <= LO < HI <= 6, the model's \
blocks
    """
    from fedsplit.client.measures import check_pairs, load_measures
    from fedsplit.commands import checks, model_checks
    from fedsplit.engines.planning import plan
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import check_strategy, load_strategy
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder
    from fedsplit.objectives.objective import demands_of

    file = Path(config.model, "config.json")
    if file.is_file():
        # For the error alone, which names the file and what is wrong with its JSON.
        _read_json(file)
    collector = ErrorCollector()
    facts = None
    with collector.collecting():
        folder = config_folder(config.model, weights=False)
        facts = read_facts(folder)
        _check_sizes(folder, config.model)
    for find_errors in (checks.check_prompt, checks.check_training, checks.check_trunk, plan):
        with collector.collecting():
            find_errors(config)
    # Checks against a model that was not found would only repeat that error.
    if facts is not None:
        for about_model in (
            model_checks.check_cut,
            model_checks.check_lengths,
            model_checks.check_adapters,
            model_checks.check_experts,
        ):
            with collector.collecting():
                partial(about_model, config, facts)()
    with collector.collecting():
        strategy = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
        check_strategy(strategy, config)
        if facts is not None:
            model_checks.check_stacked(strategy, config, facts)
    with collector.collecting():
        check_pairs(config, demands_of(load_measures(config)[0]))
    if config.data.format == "classification":
        with collector.collecting():
            model_checks.check_classifier(config)
    collector.check()


def _check_sizes(folder: Path, model: str) -> None:
    """Checks that the library can build the model, without memory for weights.

    Args:
        folder: Folder with config.json.
        model: The setting `model`, for errors.

    Raises:
        SettingError: config.json has impossible sizes.
    """
    from fedsplit.model.unsplit import empty_model

    try:
        empty_model(folder)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        allowed = "a config.json of which transformers can build a model"
        raise SettingError("model", f"{model} ({one_line(error)})", allowed) from None


def _field_of(flags: argparse.Namespace, config: Config) -> Field:
    """Returns where the run would take place.

    Raises:
        InputError: A device is unknown, or the network lists a client that does not exist.
    """
    from fedsplit.estimation.hardware import hardware_named
    from fedsplit.estimation.phase_clock import HOME, Field, with_network
    from fedsplit.network.compute import read_recorded
    from fedsplit.network.fleet import read_fleet

    network = with_network(config).network
    read_fleet(network.profile).check_clients([f"client {number}" for number in range(config.clients)])
    if network.compute:
        read_recorded(network.compute)
        if flags.client_hardware or flags.trunk_hardware:
            raise InputError("--network.compute has the times of both devices, so that no --….hardware goes with it")
    return Field(
        "a network of its own" if network.profile.startswith("{") else network.profile or HOME,
        hardware_named(flags.client_hardware or repr(network.client_tflops), "--client.hardware"),
        hardware_named(flags.trunk_hardware or repr(network.trunk_tflops), "--trunk.hardware"),
    )


def _check_counts(config: Config) -> None:
    """Checks that an estimate can follow every client and every round.

    Raises:
        InputError: There are too many.
    """
    from fedsplit.federation.evaluation import clients_that_measure

    collector = ErrorCollector()
    for name, count, most in (("clients", config.clients, _MOST_CLIENTS), ("rounds", config.rounds, _MOST_ROUNDS)):
        with collector.collecting():
            if count > most:
                raise InputError(f"{name}: {count} is too many for an estimate; allowed: up to {most:,}")
    collector.check()
    busy = max(config.asked, len(clients_that_measure(config)))
    if busy > _MOST_AT_ONCE:
        words = f"--fraction and --eval.fraction with up to {_MOST_AT_ONCE:,} clients in a round"
        raise InputError(f"clients: {busy} in a round are too many for an estimate; allowed: {words}")


def _workload_of(flags: argparse.Namespace, config: Config) -> Workload:
    """Returns the facts about the data that the flags state.

    Raises:
        InputError: A number is not possible, or missing.
    """
    from fedsplit.estimation.party_shapes import Workload

    sequences = _number("--sequences", flags.sequences)
    if config.train.epochs and not sequences:
        raise InputError("--epochs needs --sequences N, the training sequences of each client")
    classes = _number("--classes", flags.classes)
    if classes == 1:
        raise InputError("--classes: 1 is not possible; allowed: a whole number from 2")
    if config.data.format == "classification":
        classes = classes or 2
    elif classes:
        raise InputError("--classes belongs to --data.format classification")
    return Workload(sequences, _number("--held-out", flags.held_out), classes)


def _number(flag: str, text: str) -> int:
    """Returns the number of a flag; 0 for a flag that is not given.

    Raises:
        InputError: The text is no whole number from 1.
    """
    if not text:
        return 0
    # `isdigit` alone takes the digits of all scripts, and `int` refuses thousands of digits with an error of its own.
    if text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= _MOST:
        return int(text)
    raise InputError(f"{flag}: {text[:40]} is not possible; allowed: a whole number from 1 to {_MOST}")


@contextlib.contextmanager
def _as_folder(config: Config) -> Iterator[Config]:
    """Puts a model's config.json that is given by itself into a folder, as all code that reads a model expects.

    Yields:
        Settings that name the folder.
    """
    file = Path(config.model)
    # `Path.is_file` would raise an error for a name that is too long.
    if not config.model.endswith(".json") or not os.path.isfile(file):
        yield config
        return
    document = _read_json(file)
    if isinstance(document, dict) and document and not any(map(_names_end, (document, document.get("text_config")))):
        document[_END] = 0  # what an estimate reads does not depend on the token
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, file.parent.resolve().name if file.name == "config.json" else file.stem)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
        try:
            yield replace(config, model=str(folder))
        except InputError as error:
            # The folder is gone when a user reads the error.
            raise _renamed(error, str(folder), config.model) from None


def _read_json(file: Path) -> Any:
    """Reads a config.json.

    Raises:
        SettingError: The file cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
    raise SettingError("model", f"{file} ({reason})", "a config.json that can be read")


def _names_end(document: object) -> bool:
    """Returns True if a configuration names the token that ends a text."""
    return isinstance(document, dict) and document.get(_END) not in (None, [])


def _renamed(error: InputError, folder: str, model: str) -> InputError:
    """Returns an error, or several, with the user's path in place of a temporary folder."""
    errors = [InputError(str(each).replace(folder, model)) for each in error.errors]
    return errors[0] if len(errors) == 1 else InputErrors(errors)
