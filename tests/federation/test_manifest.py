"""What a checkpoint says of itself: data and model by what is in them, settings by what they decide."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.corpora.partition import partition_of
from fedsplit.corpora.shards import Shard
from fedsplit.errors import SettingError
from fedsplit.federation import manifest
from fedsplit.federation.manifest import Damaged, content_of
from fedsplit.settings.config import SETTINGS, Config
from fedsplit.settings.documents import build


@pytest.fixture
def config(tiny_models: dict[str, Path], corpus_file: Path) -> Config:
    values: dict[str, object] = {"clients": 3, "cut": "1:2", "partition": "natural", "train.max_length": 16}
    return build({**values, "dataset": str(corpus_file), "model": str(tiny_models["gpt2"])})


def content(config: Config) -> manifest.Content:
    model = Path(config.model)
    return content_of(partition_of(config).shards, model, model)


def test_the_same_data_and_model_elsewhere_are_the_same(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.model, tmp_path / "model")
    shutil.copy(config.dataset, tmp_path / "other.jsonl")
    moved = dataclasses.replace(config, model=str(tmp_path / "model"), dataset=str(tmp_path / "other.jsonl"))
    assert content(moved) == content(config)
    assert manifest.settings_of(moved) == manifest.settings_of(config)


def test_one_letter_or_one_bit_makes_them_others(config: Config, tmp_path: Path) -> None:
    before = content(config)
    text = Path(config.dataset).read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("bob wrote text number 2", "bob wrote text number 7", 1))
    after = content(dataclasses.replace(config, dataset=str(tmp_path / "other.jsonl")))
    assert after.data != before.data and after.model == before.model
    model = Path(shutil.copytree(config.model, tmp_path / "model"))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    after = content(dataclasses.replace(config, model=str(model)))
    assert after.data == before.data
    assert {name for name, found in after.model.items() if found != before.model[name]} == {"model.safetensors"}


def test_every_part_of_the_data_counts(config: Config) -> None:
    """Whose they are, which are held out, in which order, and what is to be predicted."""
    model = Path(config.model)
    shards = partition_of(config).shards
    first = shards[0]
    labels = first.train.labels.clone()
    labels[0, 3] = -100
    others: list[list[Shard]] = [
        shards[::-1],
        [dataclasses.replace(first, name="dan"), *shards[1:]],
        [dataclasses.replace(first, held_out=first.train), *shards[1:]],
        [dataclasses.replace(first, train=dataclasses.replace(first.train, labels=labels)), *shards[1:]],
        [dataclasses.replace(first, train=first.train[torch.arange(len(first.train)).flip(0)]), *shards[1:]],
    ]
    found = {content_of(some, model, model).data for some in [shards, *others]}
    assert len(found) == 1 + len(others)


def test_every_setting_decides_unless_it_is_named(config: Config) -> None:
    free = manifest.MAY_CHANGE | manifest.BY_CONTENT | {"out", "resume"}
    assert manifest.settings_of(config).keys() == SETTINGS.keys() - free
    assert free <= SETTINGS.keys()
    options = dataclasses.replace(config, strategy_options={"mu": 0.5})
    assert manifest.settings_of(options)["strategy.mu"] == 0.5


def test_the_page_on_training_names_all_that_may_change() -> None:
    page = Path("docs/training.md").read_text().partition("## Going on with a run")[2]
    assert [name for name in sorted(manifest.MAY_CHANGE - {"resume"}) if f"`{name}`" not in page] == []


def test_a_setting_that_a_manifest_lacks_had_its_default(config: Config, tmp_path: Path) -> None:
    """So a run goes on with a later version, which has more settings."""
    settings = manifest.settings_of(config)
    settings.pop("trunk.every")
    before = manifest.Manifest(1, settings, manifest.Content("", {}), {}, {})
    manifest.check_settings(before, config, tmp_path)
    changed = dataclasses.replace(config, trunk=dataclasses.replace(config.trunk, every=5))
    default = Config().trunk.every
    with pytest.raises(SettingError, match=rf"^trunk.every: 5 is not possible; allowed: {default}, with which the run"):
        manifest.check_settings(before, changed, tmp_path)


def test_a_manifest_is_read_as_it_was_written(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "round-0003"
    (folder / "personal" / "0001").mkdir(parents=True)
    (folder / "personal" / "0001" / "file").write_text("one")
    (folder / ".hidden").write_text("what a file manager leaves")
    manifest.write(folder, 3, config, manifest.Content("data", {"config.json": "x"}), {"clients/file": "y"})
    found = manifest.check_whole(folder, 3)
    assert found.settings == manifest.settings_of(config) and found.content.model == {"config.json": "x"}
    assert found.files.keys() == {"personal/0001/file"} and found.elsewhere == {"clients/file": "y"}
    manifest.check_settings(found, config, tmp_path)
    with pytest.raises(Damaged, match=r"^it is that of round 3$"):
        manifest.check_whole(folder, 4)
    document = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps({**document, "files": 3}))
    with pytest.raises(Damaged, match=r"^its manifest\.json cannot be read"):
        manifest.read(folder)
    (folder / manifest.NAME).unlink()
    with pytest.raises(Damaged, match=r"^it has no manifest\.json"):
        manifest.read(folder)


def test_options_of_sinks_decide_nothing_and_those_of_metrics_do() -> None:
    named = Config(sinks=("m:Mine",), sink_options={"Mine.project": "a"}, metric_options={"rouge.stem": True})
    settings = manifest.settings_of(named)
    assert not any(name.startswith("sink") for name in settings)
    assert settings["metric.rouge.stem"] is True


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def manifests(draw: st.DrawFn, whole: bytes) -> bytes:
    """A manifest with another value, whose digest of itself is right or not; or with other bytes."""
    if draw(st.booleans()):
        document = json.loads(whole)
        document[draw(st.sampled_from(sorted(document)))] = draw(DOCUMENTS)
        if draw(st.booleans()):
            document["sha256"] = manifest._digest_of_itself(document)
        return json.dumps(document).encode()
    changed = bytearray(whole)
    place = draw(st.integers(0, len(changed)))
    changed[place : place + draw(st.integers(0, 12))] = draw(st.binary(max_size=12))
    return bytes(changed)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_manifest_says_it_is_read_or_damaged(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"tensors")
    nothing = manifest.Content({"train": "1"}, {"config.json": "2"})
    manifest.write(tmp_path, 3, Config(), nothing, {})
    file = tmp_path / manifest.NAME
    whole = file.read_bytes()
    file.write_bytes(data.draw(manifests(whole) | st.binary(max_size=60)))
    try:
        manifest.check_whole(tmp_path, 3)
    except Damaged as damaged:
        assert str(damaged) and len(str(damaged)) < 1500
