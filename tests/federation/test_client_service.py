"""Flower's client side: one copy of the frozen base for all virtual clients of a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, MessageType, RecordDict

from fedsplit.client.heldout import shards_of
from fedsplit.corpora.shards import write_shard
from fedsplit.documents import as_document, build
from fedsplit.federation import client_app, records


def test_virtual_clients_share_the_base_and_hold_no_trunk(
    model_path: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model": str(model_path), "dataset": str(corpus_file), "partition": "natural", "clients": 3}
    config = build(values | {"cut": "1:2", "train.max_length": 16})
    run = json.dumps(as_document(config))
    monkeypatch.setattr(client_app, "find_trunk", lambda name: None)
    facts = {"run": run, "trunk": "t", "incarnation": "first", "threads": 1, "store": str(tmp_path), "personal": ""}
    content = RecordDict({records.CONFIG: records.instructions({**facts, "accepted": 0, "folded": 0}, 0)})
    write_shard(tmp_path, 0, shards_of(config)[0])
    write_shard(tmp_path, 2, shards_of(config)[2])
    corpus_file.unlink()  # and of the other client there is nothing: each needs its own data alone
    clients = []
    for partition in (2, 0):
        message = records.message_to(7, MessageType.QUERY, content)
        message.metadata.__dict__["_message_id"] = str(partition)
        context = Context(1, 7, {"partition-id": partition}, RecordDict(), {})
        _, client, _, _ = client_app._meet(message, context)
        about, start = records.read_introduction(client_app.app(message, context))
        assert (about["client"], about["name"]) == (partition, {0: "ann", 2: "cid"}[partition])
        assert (set(start) == {"bottom", "top"}) == (partition == 0)
        clients.append(client)
    assert clients[0].bottom is clients[1].bottom
    assert clients[0].top is clients[1].top
    assert clients[0].shard is not clients[1].shard
    held = {part.whole_name(n) for part in (clients[0].bottom, clients[0].top) for n, _ in part.named_parameters()}
    assert held
    assert not any(".1." in name.partition("attn")[0].partition("mlp")[0] for name in held)
