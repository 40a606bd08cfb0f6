"""The content of summary.json, whatever way a run has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_parties import gather

from fedsplit.federation.messages import Reply
from fedsplit.federation.run_summary import summarise


@pytest.mark.parametrize(
    ("ended_early", "complete", "ended"),
    [
        ("", True, "all rounds are done"),
        ("round 3 was lost twice", False, "round 3 was lost twice"),
    ],
)
def test_it_says_whether_a_run_is_complete_and_why_it_ended(
    ended_early: str, complete: bool, ended: str, tmp_path: Path
) -> None:
    parties, state = gather(lambda request: Reply(request.client), tmp_path)
    state.totals.asked, state.totals.failed = 8, 2
    state.stopping.note(2, 3.5)
    summary = summarise(parties.config, state, {"trunk": {}}, 2, parties.trunk.status(), ended_early)
    assert (summary["complete"], summary["ended"]) == (complete, ended)
    assert (summary["last_round"], summary["best_round"], summary["adapter_round"]) == (2, 2, 2)
    assert summary["client_rounds"] == {"asked": 8, "failed": 2}
    assert summary["peak_memory"]["trunk"] == parties.trunk.status().peak_memory
