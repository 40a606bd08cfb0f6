"""The command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm_command
from safetensors.torch import load_file

from fedsplit.commands import simulate
from fedsplit.settings.config import Config

TINY = [
    *("--rounds", "1", "--train.steps", "2", "--batch-size", "2", "--max-length", "32"),
    *("--eval.samples", "4", "--lora-rank", "2", "--lr", "0.01"),
]


LOCAL = ("--engine", "local")
"""For what does not depend on processes: no Ray has to start."""


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm_command.command("fedsplit.simulate", *argv, cwd=cwd)


def kill_and_resume(*argv: str, after: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Kills a run, in the folder `killed`, once it has shown a line that begins so, and goes on with it."""
    call = [sys.executable, "-m", "fedsplit.simulate", *argv, "--out", "killed"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=cwd) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith(after):
                run.kill()
    assert not (cwd / "killed" / "summary.json").exists()
    done = command("--resume", "killed", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.slow
def test_eight_presidents_and_the_same_again(tmp_path: Path) -> None:
    """Two runs of the same seed with one worker: equal to the bit; a third with another seed: not."""
    for name, seed, engine in (("three", "4", "local"), ("one", "3", "ray"), ("two", "3", "ray")):
        argv = ["--clients", "8", "--workers", "1", "--seed", seed, "--engine", engine, "--out", name, *TINY]
        done = command(*argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        for chatter in ("warn", "deprecat", "INFO", "\x1b["):
            assert chatter.lower() not in done.stdout.lower()
    lines = done.stdout.splitlines()
    assert lines[2].startswith("fedavg aggregates 33% of the trained parameters; all clients train the trunk")
    assert lines[3].startswith("round 0/1  held-out loss ")
    assert lines[4].startswith("round 1/1  training loss ")
    for words in ("held-out loss", "perplexity", "trunk parameters", "activations", "gradients", "adapters", "files"):
        assert any(line.startswith(words) for line in lines[5:]), words
    one, two, three = (adapter(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, three[name]) for name, tensor in one.items())
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert set(summary) >= {"seed", "model", "clients", "rounds", "strategy", "cut", "parameters", "eval_loss"}
    assert set(summary) >= {"tokens", "tokens_per_second", "wall_seconds", "bytes", "peak_memory"}
    sent = summary["bytes"]
    assert all(sent[f"{what}_{way}"] for what in ("activation", "gradient") for way in ("up", "down"))
    assert sent["adapter_up"] and not sent["adapter_down"]  # what the only round starts from follows from the seed
    assert summary["tokens"] == 8 * 2 * 2 * 32


@pytest.mark.slow
def test_a_batched_trunk_that_is_called_deterministic_is_so_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of workers, and the order of Python's sets; tests/engines/test_in_process.py has others."""
    argv = ["--clients", "4", "--trunk.schedule", "batched", "--deterministic", "--trunk.group", "2", *TINY]
    workers = ("2", "3")
    for seed, number in zip(("0", "1"), workers, strict=True):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        done = command(*argv, "--workers", number, "--out", number, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (adapter(tmp_path / number) for number in workers)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    losses = [json.loads((tmp_path / number / "summary.json").read_text()) for number in workers]
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]
    assert losses[0]["forgotten"] == losses[1]["forgotten"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the third round of four; base weights, control variates and personal parts come back."""
    argv = [*TINY, "--clients", "3", "--rounds", "4", "--strategy", "flora", "--lora.rank", "2,4"]
    argv += ["--share", "bottom,trunk", "--trunk.schedule", "copies"]
    done = command(*argv, "--out", "straight", *LOCAL, cwd=tmp_path)  # the engines leave the same bytes
    assert done.returncode == 0, done.stderr
    done = kill_and_resume(*argv, after="round 2/4", cwd=tmp_path)
    assert "goes on after round " in done.stdout
    for where in ("adapter", "personal/0000", "personal/0002"):
        one, two = (adapter(tmp_path / name, where) for name in ("straight", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "killed"))
    assert before["eval_loss"] == after["eval_loss"] and before["tokens"] == after["tokens"]
    assert command("--resume", "killed", cwd=tmp_path).stderr.startswith("fedsplit: rounds: 4 is not possible")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_round_begins_again(tmp_path: Path) -> None:
    """SIGKILL as clients' text lies on their disks: it is named and removed, and the run is as one never killed."""
    argv = [*TINY, "--clients", "2", "--rounds", "1", "--engine", "local"]
    call = [sys.executable, "-m", "fedsplit.simulate", *argv, "--out", "killed"]
    text = tmp_path / "killed" / "clients" / "data" / "0001.safetensors"
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, cwd=tmp_path) as run:
        while not text.exists() and run.poll() is None:
            time.sleep(0.01)
        run.kill()
    refused = command(*argv, "--out", "killed", cwd=tmp_path)
    assert refused.returncode == 2 and "which --resume killed begins again" in refused.stderr
    done = command("--resume", "killed", "--config", "killed/config.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the run was stopped before its first checkpoint, and begins again\n" in done.stdout
    assert "removed the text of 2 clients, which a killed run had left in" in done.stdout
    assert not text.parent.exists()
    assert command(*argv, "--out", "straight", cwd=tmp_path).returncode == 0
    one, two = (adapter(tmp_path / name) for name in ("straight", "killed"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_what_its_optimisers_remember(tmp_path: Path) -> None:
    """SIGKILL in the second round of three, with every feature of training on: the same to the bit."""
    argv = [*TINY, "--clients", "2", "--rounds", "3", "--trunk.schedule", "copies", "--keep-best", "--patience", "2"]
    argv += ["--train.schedule", "cosine", "--train.warmup", "0.2", "--train.accumulation", "2", "--train.clip", "0.1"]
    argv += ["--train.optimizer-state", "keep", *LOCAL]
    done = command(*argv, "--out", "straight", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kill_and_resume(*argv, after="round 1/3", cwd=tmp_path)
    for where in ("adapter", "checkpoints/round-0003"):  # the first may be that of a round before the kill
        one, two = (adapter(tmp_path / name, where) for name in ("straight", "killed"))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), where
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "killed"))
    for name in ("eval_loss", "tokens", "best_round", "adapter_round", "ended"):
        assert before[name] == after[name], name
    assert before["tokens"] == 2 * 3 * 2 * (2 * 2) * 32


@pytest.mark.slow
def test_the_readmes_three_lines_give_the_reported_loss(tmp_path: Path) -> None:
    """Runs from another folder, with a strategy of the user's, from a file of settings."""
    readme, strategies = Path("README.md").read_text(), Path("docs/strategies.md").read_text()
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(# mine.py.*?)```", strategies, re.S)[0])
    (tmp_path / "run.toml").write_text('clients = 3\nstrategy = "mine.py:Mine"\nengine = "local"\n')
    done = command("--config", "run.toml", "--out", "runs/demo", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (code,) = re.findall(r"```python\n(from peft.*?)```", readme, re.S)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert shown.returncode == 0, shown.stderr
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert float(shown.stdout) == pytest.approx(summary["eval_loss"]["after"], abs=1e-5)


@pytest.mark.slow
def test_another_kind_of_adapter_goes_on_with_the_fields_of_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "fields.json").write_text('{"d_initial": 0.3}')
    argv = ["--clients", "2", "--peft", "vera", "--peft-config", "fields.json", "--trunk.schedule", "copies", *LOCAL]
    done = command(*argv, "--out", "run", *TINY, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "; adapters: vera" in done.stdout and "aggregation error" not in done.stdout
    (tmp_path / "fields.json").unlink()
    done = command("--resume", "run", "--rounds", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["lora"]
    assert (settings["method"], settings["options"]) == ("vera", '{"d_initial": 0.3}')
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss"]["after"] < summary["eval_loss"]["before"]
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["d_initial"] == 0.3
    assert {name.rpartition("_lambda_")[2] for name in adapter(tmp_path / "run")} == {"b", "d"}


@pytest.mark.slow
def test_a_flower_strategy_by_name(tmp_path: Path) -> None:
    argv = ["--clients", "2", "--strategy", "flwr.serverapp.strategy:FedAdam", "--strategy.eta", "0.01"]
    done = command(*argv, "--out", "run", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["strategy"].endswith("FedAdam")


def test_what_breaks_is_said_in_one_line_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsplit.federation.aggregation import FederationFailed

    def broken(config: Config) -> None:
        raise FederationFailed("no client answered: out of luck")

    monkeypatch.setattr(simulate, "run", broken)
    assert simulate.main([]) == 1
    assert capsys.readouterr().err == "fedsplit: no client answered: out of luck\n"


def test_ctrl_c_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "run", interrupted)
    assert simulate.main([]) == 130
    assert capsys.readouterr().err == "fedsplit: stopped\n"


def test_an_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(config: Config) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(simulate, "run", wrong)
    assert simulate.main([]) == 1
    assert capsys.readouterr().err == "fedsplit: ZeroDivisionError: no luck; --debug shows more\n"
    assert simulate.main(["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_no_engine_starts_for_a_run_that_is_at_work(
    finished_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A trunk's server would take the trunk from the command that is at work, since both have the run's folder."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("llama", "fedavg"), run)
    monkeypatch.setattr("fedsplit.engines.session.engine_named", lambda name: pytest.fail("an engine was started"))
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    call = [sys.executable, "-c", hold, str(run / "checkpoints" / ".lock")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert simulate.main(["--resume", str(run), "--rounds", "9"]) == 2
        other.kill()
    assert "allowed: the folder of a run that is not at work any more" in capsys.readouterr().err


def test_help_and_refusals_load_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from fedsplit.commands.simulate import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'ray', 'flwr', 'datasets', 'numpy', 'rich'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    for argv in (["--help"], ["--clients", "0"], ["--clientz"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    shown = command("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "--trunk.schedule" in shown.stdout


FROM_PYTHON = """
import os, sys, threading
import psutil
from fedsplit.settings.documents import build
from fedsplit.commands.simulate import run

seen, done = set(), threading.Event()

def look():
    while not done.wait(0.3):
        for process in psutil.Process().children(recursive=True):
            try:
                listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
                seen.update(c.laddr.ip.removeprefix("::ffff:") for c in listening)  # an IPv6 socket says it so
            except psutil.Error:
                pass

threading.Thread(target=look, daemon=True).start()
summary = run(build({"clients": 2, "rounds": 1, "train.steps": 1, "eval.samples": 4, "out": "run"}))
done.set()
assert summary["client_rounds"] == {"asked": 2, "failed": 0}, summary
assert seen == {"127.0.0.1"}, seen
assert os.environ["RAY_AUTH_MODE"] == "token"
"""


@pytest.mark.slow
def test_a_run_that_is_called_from_python_is_closed_to_others(tmp_path: Path) -> None:
    call = [sys.executable, "-c", FROM_PYTHON]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=550, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_nothing_in_the_working_folder_hides_a_library(tmp_path: Path) -> None:
    """Folders with the names of libraries, a home that is not there, an output that can only say ASCII."""
    for name in ("strategies", "datasets", "tokenizers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user's own')")
    (tmp_path / "psutil.py").write_text("raise RuntimeError('the user's own')")
    environment = {**os.environ, "HOME": "/nonexistent", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    call = [sys.executable, "-m", "fedsplit.simulate", "--clients", "2", "--out", "run", *TINY]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=550, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    run = f"{sys.executable} -m fedsplit.simulate --clients 1 --out run {' '.join(TINY)}"
    call = ["bash", "-c", f"{run} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert "Traceback" not in done.stderr
