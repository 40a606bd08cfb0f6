"""Uploads to the Hub, against a client that is none: what is sent, and what is said if nothing can be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_runs import Runs
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.commands import adapters, simulate
from fedsplit.errors import InputError, SettingError
from fedsplit.evaluate import held_out_loss
from fedsplit.results import publishing
from fedsplit.results.finished import open_run


class FakeHub:
    """Keeps what is uploaded, or refuses everything with one error."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder, self.error, self.calls = folder, error, list[tuple[str, Any]]()

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "ann"}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        self.calls.append((repository, private))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        shutil.copytree(folder_path, self.folder)
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Runs(tiny_models, tmp_path_factory.mktemp("runs"))("llama")


def test_an_upload_opens_by_its_own_lines_and_names_no_folder_of_the_machine(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = FakeHub(tmp_path / "sent")
    monkeypatch.setattr(publishing, "_api", hub)
    assert adapters.main(["push", str(run), "org/mine", "--export-base"]) == 0
    assert capsys.readouterr().out == f"{run}/adapter is on the Hub: https://hub/org/mine\n"
    assert hub.calls == [("org/mine", True)]
    card = ModelCard.load(tmp_path / "sent" / "README.md")
    assert 'subfolder="adapter"' in card.text and card.text.count("## Use") == 1 and "## Results" in card.text
    assert "path/to/this/folder" not in card.text
    for path in tmp_path.glob("sent/**/*.*"):
        if path.suffix != ".safetensors":
            assert str(run.parent) not in path.read_text(), path
    written = json.loads((tmp_path / "sent" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/mine"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sent")
    words = "Once upon a time"
    ids = AutoTokenizer.from_pretrained(tmp_path / "sent")(words).input_ids
    assert ids == AutoTokenizer.from_pretrained(open_run(run).config.model)(words).input_ids
    model = PeftModel.from_pretrained(base, str(tmp_path / "sent"), subfolder="adapter").eval()
    expected = json.loads((run / "summary.json").read_text())["eval_loss"]["after"]
    assert held_out_loss(model, run) == pytest.approx(expected, abs=1e-5)


def test_a_base_that_is_nowhere_is_said(run: Path, tmp_path: Path) -> None:
    publishing.fill(tmp_path / "sent", open_run(run).adapter(), "org/mine", with_base=False)
    assert "The base model is not on the Hub" in (tmp_path / "sent" / "README.md").read_text()
    written = json.loads((tmp_path / "sent" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "llama0" and not (tmp_path / "sent" / "config.json").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalTokenNotFoundError("Token is required"), "there is no token"),
        (OfflineModeIsEnabled("Cannot reach"), "HF_HUB_OFFLINE=1 forbids to ask the Hub"),
        (ConnectionError("no route"), "the Hub cannot be reached"),
    ],
)
def test_what_hinders_is_one_line(
    error: Exception, words: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_api", FakeHub(tmp_path / "sent", error))
    with pytest.raises(SettingError, match=rf"^push_to_hub: org/mine \({words}\) is not possible; allowed"):
        publishing.check_access("org/mine")
    with pytest.raises(InputError, match=f"was not uploaded to org/mine: {words}$"):
        publishing.push(open_run(run).adapter(), "org/mine")


@pytest.mark.parametrize("name", ["mine", "org/mine@v1", "a/b/c", "/tmp/x"])
def test_names_of_no_repository(name: str) -> None:
    with pytest.raises(SettingError, match=r"^push_to_hub: "):
        publishing.check_access(name)


def flags_of(model: Path, corpus: Path, out: Path) -> list[str]:
    """A run of a tiny model in this process, which uploads its adapter."""
    settings = {"clients": 2, "rounds": 1, "cut": "1:2", "train.steps": 1, "train.batch-size": 2, "engine": "local"}
    settings |= {"train.max-length": 16, "eval.samples": 2, "model": model, "dataset": corpus, "out": out}
    return [*(f"--{name}={value}" for name, value in settings.items()), "--push-to-hub=org/mine"]


def test_a_run_checks_the_token_first_and_survives_an_upload_that_fails(
    tiny_models: dict[str, Path],
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    flags = flags_of(tiny_models["gpt2"], corpus_file, run)
    monkeypatch.setattr(publishing, "_api", FakeHub(tmp_path / "sent", LocalTokenNotFoundError("x")))
    assert simulate.main(flags) == 2 and not run.exists()
    assert "push_to_hub: org/mine (there is no token) is not possible" in capsys.readouterr().err

    monkeypatch.setattr(publishing, "check_access", lambda name: None)
    assert simulate.main(flags) == 0
    said = capsys.readouterr().out
    assert f"was not uploaded to org/mine: there is no token; fedsplit adapters push {run} org/mine tries again" in said
