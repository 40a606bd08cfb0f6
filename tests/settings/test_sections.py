"""What sections of the settings say of themselves."""

from __future__ import annotations

import pytest

from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings, PromptSettings


def test_no_budget_is_none_and_another_is_bytes() -> None:
    assert build({"trunk.memory": ""}).trunk.memory_bytes is None
    assert build({"trunk.memory": "2GiB"}).trunk.memory_bytes == 2**31


def test_clients_take_ranks_in_turn() -> None:
    lora = LoraSettings(rank=(2, 8))
    assert [lora.rank_of(client) for client in range(3)] == [2, 8, 2]
    assert lora.top_rank == 8


@pytest.mark.parametrize(
    ("kind", "virtual", "positions"), [("off", 0, 0), ("prompt", 5, 5), ("ptuning", 5, 5), ("prefix", 0, 5)]
)
def test_a_prefix_takes_positions_and_crosses_no_virtual_tokens(kind: str, virtual: int, positions: int) -> None:
    prompt = PromptSettings(kind=kind, tokens=5)
    assert (prompt.virtual, prompt.positions) == (virtual, positions)


def test_a_server_has_an_address_and_no_server_has_none() -> None:
    assert build({"trunk.server": "[::1]:7"}).trunk.server_address == ("::1", 7)
    assert build({}).trunk.server_address == ("", 0)
