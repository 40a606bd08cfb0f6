"""The door from Python."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedsplit
from fedsplit import flags
from fedsplit.config import TrainSettings
from fedsplit.updates import Adapters, ClientUpdate
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx

SMALL = {"cut": "1:2", "clients": 2, "rounds": 1, "workers": 1, "threads": 1}
SMALL |= {"train": {"steps": 2, "batch_size": 2, "max_length": 16, "lr": 0.05}, "lora": {"rank": 2}}


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = adapter(one), adapter(two)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def small(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_ray: None
) -> dict[str, Any]:
    """Keywords of a small run, in this process."""
    monkeypatch.chdir(tmp_path)
    return {**SMALL, "model": tiny_models["gpt2"], "dataset": corpus_file}


def test_keywords_are_the_settings_of_the_command(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = fedsplit.run(**small, strategy="fedprox", strategy__mu=0.5, train__clip=0.1, out="one")
    nested = {**small, "train": {**small["train"], "clip": 0.1}}
    again = fedsplit.run(**nested, strategy="fedprox", strategy_options={"mu": 0.5}, out="two")
    assert same(result.folder, again.folder)
    command = ["--train.clip", "0.1", "--strategy", "fedprox", "--strategy.mu", "0.5", "--cut", "1:2", "--clients", "2"]
    command += ["--rounds", "1", "--train.steps", "2", "--batch-size", "2", "--max-length", "16", "--lr", "0.05"]
    command += ["--lora.rank", "2", "--model", str(small["model"]), "--dataset", str(small["dataset"])]
    command += ["--workers", "1", "--threads", "1"]
    asked = flags.parse(command)
    filed = tomllib.loads((result.folder / "config.toml").read_text())
    assert (asked.train.clip, asked.strategy_options) == (filed["train"]["clip"], filed["strategy_options"])
    assert result.config.strategy == "fedprox" and result.summary["eval_loss"] == again.summary["eval_loss"]


def test_a_config_or_a_file_lies_below_the_keywords(small: dict[str, Any]) -> None:
    config = flags.settle({**{n: v for n, v in small.items() if n not in ("train", "lora", "model", "dataset")}}, {})
    model, dataset = str(small["model"]), str(small["dataset"])
    train = TrainSettings(**small["train"])
    below = fedsplit.Config(**{**vars(config), "model": model, "dataset": dataset, "train": train})
    one = fedsplit.run(below, lora__rank=2, out="one")
    Path("run.toml").write_text((one.folder / "config.toml").read_text())
    two = fedsplit.run("run.toml", out="two")
    three = fedsplit.run(Path("run.toml"), lora={"rank": 3}, out="three")
    assert same(one.folder, two.folder) and not same(one.folder, three.folder)
    assert three.config.lora.rank == (3,) and three.config.train == train
    section = fedsplit.run(**{**small, "train": train}, out="four")
    assert same(one.folder, section.folder)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"clients": 0}, "clients: 0 is not possible; allowed: a whole number from 1 to 2147483647"),
    ({"clientz": 2}, "there is no setting clientz; did you mean clients"),
    ({"train": {"lrr": 1}}, "there is no setting train.lrr; did you mean train.lr"),
    ({"train__lr": "fast"}, "train.lr: fast is not possible; allowed: a finite number above 0"),
    ({"train": 3}, "there is no setting train; did you mean"),
    ({"seed": None}, "seed: None is not possible; allowed: a whole number from 0 to 4294967295"),
    ({"strategy_options": 3}, "strategy_options: 3 is not possible; allowed: a table"),
    ({"strategy": "fedavgg"}, "strategy: fedavgg is not possible; allowed: "),
    ({"strategy": FedAvg}, "strategy: the class FedAvg is not possible; allowed: a name, an object"),
    ({"dataset": 3}, "dataset: 3 is not possible; allowed: a name, a file"),
    ({"model": 3}, "model: 3 is not possible; allowed: a name, a folder"),
    ({"model": "sotu-gpt2", "tokenizer": object()}, "tokenizer: one of object is not possible; allowed: one together"),
    ({"config": 3}, "config: an object of the type int is not possible; allowed: a Config, or the path of a TOML"),
    ({"config": "gone.toml"}, "config: gone.toml is not possible; allowed: a TOML file that can be read"),
    ({"resume": "gone"}, "resume: gone is not possible; allowed: the folder of a run"),
    ({"sinks": [object()]}, "sinks: an object of the type object is not possible"),
]


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
    from fedsplit import simulate

    assert simulate.main(["--train.lr", "fast"]) == 2
    with pytest.raises(fedsplit.InputError) as refused:
        fedsplit.run(train__lr="fast")
    assert capsys.readouterr().err == f"fedsplit: {refused.value}\n"


def test_objects_give_what_the_names_of_the_same_things_give(small: dict[str, Any], corpus_file: Path) -> None:
    """A strategy, a model and a data set; and the run is known by its folder alone afterwards."""
    named = fedsplit.run(**small, strategy="fedprox", strategy__mu=0.5, partition="natural", out="named")
    model = AutoModelForCausalLM.from_pretrained(small["model"])
    tokenizer = AutoTokenizer.from_pretrained(small["model"])
    rows = datasets.Dataset.from_list([json.loads(line) for line in corpus_file.read_text().splitlines()])
    objects = {"strategy": FedProx(mu=0.5), "dataset": rows, "partition": "natural"}
    given = fedsplit.run(**{**small, **objects, "model": model, "tokenizer": tokenizer}, out="given")
    paired = fedsplit.run(**{**small, **objects, "model": (model, tokenizer)}, out="paired")
    assert same(named.folder, given.folder) and same(given.folder, paired.folder)
    again = fedsplit.run(given.folder / "config.toml", out="again")
    assert same(named.folder, again.folder)
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
    two = fedsplit.run(**{**small, "dataset": texts, "clients": 2, "partition": "iid"}, out="two")
    assert (two.config.clients, two.config.partition) == (2, "iid")


class Remembers:
    """A strategy of the user's, which keeps more than plain values on itself."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def init(self, adapters: Adapters) -> Mapping[str, Tensor]:
        return {}

    def aggregate(
        self, state: Mapping[str, Tensor], adapters: Adapters, updates: Sequence[ClientUpdate]
    ) -> tuple[Mapping[str, Tensor], Adapters]:
        self.seen.append(len(updates))
        return FedAvg().aggregate(state, adapters, updates)


