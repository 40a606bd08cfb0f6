"""A trunk that two Ray actors share, through the command: the result of one actor, also where an actor is killed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import write_corpus
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from watched_runs import WatchedRun

RUN = ["--clients", "2", "--rounds", "2", "--cut", "1:3", "--partition", "iid", "--deterministic", "--workers", "1"]
RUN += ["--train.steps", "20", "--batch-size", "2", "--max-length", "16", "--eval.samples", "2", "--lora-rank", "2"]
RUN += ["--train.optimizer", "sgd", "--train.lr", "0.01", "--lora.dropout", "0.1", "--out", "run"]

FOLLOWER, TRUNK = "ray::ShardActor", "ray::TrunkActor"


class Watched(WatchedRun):
    """The command, whose processes a test finds as its lines are shown."""

    def __init__(self, cwd: Path, model: Path, *argv: str) -> None:
        cwd.mkdir()
        corpus = write_corpus(cwd / "corpus.jsonl")
        super().__init__(cwd, "--model", str(model), "--dataset", str(corpus), *RUN, *argv)

    def processes(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
        return found

    def end(self, seconds: float | None = 400) -> tuple[int, str]:
        return super().end(seconds)


@pytest.mark.slow
def test_the_adapters_are_those_of_one_process(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Also where processes are killed or stop answering. The first round is undisturbed."""
    with Watched(tmp_path / "alone", tiny_models["llama"], "--engine", "local") as run:
        assert run.end() == (0, ""), run.shown
    unsharded = load_file(tmp_path / "alone" / "run" / "adapter" / "adapter_model.safetensors")

    losses: list[tuple[str, Callable[[psutil.Process], None]]] = [
        (FOLLOWER, psutil.Process.kill),
        (TRUNK, psutil.Process.kill),
        (FOLLOWER, psutil.Process.suspend),  # nobody waits for ever, and it does not stay behind
    ]
    of_trunk: list[psutil.Process] = []
    with Watched(tmp_path / "here", tiny_models["llama"], "--trunk.tensor-parallel", "2", "--timeout", "20") as run:
        for number, (victim, lose) in enumerate(losses):
            with run.halted("round 2/2 is played again" if number else "round 1/2"):
                present = {name: run.processes(name) for name in (TRUNK, FOLLOWER)}
                assert [len(processes) for processes in present.values()] == [1, 1]
                of_trunk += [*present[TRUNK], *present[FOLLOWER]]
                lose(present[victim][0])
        run.wait_for("round 2/2 is played again")
        assert run.end() == (0, ""), run.shown
    assert psutil.wait_procs(of_trunk, timeout=60)[1] == []

    folder = tmp_path / "here" / "run"
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert found.keys() == unsharded.keys()
    for name, value in unsharded.items():
        assert float((found[name] - value).abs().max()) < 1e-6, name
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models["llama"]), folder / "adapter")
    loaded = {name.replace(".default", ""): value for name, value in whole.state_dict().items() if ".lora_" in name}
    assert loaded.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in loaded.items())
