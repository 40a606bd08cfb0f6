"""Estimates of the bundled model, for several tests."""

from __future__ import annotations

from fedsplit.estimation.hardware import hardware_named
from fedsplit.estimation.party_shapes import Parties, Workload
from fedsplit.estimation.phase_clock import Field
from fedsplit.estimation.run_cost import Estimate, estimate
from fedsplit.settings.documents import build


def estimated(
    workload: Workload | None = None,
    network: str = "home",
    client_tflops: float = 0.15,
    trunk_tflops: float = 124.8,
    **settings: object,
) -> Estimate:
    """An estimate by settings, with two underscores for a dot."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    values["network.profile"] = network
    field = Field(network, hardware_named(f"{client_tflops}", ""), hardware_named(f"{trunk_tflops}", ""))
    return estimate(Parties(build({"train.micro_batches": 1, **values}), workload), field)
