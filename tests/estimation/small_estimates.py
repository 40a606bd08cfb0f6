"""Estimates of the bundled model, for several tests."""

from __future__ import annotations

from fedsplit.estimation.estimate import Estimate, Field, estimate
from fedsplit.estimation.hardware import HARDWARE
from fedsplit.estimation.parties import Parties, Workload
from fedsplit.network.profiles import PROFILES
from fedsplit.settings.documents import build


def estimated(workload: Workload | None = None, network: str = "home", **settings: object) -> Estimate:
    """An estimate by settings, with two underscores for a dot."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    field = Field(network, PROFILES[network], HARDWARE["laptop"], HARDWARE["a100"])
    return estimate(Parties(build({"train.micro_batches": 1, **values}), workload), field)
