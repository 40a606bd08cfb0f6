"""Versions of what is installed, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from fedsplit.events import versions


def test_versions_are_those_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LIBRARIES", ("torch", "no-such-library"))
    found = versions.versions()
    assert found.keys() == {"python", "torch"}
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
