"""Settings and origin of runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from reported_runs import write_run

from fedsplit.reporting.origin import beyond_defaults, differing, where_from
from fedsplit.reporting.run_record import read_run


def test_settings_beyond_the_defaults_and_those_that_differ(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path / "one", **{"train.lr": 0.5}))
    two = read_run(write_run(tmp_path / "two", strategy="flora"))
    assert beyond_defaults(one) == {"clients": 3, "rounds": 2, "engine": "local", "train.lr": 0.5}
    assert differing([one, two]) == {"strategy": ["fedavg", "flora"], "train.lr": ["0.5", "0.001"]}
    without = dataclasses.replace(two, settings={"strategy": "flora"})  # as of an earlier version
    assert differing([two, without]) == {"clients": ["3", "8"], "rounds": ["2", "5"], "engine": ["local", "ray"]}
    assert where_from(one)["machine"] == "2 cores, Linux x86_64"
