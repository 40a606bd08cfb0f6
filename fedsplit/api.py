"""The door from Python: `fedsplit.run` runs a federation, `fedsplit.open` opens the folder of an earlier run."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fedsplit.call import Arguments, Call, listed, read_call
from fedsplit.environment import prepare
from fedsplit.errors import ErrorCollector, InputError
from fedsplit.result import Result
from fedsplit.results.finished import open_run
from fedsplit.settings.config import Config
from fedsplit.settings.drafts import Draft, without


def run(
    config: Config | str | os.PathLike[str] | None = None,
    *,
    strategy: object = None,
    dataset: object = None,
    model: object = None,
    tokenizer: object = None,
    sinks: Iterable[object] = (),
    objective: object = None,
    metrics: Iterable[object] = (),
    **settings: object,
) -> Result:
    """Runs a federation.

    Args:
        config: Settings to begin with: a `Config`, or the path of a TOML file. Keywords win over `config`.
        strategy: Name of a strategy, an object with the methods `init` and `aggregate`, or a strategy of Flower.
        dataset: Name or path of a data set, a `datasets.Dataset` or `DatasetDict`, or a dict of lists of texts by
            client. With a dict, each client trains on its list.
        model: Name or folder of a model, a loaded `transformers.PreTrainedModel`, or a pair of a loaded model and its
            tokenizer.
        tokenizer: Tokenizer of a loaded model.
        sinks: Names of sinks, or objects with the methods `handle` and `close` (`fedsplit.events.Sink`).
        objective: Name of an objective, or a function of logits and labels.
        metrics: Names of metrics, or functions of logits and labels. Objectives and metrics as functions need
            `engine="local"`, since no object crosses to the processes of the engine `ray`.
        **settings: Any other setting. A setting of a section is written `train={"lr": 3e-4}` or `train__lr=3e-4`, a
            keyword argument of a named strategy `strategy__mu=0.1`, that of a named metric or sink
            `metric__rouge__stem=True` or `metric_options={"rouge": {"stem": True}}`.

    Returns:
        Losses, adapter, summary and folder of the run.

    Raises:
        InputError: A setting or an object is wrong. No file has been written.

    Example:
        >>> import fedsplit
        >>> fedsplit.run(clients=0)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: clients: 0 is not possible; allowed: a whole number from 1 to 2147483647

        docs/python.md shows a whole run, which takes half a minute.
    """
    arguments = Arguments(strategy, dataset, model, tokenizer, objective, listed(metrics), listed(sinks))
    call = read_call(config, arguments, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of much that no user can change; the command is as quiet
        if call.draft.errors:
            _refuse(call)
        prepare(call.draft.config.ray.address)
        return _run(call)


def _refuse(call: Call) -> None:
    """Raises the errors of a call, with those that the checks find in the valid settings.

    Args:
        call: The call. A setting has an error, or one of the objects is wrong.

    Raises:
        InputError: Always. All errors are reported together.
    """
    draft = call.draft
    objects = call.objects
    if draft.is_default:  # nothing more can be wrong, and the checks load libraries
        draft.checked()
    prepare()
    from fedsplit import inputs
    from fedsplit.commands.run_checks import checked

    collector = ErrorCollector()
    collector.extend(draft.errors)
    try:
        inputs.check_strategy(objects.strategy)
    except InputError as error:
        collector.extend(error.errors)
        objects = replace(objects, strategy=None)
        draft = replace(draft, config=without(draft.config, ["strategy", "strategy_options"]))
    with collector.collecting():
        inputs.check_objects(call.model, call.dataset)
    # The settings will name the files of the objects, and hold defaults until then.
    hidden = []
    if call.model is not None:
        hidden.append("model")
    if call.dataset is not None:
        hidden.append("dataset")
    checked(Draft(without(draft.config, hidden), collector.errors), objects)


def open(folder: str | os.PathLike[str]) -> Result:
    """Opens the folder of a finished run.

    Raises:
        InputError: The folder does not exist, is no run's folder, or belongs to a run that did not end.

    Example:
        >>> import fedsplit
        >>> fedsplit.open("nowhere")
        Traceback (most recent call last):
        fedsplit.errors.InputError: nowhere is no folder of a run: there is no such folder
    """
    return Result(open_run(Path(folder)))


def _run(call: Call) -> Result:
    """Runs a federation. The settings of the call have no error.

    Raises:
        InputError: A setting does not fit another one or an object, or an object is wrong.
    """
    # Both modules load libraries that read the environment, which `run` has prepared by now.
    from fedsplit import inputs
    from fedsplit.commands import simulate

    config = call.draft.config
    if config.resume:
        for name, given in (("dataset", call.dataset), ("model", call.model)):
            if given is not None:
                raise InputError(f"{name} cannot be set for a run that goes on: its folder has it already")
    try:
        inputs.check_strategy(call.objects.strategy)
        inputs.check_objects(call.model, call.dataset)
    except InputError:
        _refuse(replace(call, draft=Draft(config)))  # reports the errors of the settings together with this one
        raise
    if call.objects.strategy is not None:
        config = replace(config, **inputs.strategy_settings(call.objects.strategy))
    if config.resume:
        simulate.run(config, objects=call.objects, sinks=call.sinks)
        return open(config.resume)

    folder = Path(config.out) if config.out else _free_folder()
    with inputs.written(folder, call.model, call.dataset) as written_settings:
        config = replace(config, out=str(folder), **written_settings)
        simulate.run(config, objects=call.objects, sinks=call.sinks)
    return open(folder)


def _free_folder() -> Path:
    """Returns a new folder's path: `runs/` and the time, with a number if a run of the same second has the name."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path("runs", now)
    for number in itertools.count(2):
        if not folder.exists():
            break
        folder = Path("runs", f"{now}-{number}")
    return folder
