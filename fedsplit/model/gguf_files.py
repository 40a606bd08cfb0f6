"""A GGUF file to a folder that any other model could lie in, made once and kept in a cache.

What the file means is transformers' to say: the folder holds what `from_pretrained(..., gguf_file=...)` makes of it,
with all weights unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedsplit.allowed import SettingError
from fedsplit.durable import sync
from fedsplit.model.families import family_of

ALLOWED = "a GGUF file of a known family that is whole; the package gguf must be there (pip install gguf)"
"""In words, for errors."""

_MAGIC = b"GGUF"
_LINK = "model.gguf"

_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights are kept in, by the type a run asks for; any other is made from float32, which rounds nothing away."""


def cache_folder() -> Path:
    """Where unpacked files are kept: ~/.cache/fedsplit, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsplit"


def _home(file: Path) -> Path:
    """The cache of one file; another one as soon as the file, or what reads it, changes."""
    import transformers

    facts, place = file.stat(), file.resolve()
    identity = f"{place}\0{facts.st_size}\0{facts.st_mtime_ns}\0{transformers.__version__}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _check(file: Path) -> None:
    """Refuses what need not be looked into.

    Raises:
        SettingError: There is no such file, it is no GGUF file, or what reads one is not installed.
    """
    try:
        with open(file, "rb") as opened:
            begins = opened.read(len(_MAGIC))
    except OSError as error:
        raise SettingError("model", f"{file} ({error.strerror})", ALLOWED) from None
    if begins != _MAGIC:
        raise SettingError("model", f"{file} (it does not begin as a GGUF file does)", ALLOWED)
    if importlib.util.find_spec("gguf") is None:
        raise SettingError("model", f"{file} (the package gguf is not installed)", ALLOWED)


def _write_once(target: Path, file: Path, fill: Callable[[Path], None]) -> Path:
    """Fills a folder beside its final place and moves it there; where somebody else was faster, theirs stays.

    Raises:
        SettingError: The file cannot be unpacked, or the folder cannot be written.
    """
    if target.is_dir():
        return target
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        # Alone in a folder: transformers would look at what else lies beside it.
        (draft / _LINK).symlink_to(file.resolve())
        fill(draft)
        (draft / _LINK).unlink()
        for written in (*draft.iterdir(), draft):
            sync(written)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except SettingError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the libraries make of a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingError("model", f"{file} ({reason})", ALLOWED) from None
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def config_folder(file: Path) -> Path:
    """A folder with the config.json and the tokenizer of a GGUF file.

    Raises:
        SettingError: There is no such file, it is broken, or its family is unknown.
    """
    _check(file)

    def fill(draft: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(draft, gguf_file=_LINK)
        family_of(config.model_type)
        config.save_pretrained(draft)
        AutoTokenizer.from_pretrained(draft, gguf_file=_LINK).save_pretrained(draft)

    return _write_once(_home(file) / "about", file, fill)


def unpack(file: Path, dtype: str, tell: Callable[[str], object] = lambda line: None) -> Path:
    """A folder with config.json, tokenizer and model.safetensors, equal to what transformers makes of a GGUF file.

    Args:
        file: The file.
        dtype: The type that a run holds base weights in, one of `fedsplit.allowed.DTYPES`; weights are kept in it.
        tell: Is told before the file is unpacked, which may take long.

    Raises:
        SettingError: There is no such file, it is broken or lacks a tensor, or its family is unknown.
    """
    described, stored = config_folder(file), _STORED.get(dtype, torch.float32)
    target = _home(file) / str(stored).removeprefix("torch.")
    if not target.is_dir():
        tell(f"unpacking {file} into {target}")

    def fill(draft: Path) -> None:
        _load(draft, stored).save_pretrained(draft)
        for small in described.iterdir():  # config.json among them, which says nothing of quantisation
            shutil.copyfile(small, draft / small.name)

    return _write_once(target, file, fill)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder's GGUF file, dense.

    Raises:
        ValueError: The file lacks a tensor; transformers would draw it at random.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_LINK,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(f"it has no tensor {lacking[0]}")
    return model
