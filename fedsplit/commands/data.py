"""`python -m fedsplit.data`: shows how a federation's data would be divided among clients, without running it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import ErrorCollector
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import Config
from fedsplit.settings.flags import read_draft

if TYPE_CHECKING:
    from fedsplit.corpora.sharding import Partition


def look(config: Config) -> Partition:
    """Checks the settings about data, and divides a federation's data among its clients.

    Args:
        config: Settings of the federation.

    Raises:
        SettingError: The model or the data set cannot be found, there is too little text, or the text holds a token
            that the model does not know.
        InputErrors: Several settings are wrong.

    Example:
        >>> look(Config(clients=2, dataset="synthetic")).shards[1].name
        'owner 1'
    """
    _check_settings(config)

    from fedsplit.commands.model_checks import check_tokens
    from fedsplit.corpora.partition import partition_of

    partition = partition_of(config)
    check_tokens(config, partition)
    return partition


def _check_settings(config: Config) -> None:
    """Checks the settings about data, without reading the data.

    Raises:
        InputError: A setting is wrong. All errors are reported together.
    """
    from fedsplit.commands.model_checks import check_lengths
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder

    collector = ErrorCollector()
    with collector.collecting():
        check_lengths(config, read_facts(config_folder(config.model)))
    with collector.collecting():
        check_packing(config.data)
    with collector.collecting():
        check_dataset(config.dataset, config.data)
    collector.check()


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.data",
        description="Shows the data of each client: numbers of sequences and tokens, to train on and held out, and the "
        "distribution of their owners or labels.",
        epilog="Takes all flags of python -m fedsplit.simulate. Those that decide: --dataset, --partition, --clients, "
        "--model, --max-length, --seed and the --data flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--plot", default="", metavar="FILE", help="draw a picture, too; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print JSON, as in data.json of a run's folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code."""

    def work() -> None:
        # The parser knows --plot and --json. The rest are flags of simulate.
        call = make_parser().read_known(argv)
        # The data set may have to be fetched.
        quieten(offline=False)
        config = read_draft(call.rest, call.errors).checked(_check_settings)
        flags = call.flags

        from fedsplit.corpora.data_summary import as_document, data_notes, plot, table

        partition = look(config)
        if flags.json:
            lines = [json.dumps(as_document(partition), indent=2)]
        else:
            lines = [*data_notes(partition), *table(partition)]
        # Before the table is printed: if drawing fails, the error is the only output.
        if flags.plot:
            plot(partition, Path(flags.plot))
        print(*lines, sep="\n")

    return exit_code(work, argv)
