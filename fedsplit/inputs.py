"""Objects that were given from Python, as settings: a run's `config.toml` must say what the run computed with.

Client processes, a resumed run and `fedsplit.evaluate` know a run by its settings alone. So a model and a data set are
written into the run's folder, and the settings `model` and `dataset` name those folders. A strategy stays an object,
since it lives in the server's process; the settings tell its class and its options.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsplit.errors import SettingError, first_line, kind_of
from fedsplit.federation.checkpoint import INPUTS, check_folder
from fedsplit.federation.strategy import FlowerLike, Strategy
from fedsplit.loading import OBJECT, builtin_package

_MODELS = "a name, a folder, or a loaded transformers PreTrainedModel together with its tokenizer"

_DATA = "a name, a file, a folder, a datasets.Dataset or DatasetDict, or a dict of lists of texts by client"

_STRATEGIES = "a name, an object with the methods init and aggregate, or a strategy of Flower's"


def strategy_settings(strategy: object) -> dict[str, Any]:
    """Returns the settings that tell what a strategy object is.

    Args:
        strategy: One of ours or of Flower's.

    Returns:
        `strategy`, and `strategy_options`. A strategy that its class and plain options make again is told by these. Of
        any other the class alone is told, with `(...)` behind its name, which a command refuses.

    Raises:
        SettingError: The object is no strategy.

    Example:
        >>> from strategies.fedprox import FedProx
        >>> strategy_settings(FedProx(mu=0.1))
        {'strategy': 'fedprox', 'strategy_options': {'mu': 0.1}}
    """
    if inspect.isclass(strategy) or not isinstance(strategy, Strategy | FlowerLike):
        raise SettingError("strategy", _described(strategy), _STRATEGIES)
    cls = type(strategy)
    place = f"{cls.__module__}:{cls.__qualname__}"
    options = _options_of(strategy)
    if options is None:
        return {"strategy": place + OBJECT, "strategy_options": {}}
    package: Any = builtin_package()
    names = {place: name for name, place in package.STRATEGIES.items()}
    return {"strategy": names.get(place, place), "strategy_options": options}


def _options_of(strategy: object) -> dict[str, Any] | None:
    """Returns the keyword arguments that make a strategy again, or None where plain ones do not suffice.

    Looks for each argument in the attribute of its name, and tries whether the class makes an equal object of them.
    """
    cls = type(strategy)
    if cls.__module__ == "__main__" or "<" in cls.__qualname__:  # no other process could import the class
        return None
    options = {}
    for name in inspect.signature(cls).parameters:
        value = getattr(strategy, name, getattr(strategy, f"_{name}", None))
        if isinstance(value, str | int | float):
            options[name] = value
    try:
        equal = bool(vars(cls(**options)) == vars(strategy))
    except Exception:  # noqa: BLE001  # the user's class may refuse, and tensors do not compare to one truth
        return None
    return options if equal else None


@contextlib.contextmanager
def written(out: Path, model: object = None, dataset: object = None) -> Iterator[dict[str, Any]]:
    """Writes objects into a run's folder for as long as a run needs them, and leaves nothing of a run that never began.

    Args:
        out: The run's folder, which is not there yet, or empty.
        model: A loaded model with its tokenizer, as a pair; None where the settings name one.
        dataset: A data set; None where the settings name one.

    Yields:
        The settings that name what was written.

    Raises:
        SettingError: The folder is in use, or an object is of no kind that can be written.
    """
    check_folder(out)
    root = out.absolute() / INPUTS
    settings: dict[str, Any] = {}
    try:
        if model is not None:
            _write_model(root / "model", model)
            settings["model"] = str(root / "model")
        if dataset is not None:
            _write_dataset(root / "dataset", dataset)
            settings["dataset"] = str(root / "dataset")
        yield settings
    finally:
        if not (out / "config.toml").exists():
            shutil.rmtree(root, ignore_errors=True)
            with contextlib.suppress(OSError):  # there already before, or never made
                out.rmdir()


def _write_model(folder: Path, given: object) -> None:
    """Writes a model's weights as safetensors, with its configuration and its tokenizer.

    Raises:
        SettingError: It is no model with a tokenizer, or cannot be written.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, PreTrainedModel):
        raise SettingError("model", _described(model), _MODELS)
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter would be written
        words = "a model without an adapter; a run starts from a PEFT adapter's folder by init_adapter"
        raise SettingError("model", f"{_described(model)} with an adapter", words)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = "no tokenizer" if tokenizer is None else _described(tokenizer)
        raise SettingError("model", f"{_described(model)} with {what}", _MODELS)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever the library makes of a model on no device, or of a full disk
        words = f"a model that save_pretrained can write ({first_line(error)})"
        raise SettingError("model", _described(model), words) from error


def _write_dataset(folder: Path, given: object) -> None:
    """Writes a data set as Arrow files.

    Raises:
        SettingError: It is of no kind that can be written, or cannot be written.
    """
    import datasets

    if isinstance(given, Mapping) and not isinstance(given, datasets.DatasetDict):
        given = datasets.Dataset.from_dict(_columns_by_client(given))
    if not isinstance(given, datasets.Dataset | datasets.DatasetDict):
        raise SettingError("dataset", _described(given), _DATA)
    splits = given.values() if isinstance(given, datasets.DatasetDict) else [given]
    if any(split.format["type"] == "custom" for split in splits):
        raise SettingError("dataset", "one with a transform", f"{_DATA}; map() applies a transform for good")
    datasets.disable_progress_bars()
    try:
        given.with_format(None).save_to_disk(str(folder))
    except Exception as error:  # whatever the library makes of its columns, or of a full disk
        words = f"what save_to_disk can write ({first_line(error)})"
        raise SettingError("dataset", _described(given), words) from error


def _columns_by_client(texts: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Returns texts by client as the columns `text` and `owner`.

    Raises:
        SettingError: A client's name is no text, or a client has something else than a list of texts.
    """
    columns: dict[str, list[str]] = {"text": [], "owner": []}
    for client, own in texts.items():
        is_list = isinstance(own, list | tuple) and all(isinstance(text, str) for text in own)
        if not isinstance(client, str) or not is_list:
            raise SettingError("dataset", f"{_described(own)} for the client {client!r}", _DATA)
        columns["text"] += own
        columns["owner"] += [client] * len(own)
    if not columns["text"]:
        raise SettingError("dataset", "a dict without a text", _DATA)
    return columns


def _described(value: object) -> str:
    """Names an object by its type, and shows a plain value as it is."""
    if value is None or isinstance(value, str | int | float):
        return repr(value) if isinstance(value, str) else str(value)
    return kind_of(value)
