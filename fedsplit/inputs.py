"""Turns objects from Python into settings, so that a run's `config.toml` describes the whole run.

Client processes, a resumed run and `fedsplit.evaluate` know a run by its settings alone. So a model and a data set are
written into the run's folder, and the settings `model` and `dataset` name the folders of both. A strategy stays an
object, since the server's process alone needs the strategy. The settings name its class and options.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.corpora.given import FORMS, as_dataset
from fedsplit.errors import ErrorCollector, SettingError, described, first_line
from fedsplit.federation.checkpoint import INPUTS, check_folder
from fedsplit.federation.strategy import FlowerLike, Strategy
from fedsplit.loading import OBJECT, builtin_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODELS = "a name, a folder, or a loaded transformers PreTrainedModel together with its tokenizer"

_DATA = f"a name, a file, a folder, {FORMS}"

_STRATEGIES = "a name, an object with the methods init and aggregate, or a strategy of Flower's"


def strategy_settings(strategy: object) -> dict[str, Any]:
    """Returns the settings that describe a strategy object.

    Args:
        strategy: A strategy of fedsplit's form or of Flower's.

    Returns:
        The settings `strategy` and `strategy_options`. If the class with plain options makes an equal strategy again,
        the settings are class and options. Else they are the class alone, with `(...)` behind its name, and a command
        refuses the name.

    Raises:
        SettingError: The object is no strategy.

    Example:
        >>> from strategies.fedprox import FedProx
        >>> strategy_settings(FedProx(mu=0.1))
        {'strategy': 'fedprox', 'strategy_options': {'mu': 0.1}}
    """
    check_strategy(strategy)
    cls = type(strategy)
    place = f"{cls.__module__}:{cls.__qualname__}"
    options = _options_of(strategy)
    if options is None:
        return {"strategy": place + OBJECT, "strategy_options": {}}
    names = {builtin_place: name for name, builtin_place in builtin_package().STRATEGIES.items()}
    return {"strategy": names.get(place, place), "strategy_options": options}


def check_strategy(strategy: object) -> None:
    """Checks that an object is a strategy; None passes, since the settings name the strategy then.

    Raises:
        SettingError: The object is a class, or lacks the methods of a strategy.

    Example:
        >>> check_strategy("a text")
        Traceback (most recent call last):
        fedsplit.errors.SettingError: strategy: 'a text' is not possible; allowed: a name, an object with the methods \
init and aggregate, or a strategy of Flower's
    """
    if strategy is None:
        return
    if inspect.isclass(strategy) or not isinstance(strategy, Strategy | FlowerLike):
        raise SettingError("strategy", described(strategy), _STRATEGIES)


def check_objects(model: object = None, dataset: object = None) -> None:
    """Checks that a model and a data set have types that can be written; None passes.

    Raises:
        InputError: They have not. The errors of both are reported together.

    Example:
        >>> check_objects(dataset={"ann": "one text"})
        Traceback (most recent call last):
        fedsplit.errors.SettingError: dataset: 'one text' for the client 'ann' is not possible; allowed: a name, a \
file, a folder, a datasets.Dataset or DatasetDict, a dict of lists of texts by client, or a list of dicts of values \
by column
    """
    collector = ErrorCollector()
    with collector.collecting():
        if model is not None:
            _model_and_tokenizer(model)
    with collector.collecting():
        if dataset is not None:
            as_dataset(dataset, _DATA)
    collector.check()


def _options_of(strategy: object) -> dict[str, Any] | None:
    """Returns keyword arguments with which the class makes an equal strategy; None if plain values do not suffice.

    An argument is looked for in the attribute of its name, with or without an underscore. A trial shows whether the
    class makes an equal object from the arguments found.
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
    """Writes objects into a run's folder. If the run does not begin within the context, the files are removed.

    Args:
        out: The run's folder, which does not exist yet or is empty.
        model: A loaded model with its tokenizer, as a pair; None if the settings name the model.
        dataset: A data set; None if the settings name the data set.

    Yields:
        The settings that name the folders written.

    Raises:
        SettingError: The folder is in use, or an object has a type that cannot be written.
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
        has_begun = (out / "config.toml").exists()
        if not has_begun:
            shutil.rmtree(root, ignore_errors=True)
            with contextlib.suppress(OSError):  # the folder has files of the user's, or was never made
                out.rmdir()


def _write_model(folder: Path, given: object) -> None:
    """Writes a model's weights as safetensors, with configuration and tokenizer.

    Args:
        folder: The folder to write.
        given: A pair of a model and its tokenizer. Anything else is refused.

    Raises:
        SettingError: The object is no model with a tokenizer, or cannot be written.
    """
    model, tokenizer = _model_and_tokenizer(given)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the library raises many types: for a model on the meta device, for a full disk, …
        words = f"a model that save_pretrained can write ({first_line(error)})"
        raise SettingError("model", described(model), words) from error


def _model_and_tokenizer(given: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a pair of a model and its tokenizer.

    Raises:
        SettingError: The object is no such pair, or the model has an adapter.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, PreTrainedModel):
        raise SettingError("model", described(model), _MODELS)
    if getattr(model, "_hf_peft_config_loaded", False):  # `save_pretrained` would write the adapter alone
        words = "a model without an adapter; a run starts from a PEFT adapter's folder by init_adapter"
        raise SettingError("model", f"{described(model)} with an adapter", words)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = "no tokenizer" if tokenizer is None else described(tokenizer)
        raise SettingError("model", f"{described(model)} with {what}", _MODELS)
    return model, tokenizer


def _write_dataset(folder: Path, given: object) -> None:
    """Writes a data set as Arrow files.

    Raises:
        SettingError: The object has a type that cannot be written, or writing failed.
    """
    import datasets

    dataset = as_dataset(given, _DATA)
    datasets.disable_progress_bars()
    try:
        dataset.with_format(None).save_to_disk(str(folder))
    except Exception as error:  # the library raises many types: for a column of odd objects, for a full disk, …
        words = f"what save_to_disk can write ({first_line(error)})"
        raise SettingError("dataset", described(given), words) from error
