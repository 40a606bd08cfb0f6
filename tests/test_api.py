"""The door from Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsplit
from fedsplit import api
from fedsplit.events import Event, RoundEvaluated
from fedsplit.settings import flags
from fedsplit.settings.config import Config
from fedsplit.settings.sections import TrainSettings
from fedsplit.stages import Gradients, GradientStage, LocalStep
from fedsplit.updates import Adapters, ClientUpdate
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx

SMALL = {"cut": "1:2", "clients": 2, "rounds": 1, "engine": "local", "threads": 1}
SMALL |= {"train": {"steps": 1, "batch_size": 2, "max_length": 16, "lr": 0.05}, "lora": {"rank": 2}}
SMALL |= {"eval": {"samples": 2, "after": 0}}


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = adapter(one), adapter(two)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def small(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Keywords of a small run, in this process."""
    monkeypatch.chdir(tmp_path)
    return {**SMALL, "model": tiny_models["gpt2"], "dataset": corpus_file}


def test_keywords_are_the_settings_of_the_command(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(api, "_run", lambda call: asked.append(call.draft.config))
    del small["eval"]
    fedsplit.run(**small, strategy="fedprox", strategy__mu=0.5, train__clip=0.1, out="one")
    nested = {**small, "train": {**small["train"], "clip": 0.1}}
    fedsplit.run(**nested, strategy="fedprox", strategy_options={"mu": 0.5}, out="one")
    fedsplit.run(**{"train.clip": 0.1}, **small, strategy="fedprox", strategy__mu=0.5, out=Path("one"))
    command = ["--train.clip", "0.1", "--strategy", "fedprox", "--strategy.mu", "0.5", "--cut", "1:2", "--clients", "2"]
    command += ["--rounds", "1", "--train.steps", "1", "--batch-size", "2", "--max-length", "16", "--lr", "0.05"]
    command += ["--lora.rank", "2", "--model", str(small["model"]), "--dataset", str(small["dataset"])]
    command += ["--engine", "local", "--threads", "1", "--out", "one"]
    assert asked == [flags.parse(command)] * 3


def test_a_config_or_a_file_lies_below_the_keywords(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(api, "_run", lambda call: asked.append(call.draft.config))
    Path("run.toml").write_text("rounds = 4\n[train]\nlr = 0.1\nclip = 0.5\n[strategy_options]\nmu = 0.5\n")
    config = Config(rounds=4, train=TrainSettings(lr=0.1, clip=0.5), strategy_options={"mu": 0.5})
    for below in (config, "run.toml", Path("run.toml")):
        fedsplit.run(below, train__lr=0.2, seed=3)
    fedsplit.run(rounds=4, train=TrainSettings(lr=0.2, clip=0.5), seed=3, strategy_options={"mu": 0.5})
    expected = Config(rounds=4, seed=3, train=TrainSettings(lr=0.2, clip=0.5), strategy_options={"mu": 0.5})
    assert asked == [expected] * 4


def test_metrics_and_sinks_by_name_have_options(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(api, "_run", lambda call: asked.append(call.draft.config))
    named: dict[str, Any] = {**small, "metrics": ["m:rouge"], "sinks": ["m:Mine"]}
    fedsplit.run(**named, metric__rouge__stem=True, sinks__Mine__project="a")
    fedsplit.run(**named, metric_options={"rouge": {"stem": True}}, sink_options={"Mine.project": "a"})
    fedsplit.run(asked[0], sinks__Mine__project="b")
    assert [config.metric_options for config in asked] == [{"rouge.stem": True}] * 3
    assert [config.sink_options for config in asked] == [{"Mine.project": project} for project in "aab"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clients": 0}, "clients: 0 is not possible; allowed: a whole number from 1 to 2147483647"),
    ({"clientz": 2}, "there is no setting clientz; did you mean clients"),
    ({"train": {"lrr": 1, "max_length": 16}}, "there is no setting train.lrr; did you mean train.lr"),
    ({"train__lr": "fast"}, "train.lr: fast is not possible; allowed: a finite number above 0"),
    ({"train": 3}, "there is no setting train; did you mean"),
    ({"seed": None}, "seed: None is not possible; allowed: a whole number from 0 to 4294967295"),
    ({"strategy_options": 3}, "strategy_options: 3 is not possible; allowed: a table"),
    ({"strategy": "fedavgg"}, "strategy: fedavgg is not possible; allowed: "),
    ({"strategy": FedAvg}, "strategy: the class FedAvg is not possible; allowed: a name, an object"),
    ({"dataset": {}}, "dataset: a dict without a text is not possible; allowed: a name, a file"),
    ({"dataset": 3}, "dataset: 3 is not possible; allowed: a name, a file"),
    ({"model": 3}, "model: 3 is not possible; allowed: a name, a folder"),
    ({"model": "sotu-gpt2", "tokenizer": object()}, "tokenizer: one of object is not possible; allowed: one together"),
    ({"config": 3}, "config: an object of type int is not possible; allowed: a Config, or the path of a TOML"),
    ({"config": "gone.toml"}, "config: gone.toml is not possible; allowed: a TOML file that can be read"),
    ({"resume": "gone"}, "resume: gone is not possible; allowed: the folder of a run"),
    ({"sinks": [object()]}, "sinks: an object of type object is not possible; allowed: the name of a class, or an"),
    ({"objective": 3}, "objective: an object of type int is not possible; allowed: a name, or a function of logits"),
    ({"objective": len, "engine": "ray"}, "objective: an object of type builtin_function_or_method is not possible"),
    ({"metrics": [len], "engine": "ray"}, "metrics: an object of type builtin_function_or_method is not possible"),
]


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (
            {"nonsense": 1, "rounds": "x", "cut": "9:99", "data__at": "nowhere", "sinks": [3], "metrics": [FedAvg]},
            [
                "sinks: an object",
                "metrics: the class",
                "there is no setting nonsense",
                "rounds: x",
                "data.at: nowhere",
                "cut: 9:99",
            ],
        ),
        ({"strategy": FedAvg, "dataset": 3, "model": 3}, ["strategy: the class", "model: 3", "dataset: 3"]),
        ({"dataset": {"ann": "text"}, "trunk__every": 2}, ["dataset: 'text'", "trunk.every: 2"]),
        ({"dataset": {"ann": ["text"]}, "clients": "x", "data__split": "test"}, ["clients: x"]),
        ({"config": 3, "cut": "9:99", "rounds": 0}, ["config: an object", "rounds: 0"]),
        ({"strategy_options": 3, "strategy": "fedavgg", "rounds": 0}, ["strategy_options: 3", "rounds: 0", "strategy"]),
    ],
)
def test_all_errors_of_a_call_are_reported_together(
    given: dict[str, Any], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of objects, of settings and of later checks, but none that only follows from a default."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedsplit.InputError) as refused:
        fedsplit.run(**given)
    errors = [str(error) for error in refused.value.errors]
    assert len(errors) == len(messages), errors
    for error, message in zip(errors, messages, strict=True):
        assert error.startswith(message), errors
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("given", "words"), WRONG, ids=lambda given: str(given)[:30])
def test_what_is_asked_wrongly_is_an_input_error_in_one_line(
    given: dict[str, Any], words: str, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {*Path().rglob("*")}
    with pytest.raises(fedsplit.InputError, match=f"^{re.escape(words)}") as refused:
        fedsplit.run(**{**({} if "resume" in given else small), **given})
    assert "\n" not in str(refused.value)
    assert capsys.readouterr() == ("", "")
    assert {*Path().rglob("*")} == before


def test_the_error_of_a_setting_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsplit.commands import simulate

    assert simulate.main(["--train.lr", "fast"]) == 2
    with pytest.raises(fedsplit.InputError) as refused:
        fedsplit.run(train__lr="fast")
    assert capsys.readouterr().err == f"fedsplit: {refused.value}\n"


@pytest.mark.slow
def test_objects_give_what_the_names_of_the_same_things_give(small: dict[str, Any], corpus_file: Path) -> None:
    """A strategy, a model and a data set; and the run is known by its folder alone afterwards."""
    named = fedsplit.run(**small, strategy="fedprox", strategy__mu=0.5, partition="natural", out="named")
    model = AutoModelForCausalLM.from_pretrained(small["model"])
    tokenizer = AutoTokenizer.from_pretrained(small["model"])
    rows = datasets.Dataset.from_list([json.loads(line) for line in corpus_file.read_text().splitlines()])
    objects = {"strategy": FedProx(mu=0.5), "dataset": rows, "partition": "natural"}
    given = fedsplit.run(**{**small, **objects, "model": (model, tokenizer)}, out="given")
    assert same(named.folder, given.folder)
    on = fedsplit.run(resume=given.folder, rounds=2)
    assert on.summary["last_round"] == 2 and on.folder == given.folder
    assert on.model().peft_config["default"].r == 2


def test_texts_by_client_are_each_clients_own(small: dict[str, Any]) -> None:
    texts = {name: [f"{name} wrote text number {n}. " * 6 for n in range(5)] for name in ("bob", "ann", "cid")}
    del small["clients"]
    result = fedsplit.run(**{**small, "dataset": texts}, out="all")
    assert list(json.loads((result.folder / "data.json").read_text())["clients"]) != []
    held_out = result.losses[result.losses.split == "held_out"]
    assert list(dict.fromkeys(held_out.client)) == ["all", "bob", "ann", "cid"]
    assert (result.config.clients, result.config.partition) == (3, "natural")


class Remembers:
    """A strategy of the user's, which keeps more than plain values on itself."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        self.seen.append(len(updates))
        return FedAvg().aggregate(state, adapters, updates)


@pytest.mark.slow
def test_a_strategy_stays_the_object_that_was_given(small: dict[str, Any]) -> None:
    """The trial round before the run is played by a copy."""
    seen: list[int] = []
    result = fedsplit.run(**{**small, "rounds": 2}, strategy=Remembers(seen), out="one")
    assert seen == [2, 2]
    plain = fedsplit.run(**{**small, "rounds": 2}, strategy="fedavg", out="two")
    assert same(result.folder, plain.folder)
    with pytest.raises(fedsplit.InputError, match=r"^strategy: .*Remembers\(\.\.\.\) is not possible"):
        fedsplit.run(resume=result.folder, rounds=3)
    fedsplit.run(resume=result.folder, rounds=3, strategy=Remembers([]))
    with pytest.raises(fedsplit.InputError, match=r"^strategy: fedprox is not possible; allowed: .*Remembers"):
        fedsplit.run(resume=result.folder, rounds=4, strategy=FedProx())


@pytest.mark.slow
def test_a_strategy_of_flowers_as_an_object(small: dict[str, Any]) -> None:
    result = fedsplit.run(**small, strategy=FedAdam(eta=0.01), out="one")
    named = fedsplit.run(**small, strategy="flwr.serverapp.strategy:FedAdam", strategy__eta=0.01, out="two")
    assert same(result.folder, named.folder)


def doubled(logits: Tensor, labels: Tensor) -> Tensor:
    return 2 * functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def share_of_sevens(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float((labels == 7).sum()), float((labels >= 0).sum())


class Held(FedAvg):
    """Lets no client move, by a stage that is an object of this program."""

    def __init__(self, by: list[float]) -> None:
        self.by = by

    def stage(self) -> GradientStage:
        return Zero()


class Zero(GradientStage):
    def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
        return {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}


@pytest.mark.slow
def test_objective_metric_and_stage_are_objects_too(small: dict[str, Any]) -> None:
    """In this process; what the settings say of them no command can load."""
    plain = fedsplit.run(**small, out="plain", train__steps=1)
    double = fedsplit.run(**small, out="double", train__steps=1, objective=doubled, metrics=[share_of_sevens])
    first = [result.losses.query("split == 'train' and client == 'all'").loss.item() for result in (plain, double)]
    assert first[1] == pytest.approx(2 * first[0], rel=1e-5)
    assert 0 <= double.summary["metrics"]["share_of_sevens"]["after"] < 1
    assert double.config.objective.endswith(":doubled(...)")
    held = fedsplit.run(**small, out="held", strategy=Held([1.0]), trunk__schedule="copies")
    assert held.summary["eval_loss"]["after"] == held.summary["eval_loss"]["before"]


class Broken(Remembers):
    """A strategy that breaks in its second round."""

    def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
        if len(self.seen) == 1:
            raise RuntimeError("out of luck")
        return super().aggregate(state, adapters, updates)


@pytest.mark.slow
def test_a_run_follows_one_that_failed_and_the_failed_one_goes_on(small: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="out of luck"):
        fedsplit.run(**{**small, "rounds": 2}, strategy=Broken([]), out="broken")
    straight = fedsplit.run(**{**small, "rounds": 2}, out="straight")
    with pytest.raises(fedsplit.InputError, match="did not end"):
        fedsplit.open("broken")
    gone_on = fedsplit.run(resume="broken", strategy=Broken([]))  # whose second call is another run's
    assert same(straight.folder, gone_on.folder)


def test_runs_without_a_folder_get_one_each(small: dict[str, Any]) -> None:
    first, second = (fedsplit.run(**small) for _ in range(2))
    assert first.folder != second.folder and first.folder.parent == second.folder.parent == Path("runs")
    again = fedsplit.open(first.folder)
    assert (again.summary, again.config) == (first.summary, first.config) and again.losses.equals(first.losses)


def test_the_package_offers_what_it_lists() -> None:
    assert {name for name in fedsplit.__all__ if not hasattr(fedsplit, name)} == set()
    assert dir(fedsplit) == sorted(fedsplit.__all__)
    with pytest.raises(AttributeError, match="module 'fedsplit' has no attribute 'runn'"):
        fedsplit.runn  # noqa: B018


class Losses:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.closed = 0

    def handle(self, event: Event) -> None:
        if isinstance(event, RoundEvaluated):
            self.losses.append(event.loss)

    def close(self) -> None:
        self.closed += 1


def test_a_sink_is_an_object_that_hears_the_run(small: dict[str, Any]) -> None:
    sink = Losses()
    result = fedsplit.run(**small, sinks=[sink], out="one")
    held_out = result.losses[(result.losses.split == "held_out") & (result.losses.client == "all")]
    assert (sink.losses, sink.closed) == (list(held_out.loss), 1)


def test_names_and_objects_of_sinks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Config, Any]] = []
    monkeypatch.setattr(api, "_run", lambda call: asked.append((call.draft.config, call.sinks)))
    sink = Losses()
    fedsplit.run(sinks=["mine.py:Sink", sink])
    fedsplit.run(sinks="mine.py:Sink")
    assert [(config.sinks, sinks) for config, sinks in asked] == [(("mine.py:Sink",), [sink]), (("mine.py:Sink",), [])]


@pytest.mark.slow
def test_the_page_about_python_runs_as_it_is_written(tmp_path: Path) -> None:
    page = Path("docs/python.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=550, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "fedprox {'mu': 0.1}" in done.stdout and "torch.Size([1, " in done.stdout
    assert (tmp_path / "losses.png").stat().st_size


INTERRUPTED = """
import os, signal, sys, threading
import fedsplit

KEYWORDS = {keywords}


class Interrupts:
    def init(self, adapters):
        return {{}}

    def aggregate(self, state, adapters, updates):
        if not getattr(self, "copied", False):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.0 if KEYWORDS["engine"] == "local" else 60.0)
        return state, adapters

    def __deepcopy__(self, memo):
        copy = Interrupts()
        copy.copied = True
        return copy


before = signal.getsignal(signal.SIGINT)
try:
    fedsplit.run(**KEYWORDS, strategy=Interrupts(), out="stopped")
except KeyboardInterrupt:
    print("stopped")
assert signal.getsignal(signal.SIGINT) is before

found = []
thread = threading.Thread(target=lambda: found.append(fedsplit.run(**KEYWORDS, out="after")))
thread.start()
thread.join()
print(found[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_ctrl_c_raises_and_another_run_follows_in_a_thread(
    engine: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    keywords = {**SMALL, "engine": engine, "model": str(tiny_models["gpt2"]), "dataset": str(corpus_file)}
    call = [sys.executable, "-c", INTERRUPTED.format(keywords=keywords)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=550, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "\nstopped\n" in done.stdout and "<Result of after: held-out loss" in done.stdout
