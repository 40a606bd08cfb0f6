"""Proofs that are kept, so that each type of model is proved once and not at every run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import fedsplit
from fedsplit.durable import write_text
from fedsplit.model.facts import read_config
from fedsplit.model.gguf_files import cache_folder
from fedsplit.model.miniature import identity_of, miniature
from fedsplit.proving.proof import ONCE, Proof, prove

_LIBRARIES = ("torch", "transformers", "peft")
"""Libraries whose versions decide whether a kept proof still counts."""

_CODE = ("model", "adaptation", "proving")
"""Packages of fedsplit whose code decides whether a kept proof still counts."""


def proof_of(folder: Path, tell: Callable[[str], object] = lambda line: None, classifies: bool = False) -> Proof:
    """Returns the proof of a model's type: a kept one, or a new one.

    A proof that refuses the type or some of its cuts is not kept: a lack of memory may be its reason. A cache folder
    that cannot be written costs the time of a proof, and nothing else.

    Args:
        folder: Folder with the model's config.json.
        tell: Called with a line of text after a new proof.
        classifies: True for the type's sequence classifier.

    Raises:
        SettingError: The model has a shape that cannot be cut at all, or the type has no sequence classifier.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> proof_of(BUNDLED_MODEL).trains
        True
    """
    config = read_config(folder)
    # Of the miniature and not of the model: models of one type in several sizes share a proof.
    identity = [identity_of(miniature(config)), *map(version, _LIBRARIES), _digest_of_code()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    kind = "classifier-" if classifies else ""
    name = f"{config.model_type}-{kind}{digest}.json"
    kept = _read(name, classifies)
    if kept is not None and kept.trains:
        return kept
    proof = prove(config, classifies)
    tell(proof.summary)
    if proof.trains and not proof.inner:
        _keep(proof, name, tell)
    return proof


def _keep(proof: Proof, name: str, tell: Callable[[str], object]) -> None:
    """Writes a proof to the cache folder, or tells why it cannot be written."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, json.dumps(dataclasses.asdict(proof), indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        tell(f"the proof is not kept, and is repeated at the next run: {error}")


def _folder() -> Path:
    """Returns the folder of the proofs.

    Raises:
        RuntimeError: The user has no home folder, and no other cache folder is set.
    """
    return cache_folder() / "proofs"


def _digest_of_code() -> str:
    """Returns a digest of fedsplit's own code that a proof depends on."""
    root = Path(fedsplit.__file__).parent
    digest = hashlib.sha256()
    for package in _CODE:
        for file in sorted((root / package).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(name: str, classifies: bool) -> Proof | None:
    """Reads a kept proof. Returns None if there is none, or if the file is damaged or lacks a comparison.

    Args:
        name: Name of the file.
        classifies: True for a proof of a sequence classifier.
    """
    try:
        document = json.loads((_folder() / name).read_text(encoding="utf-8"))
        # A damaged file raises one of the errors below as its values are converted.
        cuts = tuple((int(low), int(high)) for low, high in document["cuts"])
        equal = {str(name): int(count) for name, count in document["equal"].items()}
        faults = {str(name): str(words) for name, words in document["faults"].items()}
        seconds = float(document["seconds"])
        proof = Proof(str(document["model_type"]), cuts, equal, faults, seconds, classifies=classifies)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None
    expected = {check: 1 if check in ONCE else len(cuts) for check in proof.always}
    is_whole = all(equal.get(check) == count for check, count in expected.items())
    return proof if cuts and is_whole else None
