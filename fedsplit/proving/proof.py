"""Compares a small random model, cut at every place, with the same model uncut.

The small model has the class and the switches of the user's model. Comparisons are to the bit, since a part runs the
library's own code. Only fedsplit's faster kernels, the export through PEFT and the routers' loss are compared up to
rounding.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedsplit.errors import SettingError, one_line
from fedsplit.model.derivation import family_of
from fedsplit.model.miniature import miniature
from fedsplit.model.sharing import closed_places
from fedsplit.proving.classifiers import ClassifierSubject, check_class
from fedsplit.proving.comparisons import Chain, Subject

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fedsplit.settings.config import Config

Cut = tuple[int, int]
"""Bounds (LO, HI) of a trunk."""

CHECKS = (
    *("logits", "padding left", "padding right", "loss", "gradients"),
    *("causality", "kernels", "export", "cache", "balance"),
)
"""What is compared, by the names in a proof."""

ONCE = ("causality", "export", "kernels")
"""Checks of a single cut: they do not depend on the cut."""

ROUNDED = ("causality", "export", "kernels", "balance")
"""Checks up to rounding. All others are to the bit."""


@dataclass(frozen=True)
class Proof:
    """Result of the comparisons for one type of model.

    Attributes:
        model_type: The type, as in config.json.
        cuts: The cuts (LO, HI) of the small model.
        equal: Number of cuts at which a check gave equal values, by name of the check.
        faults: Differences in words, by name of the check; only the first difference of a check.
        seconds: Duration of the proof.
        inner: The first difference between two blocks, if the model is exact with all blocks in the trunk, and at no
            other cut; `cuts` is then that one cut. Empty for other models.
        classifies: True for the type's sequence classifier, False for its language model.
    """

    model_type: str
    cuts: tuple[Cut, ...]
    equal: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    inner: str = ""
    classifies: bool = False

    @property
    def trains(self) -> bool:
        """True if training and evaluation are exact at all of `cuts`."""
        return not {*self.faults} - {"cache"}

    @property
    def generates(self) -> bool:
        """True if the generation of text with caches is exact, too."""
        return self.trains and "cache" in self.equal and "cache" not in self.faults

    @property
    def always(self) -> tuple[str, ...]:
        """Checks that the model has, whatever its type. Some types have no cache, or no routers to balance."""
        missing = ("cache", "balance", *(("causality", "padding left") if self.classifies else ()))
        return tuple(check for check in CHECKS if check not in missing)

    @property
    def summary(self) -> str:
        """The result in one line."""
        if not self.trains:
            check, words = self.first_fault
            return f"{self.model_type}: {check}: {words}"
        places = len({place for cut in self.cuts for place in cut})
        what = "cut of the classifier" if self.classifies else "cut"
        where = "with all blocks in the trunk alone" if self.inner else f"at {places} places"
        line = f"{self.model_type}: {what} proved {where} ({self.seconds:.1f} s)"
        return line if self.generates or self.classifies else f"{line}, generation without caches"

    @property
    def first_fault(self) -> tuple[str, str]:
        """Name of the first check that keeps the model from training, and the difference."""
        return next((name, words) for name, words in self.faults.items() if name != "cache")


def prove(config: PretrainedConfig, classifies: bool = False) -> Proof:
    """Cuts a small random model of a type at every place, and compares with the uncut model.

    Args:
        config: Configuration of the text decoder (`fedsplit.model.derivation.text_config`).
        classifies: True for the type's sequence classifier.

    Raises:
        SettingError: The model has a shape that cannot be cut at all, or the type has no sequence classifier.

    Example:
        >>> from fedsplit.model.derivation import text_config
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> proof = prove(text_config(BUNDLED_MODEL))
        >>> proof.trains, len(proof.cuts), proof.equal["gradients"]
        (True, 6, 6)
    """
    began = time.monotonic()
    family = family_of(config)
    small = miniature(config)
    if classifies:
        check_class(config, small)
    cuts = cuts_of(small.num_hidden_layers, closed_places(small))
    kind = ClassifierSubject if classifies else Subject
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a matrix of this size is slower with more
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The same weights in every proof, so that a difference can be found again.
            torch.manual_seed(0)
            subject = kind(Path(folder), small, family)
            equal, faults = _compare(subject, cuts)
            proof = Proof(config.model_type, cuts, equal, faults, classifies=classifies)
            if not proof.trains and len(cuts) > 1:  # states may pass from block to block beside the hidden states
                proof = _in_trunk(proof, subject) or proof
    finally:
        torch.set_num_threads(threads)
    return replace(proof, seconds=time.monotonic() - began)


def _in_trunk(proof: Proof, subject: Subject) -> Proof | None:
    """Compares the model with all blocks in the trunk.

    Args:
        proof: A proof that found differences.
        subject: The uncut model.

    Returns:
        The proof of this one cut; None if the values differ there, too.
    """
    whole = (0, max(high for _, high in proof.cuts))
    equal, faults = _compare(subject, [whole])
    inner = ": ".join(proof.first_fault)
    alone = replace(proof, cuts=(whole,), equal=equal, faults=faults, inner=inner)
    return alone if alone.trains else None


def cuts_of(blocks: int, closed: Collection[int] = ()) -> tuple[Cut, ...]:
    """Returns cuts that have every open place as LO and as HI.

    Args:
        blocks: Number of blocks.
        closed: Places at which no cut may be (`fedsplit.model.sharing.closed_places`).

    Example:
        >>> cuts_of(4)
        ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 3))
        >>> cuts_of(4, closed=[2, 3])
        ((0, 1), (1, 4), (0, 4))
    """
    places = [place for place in range(blocks + 1) if place not in closed]
    # Neighbouring places have each place once as LO and once as HI. The further two cuts have all blocks in the
    # trunk, and a trunk of several blocks between bottom and top.
    cuts = [*itertools.pairwise(places), (0, blocks), (places[1], places[-2])]
    return tuple(dict.fromkeys((low, high) for low, high in cuts if low < high))


def _compare(subject: Subject, cuts: Sequence[Cut]) -> tuple[dict[str, int], dict[str, str]]:
    """Runs all checks at all cuts.

    Returns:
        Number of cuts with equal values, and the first difference, by name of the check.
    """
    equal: dict[str, int] = {}
    faults: dict[str, str] = {}
    for cut in cuts:
        try:
            chain = Chain(subject, cut)
        except Exception as error:  # noqa: BLE001  # whatever the library raises, the model cannot be cut here
            faults.setdefault("logits", f"cut {cut[0]}:{cut[1]}: {one_line(error)}")
            continue
        single_checks = chain.single_checks() if cut == cuts[0] else ()
        checks = [*chain.checks(), *single_checks]
        for check, find_difference in checks:
            # The first difference of a check is the one that is reported.
            if check in faults:
                continue
            try:
                find_difference()
            except Exception as error:  # noqa: BLE001  # as above
                faults[check] = f"cut {cut[0]}:{cut[1]}: {one_line(error)}"
            else:
                equal[check] = equal.get(check, 0) + 1
    return equal, faults


def require(proof: Proof, config: Config, blocks: int) -> None:
    """Refuses a model that is not cut exactly, and a cut at which the model is not exact.

    Args:
        proof: Proof of the model's type.
        config: Settings of the run.
        blocks: Number of blocks of the model.

    Raises:
        SettingError: Training would differ from training the uncut model.
    """
    if not proof.trains:
        check, words = proof.first_fault
        kind = f"a model of type {proof.model_type}, whose parts are not the model ({check}, {words})"
        raise SettingError("model", kind, "a type that fedsplit prove proves, or --unproved true at your own risk")
    if not proof.inner:
        return
    reason = (
        f"all blocks of type {proof.model_type} in one trunk; a small copy with another cut differs ({proof.inner})"
    )
    if config.bounds != (0, blocks):
        raise SettingError("cut", config.cut, f"0:{blocks}, {reason}")
    if config.trunk.stages:
        raise SettingError("trunk.stages", config.trunk.stages, f"none, {reason}")
