"""`python -m fedsplit.data`: who would hold what in a federation, without running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsplit.command import exit_code
from fedsplit.config import Config
from fedsplit.environment import quieten
from fedsplit.flags import Parser, parse


def look(config: Config) -> Any:
    """The data of a federation, dealt out; only what decides that is checked.

    Returns:
        A `fedsplit.corpora.partition.Deal`.

    Raises:
        SettingError: There is no such model or data set, too little text, or a token that the model does not know.
    """
    from fedsplit.checks import check_lengths, check_tokens
    from fedsplit.corpora.tables import check_dataset, check_packing
    from fedsplit.model.families import read_facts
    from fedsplit.model.sources import config_folder

    check_lengths(config, read_facts(config_folder(config.model)))
    check_packing(config.data)
    check_dataset(config.dataset, config.data)

    from fedsplit.client.heldout import deal_of

    deal = deal_of(config)
    check_tokens(config, deal)
    return deal


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fedsplit.data",
        description="Shows who would hold what: sequences and tokens, trained and held out, and whose they are.",
        epilog="All flags of python -m fedsplit.simulate are taken, too: --dataset, --partition, --clients, --model, "
        "--max-length, --seed and those of the data decide.",
        allow_abbrev=False,
    )
    parser.add_argument("--plot", default="", metavar="FILE", help="draw it, too, where matplotlib is installed")
    parser.add_argument("--json", action="store_true", help="as JSON, as data.json in a run's folder has it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where it ended well, 2 where it was asked for wrongly, 130 on Ctrl-C."""

    def work() -> None:
        asked, rest = _parser().parse_known_args(argv)
        config = parse(rest)
        quieten(offline=False)

        from fedsplit.corpora.census import as_document, plot, stated, table

        deal = look(config)
        lines = [json.dumps(as_document(deal), indent=2)] if asked.json else [*stated(deal), *table(deal)]
        print(*lines, sep="\n")
        if asked.plot:
            plot(deal, Path(asked.plot))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