def test_a_strategy_stays_the_object_that_was_given(small: dict[str, Any]) -> None:
    """The trial round before the run is played by a copy."""
    mine = Remembers()
    result = fedsplit.run(**{**small, "rounds": 2}, strategy=mine, out="one")
    assert mine.seen == [2, 2]
    plain = fedsplit.run(**{**small, "rounds": 2}, strategy="fedavg", out="two")
    assert same(result.folder, plain.folder)
    with pytest.raises(fedsplit.InputError, match=r"^strategy: .*Remembers\(\.\.\.\) is not possible"):
        fedsplit.run(resume=result.folder, rounds=3, strategy=None)
    fedsplit.run(resume=result.folder, rounds=3, strategy=Remembers())
    with pytest.raises(fedsplit.InputError, match=r"^strategy: fedprox is not possible; allowed: .*Remembers"):
        fedsplit.run(resume=result.folder, rounds=4, strategy=FedProx())


def test_a_strategy_of_flowers_as_an_object(small: dict[str, Any]) -> None:
    result = fedsplit.run(**small, strategy=FedAdam(eta=0.01), out="one")
    named = fedsplit.run(**small, strategy="flwr.serverapp.strategy:FedAdam", strategy__eta=0.01, out="two")
    assert same(result.folder, named.folder)


class Broken(Remembers):
    """A strategy that breaks in its second round."""

    def aggregate(self, state: Any, adapters: Any, updates: Any) -> Any:
        if len(self.seen) == 1:
            raise RuntimeError("out of luck")
        return super().aggregate(state, adapters, updates)


def test_a_run_follows_one_that_failed_and_the_failed_one_goes_on(small: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="out of luck"):
        fedsplit.run(**{**small, "rounds": 2}, strategy=Broken(), out="broken")
    straight = fedsplit.run(**{**small, "rounds": 2}, out="straight")
    with pytest.raises(fedsplit.InputError, match="did not end"):
        fedsplit.open("broken")
    gone_on = fedsplit.run(resume="broken", strategy=Broken())  # whose second call is another run's
    assert same(straight.folder, gone_on.folder)


def test_runs_without_a_folder_get_one_each(small: dict[str, Any]) -> None:
    folders = [fedsplit.run(**small).folder for _ in range(2)]
    assert len({*folders}) == 2 and {folder.parent for folder in folders} == {Path("runs")}


def test_a_result_is_opened_again(small: dict[str, Any]) -> None:
    result = fedsplit.run(**small, out="one")
    again = fedsplit.open("one")
    assert again.summary == result.summary and again.config == result.config
    assert again.losses.equals(result.losses)


def test_the_package_offers_what_it_lists() -> None:
    assert {name for name in fedsplit.__all__ if not hasattr(fedsplit, name)} == set()
    assert dir(fedsplit) == sorted(fedsplit.__all__)
    with pytest.raises(AttributeError, match="module 'fedsplit' has no attribute 'runn'"):
        fedsplit.runn  # noqa: B018
