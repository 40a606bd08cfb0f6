"""One check of a contract, and its outcome."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import InputError
from fedsplit.federation.rehearsal import undisturbed
from fedsplit.loading import described
from fedsplit.seeds import derive_seed


class BrokenError(Exception):
    """Something that breaks the contract. The message says what was found."""


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: Name of the check.
        rule: What the contract asks for, in a sentence.
        fault: What was found instead; empty if the rule is kept, or was not tried.
        untried: Name of an earlier check whose fault kept this one from being tried; empty for a rule that was tried.
    """

    name: str
    rule: str
    fault: str = ""
    untried: str = ""


Trial = tuple[str, str, Callable[[], object]]
"""Name and rule of a check, and the function that raises an error if the rule is broken."""


def tried(trials: list[Trial]) -> list[Check]:
    """Makes checks, each whatever became of the others. A rule whose trial meets an earlier fault counts as not tried.

    Example:
        >>> def divide():
        ...     raise BrokenError("it divides by zero")
        >>> [check.fault for check in tried([("one", "Divides.", divide), ("two", "Adds.", lambda: None)])]
        ['it divides by zero', '']
    """
    checks: list[Check] = []
    for name, rule, call in trials:
        fault = _fault_of(call)
        # The trial round wraps the fault in the words of a setting, so that the earlier words are a part of it.
        earlier = [check.name for check in checks if check.fault and check.fault in fault]
        check = Check(name, rule, untried=earlier[0]) if earlier else Check(name, rule, fault)
        checks.append(check)
    return checks


def _fault_of(call: Callable[[], object]) -> str:
    """Returns what was wrong in a trial, in one line."""
    try:
        call()
    except (BrokenError, InputError) as error:
        return str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's code may raise anything
        is_ours = type(error).__module__.partition(".")[0] == "fedsplit"
        return str(error) if is_ours else described(error)
    return ""


def globals_changed_by(call: Callable[[], object]) -> list[str]:
    """Calls a function, and returns names of the random states and settings of torch that it changed.

    Args:
        call: The function. The random states are restored after it.

    Example:
        >>> globals_changed_by(lambda: torch.rand(1))
        ["torch's random state"]
    """
    with undisturbed(seed=0):
        # States that no seed of the function's own gives, so that seeding shows, too.
        seed_all(derive_seed(0, "globals"))
        before = _globals()
        call()
        after = _globals()
    return [name for name in before if before[name] != after[name]]


def seed_all(seed: int) -> None:
    """Seeds the global random states of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's largest seed


def _globals() -> dict[str, object]:
    """Returns the random states and the settings that code may change for all other code, by name."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        # As a list, since `==` compares two tensors value by value.
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "NumPy's random state": str(numpy_state["key"].tolist()) + str(numpy_state["pos"]),
        "torch's default type": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
    }


def require_equal(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    words: str,
    exact: bool = True,
) -> None:
    """Makes sure that two results are equal.

    Args:
        found: Tensors by name.
        expected: Tensors by name.
        words: What the message says about a difference.
        exact: True for equality to the bit, False for equality up to rounding in float32.

    Raises:
        BrokenError: Names, shapes or values differ.
    """
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise BrokenError(f"{words}: one of them has no {names[0]}")
    for name, tensor in expected.items():
        other = found[name]
        is_equal = torch.equal(other, tensor) if exact else _is_close(other, tensor)
        if not is_equal:
            raise BrokenError(f"{words} in {name}{_by_how_much(other, tensor)}")


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Returns True for tensors that are equal up to rounding in float32."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6)


def _by_how_much(one: Tensor, other: Tensor) -> str:
    """Returns the largest difference in words; nothing for tensors of different shapes."""
    if one.shape != other.shape or not one.numel():
        return f" (shapes {tuple(one.shape)} and {tuple(other.shape)})"
    return f", by {float((one.double() - other.double()).abs().max()):.3g}"
