"""Devices by name or by number."""

from __future__ import annotations

import pytest

from fedsplit.errors import InputError
from fedsplit.estimation.hardware import HARDWARE, UTILIZATION, hardware_named


def test_a_gpu_sustains_a_share_of_its_peak() -> None:
    assert HARDWARE["h100"].speed("bf16") == pytest.approx(UTILIZATION * 989.4e12)
    assert HARDWARE["h100"].speed("fp16") > HARDWARE["h100"].speed("fp32")


def test_a_number_is_a_device() -> None:
    assert hardware_named("0.5", "--x").speed("fp32") == 5e11


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e99", "gpu"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--x: .*allowed: cpu-core"):
        hardware_named(text, "--x")
