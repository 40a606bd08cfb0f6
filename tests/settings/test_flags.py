"""Flags, files and their defaults; what is wrong gets one line."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.errors import InputError, InputErrors
from fedsplit.settings.config import OPTIONS, SECTIONS, SETTINGS, Config
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.settings.flags import parse


def test_flag_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("clients = 3\nrounds = 7\n[lora]\nrank = 4\n[strategy_options]\neta = 0.5\n")
    config = parse(["--config", str(file), "--clients", "5"])
    assert (config.clients, config.rounds, config.lora.rank, config.seed) == (5, 7, (4,), 0)
    assert config.strategy_options == {"eta": 0.5}


def test_an_objective_has_options_of_its_own_and_metrics_are_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('objective = "label_smoothing"\n[objective_options]\nsmoothing = 0.2\nbase = "a"\n')
    flags = ["--config", str(file), "--objective.smoothing", "0.3", "--strategy.mu=1", "--metric", "token_accuracy,m:f"]
    config = parse(flags)
    assert config.objective == "label_smoothing" and config.metric == ("token_accuracy", "m:f")
    assert (config.objective_options, config.strategy_options) == ({"smoothing": 0.3, "base": "a"}, {"mu": 1})
    assert from_document(as_document(config)) == config


def test_metrics_and_sinks_have_options_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    tables = "[metric_options.rouge]\nstem = true\norder = 1\n[sink_options.Mine]\nproject = 'a'\n"
    file.write_text("metric = ['m:rouge']\nsinks = ['m:Mine']\n" + tables)
    flags = ["--metric.rouge.order", "2", "--sink.Mine.project", "b", "--sinks.Mine.tags=x"]
    config = parse(["--config", str(file), *flags])
    assert config.metric_options == {"rouge.stem": True, "rouge.order": 2}
    assert config.sink_options == {"Mine.project": "b", "Mine.tags": "x"}
    (tmp_path / "again.toml").write_text(tomli_w.dumps(as_document(config)))
    assert parse(["--config", str(tmp_path / "again.toml")]) == config
    assert from_document(as_document(config)) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--metric.stem", "1"],
            "metric.stem: 1 is not possible; allowed: an option with a name before it, as in metr",
        ),
        (["--sinks.Mine", "1"], "sinks.Mine: 1 is not possible; allowed: an option with a name before it"),
        (["--metric.rouge.stem"], "--metric.rouge.stem: expected a value"),
        (["--metrics.rouge.stem", "1"], "there is no flag --metrics.rouge.stem"),
    ],
)
def test_an_option_of_one_of_several_says_which(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(flags)


def test_a_run_that_goes_on_may_have_other_sinks_with_other_options(tmp_path: Path) -> None:
    tables = "[metric_options.rouge]\nstem = true\n[sink_options.Old]\nproject = 'a'\n"
    (tmp_path / "config.toml").write_text("metric = ['m:rouge']\nsinks = ['m:Old']\n" + tables)
    goes_on = ["--resume", str(tmp_path)]
    assert parse(goes_on).sink_options == {"Old.project": "a"}
    assert parse([*goes_on, "--sink.Old.project", "b"]).sink_options == {"Old.project": "b"}
    other = parse([*goes_on, "--sink", "m:New", "--sink.New.key", "1"])
    assert (other.sink_options, other.metric_options) == ({"New.key": 1}, {"rouge.stem": True})
    with pytest.raises(InputError, match=r"metric.rouge.stem cannot be set for a run that goes on"):
        parse([*goes_on, "--metric.rouge.stem", "false"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective_options = 3", "objective_options: 3 is not possible; allowed: a table"),
        ("[objective_options]\nx = [1]", r"objective.x: \[1\] is not possible; allowed: a text, a number"),
    ],
)
def test_options_of_an_objective_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse(["--config", str(tmp_path / "run.toml")])


@pytest.mark.parametrize(
    ("alias", "value", "name"),
    [
        ("--samples", "9", "train.samples"),
        ("--batch-size", "9", "train.batch_size"),
        ("--max-length", "9", "train.max_length"),
        ("--epochs", "9", "train.epochs"),
        ("--lora-rank", "9", "lora.rank"),
        ("--lora-alpha", "9", "lora.alpha"),
        ("--lora-target-modules", "a,b", "lora.targets"),
        ("--lr", "9", "train.lr"),
        ("--save-dir", "9", "out"),
    ],
)
def test_names_known_from_elsewhere(alias: str, value: str, name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert parse([alias, value]) == parse([flag, value]) != parse([])


def test_a_kind_of_prompt_by_peft_wins_over_a_file_that_knows_of_none(tmp_path: Path) -> None:
    """Such as the config.toml of any run, which names every setting."""
    file = tmp_path / "config.toml"
    for before, kind in (({}, "ptuning"), ({"lora.method": "prompt"}, "prompt")):
        file.write_text(tomli_w.dumps(as_document(build(before))))
        expected = parse(["--prompt.kind", kind])
        assert parse(["--config", str(file), "--peft", kind]) == parse(["--peft", kind]) == expected
    with pytest.raises(InputError, match=r"^prompt.kind: prompt is not possible; allowed: prefix with --peft prefix$"):
        parse(["--config", str(file), "--peft", "prefix"])


def test_every_setting_has_a_flag_a_default_that_is_allowed_and_a_help_text() -> None:
    for name, setting in SETTINGS.items():
        assert setting.allowed.test(setting.default), name
        assert setting.help, name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clientz", "8"], "there is no flag --clientz; did you mean --clients"),
        (["--strategi.eta=1"], "there is no flag --strategi.eta"),
        (["clients"], "there is no flag clients"),
        (
            ["--peft", "prompt", "--prompt.kind", "prefix"],
            "prompt.kind: prefix is not possible; allowed: prompt with --p",
        ),
        (["--clients"], "--clients: expected a value after it"),
        (["--clients", "--rounds", "3"], "--clients: expected a value after it"),
        (["--train.lr", "-x"], "argument --train.lr/--lr: expected one argument"),
        (["--clients", "0"], "clients: 0 is not possible; allowed: a whole number from 1 to 2147483647"),
        (["--clients", "2.5"], "clients: 2.5 is not possible"),
        (["--clients", "eight"], "clients: eight is not possible"),
        (["--rounds", "-1"], "rounds: -1 is not possible"),
        (["--cut", "3:3"], "cut: 3:3 is not possible; allowed: LO:HI"),
        (["--cut", "4"], "cut: 4 is not possible"),
        (["--lora.rank", "0"], "lora.rank: 0 is not possible; allowed: whole numbers from 1 to 1024"),
        (["--lora.dropout", "1"], "lora.dropout: 1 is not possible; allowed: a number from 0 to below 1"),
        (["--lora.alpha", "inf"], "lora.alpha: inf is not possible"),
        (["--lora.targets", "a,,b"], "lora.targets: a,,b is not possible"),
        (["--train.lr", "-0.1"], "train.lr: -0.1 is not possible; allowed: a finite number above 0"),
        (["--train.lr", "nan"], "train.lr: nan is not possible"),
        (["--train.batch-size", "0"], "train.batch_size: 0 is not possible"),
        (["--trunk.schedule", "sharde"], "trunk.schedule: sharde is not possible; allowed: shared | batched"),
        (
            ["--wire.codec", "zip"],
            "wire.codec: zip is not possible; allowed: codecs separated by commas: any of delta[:THRESHOLD]",
        ),
        (["--partition", "dirichlet:x"], "partition: dirichlet:x is not possible"),
        (["--rounds", "1" + "0" * 400], "rounds: 1000"),
        (["--cut", "1:" + "9" * 5000], "cut: 1:999"),
        (["--seed", "-1"], "seed: -1 is not possible; allowed: a whole number from 0 to 4294967295"),
        (["--strategy.rate", "2020-01-01"], "strategy.rate: 2020-01-01 is not possible; allowed: a text, a number"),
        (["--strategy.eta"], "--strategy.eta: expected a value after it"),
        (["--config", "nowhere.toml"], "config: nowhere.toml is not possible; allowed: a TOML file"),
    ],
)
def test_wrong_flags_get_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(argv)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_flags_without_values_and_with_wrong_ones_and_unknown_flags_are_reported_together() -> None:
    argv = ["--clients", "--nope", "3", "--rounds", "0", "--strategy.mu", "--cut", "x", "--batch-size"]
    with pytest.raises(InputErrors) as caught:
        parse(argv)
    said = [str(error).partition(";")[0] for error in caught.value.errors]
    assert said == [
        "--clients: expected a value after it",
        "--batch-size: expected a value after it",
        "there is no flag --nope",
        "--strategy.mu: expected a value after it",
        "rounds: 0 is not possible",
        "cut: x is not possible",
    ]


def test_a_text_may_begin_with_dashes() -> None:
    text = "-- a text --of many words"
    assert parse(["--prompt.kind", "prompt", "--prompt.init", "text", "--prompt.text", text]).prompt.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clients = ", "config: "),
        ("rounds = inf", "rounds: inf is not possible"),
        ("rounds = 1" + "0" * 5000, "config: "),
        ("train.lr = 1" + "0" * 400, "train.lr: a number of many digits is not possible"),
        ("x = " + "[" * 3000, "config: "),
        ("lr = 0.1", "there is no setting lr; did you mean train.lr?"),
        ("clientz = 8", "there is no setting clientz; did you mean clients"),
        ("clients = true", "clients: True is not possible"),
        ("clients = 2.5", "clients: 2.5 is not possible"),
        ("model = 3", "model: 3 is not possible"),
        ("[lora]\nrang = 8", "there is no setting lora.rang; did you mean lora.rank"),
        ("[lora]\ntargets = [1]", "lora.targets: [1] is not possible"),
        ("strategy_options = 3", "strategy_options: 3 is not possible; allowed: a table"),
        ("lora = 3", "there is no setting lora"),
    ],
)
def test_wrong_files_get_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(["--config", str(file)])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(
    clients=st.integers(1, 10**6),
    lr=st.floats(1e-9, 1e3),
    targets=st.lists(st.text("abc_", min_size=1), max_size=3),
    options=st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans() | st.text()),
)
def test_a_configuration_survives_toml(clients: int, lr: float, targets: list[str], options: dict) -> None:
    values = {"clients": clients, "train.lr": lr}
    config = build(values | ({"lora.targets": targets} if targets else {}), options)
    assert from_document(tomllib.loads(tomli_w.dumps(as_document(config)))) == config


@pytest.mark.parametrize("argv", [["--deterministic"], ["--deterministic", "true"], ["--deterministic=true"]])
def test_a_switch_may_stand_alone(argv: list[str]) -> None:
    assert parse([*argv, "--rounds", "2"]).deterministic is True
    assert parse([*argv, "--deterministic", "false"]).deterministic is False
    assert build({"deterministic": True}).deterministic is True


def test_ranks_are_dealt_out_in_turn(tmp_path: Path) -> None:
    (tmp_path / "ranks.txt").write_text("4 8\n16,\n2\n")
    for text, ranks in {"4,8,16": (4, 8, 16), "8": (8,), str(tmp_path / "ranks.txt"): (4, 8, 16, 2)}.items():
        config = parse(["--lora.rank", text])
        assert config.lora.rank == ranks and config.lora.top_rank == max(ranks)
        assert [config.lora.rank_of(client) for client in range(5)] == [ranks[n % len(ranks)] for n in range(5)]
        assert from_document(as_document(config)) == config
    for text in ("4,,8", "0,4", "nowhere.txt", "4,x", "", "2000", "4.5"):
        with pytest.raises(InputError, match=r"^lora.rank: .*allowed: whole numbers from 1 to 1024"):
            parse(["--lora.rank", text])


@pytest.mark.parametrize(("share", "right"), [("bottom,top", True), ("trunk", True), ("top,top", False), ("", False)])
def test_parts_that_are_shared_are_parts(share: str, right: bool) -> None:
    if right:
        assert parse(["--share", share]).share == tuple(share.split(","))
    else:
        with pytest.raises(InputError, match=r"^share: "):
            parse(["--share", share])


def test_a_run_that_goes_on_may_have_more_rounds_and_patience_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 3\nrounds = 2\n[strategy_options]\neta = 0.5\n")
    config = parse(["--resume", str(tmp_path), "--rounds", "7", "--patience", "2", "--workers", "1"])
    assert (config.seed, config.rounds, config.workers, config.resume) == (3, 7, 1, str(tmp_path))
    assert config.patience == 2
    assert config.strategy_options == {"eta": 0.5}
    for flags in (["--seed", "4"], ["--config", "x.toml"], ["--strategy.eta", "1"], ["--lr", "0.1"]):
        with pytest.raises(InputError, match=f"{flags[0].lstrip('-').split('-')[-1]}.* cannot be set for a run that"):
            parse(["--resume", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("before", "now", "passes"),
    [("driver", "shared", True), ("label", "label", True), ("label", "driver", False), ("shared", "label", False)],
)
def test_state_that_nodes_keep_is_not_left_behind(before: str, now: str, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[data]\nat = "{before}"\n')
    if passes:
        assert parse(["--resume", str(tmp_path), "--data.at", now]).data.at == now
    else:
        with pytest.raises(InputError, match=r"^data.at cannot be set for a run that goes on"):
            parse(["--resume", str(tmp_path), "--data.at", now])


def test_a_run_that_goes_on_may_be_given_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its path is written; a file of the same content is another one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("seed = 3\n")
    (tmp_path / "other.toml").write_text("seed = 3\n")
    monkeypatch.chdir(tmp_path)
    for file in ("run/config.toml", "./run/../run/config.toml", str(tmp_path / "run" / "config.toml")):
        config = parse(["--resume", "run", "--config", file, "--rounds", "9"])
        assert (config.seed, config.rounds, config.resume) == (3, 9, "run")
    for file in ("other.toml", "nowhere.toml"):
        with pytest.raises(InputError, match=r"^config cannot be set for a run that goes on"):
            parse(["--resume", "run", "--config", file])


def test_checkpoints_have_the_names_people_know() -> None:
    config = parse(["--checkpoint-every", "5", "--keep-checkpoints", "3"])
    assert config.checkpoint == parse(["--checkpoint.every", "5", "--checkpoint.keep", "3"]).checkpoint
    assert (config.checkpoint.every, config.checkpoint.keep) == (5, 3)
    for flags, name in (
        (["--checkpoint-every", "0"], "checkpoint.every"),
        (["--keep-checkpoints", "-1"], "checkpoint.keep"),
    ):
        with pytest.raises(InputError, match=rf"^{name}: .* is not possible; allowed: a whole number"):
            parse(flags)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*SETTINGS, *SECTIONS, *OPTIONS.values()]) | st.text(max_size=9)


def one_line(refused: InputError) -> bool:
    """Returns True if each of the errors has one line for the screen."""
    return all(str(error).isprintable() and 0 < len(str(error)) < 1500 for error in refused.errors)


@settings(max_examples=100)
@given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_whatever_a_document_says_it_is_a_configuration_or_is_refused(document: dict[str, object]) -> None:
    for read in (from_document, lambda values: build(values)):
        try:
            config = read(document)
        except InputError as refused:
            assert one_line(refused)
        else:
            # The folder of a run is left out of its document.
            assert from_document(as_document(config)) == replace(config, out="", resume="")


@st.composite
def tomls(draw: st.DrawFn) -> bytes:
    """A configuration's file in which bytes are changed, left out or added."""
    content = bytearray(tomli_w.dumps(as_document(Config())).encode())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 12))] = draw(st.binary(max_size=12))
    return bytes(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tomls() | st.binary(max_size=60) | st.just(b"[" * 10**5) | st.just(b"clients = " + b"9" * 10**5))
def test_whatever_a_file_holds_it_is_a_configuration_or_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    try:
        parse(["--config", str(file)])
    except InputError as refused:
        assert one_line(refused)


FLAGS = st.sampled_from([f"--{name}" for name in SETTINGS] + ["--strategy.mu", "--metric.a.b", "--", "-x", "--lr"])


@settings(max_examples=100)
@given(st.lists(FLAGS | st.text(max_size=9) | st.sampled_from(["1", "-1", "nan", "1e999", "9" * 5000]), max_size=5))
def test_whatever_flags_there_are_they_are_a_configuration_or_are_refused(argv: list[str]) -> None:
    try:
        parse(argv)
    except InputError as refused:
        assert one_line(refused)
    except SystemExit as ended:  # --help, --version
        assert not ended.code
