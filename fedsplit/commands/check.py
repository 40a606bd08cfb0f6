"""`fedsplit check`: puts a strategy, an objective or a metric to its contract, in seconds and without a model."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsplit.commands.exit_codes import exit_code
from fedsplit.environment import prepare
from fedsplit.errors import InputError, SettingError
from fedsplit.settings.command_line import Parser
from fedsplit.settings.config import OPTIONS, Config
from fedsplit.watchdog import Watchdog

if TYPE_CHECKING:
    from fedsplit.contracts.rules import Check

KINDS = ("strategy", "objective", "metric")
"""Kinds of code with a contract."""

TIMEOUT = 60.0
"""Seconds after which code that has not returned counts as hung."""


def kind_of_code(spec: str) -> str:
    """Finds out what a name stands for.

    Args:
        spec: A name that comes with fedsplit, `path/to/mine.py:Mine`, or `module:Class`.

    Raises:
        SettingError: There is no such class or function, or it is none of the three kinds.

    Example:
        >>> kind_of_code("fedprox"), kind_of_code("dpo"), kind_of_code("token_accuracy")
        ('strategy', 'objective', 'metric')
    """
    from fedsplit.demands import further_of
    from fedsplit.loading import STRATEGY, Kind, builtin_package, find
    from fedsplit.metrics.metric import METRICS
    from fedsplit.objectives.objective import OBJECTIVES

    builtin = dict(zip(KINDS, (builtin_package().STRATEGIES, OBJECTIVES, METRICS), strict=True))
    for kind, names in builtin.items():
        if spec in names:
            return kind
    anything = Kind("code", dict, STRATEGY.allowed, functions=True)
    found = find(anything, spec)
    # The methods of our strategies, and of Flower's.
    if callable(getattr(found, "aggregate", None)) or callable(getattr(found, "configure_train", None)):
        return "strategy"
    returned = _returned_by(found)
    if returned is not None:
        return returned
    further_of(found, "code", spec)  # names an argument that a split cannot give
    kinds = " | ".join(KINDS)
    allowed = f"a strategy (init and aggregate), or a function of logits and labels; --kind {kinds} says which"
    raise SettingError("code", spec, allowed)


def _returned_by(found: Any) -> str | None:
    """Tells an objective, which returns a tensor, from a metric, which returns a pair; None if neither is clear."""
    from torch import Tensor

    from fedsplit.contracts.functions import batch_of
    from fedsplit.demands import FURTHER

    function = found
    if inspect.isclass(found):
        # Only objectives say over what their loss is a mean.
        if hasattr(found, "mean_over"):
            return "objective"
        try:
            function = found()
        except Exception:  # noqa: BLE001  # it wants options; the user says by --kind what it is
            return None
    batch = batch_of(frozenset(FURTHER))
    with contextlib.suppress(Exception):  # the check itself will report what the function raises
        names = inspect.signature(function).parameters
        further = {name: tensor for name, tensor in batch.further.items() if name in names}
        returned = function(batch.logits.requires_grad_(), batch.labels, **further)
        return "objective" if isinstance(returned, Tensor) and not returned.ndim else "metric"
    return None


def check(spec: str, kind: str, options: Mapping[str, Any]) -> list[Check]:
    """Puts code to its contract.

    Args:
        spec: Name of the code.
        kind: A name in `KINDS`.
        options: Keyword arguments for the class.

    Raises:
        InputError: The code cannot be loaded, or does not take the options.

    Example:
        >>> [check.fault for check in check("label_smoothing", "objective", {}) if check.fault]
        []
    """
    from fedsplit.contracts.functions import check_metric, check_objective
    from fedsplit.contracts.strategies import check_strategy
    from fedsplit.federation.aggregation import strategy_defaults
    from fedsplit.federation.strategy import load_strategy
    from fedsplit.metrics.metric import load_metrics
    from fedsplit.objectives.objective import load_objective

    if kind == "strategy":
        config = Config(strategy=spec, strategy_options=dict(options), engine="local")
        defaults = strategy_defaults(config)
        return check_strategy(lambda: load_strategy(spec, options, defaults), config)
    if kind == "objective":
        return check_objective(load_objective(spec, options, {}))
    metrics = load_metrics([spec], {}, options=options)
    return check_metric(next(iter(metrics.values())))


def table(checks: Sequence[Check]) -> list[str]:
    """Returns the lines of a table of checks: the rule of each, and what broke it or kept it from being tried."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        state = "FAIL" if check.fault else "skip" if check.untried else "ok"
        note = f" (fails as '{check.untried}')" if check.untried else ""
        lines.append(f"{state:<4}  {check.name:<{width}}  {check.rule}{note}")
        if check.fault:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.fault}")
    return lines


def make_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="fedsplit check",
        description="Puts a strategy, an objective or a metric to its contract, before a run, without a model.",
        epilog="--strategy.KEY VALUE, --objective.KEY VALUE and --metric.NAME.KEY VALUE set arguments, as for a run.",
    )
    parser.add_argument("code", metavar="CODE", help="path/to/mine.py:Mine, module:Class, or a name of fedsplit's")
    parser.add_argument("--kind", choices=KINDS, help="what it is (default: found out)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see `fedsplit.commands.exit_codes.exit_code` for the exit code.

    Example:
        >>> main(["token_accuracy"])  # doctest: +ELLIPSIS
        token_accuracy is a metric
        ok    sum and count     A batch has a finite sum, and a count above 0.
        ...
        0
    """

    def work() -> None:
        call = make_parser().read(argv, [name for name in OPTIONS if name in KINDS])
        flags = call.checked()
        prepare()
        warnings.simplefilter("ignore")
        watchdog = Watchdog(TIMEOUT)
        with watchdog.guarding(f"the code of {flags.code}"):
            kind = flags.kind or kind_of_code(flags.code)
            # Flushed before the check: code that hangs must not hide what was checked.
            print(f"{flags.code} is {'an' if kind == 'objective' else 'a'} {kind}", flush=True)
            checks = check(flags.code, kind, call.options[kind])
        print(*table(checks), sep="\n")
        broken = sum(bool(check.fault) for check in checks)
        if broken:
            untried = sum(bool(check.untried) for check in checks)
            rest = f"; {untried} could not be tried" if untried else ""
            raise InputError(f"{flags.code} breaks {broken} of the {len(checks)} rules for its kind, {kind}{rest}")

    return exit_code(work, argv)
