"""How a name becomes a strategy."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

import strategies
from fedsplit.errors import SettingError
from fedsplit.federation.aggregation import strategy_defaults
from fedsplit.federation.strategy import Strategy, check_strategy, is_builtin, load_strategy
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build

MINE = """
class Mine:
    def __init__(self, rate: float = 1.0) -> None:
        self.rate = rate
    def init(self, adapters): return {}
    def aggregate(self, state, adapters, updates): return state, adapters
"""


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_every_name_of_ours_is_a_strategy(name: str) -> None:
    assert isinstance(load_strategy(name, {}, strategy_defaults(Config())), Strategy)


def test_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    strategy = load_strategy(f"{tmp_path}/mine.py:Mine", {"rate": 0.5}, {"min_available_nodes": 8})
    assert isinstance(strategy, Strategy)
    assert vars(strategy)["rate"] == 0.5


def test_a_flower_strategy_is_told_how_many_clients_there_are() -> None:
    strategy = load_strategy("flwr.serverapp.strategy:FedAdam", {"eta": 0.01}, strategy_defaults(Config()))
    assert (strategy.eta, strategy.min_available_nodes, strategy.fraction_train) == (0.01, 8, 1.0)
    half = load_strategy("flwr.serverapp.strategy:FedAvg", {"fraction_train": 0.5}, strategy_defaults(Config()))
    assert (half.fraction_train, half.min_available_nodes) == (0.5, 8)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("fedavgg", {}, "strategy: fedavgg is not possible; allowed: fedadagrad .*fedavg .*, path/to/mine.py:Mine"),
        ("nowhere.py:Mine", {}, "strategy: nowhere.py is not possible; allowed: a Python file that is there"),
        ("{file}:Other", {}, "strategy: .*mine.py:Other is not possible; allowed: a class of .*: Mine"),
        ("{file}:Mine", {"speed": 1}, "strategy.speed: 1 is not possible; allowed: rate"),
        ("{broken}:Mine", {}, r"that can be imported \(ZeroDivisionError"),
        ("flwr.serverapp.strategy:FedNone", {}, "allowed: a class of flwr.serverapp.strategy: "),
        ("flwr.nowhere:FedAvg", {}, "strategy: flwr.nowhere:FedAvg is not possible; allowed: a name"),
        (":X", {}, "strategy: :X is not possible"),
        ("..x:Y", {}, "strategy: ..x:Y is not possible"),
        ("collections:Counter", {}, "allowed: a class with the methods init and aggregate"),
        ("{quits}:Mine", {}, r"that can be imported \(SystemExit"),
        ("{long}.py:Mine", {}, "allowed: a Python file that is there"),
        ("fedavg", {"eta": 1}, "strategy.eta: 1 is not possible; allowed: no option at all"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, spec: str, options: dict, message: str) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "quits.py").write_text("raise SystemExit(3)")
    paths = {name: tmp_path / f"{name}.py" for name in ("broken", "quits")} | {"long": "a" * 300}
    with pytest.raises(SettingError, match=message) as caught:
        load_strategy(spec.format(file=tmp_path / "mine.py", **paths), options, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "options", "values", "message"),
    [
        ("ffa", {}, {"lora.rank": "4,8"}, "^lora.rank: 4,8 is not possible; allowed: one rank .* ffa; fedex, flexlora"),
        ("ffa", {}, {"lora.method": "dora"}, "^strategy: ffa is not possible; allowed: fedadagrad, .* --peft dora"),
        (
            "flora",
            {},
            {"lora.method": "pissa"},
            "^strategy: flora is not possible; allowed: another one where training",
        ),
        ("normclip", {"around": "flora"}, {"lora.method": "ia3"}, "^strategy: normclip .* no pairs of factors A and B"),
        ("flora", {}, {"dtype": "bf16"}, "^dtype: bf16 is not possible; allowed: fp32 under the strategy flora"),
        (
            "flora",
            {},
            {"eval.fraction": 0.5},
            "^eval.fraction: 0.5 is not possible; allowed: 1 under the strategy flora",
        ),
        ("flora", {}, {"eval.every": 2}, "^eval.every: 2 is not possible; allowed: 1 under the strategy flora"),
        ("krum", {"malicious": 1}, {"clients": 4}, "^clients: 4 is not possible; allowed: 5 and more in a round"),
        ("krum", {}, {"clients": 8, "fraction": 0.25}, "^clients: 2 in a round is not possible; allowed: 3 and more"),
        ("multikrum", {"keep": 7}, {"clients": 6}, "^clients: 6 is not possible; allowed: 7 and more"),
        ("normclip", {"around": "krum"}, {"clients": 2}, "^clients: 2 is not possible; allowed: 3 and more"),
        ("flwr.serverapp.strategy:FedAvg", {}, {"resume": "x"}, "^resume: x is not possible; .*Flower's cannot"),
        ("flwr.serverapp.strategy:FedAvg", {}, {"lora.rank": "4,8"}, "^lora.rank: 4,8 is not possible"),
    ],
)
def test_what_a_strategy_cannot_do_is_said_at_the_start(
    strategy: str, options: dict, values: dict, message: str
) -> None:
    config = build({"strategy": strategy, **values}, options)
    made = load_strategy(strategy, options, strategy_defaults(config))
    with pytest.raises(SettingError, match=message) as caught:
        check_strategy(made, config)
    assert "\n" not in str(caught.value)
    check_strategy(load_strategy("fedex", {}, {}), build({"lora.rank": "4,8"}))


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Python look for the package of strategies anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "strategies"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("files", [[], ["__init__.py"]])
def test_a_folder_of_the_same_name_does_not_hide_ours(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strategies").mkdir()
    for file in files:
        (tmp_path / "strategies" / file).write_text("raise RuntimeError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    made = load_strategy("fedavg", {}, {})
    assert Path(inspect.getfile(type(made))) == Path("strategies/fedavg.py").resolve()
    assert is_builtin(made) and not is_builtin(Strategy)


@pytest.mark.usefixtures("forgotten")
def test_a_module_of_the_users_that_is_loaded_already_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strategies.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("strategies")
    with pytest.raises(SettingError, match="no other module named strategies, which would hide fedsplit's own"):
        load_strategy("fedavg", {}, {})


def test_a_strategy_with_a_stage_must_be_the_one_that_the_setting_names() -> None:
    """Clients load the stage by that name; another name would leave it out without a word."""
    own = Path(__file__).parent.parent / "own_stages.py"
    config = build({"strategy": f"{own}:FedDyn"}, {"alpha": 0.2})
    made = load_strategy(config.strategy, config.strategy_options, strategy_defaults(config))
    check_strategy(made, config)
    for name in ("fedavg", f"{own}:Ditto"):
        with pytest.raises(SettingError, match=r"^strategy: .* is not possible; allowed: the name of the strategy's"):
            check_strategy(made, build({"strategy": name}))
