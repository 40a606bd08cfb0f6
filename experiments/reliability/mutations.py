"""Would the tests notice a mistake in recovery? Seeds one mistake after another, and runs the fast tests of recovery.

$ python -m experiments.reliability.mutations            # writes mutations.json beside this file
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

RESULT = Path(__file__).with_suffix(".json")

RECOVERY = "tests/federation/test_supervision.py"
ROUND = "tests/federation/test_round.py"
RESUMPTION = "tests/federation/test_resumption.py"


@dataclass(frozen=True)
class Mutation:
    """A mistake in the code of recovery.

    Attributes:
        mistake: The mistake in words.
        file: File of the package.
        right: Text of the file that is replaced.
        wrong: Text in its place.
        tests: Files of tests that must notice.
    """

    mistake: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = (RECOVERY,)


MUTATIONS = (
    Mutation(
        "a client that begins again keeps the trunk's copy that its first steps have changed",
        "fedsplit/trunk/copies.py",
        "        self._copies[client] = copy\n",
        "        self._copies.setdefault(client, copy)\n",
    ),
    Mutation(
        "attempts are not counted, so that the trunk takes steps for repeats",
        "fedsplit/federation/attempts.py",
        "return self.number * TRIES + self._again[client]",
        "return 0",
    ),
    Mutation(
        "a new trunk begins without the state of its optimiser",
        "fedsplit/federation/round.py",
        "    trunk.restore(state.trunk.tensors, state.moments)\n",
        "    trunk.restore(state.trunk.tensors, {})\n",
    ),
    Mutation(
        "a new trunk begins with the adapter of the start",
        "fedsplit/federation/round.py",
        "    trunk.restore(state.trunk.tensors, state.moments)\n    if schedule.personal:",
        "    if schedule.personal:",
    ),
    Mutation(
        "changes of base weights are not made again at a new trunk",
        "fedsplit/federation/round.py",
        "            trunk.fold(changes)\n",
        "            continue\n",
    ),
    Mutation(
        "the strategy keeps what a discarded round has taught it",
        "fedsplit/federation/round.py",
        "        self._parties.aggregation.recall(self._strategy)\n",
        "",
        (RECOVERY, ROUND),
    ),
    Mutation(
        "clients keep base weights that a discarded round has changed",
        "fedsplit/federation/adapter_ledger.py",
        "        self.discarded += 1\n",
        "",
        (RECOVERY, ROUND),
    ),
    Mutation(
        "a discarded round leaves the trunk's adapter as it is",
        "fedsplit/federation/round.py",
        "        parties.trunk.restore(before.trunk.tensors, before.moments)\n",
        "",
        (RECOVERY, ROUND),
    ),
    Mutation(
        "a client's disk forgets the last round that the server has accepted",
        "fedsplit/state/client_store.py",
        "        earlier = {accepted, *kept} - {0}\n",
        "        earlier = {*kept} - {0, accepted}\n",
        (RECOVERY, "tests/state/test_client_store.py"),
    ),
    Mutation(
        "a round stands without its quorum",
        "fedsplit/federation/training.py",
        "        if used < needed:\n",
        "        if used < 0:\n",
    ),
    Mutation(
        "a checkpoint is used without a look at the digests of its files",
        "fedsplit/federation/manifest.py",
        "        if found != expected:\n",
        "        if not found:\n",
        (RESUMPTION,),
    ),
    Mutation(
        "a manifest is believed without a look at its own digest",
        "fedsplit/federation/manifest.py",
        "    if not is_whole:\n",
        "    if not written.files:\n",
        (RESUMPTION,),
    ),
    Mutation(
        "gradients are not cleared by the step that they were summed for",
        "fedsplit/trunk/registry.py",
        "        self._sums.clear()\n        if not sums and",
        "        if not sums and",
        ("tests/trunk/test_registry.py",),
    ),
    Mutation(
        "the parts of a step that a client gave up join its next one",
        "fedsplit/trunk/registry.py",
        "        if whole is None or key.turn not in whole.parts:",
        "        if whole is None:",
        ("tests/trunk/test_registry.py",),
    ),
    Mutation(
        "the weights of updates are ignored",
        "fedsplit/federation/training.py",
        "        return float(update.examples)\n",
        "        return 1.0\n",
        ("tests/federation/test_training.py",),
    ),
    Mutation(
        "a client that is lost again and again is asked for ever",
        "fedsplit/federation/attempts.py",
        "        if self._again[client] >= TRIES - 1:\n            return False\n",
        "",
        ("tests/federation/test_attempts.py",),
    ),
)
"""One for each thing that recovery must do."""


def failing_test(tests: Iterable[str], mutation: Mutation | None = None) -> str:
    """Returns the first test that fails in a copy of the repository; empty where none does.

    Args:
        tests: Files of tests that are run.
        mutation: Mistake that the copy has; None for none.

    Raises:
        ValueError: The text that the mistake replaces is not in the file, or more than once.
        RuntimeError: The tests could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("fedsplit", "strategies", "tests", "experiments", "docs", "pyproject.toml", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)
        if mutation is not None:
            _seed(mutation, Path(folder))
        call = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def _seed(mutation: Mutation, folder: Path) -> None:
    """Puts a mistake into a copy of the repository.

    Raises:
        ValueError: The text that it replaces is not there, or more than once.
    """
    file = folder / mutation.file
    text = file.read_text()
    if text.count(mutation.right) != 1:
        raise ValueError(f"{mutation.file} does not have this text once: {mutation.right}")
    file.write_text(text.replace(mutation.right, mutation.wrong))


def main() -> int:
    """Tries every mistake; the exit code is 1 where one went unnoticed."""
    if failed := failing_test(sorted({file for mutation in MUTATIONS for file in mutation.tests})):
        print(f"without any mistake {failed} fails")
        return 1
    caught = {}
    for mutation in MUTATIONS:
        caught[mutation.mistake] = failing_test(mutation.tests, mutation)
        print(f"{mutation.mistake}: {caught[mutation.mistake] or 'UNNOTICED'}", flush=True)
    RESULT.write_text(json.dumps(caught, indent=1) + "\n")
    return 0 if all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
