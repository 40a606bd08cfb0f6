"""Names of the files and folders that belong to one round."""

from __future__ import annotations

import re
from pathlib import Path


def round_file(folder: Path, round: int) -> Path:
    """Returns the path of a round's tensor file.

    Example:
        >>> round_file(Path("folds"), 7).name
        'round-0007.safetensors'
    """
    return folder / f"round-{round:04d}.safetensors"


def round_of(path: Path) -> int | None:
    """Returns the round of a file or folder named "round-NNNN"; None for any other name.

    Example:
        >>> round_of(Path("checkpoints/round-0012")), round_of(Path("folds/round-0012.safetensors"))
        (12, 12)
    """
    # ASCII, since `\d` knows the digits of all scripts.
    match = re.fullmatch(r"round-(\d+)(\.safetensors)?", path.name, re.ASCII)
    return int(match[1]) if match else None
