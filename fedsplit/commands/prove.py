"""`python -m fedsplit.prove`: compares a small copy of a model, cut at every place, with the same copy uncut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import quieten
from fedsplit.errors import InputError, one_line
from fedsplit.settings.command_line import Parser

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fedsplit.model.families import Family
    from fedsplit.proving.proof import Proof


def make_parser() -> Parser:
    """Returns the parser of the flags of the command."""
    parser = Parser(
        prog="python -m fedsplit.prove",
        description="Builds a small random model of a model's type and switches, cuts it at every place, and compares "
        "it with the same model uncut. A place is a boundary of blocks: place 2 is after the first two blocks. "
        "Logits, padding, loss, gradients of adapters and generation are compared to the bit. Export, kernels, "
        "causality and the routers' loss are compared up to rounding. "
        "simulate does the same by itself before it trains a model of a new type.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="a folder with config.json, a .gguf file, or a model of the Hub; no weights are read"
    )
    parser.add_argument(
        "--task",
        choices=("generation", "classification"),
        default="generation",
        help="the model's head: of a language model, or of a classifier (--data.format classification)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code.

    Example:
        >>> main(["sotu-gpt2"])  # doctest: +ELLIPSIS
        sotu-gpt2 is of type gpt2
        ...
          gradients      6 of 6  equal to the bit
        ...
        0
    """

    def work() -> None:
        flags = make_parser().parse_args(argv)
        # The config.json may have to be fetched.
        quieten(offline=False)

        from fedsplit.model.derivation import family_of
        from fedsplit.model.facts import read_config
        from fedsplit.model.sources import config_folder
        from fedsplit.proving.proof import prove

        config = read_config(config_folder(flags.model, weights=False))
        family = family_of(config)
        try:
            proof = prove(config, classifies=flags.task == "classification")
        except InputError:
            raise
        except Exception as error:
            # Where transformers itself cannot run the model, the cut is not to blame.
            fault = uncut_fault(config)
            if fault:
                words = f"transformers' own model of type {config.model_type} does not run with this configuration"
                raise InputError(f"model: {flags.model}: {words}, as a small copy: {fault}") from error
            raise
        cuts = cuts_in_words(proof, config)
        if flags.json:
            document = {
                "model": flags.model,
                "family": dataclasses.asdict(family),
                "proof": dataclasses.asdict(proof),
                "cuts": cuts,
            }
            print(json.dumps(document, indent=2))
        else:
            print(*table(flags.model, family, proof, cuts), sep="\n")
        # Only after the table, which says what differs.
        if not proof.trains:
            raise InputError(f"model: {flags.model} cannot be cut exactly")

    return exit_code(work, argv)


def uncut_fault(config: PretrainedConfig) -> str:
    """Returns why transformers alone cannot run a small model of a configuration; empty if it can.

    Args:
        config: Configuration of the model.
    """
    import torch

    from fedsplit.model.derivation import build
    from fedsplit.model.miniature import miniature

    try:
        with torch.no_grad():
            model = build(miniature(config)).eval()
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        return one_line(error)
    return ""


def cuts_in_words(proof: Proof, config: PretrainedConfig) -> str:
    """Returns the cuts LO:HI of the model that are exact; "none" for a refused model.

    Args:
        proof: The comparisons.
        config: Configuration of the model, not of its small copy.
    """
    from fedsplit.model.sharing import closed_places, listed

    blocks = config.num_hidden_layers
    if not proof.trains:
        return "none"
    if proof.inner:
        return f"0:{blocks} alone, all blocks in the trunk"
    closed = closed_places(config)
    places = [place for place in range(blocks + 1) if place not in closed]
    reason = "; between the others, blocks read keys and values of earlier blocks" if closed else ""
    return f"LO and HI among {listed(places)}{reason}"


def table(model: str, family: Family, proof: Proof, cuts: str) -> list[str]:
    """Returns what was found out about a model, as lines.

    Args:
        model: Name of the model.
        family: Names of its modules.
        proof: The comparisons.
        cuts: The cuts that are exact, in words.
    """
    from fedsplit.model.parts import SCORE
    from fedsplit.proving.proof import CHECKS, ONCE, ROUNDED

    compared_cuts = len(proof.cuts)
    lines = [
        f"{model} is of type {proof.model_type}",
        f"  blocks       {family.decoder}.{family.blocks}",
        f"  bottom       {', '.join([family.embedding, *family.positions, *family.before])}",
        f"  top          {', '.join([*family.after, SCORE if proof.classifies else family.head])}",
        f"  adapters on  {', '.join(family.targets)}",
        f"a small copy, cut at {', '.join(f'{low}:{high}' for low, high in proof.cuts)}:",
    ]
    for check in CHECKS:
        if check in proof.faults:
            lines.append(f"  {check:<14} {proof.faults[check]}")
        elif check in proof.equal:
            compared = 1 if check in ONCE else compared_cuts
            degree = "up to rounding" if check in ROUNDED else "to the bit"
            lines.append(f"  {check:<14} {proof.equal[check]} of {compared}  equal {degree}")
    if proof.inner:
        lines.append(f"  other cuts     {proof.inner}")
    return [*lines, f"cuts that are exact: {cuts}", proof.summary]
