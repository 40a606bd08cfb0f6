"""A client's state is there again, and its folder holds no more than is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tensor_files import ONE, same

from fedsplit.state.client_store import ClientState, ClientStore, LostState


def test_a_client_keeps_what_the_server_accepted_until_it_has_accepted_more(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, 3)
    assert store.load(0) == ClientState() and not any(tmp_path.iterdir())

    def state(round: int) -> ClientState:
        return ClientState({}, {n: t * round for n, t in ONE.items()}, ONE)

    store.save(1, state(1), accepted=0)
    for round in (2, 3, 5):  # none of these was accepted
        store.save(round, state(round), accepted=1)
    assert same(store.load(1).personal, ONE)
    assert same(store.load(5).control, ONE) and store.load(5).held == {}
    store.save(6, state(6), accepted=5)
    assert same(store.load(5).personal, {n: t * 5 for n, t in ONE.items()})
    with pytest.raises(LostState, match="0003 has nothing of round 1, which the server has accepted"):
        store.load(1)
    assert ClientStore(tmp_path, 4).load(5) == ClientState()


def test_who_never_has_anything_to_keep_leaves_no_file(tmp_path: Path) -> None:
    ClientStore(tmp_path, 1).save(1, ClientState(), accepted=0)
    assert not (tmp_path / "0001").exists()
    store = ClientStore(tmp_path, 0)
    store.save(1, ClientState(held=ONE), accepted=0)
    store.save(2, ClientState(), accepted=1)  # nothing, and known to be nothing
    assert store.load(2) == ClientState() and same(store.load(1).held, ONE)
    late = ClientStore(tmp_path, 2)
    late.save(1, ClientState(), accepted=0)
    late.save(2, ClientState(held=ONE), accepted=1)
    assert late.load(1) == ClientState()


def test_rounds_that_checkpoints_go_back_to_stay(tmp_path: Path) -> None:
    """Those without a file, too: their state was empty, and is not lost."""
    store = ClientStore(tmp_path, 0)
    store.save(3, ClientState(), accepted=2, kept=(1, 2))
    store.save(5, ClientState(held=ONE), accepted=3, kept=(1, 2, 3))
    assert sorted(path.name[6:10] for path in (tmp_path / "0000").iterdir()) == ["0001", "0002", "0003", "0005"]
    assert store.load(1) == store.load(3) == ClientState()
    store.save(6, ClientState(held=ONE), accepted=5, kept=(0, 2))
    assert sorted(path.name[6:10] for path in (tmp_path / "0000").iterdir()) == ["0002", "0005", "0006"]
