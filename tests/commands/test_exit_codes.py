"""How commands end, and what they say then."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.__main__ import main
from fedsplit.commands.exit_codes import exit_code
from fedsplit.errors import InputError, InputErrors


class Broke(Exception):
    """Stands for an error of a module of ours."""


Broke.__module__ = "fedsplit.somewhere"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("no\n such  folder"), 2, "fedsplit: no such folder\n"),
        (KeyboardInterrupt(), 130, "fedsplit: stopped\n"),
        (Broke("the trunk\nis gone"), 1, "fedsplit: the trunk is gone\n"),
        (InputErrors([InputError("no a"), InputError("no b")]), 2, "fedsplit: no a\nfedsplit: no b\n"),
        (ZeroDivisionError("by\nzero"), 1, "fedsplit: ZeroDivisionError: by zero; --debug shows more\n"),
        (AssertionError(), 1, "fedsplit: AssertionError; --debug shows more\n"),
    ],
)
def test_what_ends_a_command_is_said_in_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Broke("the trunk is gone"), "fedsplit: the trunk is gone; go on\n"),
        (KeyError("x"), "fedsplit: KeyError: 'x'; --debug shows more; go on\n"),
    ],
)
def test_the_notes_of_an_error_are_said_after_it(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        error.add_note("go on")
        raise error

    assert exit_code(work, []) == 1
    assert capsys.readouterr().err == words


def test_the_log_is_shown_under_debug_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        logging.getLogger("fedsplit.federation.client_service").debug("client 3 failed")

    for argv, shown in (([], ""), (["--debug"], "client 3 failed\n"), ([], "")):
        assert exit_code(work, argv) == 0
        assert capsys.readouterr().err == shown


@pytest.mark.parametrize("error", [InputError("no such folder"), Broke("the trunk is gone"), KeyError("x")])
def test_debug_shows_the_traceback_too(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> None:
        raise error

    code = exit_code(breaks, ["--clients", "2"])
    assert "Traceback" not in capsys.readouterr().err
    assert exit_code(breaks, ["--debug"]) == code
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):" and last.startswith("fedsplit: ")


def test_an_error_in_a_thread_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        thread = threading.Thread(target=lambda: 1 / 0, name="reader")
        thread.start()
        thread.join()

    hook = threading.excepthook
    assert exit_code(work, []) == 0
    assert threading.excepthook is hook
    assert (
        capsys.readouterr().err == "fedsplit: reader ended: ZeroDivisionError: division by zero; --debug shows more\n"
    )


PRINTS = """
import sys
from fedsplit.__main__ import main
from fedsplit.commands.exit_codes import exit_code
sys.exit(exit_code(lambda: print("x" * int(sys.argv[1]))))
"""


@pytest.mark.parametrize("letters", [10, 10**6])
def test_a_closed_output_is_one_line(letters: int, tmp_path: Path) -> None:
    call = [sys.executable, "-c", PRINTS, str(letters)]
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as command:
        assert command.stdout is not None and command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == "fedsplit: the output was closed\n"
    assert command.returncode == 1


def test_what_ends_well_is_0() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3


def bad_calls(folder: Path, run: Path) -> list[tuple[str, str]]:
    """Calls of all commands that cannot be right, and how the one line on each begins; `simulate` has more of its own.

    Args:
        folder: Working folder of the calls, in which files are made.
        run: A finished run.
    """
    (folder / "notes").write_text("mine")
    (folder / "void").mkdir()
    (folder / "dots").symlink_to("dots")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "lines.txt").write_text("\n\n")
    (folder / "void.toml").write_text("")
    (folder / "table.toml").write_text("train = 3\n")
    (folder / "torn.toml").write_text("clients = [1\n")
    (folder / "bytes.toml").write_bytes(b"\xff")
    (folder / "list.json").write_text("[1]")
    for name, text in {"began": "", "torn": "clients = 'x'\n"}.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "config.toml").write_text(text)
    shutil.copytree(run, folder / "damaged")
    (folder / "damaged" / "summary.json").write_text("{}")
    shutil.copytree(run, folder / "cut")
    weights = folder / "cut" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    toml = "is not possible; allowed: a TOML file"
    whole = "allowed: a whole number"
    return [
        # the command itself
        ("simulat", "there is no command simulat; did you mean simulate or estimate?"),
        ("../simulate", "there is no command ../simulate"),
        ("simulate.main", "there is no command simulate.main"),
        # simulate
        ("simulate extra", "there is no flag extra"),
        ("simulate --", "there is no flag --"),
        ("simulate --clients=", "clients: nothing is not possible; " + whole),
        ("simulate --clients 1e2", "clients: 1e2 is not possible; " + whole),
        ("simulate --clients 0x10", "clients: 0x10 is not possible; " + whole),
        ("simulate --seed 4294967296", "seed: 4294967296 is not possible; " + whole),
        ("simulate --lr 1e999", "train.lr: 1e999 is not possible; allowed: a finite number"),
        ("simulate --engine rays", "engine: rays is not possible; allowed: ray | local | flower"),
        ("simulate --workers -1", "workers: -1 is not possible; " + whole),
        ("simulate --threads many", "threads: many is not possible; " + whole),
        ("simulate --timeout 0", "timeout: 0 is not possible; allowed: "),
        ("simulate --quorum 1.1", "quorum: 1.1 is not possible; allowed: a number from 0 to 1"),
        ("simulate --max-failures -1", "max_failures: -1 is not possible; " + whole),
        ("simulate --round-deadline soon", "round_deadline: soon is not possible; allowed: "),
        ("simulate --keep-checkpoints some", "checkpoint.keep: some is not possible; " + whole),
        ("simulate --checkpoint-every 0.5", "checkpoint.every: 0.5 is not possible; " + whole),
        ("simulate --weights most", "weights: most is not possible; allowed: "),
        ("simulate --kernels fast", "kernels: fast is not possible; allowed: fused | library"),
        ("simulate --keep-best 2", "keep_best: 2 is not possible; allowed: true | false"),
        ("simulate --dtype=", "dtype: nothing is not possible; allowed: fp32 | bf16 | fp16"),
        ("simulate --device cuda:x", "device: cuda:x is not possible; allowed: auto | cpu"),
        ("simulate --objective nowhere.py:Mine", "objective: nowhere.py is not"),
        ("simulate --objective huber", "objective: huber is not possible; allowed: cross_entropy"),
        ("simulate --metric accuracy,,", "metric: accuracy,, is not possible"),
        ("simulate --sink nowhere.py:Mine", "sinks: nowhere.py is not"),
        ("simulate --init-adapter void", "init_adapter: void"),
        ("simulate --config void", f"config: void {toml} that can be read (Is a directory)"),
        ("simulate --config torn.toml", f"config: torn.toml {toml} ("),
        ("simulate --config bytes.toml", f"config: bytes.toml {toml} ("),
        ("simulate --config table.toml", "there is no setting train; "),
        ("simulate --config dots", f"config: dots {toml} that can be read (Too many levels of symbolic links)"),
        ("simulate --peft-config list.json", "lora.options: list.json is not possible; allowed: a JSON object"),
        ("simulate --out notes", "out: notes (there already)"),
        ("simulate --out dots", "out: dots ("),
        ("simulate --out " + "x" * 300, "out: xxx"),
        ("simulate --out notes/run", "out: notes/run ("),
        ("simulate --resume void", "resume: void is not possible; allowed: the folder of a run"),
        ("simulate --resume torn", "clients: x is not possible; " + whole),
        ("simulate --resume began --seed 1", "seed cannot be set for a run that goes on"),
        # evaluate
        ("evaluate", "the following arguments are required: --run; see --help"),
        ("evaluate --run notes", "notes is no folder of a run: there is no such folder"),
        ("evaluate --run void", "void is no folder of a run: there is no config.toml in it"),
        ("evaluate --run began", "the run in began did not end"),
        ("evaluate --run torn", "clients: x is not possible"),
        ("evaluate --run damaged", "the run in damaged did not end"),
        ("evaluate --run cut", "the adapter in cut/adapter cannot be read ("),
        (f"evaluate --run {run} --client x", "argument --client: invalid int value: 'x'; see --help"),
        (f"evaluate --run {run} --client -1", "client: -1 is not possible"),
        (f"evaluate --run {run} --samples 1.5", "argument --samples: invalid int value: '1.5'; see --help"),
        (f"evaluate --run {run} --device gpu", "device: gpu is not possible; allowed: auto | cpu"),
        (f"evaluate --run {run} --model notes", "model: notes is not possible"),
        (f"evaluate --run {run} --metric.x", "--metric.x: expected a value after it"),
        (f"evaluate --run {run} more", "there is no flag more"),
        # generate
        ("generate --prompt a", "the following arguments are required: --run; see --help"),
        ("generate --run void --prompt a", "void is no folder of a run"),
        ("generate --run torn --prompt a", "clients: x is not possible"),
        (f"generate --run {run} --prompts void", "prompts: void is not possible; allowed: a text file"),
        (f"generate --run {run} --prompts bytes.txt", "prompts: bytes.txt is not possible; allowed: a text file"),
        (f"generate --run {run} --prompts lines.txt", "prompts: lines.txt (nothing in it) is not possible"),
        (f"generate --run {run} --prompt a --seed -1 --temperature 1", "seed: -1 is not possible; " + whole),
        (f"generate --run {run} --prompt a --temperature nan", "temperature: nan is not possible; allowed: 0"),
        (f"generate --run {run} --prompt a --top-p 0 --temperature 1", "top_p: 0.0 is not possible; allowed: "),
        (f"generate --run {run} --prompt a --batch-size 0", "batch_size: 0 is not possible; " + whole),
        (f"generate --run {run} --prompt a --trunk.device gpu", "trunk.device: gpu is not possible; allowed: auto"),
        (f"generate --run {run} --prompt a --kernels fast", "kernels: fast is not possible; allowed: fused"),
        ("generate --run cut --prompt a", "the adapter in cut/adapter cannot be read ("),
        # adapters
        ("adapters", "the following arguments are required: COMMAND; see --help"),
        ("adapters split", "argument COMMAND: invalid choice: 'split'"),
        ("adapters summary", "the following arguments are required: DIR; see --help"),
        ("adapters summary void", "void is no folder of a run"),
        ("adapters summary cut", "the adapter in cut/adapter cannot be read ("),
        ("adapters merge void --out merged", "void is no folder of a run"),
        (f"adapters merge {run} --out notes", "out: notes (there already)"),
        (f"adapters merge {run} --dtype fp8 --out merged", "argument --dtype: invalid choice: 'fp8'"),
        (f"adapters merge {run} --client 7 --out merged", "client: 7 is not possible"),
        ("adapters unmerge notes --out back", "notes is no merged model: there is no such folder"),
        ("adapters unmerge void --out back", "void"),
        (f"adapters combine {run} {run} --weights 1 --out both", "weights: 1 is not possible; allowed: 2 numbers"),
        (f"adapters combine {run} {run} --weights 1,nan --out both", "weights: 1,nan is not possible"),
        (f"adapters combine {run} {run} --rank 0 --how svd --out both", "rank: 0 is not possible; " + whole),
        (f"adapters combine {run} {run} --how mean --out both", "argument --how: invalid choice: 'mean'"),
        (f"adapters export {run} --names ../x --out tasks", "names: ../x is not possible; allowed: up to 200"),
        (f"adapters export {run} {run} --names a,a --out tasks", "names: a is there twice"),
        (f"adapters export {run} {run} --names a,A --out tasks", "names: A is there twice"),
        (f"adapters export {run} --names {'x' * 300} --out tasks", "names: xxx"),
        (f"adapters compare {run} void", "void is no folder of a run"),
        # data
        ("data --clients 0", "clients: 0 is not possible"),
        ("data --plots x.png", "there is no flag --plots"),
        ("data --plot", "--plot: expected a value after it"),
        ("data --dataset void", "dataset: void (no data files in it) is not possible"),
        ("data --plot void/none/x.png --clients 2", "plot: void/none/x.png cannot be written ("),
        ("data --plot x.docx --clients 2", "plot: x.docx cannot be written ("),
        # clean
        ("clean", "the following arguments are required: RUN; see --help"),
        ("clean void", "run: void is not possible; allowed: the folder of a run"),
        ("clean dots", "run: dots is not possible; allowed: the folder of a run"),
        ("clean --all began", "there is no flag --all; see --help for the list"),
        # completion
        ("completion", "the following arguments are required: SHELL; see --help"),
        ("completion fish", "argument SHELL: invalid choice: 'fish'"),
        ("completion bash zsh", "there is no flag zsh; see --help for the list"),
    ]


def test_what_is_asked_for_wrongly_of_any_command_gets_one_line_and_writes_nothing(
    finished_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = bad_calls(tmp_path, finished_run("gpt2"))
    assert len(calls) >= 100
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    wrong = []
    for call, message in calls:
        code = main(call.split())
        said = capsys.readouterr()
        is_right = (code, said.out, said.err.count("\n")) == (2, "", 1) and said.err.startswith(f"fedsplit: {message}")
        if not is_right or files(tmp_path) != before:
            wrong.append((call, code, said.out, said.err))
        before = files(tmp_path)
    assert wrong == [], "\n".join(map(str, wrong))


def files(folder: Path) -> dict[str, int]:
    """Returns the names and sizes of all files in a folder."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("call", "messages"),
    [
        (
            "simulate --config wrong.toml --clients 0 --clientz 3 --lr nan --strategy.eta",
            [
                "there is no flag --clientz",
                "--strategy.eta: ",
                "rounds: -1",
                "clients: 0",
                "there is no setting lora.rang",
                "train.lr: nan",
            ],
        ),
        (
            "simulate --cut 1:7 --trunk.every 2 --train.momentum 0.9 --min-delta 1 --out notes --strategy fedavgg "
            "--dataset nowhere.txt --objective huber --sink nowhere.py:Mine --max-length 100000",
            [
                "train.momentum",
                "min_delta",
                "trunk.every",
                "cut",
                "train.max_length",
                "dataset",
                "out",
                "sinks",
                "strategy",
                "objective",
            ],
        ),
        (
            "simulate --nonsense 1 --rounds x --cut 9:99 --data.at nowhere",
            ["there is no flag --nonsense", "rounds: x", "data.at: nowhere", "cut: 9:99"],
        ),
        (
            "simulate --config wrong.toml --train.lr --strategy fedavgg --train.momentum 0.9 --out notes",
            [
                "--train.lr: expected",
                "rounds: -1",
                "clients: x",
                "there is no setting lora.rang",
                "train.momentum",
                "out",
                "strategy",
            ],
        ),
        # A check that needs a wrong setting has nothing to say, even if the setting is only meant.
        ("simulate --modle other --cut 9:99 --trunk.every 2", ["there is no flag --modle", "trunk.every"]),
        ("simulate --clients x --train.warmup 51 --rounds y", ["clients: x", "rounds: y"]),
        ("simulate --config gone.toml --cut 9:99 --train.momentum 0.9", ["config: gone.toml"]),
        (
            "simulate --config gone.toml --model sotu-gpt2 --max-length 100000",
            ["config: gone.toml", "train.max_length"],
        ),
        ("simulate --resume gone --nonsense 1", ["there is no flag --nonsense", "resume: gone"]),
        ("simulate --resume run --seed 1 --lr 0.1", ["seed cannot be set", "train.lr cannot be set", "resume: run"]),
        (
            "evaluate --run nowhere --samples -1 --device gpu --sampels 3",
            ["there is no flag --sampels", "samples", "device", "nowhere is no folder of a run"],
        ),
        (
            "generate --run nowhere --prompt= --top-k 0 --batch-size 0",
            ["batch_size", "top_k", "prompt", "nowhere is no"],
        ),
        (
            "adapters combine nowhere --weights x --rank 3 --out notes",
            ["combine: one", "weights", "rank", "nowhere", "out"],
        ),
        ("data --max-length 100000 --dataset nowhere.txt", ["train.max_length", "dataset"]),
        (
            "data --plot --clients x --max-length 100000 --dataset nowhere.txt",
            ["--plot: expected", "clients: x", "train.max_length", "dataset"],
        ),
        ("clean nowhere notes", ["run: nowhere", "run: notes"]),
        ("clean nowhere --al", ["there is no flag --al", "run: nowhere"]),
        (
            "evaluate --client x --samples -1 --nonsense 2 --metric.rouge",
            [
                "argument --client: invalid int",
                "the following arguments are required: --run",
                "there is no flag --nonsense",
                "--metric.rouge: expected",
                "samples: -1",
            ],
        ),
        (
            "generate --temperature x --batch-size 0 --prompt= --run nowhere --nonsense 2 --seed",
            [
                "--seed: expected",
                "argument --temperature: invalid float",
                "there is no flag --nonsense",
                "batch_size: 0",
                "prompt: nothing",
                "nowhere is no folder",
            ],
        ),
        ("adapters summary nowhere --nonsense 1", ["there is no flag --nonsense", "nowhere is no folder"]),
        (
            "adapters merge nowhere --dtype fp8 --out notes --nonsense 1",
            ["argument --dtype: invalid choice", "there is no flag --nonsense", "nowhere is no folder", "out: notes"],
        ),
        ("adapters unmerge nowhere --out notes", ["nowhere is no merged model", "out: notes"]),
        (
            "adapters combine nowhere --how mean --weights x",
            [
                "argument --how: invalid choice",
                "the following arguments are required: --out",
                "combine: one",
                "weights: x",
                "nowhere is no folder",
            ],
        ),
        ("adapters export nowhere run", ["the following arguments are required: --out", "nowhere", "the run in run"]),
        ("adapters compare nowhere gone", ["nowhere is no folder", "gone is no folder"]),
    ],
)
def test_all_errors_of_a_call_are_reported_together(
    call: str, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of flags and of the file alike, a line each."""
    (tmp_path / "wrong.toml").write_text("rounds = -1\nclients = 'x'\n[lora]\nrang = 3\n")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(call.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"fedsplit: {message}"), lines


@pytest.mark.parametrize(
    ("call", "messages"),
    [
        (
            "evaluate --nonsense 1 --client 9 --dataset nowhere.txt --data.format prose --metric rouge --device gpu",
            ["there is no flag --nonsense", "device: gpu", "data.format: prose", "client: 9", "metric: rouge"],
        ),
        (
            "evaluate --clint 1 --samples x --dataset nowhere.txt --data.format classification",
            ["argument --samples: invalid int", "there is no flag --clint", "data.format: classification", "dataset"],
        ),
        (
            "generate --nonsense 1 --top-k 0 --client 9 --model nowhere --prompt a",
            ["there is no flag --nonsense", "top_k: 0", "client: 9", "model: nowhere"],
        ),
        ("generate --trunk.device gpu --max-new-tokens 999 --prompt a", ["trunk.device: gpu", "max_new_tokens: 999"]),
    ],
)
def test_errors_against_a_run_are_reported_together_with_those_of_the_flags(
    call: str,
    messages: list[str],
    finished_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fedsplit.results.whole.open_held", too_late)
    monkeypatch.setattr("fedsplit.commands.generate._load_client_parts", too_late)
    assert main([*call.split(), "--run", str(finished_run("gpt2"))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"fedsplit: {message}"), lines


def test_whatever_a_command_writes_is_for_its_user_alone(
    corpus_file: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask would let everybody read it. Clients' text is looked at while the run trains."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOOKS)
    run = f"simulate --engine local --model {tiny_models['gpt2']} --dataset {corpus_file} --clients 2 --rounds 1"
    run += " --cut 1:2"
    run += " --train.steps 1 --batch-size 1 --max-length 16 --partition natural --out run --sink mine.py:Looks"
    before = os.umask(0o022)
    try:
        assert main(run.split()) == 0
        assert main(["adapters", "merge", "run", "--out", "merged"]) == 0
        assert main(["adapters", "export", "run", "--out", "tasks"]) == 0
    finally:
        os.umask(before)
    text = [line.rpartition(" ") for line in (tmp_path / "seen").read_text().splitlines()]
    assert {name for name, _, _ in text} >= {"run/clients", "run/clients/data/0000.safetensors"}
    modes = {name: int(mode, 8) for name, _, mode in text}
    for folder in ("run", "merged", "tasks"):
        paths = [tmp_path / folder, *(tmp_path / folder).rglob("*")]
        modes |= {str(path): path.stat().st_mode & 0o777 for path in paths}
    assert len(modes) > 20
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


LOOKS = """
from pathlib import Path

class Looks:
    def handle(self, event):
        paths = [path for path in Path("run").rglob("*") if path.exists()]
        with open("seen", "a") as seen:
            seen.writelines(f"{path} {path.stat().st_mode & 0o777:o}\\n" for path in paths)

    def close(self):
        pass
"""


def test_an_output_that_can_only_say_ascii_gets_a_question_mark() -> None:
    """A name of a client's, say: the command goes on."""
    code = "from fedsplit.commands.exit_codes import exit_code\n"
    code += "raise SystemExit(exit_code(lambda: print('caf\\u00e9'), []))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf?\n", "")
