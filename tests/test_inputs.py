"""Objects from Python, as settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from flwr.serverapp.strategy import FedAdam
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.corpora.tables import read_table
from fedsplit.errors import SettingError
from fedsplit.federation.strategy import builtin_package, load_strategy
from fedsplit.inputs import strategy_settings, written
from fedsplit.settings.config import Config
from fedsplit.settings.sections import DataSettings
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.fedprox import FedProx


@pytest.mark.parametrize("name", sorted(builtin_package().STRATEGIES))
def test_a_strategy_of_ours_is_made_again_of_its_settings(name: str) -> None:
    """Those that cannot be are refused by the command, in place of another one that runs under their name."""
    made = load_strategy(name, {}, {"seed": 5, "clients": 3})
    settings = strategy_settings(made)
    if settings["strategy"].endswith("(...)"):
        with pytest.raises(SettingError, match=r"\(\.\.\.\) is not possible; allowed: a class of "):
            load_strategy(settings["strategy"], {}, {})
    else:
        assert settings["strategy"] == name
        again = load_strategy(name, settings["strategy_options"], {"seed": 0, "clients": 9})
        assert type(again) is type(made) and vars(again) == vars(made)


def test_options_are_told_and_what_is_told_suffices() -> None:
    assert strategy_settings(FedProx(mu=0.25)) == {"strategy": "fedprox", "strategy_options": {"mu": 0.25}}
    adam = strategy_settings(FedAdam(eta=0.5))
    assert adam["strategy"] == "flwr.serverapp.strategy.fedadam:FedAdam"
    assert adam["strategy_options"]["eta"] == 0.5 and adam["strategy_options"]["min_train_nodes"] == 2
    changed = FedProx(mu=0.25)
    changed.extra = torch.ones(2)  # type: ignore[attr-defined]
    assert strategy_settings(changed) == {"strategy": "strategies.fedprox:FedProx(...)", "strategy_options": {}}
    assert strategy_settings(FedBuff("1,2"))["strategy"] == "strategies.fedbuff:FedBuff(...)"


def test_a_class_of_a_notebook_is_told_as_one_that_cannot_be_made_again() -> None:
    mine = type("Mine", (FedAvg,), {"__module__": "__main__"})
    assert strategy_settings(mine())["strategy"] == "__main__:Mine(...)"


@pytest.mark.parametrize("given", [FedProx, object(), 3, len])
def test_what_is_no_strategy_is_refused_in_one_line(given: object) -> None:
    with pytest.raises(SettingError, match=r"^strategy: .* is not possible; allowed: a name, an object with"):
        strategy_settings(given)


def test_a_loaded_model_comes_back_with_its_tokenizer_to_the_bit(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # a path would not tell
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    with written(tmp_path / "run", (model, tokenizer)) as settings:
        assert settings == {"model": str(tmp_path / "run" / "inputs" / "model")}
        assert not list((tmp_path / "run").rglob("*.bin"))
        again = AutoModelForCausalLM.from_pretrained(settings["model"]).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
        assert AutoTokenizer.from_pretrained(settings["model"])("Ann")["input_ids"] == tokenizer("Ann")["input_ids"]


ROWS = {"text": ["one", "two"], "owner": ["ann", "bob"]}


def read(settings: dict[str, Any], split: str = "train") -> dict[str, list[Any]]:
    table = read_table(settings["dataset"], DataSettings(split=split))
    return {name: list(values) for name, values in table.columns.items()}


def test_data_sets_come_back_as_they_were(tmp_path: Path) -> None:
    plain = datasets.Dataset.from_dict(ROWS)
    with written(tmp_path / "plain", dataset=plain) as settings:
        assert read(settings) == ROWS
    with written(tmp_path / "chosen", dataset=plain.select([1]).with_format("torch")) as settings:
        assert read(settings) == {"text": ["two"], "owner": ["bob"]}
    both = datasets.DatasetDict(train=plain, test=plain.select([0]))
    with written(tmp_path / "splits", dataset=both) as settings:
        assert read(settings) == ROWS
        assert read(settings, "test") == {"text": ["one"], "owner": ["ann"]}
    with written(tmp_path / "texts", dataset={"ann": ["one", "three"], "bob": ("two",)}) as settings:
        assert read(settings) == {"text": ["one", "three", "two"], "owner": ["ann", "ann", "bob"]}


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("it holds a socket")


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["gpt2"])
    adapted = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"])
    adapted.add_adapter(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    models = {
        "Unpicklable": Unpicklable(),
        "GPT2LMHeadModel with no tokenizer": model,
        "GPT2LMHeadModel with an adapter": (adapted, tokenizer),
        "GPT2LMHeadModel with an object of type Unpicklable": (model, Unpicklable()),
        "GPT2LMHeadModel": (empty, tokenizer),
    }
    transformed = datasets.Dataset.from_dict(ROWS).with_transform(lambda rows: rows)
    texts = {
        "Unpicklable": Unpicklable(),
        "'one' as row 0": ["one"],
        "'one' for the client 'ann'": {"ann": "one"},
        "list for the client 3": {3: ["one"]},
        "a dict without a text": {"ann": []},
        "one with a transform": transformed,
    }
    given = [{"model": model} for model in models.values()] + [{"dataset": one} for one in texts.values()]
    for words, objects in zip([*models, *texts], given, strict=True):
        name = next(iter(objects))
        with (
            pytest.raises(SettingError, match=f"^{name}: .*{words}.* is not possible") as refused,
            written(tmp_path / "run", **objects),
        ):
            pass
        assert "\n" not in str(refused.value)
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_did_not_begin_leaves_nothing_and_one_that_did_keeps_its_inputs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), written(out, dataset=dict(ann=["one"])):
        raise ZeroDivisionError
    assert not out.exists()
    with pytest.raises(ZeroDivisionError), written(out, dataset=dict(ann=["one"])) as settings:
        (out / "config.toml").write_text("")
        raise ZeroDivisionError
    assert read(settings)["text"] == ["one"]
    with pytest.raises(SettingError, match=r"^out: .*run \(there already\)"), written(out):
        pass
    assert Config(dataset=settings["dataset"]).dataset == settings["dataset"]
