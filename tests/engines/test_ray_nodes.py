"""Nodes of a cluster: which versions they must have, and how they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Authority

from fedsplit.engines import ray_nodes
from fedsplit.engines.ray_nodes import MUST_MATCH, Node, check_certificates, check_versions, table
from fedsplit.errors import InputError
from fedsplit.events.versions import versions

NODE = Node("one", "10.0.0.7", {"CPU": 8.0, "GPU": 2.0, "memory": 64e9}, {"site": "north", "a": "b"}, versions())


def with_version(name: str, version: str) -> Node:
    return replace(NODE, versions={**NODE.versions, name: version})


def test_nodes_with_the_drivers_versions_pass() -> None:
    check_versions([NODE, NODE], ships=False)


@pytest.mark.parametrize("name", MUST_MATCH[1:])
@pytest.mark.parametrize("version", ["", "0.0.1"])
def test_another_version_or_none_is_named_with_its_node(name: str, version: str) -> None:
    with pytest.raises(InputError) as refused:
        check_versions([NODE, with_version(name, version)], ships=False)
    has = f"has {name} 0.0.1" if version else f"has no {name}"
    hint = "; --ray.ship brings it" if name == "fedsplit" else ""
    ours = versions()[name]
    assert str(refused.value) == f"ray.address: the node 10.0.0.7 {has}, and {ours} is needed{hint}"


@pytest.mark.parametrize(
    ("name", "version", "passes"),
    [
        ("python", versions()["python"].rpartition(".")[0] + ".99", True),
        ("python", "2.7.18", False),
        ("torch", versions()["torch"].partition("+")[0] + "+cu129", True),
    ],
)
def test_builds_of_one_version_are_the_same(name: str, version: str, passes: bool) -> None:
    if passes:
        check_versions([with_version(name, version)], ships=False)
    else:
        with pytest.raises(InputError, match=f"has {name} {version}"):
            check_versions([with_version(name, version)], ships=False)


def test_code_that_is_brought_need_not_be_there() -> None:
    check_versions([with_version("fedsplit", "")], ships=True)
    with pytest.raises(InputError, match="has no peft"):
        check_versions([with_version("peft", "")], ships=True)


def test_the_table_tells_who_sits_where() -> None:
    other = Node("two", "10.0.0.8", {"CPU": 4.0}, {}, {})
    lines = table([NODE, other], trunks={"one": 1}, workers={"one": 1, "two": 4})
    assert lines == [
        "node             CPUs  GPUs    memory  runs                     labels",
        "10.0.0.7            8     2     64 GB  trunk, 1 client          a=b,site=north",
        "10.0.0.8            4     0      0 GB  4 clients",
    ]
    assert "2 trunks, 1 client" in table([NODE], trunks={"one": 2}, workers={"one": 1})[1]
    assert table([other], trunks={"one": 1}, workers={})[1].split()[-1] == "-"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("ours", ""),
        ("nothing", "wire.tls: on the node 10.0.0.8, {folder}/nothing/ca.pem: No such file or directory"),
        ("expired", "wire.tls: on the node 10.0.0.8, {folder}/expired/cert.pem: certificate has expired"),
        ("foreign", "wire.tls: the node 10.0.0.8 has another {folder}/ours/ca.pem than this machine"),
    ],
)
def test_certificates_of_each_node_are_checked(
    there: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Authority()
    folders = {"one": ours.folder(tmp_path / "ours"), "two": tmp_path / there}
    if there == "expired":
        ours.folder(tmp_path / there, days=-1)
    if there == "foreign":
        Authority("foreign").folder(tmp_path / there)

    def ask(addresses: dict[str, str], question: object, folder: str) -> dict[str, tuple[str, str]]:
        """Stands for nodes on whose disks different folders lie under one path."""
        assert folder == str(tmp_path / "ours")
        return {node: ray_nodes._certificates(str(folders[node])) for node in addresses}

    monkeypatch.setattr(ray_nodes, "_ask", ask)
    nodes = [NODE, Node("two", "10.0.0.8", {}, {}, {})]
    if words:
        with pytest.raises(InputError) as refused:
            check_certificates(nodes, str(tmp_path / "ours"))
        assert str(refused.value) == words.format(folder=tmp_path)
    else:
        check_certificates(nodes, str(tmp_path / "ours"))
