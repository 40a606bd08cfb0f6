"""A client at a site of its own: what is the site's business, no run decides."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.corpora.partition import partition_of
from fedsplit.corpora.shards import read_shard
from fedsplit.errors import InputError, SettingError
from fedsplit.federation.client_site import Site, check_model, make_site, name_of_run, read_site, write_site
from fedsplit.federation.manifest import digest
from fedsplit.federation.messages import Briefing, Introduce, Request
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build

NAME = "0" * 32
RUN = build({"data.at": "site", "data.format": "text", "engine": "flower", "rounds": 3, "train.max_length": 32})
SERVER = {"trunk.server": "127.0.0.1:50052"}


def rows_of(owner: str) -> list[str]:
    return [
        f"{owner} saw patient {number}, who felt {'well' if number % 3 else 'unwell'} again" for number in range(20)
    ]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    file = tmp_path / "ann.jsonl"
    file.write_text("".join(json.dumps({"text": text, "owner": "somebody"}) + "\n" for text in rows_of("ann")))
    return Site(2, "ward a", tmp_path / "state", {"dataset": str(file), **SERVER})


def asked(config: Config, store: str = NAME, model: str = "") -> Request:
    briefing = Briefing(json.dumps(as_document(config)), "trunk", "first", threads=3, store=store, model=model)
    return Introduce(briefing, client=-1)


def test_a_site_has_its_own_settings_and_the_runs_for_all_else(site: Site) -> None:
    config = site.settings_for(build({"data.at": "site", "rounds": 7, "lora.rank": 3, "strategy": "fedprox"}))
    assert (config.rounds, config.lora.rank, config.strategy) == (7, (3,), "fedprox")
    assert config.dataset == site.settings["dataset"] and config.trunk.server == "127.0.0.1:50052"


@pytest.mark.parametrize(
    "setting", ["dataset", "data.held_out", "trunk.token_file", "trunk.tls"], ids=lambda setting: setting
)
def test_no_run_names_a_file_of_a_site(site: Site, setting: str) -> None:
    """A server could otherwise have a site read any file of its machine, and tell what is in there by the losses."""
    default = site.settings_for(RUN)
    asks = build({"data.at": "site", "data.format": "text", setting: "/etc/passwd", "trunk.server": "evil.example:1"})
    config = site.settings_for(asks)
    assert "/etc/passwd" not in json.dumps(as_document(config)) and "evil" not in json.dumps(as_document(config))
    assert (config.dataset, config.data.held_out, config.trunk) == (default.dataset, "", default.trunk)


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        ({"data.at": "driver"}, "data.at: driver is not possible; allowed: site"),
        (
            {"strategy": "mine.py:Mine"},
            "strategy: mine.py:Mine is not possible; allowed: code that comes",
        ),
        ({"objective": "os:abort"}, "objective: os:abort is not possible; allowed: code that comes"),
        ({"metric": ["token_accuracy", "os:abort"]}, "metric: os:abort is not possible"),
        ({"mods": ["os:abort"]}, "mods: os:abort is not possible"),
        ({"init_adapter": "adapter"}, "init_adapter: the run's is not possible; allowed: none, since the site ward a"),
    ],
    ids=str,
)
def test_a_site_refuses_a_run_in_one_line(site: Site, asks: dict[str, Any], words: str) -> None:
    config = build({"data.at": "site", **asks})
    with pytest.raises(SettingError) as refused:
        site.settings_for(config)
    assert str(refused.value).startswith(words)


def test_a_site_may_allow_code(site: Site) -> None:
    config = build({"data.at": "site", "strategy": "mine.py:Mine", "objective": "mine:loss"})
    assert replace(site, allows_code=True).settings_for(config).strategy == "mine.py:Mine"
    assert site.settings_for(build({"data.at": "site", "strategy": "flwr.serverapp.strategy:FedAdam"})).rounds


def test_the_data_are_those_of_a_simulation_under_the_name_of_the_site(site: Site, tmp_path: Path) -> None:
    request = site.received(asked(RUN))
    assert request.client == 2 and request.briefing.store == str(tmp_path / "state" / NAME)
    assert json.loads(request.briefing.run)["dataset"] == site.settings["dataset"]
    shard = read_shard(tmp_path / "state" / NAME, 2)
    assert shard.name == "ward a"
    both = tmp_path / "both.jsonl"
    rows = [{"text": text, "owner": owner} for owner in ("bob", "ann") for text in rows_of(owner)]
    both.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, simulated = partition_of(replace(RUN, dataset=str(both), clients=2, partition="natural")).shards
    assert torch.equal(shard.train.ids, simulated.train.ids) and torch.equal(shard.held_out.ids, simulated.held_out.ids)


def test_the_data_set_is_read_once_in_a_run(site: Site, tmp_path: Path) -> None:
    first = site.received(asked(RUN))
    (tmp_path / "ann.jsonl").unlink()
    assert site.received(asked(RUN)) == first
    with pytest.raises(InputError, match="dataset: "):
        site.received(asked(RUN, store="1" * 32))
    assert site.remove_data() == 1 and site.remove_data() == 0


def test_a_site_with_another_base_model_plays_no_run(site: Site, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Of files, those count that both sides have: a site may lack weights of the trunk, or keep further files."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    of_run = {name: digest(folder / name) for name in ("config.json", "model.safetensors")}
    said = json.dumps({**of_run, "model-00002-of-00002.safetensors": "of the trunk"})
    own = replace(site, settings={**site.settings, "model": str(folder)})
    check_model(own.settings_for(RUN), said)
    for name in of_run:
        with pytest.raises(SettingError, match=rf"^model: .* is not possible; allowed: the run's model; {name} at"):
            own.received(asked(RUN, model=json.dumps({**of_run, name: "0" * 64})))
    assert not (site.folder / NAME).exists()


@pytest.mark.parametrize("store", ["", "../../etc", "/etc", "a" * 31, "é" * 32, f"{'0' * 30}/a"])
def test_no_server_chooses_a_path_at_a_site(site: Site, store: str) -> None:
    with pytest.raises(SettingError, match="allowed: a server that names its run for sites"):
        site.received(asked(RUN, store))
    assert not site.folder.exists()


def test_data_that_cannot_be_used_are_told_in_one_line(site: Site, tmp_path: Path) -> None:
    (tmp_path / "ann.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(SettingError, match=r"^dataset: .* is not possible; allowed: a data set with more text"):
        site.received(asked(RUN))


def test_a_run_keeps_its_name_when_it_goes_on(tmp_path: Path) -> None:
    name = name_of_run(tmp_path / "clients")
    assert name_of_run(tmp_path / "clients") == name != name_of_run(tmp_path / "others")
    assert len(name) == 32 and name.isalnum()


def test_a_site_comes_back_from_its_file_with_absolute_paths(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").touch()
    settings = {
        **SERVER,
        "dataset": "ann.jsonl",
        "trunk.token_file": "token",
        "data.text": "note",
        "model": "sotu-gpt2",
    }
    file = write_site(Site(1, "ward b", Path("state"), settings, allows_code=True))
    back = read_site(file)
    assert (back.client, back.name, back.folder, back.allows_code) == (1, "ward b", tmp_path / "state", True)
    absolute = {"dataset": str(tmp_path / "ann.jsonl"), "trunk.token_file": str(tmp_path / "token")}
    assert back.settings == {**settings, **absolute}


def test_all_wrong_values_of_a_site_are_told_together() -> None:
    values = {
        "client": -1,
        "name": "",
        "folder": "x",
        "allow-code": "yes",
        "rounds": 3,
        "datset": "x",
        "threads": "many",
    }
    with pytest.raises(InputError) as refused:
        make_site(values, {"strategy": {"mu": 1}})
    lines = [str(error) for error in refused.value.errors]
    beginnings = [
        "strategy: a table is not possible",
        "client: -1 is not possible",
        "name:  is not possible",
        "allow-code: yes is not possible",
        "a site cannot set rounds; it is the run's to set",
        "a site cannot set datset; did you mean dataset or ",
        "dataset: nothing is not possible",
        "trunk.server: nothing is not possible",
        "threads: many is not possible",
    ]
    assert len(lines) == len(beginnings)
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning), line
