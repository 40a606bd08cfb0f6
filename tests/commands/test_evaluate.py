"""The command that measures a finished run: its flags, its metrics and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import with_added_token

from fedsplit import scores
from fedsplit.commands import evaluate
from fedsplit.results import measuring
from fedsplit.results.finished import open_run
from fedsplit.scores import Score
from fedsplit.settings.config import Config
from fedsplit.settings.flags import flag_of
from fedsplit.settings.sections import DataSettings, WireSettings


def pooled(results: list[measuring.Result]) -> Score:
    return scores.pooled(result.tuned for result in results)


def reported(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clients = [event for event in events if event["event"] == "evaluate"][-1]["clients"]
    return json.loads((run / "summary.json").read_text())["eval_loss"], clients


def test_another_data_set_has_columns_and_a_format_of_its_own(
    finished_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's were text and owner; what is not said is as it was there, but for configuration and split."""
    run = open_run(finished_run("gpt2"))
    given = {"data.text": "body", "data.split": "test"}
    told = replace(run, config=replace(run.config, data=DataSettings(text="words", owner="who", config="raw")))
    assert measuring.other_data(told.config, given) == DataSettings(text="body", owner="who", split="test")
    rows = [{"body": "abcdefgh" * 4, "who": "dan"}, {"body": "hello " * 8, "who": "eve"}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"asked": "1+1=", "said": "2!"}, {"asked": "3+4=", "said": "7"}]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    other, sums = (["--run", str(run.path), "--dataset", str(tmp_path / f"{n}.jsonl")] for n in ("other", "sums"))
    assert evaluate.main([*other, "--data.text", "body", "--data.owner", "who"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [["dan", "30"], ["eve", "45"]]
    columns = ["--data.prompt", "asked", "--data.completion", "said"]
    assert evaluate.main([*sums, "--data.format", "completion", *columns]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "5"]  # with the end tokens


def test_the_flags_are_those_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    """All that a data set's settings are but two: nothing is held out of it, and nothing dealt out."""
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = set(re.findall(r"--data\.[a-z-]+", capsys.readouterr().out))
    assert shown == {flag_of(f"data.{leaf.name}") for leaf in fields(DataSettings)} - {"--data.held-out", "--data.show"}


def test_a_lossy_codec_brings_a_line_that_explains_another_loss(
    finished_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run("gpt2", **{"wire.codec": "int4,zstd"})
    assert evaluate.main(["--run", str(run)]) == 0
    *_, total, hint = capsys.readouterr().out.splitlines()
    assert f"-> {reported(run)[0]['after']:.4f}" not in total
    assert hint.startswith("the run measured through the codec int4,zstd, and this command without a codec")


@pytest.mark.parametrize("values", [{}, {"codec": "delta,zstd"}, {"gradient_up": "int4", "gradient_down": "topk:0.1"}])
def test_a_codec_that_leaves_hidden_states_as_they_are_brings_no_line(values: dict[str, str]) -> None:
    """Gradients are no part of a measurement."""
    assert evaluate.codec_hint(Config(wire=WireSettings(**values))) == []


def test_the_table(finished_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run("gpt2")
    assert evaluate.main(["--run", str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["tokens", "ann", "bob", "cid", "all"]
    assert f"-> {reported(run)[0]['after']:.4f}" in shown[-1]


def test_what_is_asked_for_wrongly_gets_one_line(
    finished_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = str(finished_run("gpt2")), str(finished_run("gpt2", "fedsa"))
    (tmp_path / "short.txt").write_text("Short.")
    short = str(tmp_path / "short.txt")
    added = str(with_added_token(open_run(Path(run)).config.model_path, tmp_path / "added", "text"))
    (tmp_path / "text.txt").write_text("Some text of its own. " * 4)
    for argv, words in (
        ([], "the following arguments are required: --run; see --help"),
        (["--run", "nowhere"], "nowhere is no folder of a run: there is no such folder"),
        (["--run", run, "--client", "3"], "client: 3 is not possible; allowed: 0 to 2"),
        (["--run", run, "--samples", "-1"], "samples: -1 is not possible"),
        (["--run", run, "--dataset", "nowhere.txt"], "dataset: nowhere.txt is not possible"),
        (["--run", run, "--dataset", short], f"dataset: {short} is not possible; allowed: a text of 16 tokens"),
        (["--run", own, "--dataset", short], f"in the run in {own} every client has an adapter of its own"),
        (["--run", run, "--model", "./nowhere"], "model: ./nowhere is not possible"),
        (["--run", run, "--model", added], f"model: {added} (its texts have token 97 (text), its embedding has 97"),
        (
            ["--run", run, "--model", added, "--dataset", str(tmp_path / "text.txt")],
            f"model: {added} (its texts have token 97 (text), its embedding has 97 rows)",
        ),
        (["--run", run, "--data.text", "body"], "data.text: body is not possible; allowed: no --data.text without"),
        (
            ["--run", run, "--dataset", short, "--data.format", "text", "--data.text", "body"],
            "data.text: body is not possible; allowed: a column of",
        ),
        (["--run", run, "--dataset", short, "--data.format", "prose"], "data.format: prose is not possible"),
        (
            ["--run", run, "--dataset", short, "--data.format", "classification"],
            "data.format: classification is not possible; allowed: auto | text | completion | chat, since the run's",
        ),
    ):
        assert evaluate.main(argv) == 2, argv
        said = capsys.readouterr()
        assert said.err.startswith(f"fedsplit: {words}") and said.err.count("\n") == 1, said.err
        assert said.out == ""


def test_the_table_of_a_classifier_has_no_perplexity() -> None:
    result = measuring.Result("ann", base=Score(20.0, 10, 1), tuned=Score(10.0, 10, 4))
    assert evaluate.lines([result], classifies=True)[0].split() == ["texts", "loss", "accuracy"]


MINE = """
class Above:
    '''Share of labels with a probability above a threshold.'''
    def __init__(self, least: float = 0.5) -> None:
        self.least = least
    def __call__(self, logits, labels):
        seen = labels != -100
        right = logits.softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return ((right > self.least) & seen).sum(), seen.sum()
"""


@pytest.mark.parametrize("kind", ["tokens", "virtual tokens", "classes"])
def test_the_runs_metrics_are_those_that_the_run_reported(
    kind: str, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    how: dict[str, object] = {
        "tokens": {},
        "virtual tokens": {"prompt__kind": "prompt", "prompt__tokens": 3},
        "classes": {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32},
    }[kind]  # type: ignore[assignment]
    named = {"metric": f"token_accuracy,{tmp_path}/mine.py:Above", "metric_options": {"Above.least": 0.02}}
    run = open_run(finished_run("gpt2", **how, **named))
    metrics, left_out = evaluate.metrics_of(run.config, [], {})
    results = measuring.evaluate(run, metrics=metrics)
    summary = json.loads((run.path / "summary.json").read_text())["metrics"]
    found = scores.means(pooled(results).metrics)
    before = scores.means(scores.pooled(result.base for result in results).metrics)
    assert list(found) == list(summary) == ["token_accuracy", "Above"]
    for name, ends in summary.items():
        assert found[name] == pytest.approx(ends["after"], abs=1e-6)
        if kind != "virtual tokens":  # without which the base model is measured
            assert before[name] == pytest.approx(ends["before"], abs=1e-6)
    assert found["Above"] > 0 and not left_out
    assert all(pooled([result]).accuracy == scores.means(result.tuned.metrics)["token_accuracy"] for result in results)


def test_further_metrics_stand_beside_the_loss(
    finished_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    gone = tmp_path / "gone.py"
    gone.write_text("def length(logits, labels):\n    return 1, 1\n")
    run = finished_run("gpt2", metric=f"token_accuracy,{gone}:length")
    gone.unlink()
    asked = ["--run", str(run), "--client", "0", "--metric", f"{tmp_path}/mine.py:Above"]
    assert evaluate.main([*asked, "--metric.Above.least", "0"]) == 0
    head, *_, last, note = capsys.readouterr().out.splitlines()
    assert head.split() == ["tokens", "loss", "perplexity", "accuracy", "token_accuracy", "Above"]
    assert last.endswith("1.0000 -> 1.0000")
    assert note.startswith("without the run's metric length: metric: ")
    for wrong, words in (
        (["--metric.Above.most", "1"], "metric.Above.most: 1 is not possible; allowed: least"),
        (["--metric.rouge.stem", "1"], "metric.rouge.stem: 1 is not possible; allowed: an option of Above | "),
        (["--metric", "rouge"], "metric: rouge is not possible; allowed: "),
        (["--strategy.mu", "1"], "there is no flag --strategy.mu"),
        (["--sampels", "1"], "there is no flag --sampels; did you mean --samples"),
    ):
        assert evaluate.main([*asked, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_measurement_under_way_is_told(finished_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows the phases, since a run's model may take a minute and a half."""
    told: list[tuple[str, int, int]] = []

    class Screen:
        """Remembers the phases."""

        def __enter__(self) -> Screen:
            return self

        def __exit__(self, *_: object) -> None:
            """Has nothing to close."""

        def phase(self, text: str, done: int, of: int) -> None:
            told.append((text, done, of))

    monkeypatch.setattr("fedsplit.events.screen.make_screen", lambda **_: Screen())
    assert evaluate.main(["--run", str(finished_run("gpt2"))]) == 0
    assert [done for _, done, _ in told] == list(range(len(told))) and len(told) >= 2
    assert all("text of" in text for text, _, _ in told)
