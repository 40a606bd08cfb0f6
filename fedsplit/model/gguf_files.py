"""Unpacks GGUF files into ordinary model folders, once, in a cache.

transformers reads the GGUF file. The folder holds the model from `from_pretrained(..., gguf_file=...)`, with all
weights unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedsplit.durable import sync
from fedsplit.errors import SettingError, first_line
from fedsplit.model.derivation import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALLOWED = "a GGUF file of a known family that is whole; the package gguf must be there (pip install gguf)"
"""Describes the GGUF files that can be read, for error messages."""

_MAGIC = b"GGUF"
_LINK = "model.gguf"

_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of stored weights by the setting `dtype`. For all further settings, weights are stored in float32."""


def cache_folder() -> Path:
    """Returns the folder of unpacked files: fedsplit in XDG_CACHE_HOME, or ~/.cache/fedsplit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsplit"


def _home(file: Path) -> Path:
    """Returns the cache folder of a file. A changed file, or a new version of transformers, gets a new folder."""
    import transformers

    # By size and time, and not by content: a digest would read gigabytes at every start.
    facts = file.stat()
    identity = f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{transformers.__version__}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _check(file: Path) -> None:
    """Checks that a file begins like a GGUF file, and that the package gguf is installed.

    Raises:
        SettingError: The file cannot be read or is no GGUF file, or the package is missing.
    """
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(len(_MAGIC))
    except OSError as error:
        raise SettingError("model", f"{file} ({error.strerror})", ALLOWED) from None
    if beginning != _MAGIC:
        raise SettingError("model", f"{file} (it does not begin as a GGUF file does)", ALLOWED)
    if importlib.util.find_spec("gguf") is None:
        raise SettingError("model", f"{file} (the package gguf is not installed)", ALLOWED)


def _write_once(target: Path, file: Path, fill: Callable[[Path], None]) -> Path:
    """Creates a folder from a GGUF file, unless the folder exists. A concurrent process may create it first.

    Args:
        target: The folder.
        file: The GGUF file.
        fill: Function that writes the content into a draft folder. The draft folder holds a link to the file.

    Returns:
        `target`.

    Raises:
        SettingError: The file cannot be unpacked, or the folder cannot be written.
    """
    if target.is_dir():
        return target
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        # A folder with the link alone, since transformers also reads further files beside a GGUF file.
        (draft / _LINK).symlink_to(file.resolve())
        fill(draft)
        (draft / _LINK).unlink()
        # On the disk before the rename: after a crash, a folder of the final name with empty files would count as
        # unpacked.
        for written in (*draft.iterdir(), draft):
            sync(written)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise a second process has finished first, with the same content
                raise
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # the libraries raise many kinds on a broken file
        raise SettingError("model", f"{file} ({first_line(error)})", ALLOWED) from None
    finally:
        if draft is not None:
            # After a rename the draft's name is free, and there is nothing to delete.
            shutil.rmtree(draft, ignore_errors=True)
    return target


def config_folder(file: Path) -> Path:
    """Returns a folder with the config.json and the tokenizer of a GGUF file.

    Raises:
        SettingError: The file does not exist or is broken, or the family of the model is unknown.
    """
    _check(file)

    def fill(draft: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(draft, gguf_file=_LINK)
        family_of(config)
        config.save_pretrained(draft)
        AutoTokenizer.from_pretrained(draft, gguf_file=_LINK).save_pretrained(draft)

    return _write_once(_home(file) / "about", file, fill)


def unpacked(file: Path, dtype: str) -> Path | None:
    """Returns the folder that `unpack` has written for a file, or None if it has not.

    Args:
        file: The GGUF file.
        dtype: As for `unpack`.
    """
    if not file.is_file():
        return None
    target = _target(file, dtype)
    return target if target.is_dir() else None


def _target(file: Path, dtype: str) -> Path:
    """Returns the folder for the unpacked weights of a file."""
    stored = _STORED.get(dtype, torch.float32)
    return _home(file) / str(stored).removeprefix("torch.")


def unpack(file: Path, dtype: str, tell: Callable[[str], object] = lambda line: None) -> Path:
    """Returns a folder with config.json, tokenizer and model.safetensors of a GGUF file, as transformers reads them.

    Args:
        file: The GGUF file.
        dtype: Type of the run's base weights and of the stored weights, a name in `choices.DTYPES`.
        tell: Called with a line of text before the file is unpacked. Unpacking may take long.

    Raises:
        SettingError: The file does not exist, is broken or lacks a tensor, or the family of the model is unknown.
    """
    described = config_folder(file)
    stored = _STORED.get(dtype, torch.float32)
    target = _target(file, dtype)
    if not target.is_dir():
        tell(f"unpacking {file} into {target}")

    def fill(draft: Path) -> None:
        _load(draft, stored).save_pretrained(draft)
        # The config.json of `save_pretrained` names a quantisation, which the unpacked weights do not have.
        for small in described.iterdir():
            shutil.copyfile(small, draft / small.name)

    return _write_once(target, file, fill)


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the model of the GGUF file in a folder, with all weights unpacked.

    Raises:
        ValueError: The file lacks a tensor. transformers would draw random values in place of the tensor.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_LINK,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"it has no tensor {missing[0]}")
    return model
