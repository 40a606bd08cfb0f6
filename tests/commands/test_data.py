"""The command that shows who would hold what, and all that can be wrong with data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm_command
from conftest import with_added_token

from fedsplit.commands import data, simulate


def test_the_table_of_a_file(
    corpus_file: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dataset", str(corpus_file), "--partition", "natural", "--clients", "2", "--max-length", "16"]
    argv += ["--model", str(tiny_models["gpt2"]), "--cut", "1:2"]
    assert data.main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[:3]] == [["sequences", "tokens"], ["0", "ann"], ["1", "bob"]]
    assert data.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [client["name"] for client in found["clients"]] == ["ann", "bob"]
    assert found["clients"][0]["train"]["tokens"] == 16 * found["clients"][0]["train"]["sequences"]
    whole = sum(client["train"]["sequences"] for client in found["clients"])
    assert shown[-1].split()[:3] == ["all", f"{whole}", f"{16 * whole:,}"]


def bad_data(tmp_path: Path, model: Path) -> list[tuple[list[str], str]]:
    """Flags beside the usual ones, and how the one line begins and what it says."""
    rows = {
        "words": [{"words": "x"}],
        "notes": [{"text": "a note " * 9, "owner": "ann"}],
        "chats": [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}],
        "pairs": [{"prompt": "p" * 40, "completion": "c"}] * 4,
        "classes": [{"text": f"text {n}", "label": n % 2} for n in range(8)],
        "unsorted": [{"text": "x", "label": 0}, {"text": "y", "label": None}],
        "below": [{"text": "x", "label": 0}, {"text": "y", "label": -1}],
        "alike": [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}],
    }
    files = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, made in rows.items():
        files[name].write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": "b"')
    (tmp_path / "torn.parquet").write_text("PAR1")
    (tmp_path / "none.csv").write_text("text,owner\n")
    (tmp_path / "folder").mkdir()
    at = {name: ["--dataset", str(file)] for name, file in files.items()}
    sorting = ["--data.format", "classification"]
    sorted_ = [*at["classes"], *sorting]
    added = str(with_added_token(model, tmp_path / "added", "text"))
    return [
        (at["words"], f"dataset: {files['words']} is not possible; allowed: a data set with a column 'text'"),
        ([*at["words"], "--data.text", "body"], f"dataset: {files['words']}"),
        ([*at["words"], "--data.format", "text"], "data.text: text is not possible; allowed: a column of"),
        ([*at["notes"], "--data.owner", "who"], "data.owner: who is not possible; allowed: a column of"),
        ([*at["notes"], "--partition", "natural"], "clients: 2 is not possible; allowed: none by nature, since"),
        ([*at["notes"], "--partition", "dirichlet:1:when"], "partition: when is not possible; allowed: a column of"),
        ([*at["notes"], "--partition", "wild"], "partition: wild is not possible; allowed: auto | natural"),
        ([*at["notes"], "--data.format", "poem"], "data.format: poem is not possible; allowed: auto | text"),
        ([*at["notes"], "--data.packing", "maybe"], "data.packing: maybe is not possible; allowed: auto | true"),
        ([*at["notes"], "--data.split", "dev"], f"dataset: {files['notes']}"),
        ([*at["notes"], "--data.config", "dev"], "data.config: dev is not possible; allowed: none"),
        ([*at["notes"], "--data.held-out", "dev"], "data.held_out: dev is not possible; allowed: a file or folder"),
        ([*at["notes"], "--data.held-out", str(tmp_path / "none.csv")], f"data.held_out: {tmp_path / 'none.csv'}"),
        (at["chats"], f"model: {model} is not possible; allowed: a model whose tokenizer has a chat template"),
        (at["pairs"], "train.max_length: 16 is not possible; allowed: a length that reaches beyond the prompts"),
        (["--dataset", str(tmp_path / "torn.jsonl")], f"dataset: {tmp_path / 'torn.jsonl'}"),
        (["--dataset", str(tmp_path / "torn.parquet")], f"dataset: {tmp_path / 'torn.parquet'}"),
        (["--dataset", str(tmp_path / "none.csv")], f"dataset: {tmp_path / 'none.csv'}"),
        (["--dataset", str(tmp_path / "folder")], f"dataset: {tmp_path / 'folder'} (no data files in it)"),
        (["--dataset", "nowhere.csv"], "dataset: nowhere.csv is not possible; allowed: sotu, synthetic, a Hub id"),
        ([*sorted_, "--data.label", "kind"], "data.label: kind is not possible; allowed: a column of"),
        ([*sorted_, "--data.packing", "true"], "data.packing: true is not possible; allowed: auto | false under"),
        ([*at["unsorted"], *sorting], f"dataset: {files['unsorted']} is not possible; allowed: rows whose labels"),
        ([*at["below"], *sorting], f"dataset: {files['below']} is not possible; allowed: rows whose labels"),
        ([*at["alike"], *sorting], "data.label: label is not possible; allowed: a column of labels of two classes"),
        (
            [*sorted_, "--data.held-out", str(files["below"])],
            f"dataset: {files['below']} is not possible; allowed: rows",
        ),
        (
            [*at["classes"], "--clients", "1", "--data.packing", "false", "--model", added],
            f"model: {added} (its texts have token 97 (text), its embedding has 97 rows) is not possible",
        ),
        (["--max-length", "64"], "train.max_length: 64 is not possible; allowed: 8 to 32, the model's positions"),
    ]


def test_bad_data_gets_one_line(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From this command and from the run's own checks alike; exit code 2."""
    model = tiny_models["gpt2"]
    usual = ["--model", str(model), "--cut", "1:2", "--clients", "2", "--max-length", "16"]
    usual += ["--lora.targets", "c_attn", "--out", str(tmp_path / "run")]
    for argv, message in bad_data(tmp_path, model):
        for command in (data.main, simulate.main):
            assert command([*usual, *argv]) == 2, argv
            said = capsys.readouterr()
            assert said.err.startswith(f"fedsplit: {message}"), (argv, said.err)
            assert said.err.count("\n") == 1, said.err
            assert not said.out or " proved at " in said.out  # a new proof is told in a line
    assert not (tmp_path / "run").exists()


def test_help_needs_no_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        data.main(["--help"])
    assert ended.value.code == 0
    assert "--plot FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_holds_what_was_shown_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Completions, padded and dealt out by owner, through the command; the table in its lines and in data.json."""
    argv = ["--dataset", "synthetic", "--data.format", "completion", "--partition", "pathological:1", "--clients", "2"]
    argv += ["--rounds", "1", "--train.steps", "2", "--batch-size", "2", "--max-length", "32", "--eval.samples", "4"]
    more = ["--engine", "local", "--lora-rank", "2", "--data.show", "--out", "run"]
    done = warm_command.command("fedsplit.simulate", *argv, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert data.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("data: completion; a text a sequence, padded") and shown in done.stdout
    assert data.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run" / "data.json").read_text())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["tokens"] < 2 * 2 * 2 * 32
