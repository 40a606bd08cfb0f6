"""The command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedsplit import simulate
from fedsplit.config import Config, build

TINY = [
    *("--rounds", "1", "--train.steps", "2", "--batch-size", "2", "--max-length", "32"),
    *("--eval.samples", "4", "--lora-rank", "2", "--lr", "0.01"),
]


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "fedsplit.simulate", *argv]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, timeout=550, env=dict(os.environ))


def adapter(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.slow
def test_eight_presidents_and_the_same_again(tmp_path: Path) -> None:
    """Two runs of the same seed with one worker: equal to the bit; a third with another seed: not."""
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        done = command("--clients", "8", "--workers", "1", "--seed", seed, "--out", name, *TINY, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        for chatter in ("warn", "deprecat", "INFO", "\x1b["):
            assert chatter.lower() not in done.stdout.lower()
    lines = done.stdout.splitlines()
    assert lines[2].startswith("round 0/1  held-out loss ")
    assert lines[3].startswith("round 1/1  training loss ")
    for words in ("held-out loss", "perplexity", "trunk parameters", "activations", "gradients", "adapters", "files"):
        assert any(line.startswith(words) for line in lines[4:]), words
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
@pytest.mark.parametrize(
    "argv",
    [
        ("--trunk.schedule", "copies", "--workers", "{}"),
        ("--trunk.schedule", "shared", "--deterministic", "--trunk.group", "2"),
        ("--trunk.schedule", "batched", "--deterministic", "--trunk.group", "2"),
    ],
)
def test_what_is_called_deterministic_is_so_to_the_bit(argv: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever the number of workers where the schedule is so by nature; with turns taken elsewhere."""
    for workers in ("1", "2"):
        run = [word.format(workers) for word in argv]
        done = command("--clients", "4", *run, "--out", workers, *TINY, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (adapter(tmp_path / workers) for workers in ("1", "2"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    losses = [json.loads((tmp_path / workers / "summary.json").read_text()) for workers in ("1", "2")]
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]
    assert losses[0]["forgotten"] == losses[1]["forgotten"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL in the third round of four; base weights, control variates and personal parts come back."""
    argv = [*TINY, "--clients", "3", "--rounds", "4", "--strategy", "flora", "--lora.rank", "2,4"]
    argv += ["--share", "bottom,trunk", "--trunk.schedule", "copies"]
    done = command(*argv, "--out", "straight", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    call = [sys.executable, "-m", "fedsplit.simulate", *argv, "--out", "killed"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("round 2/4"):
                run.kill()
    assert not (tmp_path / "killed" / "summary.json").exists()
    done = command("--resume", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on after round " in done.stdout
    for where in ("adapter", "personal/0000", "personal/0002"):
        one, two = (adapter(tmp_path / name, where) for name in ("straight", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "killed"))
    assert before["eval_loss"] == after["eval_loss"] and before["tokens"] == after["tokens"]
    assert command("--resume", "killed", cwd=tmp_path).stderr.startswith("fedsplit: rounds: 4 is not possible")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_what_its_optimisers_remember(tmp_path: Path) -> None:
    """SIGKILL in the second round of three, with every feature of training on: the same to the bit."""
    argv = [*TINY, "--clients", "2", "--rounds", "3", "--trunk.schedule", "copies", "--keep-best", "--patience", "2"]
    argv += ["--train.schedule", "cosine", "--train.warmup", "0.2", "--train.accumulation", "2", "--train.clip", "0.1"]
    argv += ["--train.optimizer-state", "keep", "--workers", "1"]
    done = command(*argv, "--out", "straight", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    call = [sys.executable, "-m", "fedsplit.simulate", *argv, "--out", "killed"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("round 1/3"):
                run.kill()
    assert not (tmp_path / "killed" / "summary.json").exists()
    done = command("--resume", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for where in ("adapter", "checkpoints/round-0003"):  # the first may be that of a round before the kill
        one, two = (adapter(tmp_path / name, where) for name in ("straight", "killed"))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), where
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "killed"))
    for name in ("eval_loss", "tokens", "best_round", "adapter_round", "ended"):
        assert before[name] == after[name], name
    assert before["tokens"] == 2 * 3 * 2 * (2 * 2) * 32


@pytest.mark.slow
def test_the_readmes_three_lines_give_the_reported_loss(tmp_path: Path) -> None:
    """Runs from another folder, on two processes, with a strategy of the user's, from a file of settings."""
    readme = Path("README.md").read_text()
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(# mine.py.*?)```", readme, re.S)[0])
    (tmp_path / "run.toml").write_text('clients = 3\nstrategy = "mine.py:Mine"\n')
    done = command("--config", "run.toml", "--out", "runs/demo", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (code,) = re.findall(r"```python\n(from peft.*?)```", readme, re.S)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert shown.returncode == 0, shown.stderr
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert float(shown.stdout) == pytest.approx(summary["eval_loss"]["after"], abs=1e-5)


@pytest.mark.slow
def test_a_flower_strategy_by_name(tmp_path: Path) -> None:
    argv = ["--clients", "2", "--strategy", "flwr.serverapp.strategy:FedAdam", "--strategy.eta", "0.01"]
    done = command(*argv, "--out", "run", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["strategy"].endswith("FedAdam")


def bad_inputs(tmp_path: Path, model: Path) -> list[tuple[list[str], str]]:
    """What a user may get wrong that only a look at the disk, the model or the data can tell."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "words.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "torn" / name).write_text((model / name).read_text())
    (tmp_path / "torn" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    return [
        (["--clientz", "8"], "there is no flag --clientz; did you mean --clients"),
        (["--clients", "0"], "clients: 0 is not possible"),
        (["--clients", "10000"], "clients: 10000 is not possible; allowed: 1 to "),
        (["--lora-rank", "0"], "lora.rank: 0 is not possible"),
        (["--lr", "-1"], "train.lr: -1 is not possible"),
        (["--lr", "nan"], "train.lr: nan is not possible"),
        (["--cut", "2:2"], "cut: 2:2 is not possible"),
        (["--cut", "1:7"], "cut: 1:7 is not possible; allowed: LO:HI with 0 <= LO < HI <= 6"),
        (["--cut", "5:6", "--trunk.schedule", "forward-only"], "cut: 5:6 is not possible; allowed: a cut that leaves"),
        (["--cut", "0:6", "--trunk.schedule", "frozen"], "cut: 0:6 is not possible; allowed: a cut that leaves"),
        (["--max-length", "100000"], "train.max_length: 100000 is not possible; allowed: 8 to 256"),
        (["--lora.targets", "q_proj"], "lora.targets: q_proj is not possible; allowed: c_attn,c_proj,c_fc"),
        (["--model", "nowhere"], "model: nowhere is not possible; allowed: the name of the bundled model, or a folder"),
        (["--model", str(tmp_path / "bert")], "model: a model of type bert is not possible; allowed: "),
        (["--model", str(tmp_path / "torn"), "--cut", "1:2", "--max-length", "32"], f"model: {tmp_path}/torn ("),
        (["--dataset", "nowhere.txt"], "dataset: nowhere.txt is not possible"),
        (
            ["--dataset", str(tmp_path / "short.txt")],
            "dataset: a text of 0 sequences (short, 1 in all) is not possible",
        ),
        (["--dataset", str(tmp_path / "words.jsonl")], "dataset: "),
        (["--partition", "natural", "--clients", "15"], "clients: 15 is not possible; allowed: 1 to 14"),
        (["--strategy", "fedavgg"], "strategy: fedavgg is not possible; allowed: "),
        (["--strategy", f"{tmp_path}/empty.py:Mine"], "strategy: "),
        (["--strategy", "flwr.serverapp.strategy:FedNone"], "strategy: "),
        (["--strategy.eta", "1"], "strategy.eta: 1 is not possible; allowed: no option at all"),
        (["--out", str(tmp_path / "full")], "out: "),
        (["--out", "/proc/run"], "out: /proc/run"),
        (
            ["--trunk.schedule", "none"],
            "trunk.schedule: none is not possible; allowed: shared | batched | accumulate | copies",
        ),
        (["--trunk.memory", "800"], "trunk.memory: 800 is not possible; allowed: bytes with a unit"),
        (["--deterministic", "--trunk.group", "9"], "trunk.group: 9 is not possible; allowed: 1 to "),
        (
            ["--deterministic", "--trunk.group", "2", "--workers", "2", "--trunk.memory", "2GB"],
            "trunk.memory: 2GB is not possible; allowed: none with --deterministic and groups",
        ),
        (["--deterministic", "perhaps"], "deterministic: perhaps is not possible; allowed: true | false"),
        (["--trunk.schedule", "batched", "--micro-batches", "2"], "train.micro_batches: 2 is not possible; allowed: 1"),
        (
            ["--trunk.schedule", "batched", "--train.accumulation", "2"],
            "train.accumulation: 2 is not possible; allowed: 1 under the trunk schedule batched",
        ),
        (["--trunk.schedule", "batched", "--train.clip", "1"], "train.clip: 1.0 is not possible; allowed: 0 under"),
        (["--train.clip", "-1"], "train.clip: -1 is not possible; allowed: a number of at least 0"),
        (["--train.accumulation", "0"], "train.accumulation: 0 is not possible"),
        (["--train.schedule", "steps"], "train.schedule: steps is not possible; allowed: constant | linear | cosine"),
        (["--train.warmup", "1.5"], "train.warmup: 1.5 is not possible; allowed: a whole number of steps, or a share"),
        (
            ["--train.warmup", "51"],
            "train.warmup: 51 is not possible; allowed: up to 50, a client's steps in all rounds",
        ),
        (["--train.momentum", "0.9"], "train.momentum: 0.9 is not possible; allowed: 0 under adamw"),
        (["--train.momentum", "1", "--train.optimizer", "sgd"], "train.momentum: 1 is not possible"),
        (["--train.beta1", "0.5", "--train.optimizer", "sgd"], "train.beta1: 0.5 is not possible; allowed: 0.9, the"),
        (
            ["--train.optimizer-state", "keep", "--train.optimizer", "sgd"],
            "train.optimizer_state: keep is not possible; allowed: reset under sgd without momentum",
        ),
        (["--min-delta", "0.1"], "min_delta: 0.1 is not possible; allowed: 0 without --patience"),
        (["--config", "nowhere.toml"], "config: nowhere.toml is not possible"),
    ]


def test_what_is_asked_for_wrongly_gets_one_line_and_loses_nothing(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line on stderr, no model loaded, no cluster started, nothing written."""
    from fedsplit import actor, split

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded or started first")

    cases = bad_inputs(tmp_path, tiny_models["gpt2"])
    assert len(cases) >= 20
    monkeypatch.setattr(actor, "start_cluster", too_late)
    monkeypatch.setattr(split, "load_parts", too_late)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for argv, message in cases:
        assert simulate.main(argv) == 2, argv
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"fedsplit: {message}"), (argv, printed.err)
        assert printed.err.count("\n") == 1, printed.err
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before, argv


def test_what_breaks_is_said_in_one_line_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsplit.aggregation import FederationFailed

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


def test_an_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: Config) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(simulate, "run", wrong)
    with pytest.raises(ZeroDivisionError):
        simulate.main([])


def test_help_and_refusals_load_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from fedsplit.simulate import main\n"
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


def test_threads_never_outnumber_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    plans = {
        (clients, workers): simulate.plan(build({"clients": clients, "workers": workers}))
        for clients in (1, 3, 20)
        for workers in (0, 2)
    }
    assert plans[1, 0] == simulate.Plan(1, 4, 4, 2)
    assert plans[3, 0] == simulate.Plan(3, 1, 4, 2)
    assert plans[20, 0] == simulate.Plan(8, 1, 1, 1)
    assert plans[20, 2] == simulate.Plan(2, 2, 4, 2)
    asked = build({"clients": 20, "threads": 3, "trunk.threads": 5, "train.micro_batches": 4})
    assert simulate.plan(asked) == simulate.Plan(8, 3, 5, 4)
    assert simulate.plan(build({"clients": 1, "trunk.schedule": "batched"})).micro_batches == 1


@pytest.mark.parametrize("values", [{"trunk.schedule": "copies"}, {"deterministic": True}])
def test_threads_do_not_depend_on_workers_where_the_result_must_not(
    values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    plans = [simulate.plan(build({"clients": 4, "workers": workers, **values})) for workers in (1, 2, 4)]
    assert [plan.workers for plan in plans] == [1, 2, 4]
    assert {(plan.client_threads, plan.trunk_threads, plan.micro_batches) for plan in plans} == {(1, 4, 2)}


@pytest.mark.parametrize(
    ("cut", "schedule", "parts"),
    [
        ("1:5", "shared", ["bottom", "trunk", "top"]),
        ("0:6", "shared", ["trunk"]),
        ("1:5", "frozen", ["bottom", "top"]),
        ("1:6", "frozen", ["bottom"]),
        ("0:6", "frozen", []),
        ("0:5", "forward-only", ["top"]),
        ("1:6", "forward-only", []),
    ],
)
def test_which_parts_can_learn(cut: str, schedule: str, parts: list[str]) -> None:
    assert simulate.learning_parts(build({"cut": cut, "trunk.schedule": schedule}), 6) == parts


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    run = f"{sys.executable} -m fedsplit.simulate --clients 1 --out run {' '.join(TINY)}"
    call = ["bash", "-c", f"{run} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert "Traceback" not in done.stderr
