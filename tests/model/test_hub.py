"""A model of the Hub: what is asked for, what is fetched, what is said when it cannot be had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import COMMIT, LATER, LocalHub, point_at

from fedsplit.errors import SettingError
from fedsplit.model import hub
from fedsplit.model.hub import HubName
from fedsplit.model.unsplit import load_unsplit


@pytest.fixture
def local_hub(tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub with a tiny Llama, in one file, in shards and in an old format only."""
    whole, shards, old = tiny_models["llama"], tmp_path / "shards", tmp_path / "old"
    load_unsplit(whole).save_pretrained(shards, max_shard_size="20KB")
    shutil.copy(whole / "tokenizer.json", shards)
    shutil.copytree(whole, old)
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    with LocalHub(whole=whole, shards=shards, old=old).running() as running:
        point_at(monkeypatch, running.address, tmp_path / "cache")
        yield running


def everything(tensor: str) -> bool:
    return True


def test_which_names_are_the_hubs() -> None:
    assert hub.parse("org/name") == HubName("org/name")
    assert hub.parse("org/na.me-1@refs/pr/1") == HubName("org/na.me-1", "refs/pr/1")
    assert [str(hub.parse(name)) for name in ("a/b", "a/b@v1", "gpt2", "gpt2@v1")] == [
        "a/b",
        "a/b@v1",
        "gpt2",
        "gpt2@v1",
    ]
    for name in ("my.model", "./a/b", "../b", "a/b/c", "/a/b", "~/b", "a/b@", "@v1", "a b/c", "a/b@v 1", ""):
        assert hub.parse(name) is None, name


def test_small_files_come_first_and_weights_when_they_are_asked_for(local_hub: LocalHub) -> None:
    name, told = HubName("org/whole"), []
    folder = hub.config_folder(name)
    assert folder.name == COMMIT
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    hub.fetch_weights(name, folder, everything, told.append)
    source = local_hub.repositories["org/whole"]
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert told == ["fetching the weights of org/whole"]


def test_what_the_cache_has_is_taken_without_asking(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the commit's name, and when the branch has moved on since."""
    name = HubName("org/whole")
    folder = hub.config_folder(name)
    hub.fetch_weights(name, folder, everything)
    local_hub.branches["main"] = LATER
    local_hub.asked.clear()
    for again in (name, HubName("org/whole", COMMIT)):
        assert hub.config_folder(again) == folder
        hub.fetch_weights(again, folder, everything)
    assert local_hub.asked == []
    assert hub.config_folder(HubName("org/whole", LATER)).name == LATER


def test_only_shards_that_are_wanted_are_fetched(local_hub: LocalHub) -> None:
    name, source = HubName("org/shards"), local_hub.repositories["org/shards"]
    weight_map = json.loads((source / hub.INDEX).read_text())["weight_map"]
    wanted = {file for tensor, file in weight_map.items() if ".layers.1." in tensor}
    assert wanted < {*weight_map.values()}
    folder = hub.config_folder(name)
    hub.fetch_weights(name, folder, lambda tensor: ".layers.1." in tensor)
    assert {file.name for file in folder.glob("*.safetensors")} == wanted
    hub.fetch_weights(name, folder, everything)
    assert {file.name for file in folder.glob("*.safetensors")} == {*weight_map.values()}


def test_the_single_file_goes_before_shards_where_a_repository_has_both(
    local_hub: LocalHub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """As for transformers, although the index comes along with the small files."""
    both = shutil.copytree(local_hub.repositories["org/shards"], tmp_path / "both")
    shutil.copy(tiny_models["llama"] / hub.WEIGHTS, both)
    local_hub.repositories["org/both"] = both
    name, told = HubName("org/both"), []
    folder = hub.config_folder(name)
    assert (folder / hub.INDEX).is_file()
    hub.fetch_weights(name, folder, lambda tensor: ".layers.1." in tensor, told.append)
    assert [file.name for file in folder.glob("*.safetensors")] == [hub.WEIGHTS]
    assert told == ["fetching the weights of org/both"]


def test_a_repository_with_an_adapter_beside_the_model_is_refused(
    local_hub: LocalHub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapted = shutil.copytree(tiny_models["llama"], tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    local_hub.repositories["org/adapted"] = adapted
    with pytest.raises(SettingError, match=r"org/adapted \(adapter_config\.json in it: transformers would add"):
        hub.config_folder(HubName("org/adapted"))


def test_a_fetch_that_was_broken_off_goes_on(local_hub: LocalHub) -> None:
    """The tokenizer is missing from the cache, as after a crash, or where another program needed the rest alone."""
    folder = hub.config_folder(HubName("org/whole"))
    (folder / "tokenizer.json").unlink()
    assert (hub.config_folder(HubName("org/whole")) / "tokenizer.json").is_file()


def test_restricted_models_need_the_token(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    local_hub.gated.add("org/whole")
    with pytest.raises(SettingError, match="access to it is restricted: ask for it on its page, then set HF_TOKEN"):
        hub.config_folder(HubName("org/whole"))
    monkeypatch.setenv("HF_TOKEN", local_hub.token)
    assert (hub.config_folder(HubName("org/whole")) / "config.json").is_file()


def test_what_cannot_be_had_is_said_in_one_line(local_hub: LocalHub) -> None:
    for name, reason in (
        (HubName("org/none"), "no such folder; and the Hub has no such model, or HF_TOKEN does not allow"),
        (HubName("org/whole", "v9"), "the Hub has no revision v9 of it"),
    ):
        with pytest.raises(SettingError, match=rf"^model: {name} \({reason}") as caught:
            hub.config_folder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingError, match=r"org/old \(no model\.safetensors in it\)"):
        hub.fetch_weights(HubName("org/old"), hub.config_folder(HubName("org/old")), everything)
    (hub.config_folder(HubName("org/shards")) / hub.INDEX).write_text("{}")
    with pytest.raises(SettingError, match=r"its model\.safetensors\.index\.json cannot be read"):
        hub.fetch_weights(HubName("org/shards"), hub.config_folder(HubName("org/shards")), everything)


def test_offline_the_cache_is_all_there_is(
    local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache laid out by hand, without the library's records of it."""
    source, home = local_hub.repositories["org/shards"], tmp_path / "hand" / "models--org--shards"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, home / "snapshots" / COMMIT)
    point_at(monkeypatch, local_hub.address, tmp_path / "hand", offline=True)
    name = HubName("org/shards")
    folder = hub.config_folder(name)
    hub.fetch_weights(name, folder, everything)
    assert folder == home / "snapshots" / COMMIT
    next(folder.glob("*.safetensors")).unlink()
    for act in (lambda: hub.fetch_weights(name, folder, everything), lambda: hub.config_folder(HubName("org/whole"))):
        with pytest.raises(SettingError, match="not all of it is in the Hub's cache, and HF_HUB_OFFLINE=1 forbids"):
            act()
    assert local_hub.asked == []


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(SettingError, match=r"not all of it is in the Hub's cache, and the Hub cannot be reached"):
        hub.config_folder(HubName("org/whole"))
