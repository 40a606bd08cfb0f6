"""Flower's client side is a door: a message in, the service's answer out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from fedsplit.engines import client_app
from fedsplit.federation import records
from fedsplit.federation.client_service import Around
from fedsplit.federation.client_site import NODE_KEY, Site, write_site
from fedsplit.federation.messages import Answer, Briefing, Evaluate, Failure, Introduce, Reply, Request, Train
from fedsplit.settings.config import Config
from fedsplit.settings.documents import as_document, build

BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")


class Service:
    """Remembers what it was asked, and gives one answer."""

    def __init__(self, given: Answer) -> None:
        self.given = given
        self.asked: list[Request] = []
        self.around: list[Around | None] = []

    def answer(self, request: Request, around: Around | None = None) -> Answer:
        self.asked.append(request)
        self.around.append(around)
        return self.given


def deliver(request: Request, partition: int) -> Message:
    message = records.to_message(request, node=77)
    message.metadata.__dict__["_message_id"] = "one"
    return client_app.app(message, Context(1, 77, {"partition-id": partition}, RecordDict(), {}))


@pytest.mark.parametrize("kind", [Introduce, Train, Evaluate])
def test_every_kind_of_request_reaches_the_service_as_the_client_of_the_node(
    kind: type[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partition says which client is asked, whatever the request says."""
    service = Service(Reply(3, {"loss": 2.5}))
    monkeypatch.setattr(client_app, "service", service)
    reply = deliver(kind(BRIEFING, client=-1), partition=3)
    assert service.asked == [kind(BRIEFING, client=3)]
    assert records.to_answer(reply, 3) == Reply(3, {"loss": 2.5})
    assert reply.metadata.reply_to_message_id == "one"


def test_the_client_of_a_site_answers_by_the_sites_own_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(Reply(2, {"loss": 2.5}))
    monkeypatch.setattr(client_app, "service", service)
    (tmp_path / "notes.txt").write_text("a note about nothing in particular, and so on. " * 200)
    for number in range(3):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / f"{number}.txt").write_text((tmp_path / "notes.txt").read_text())
    settings = {"dataset": str(tmp_path / "notes"), "trunk.server": "127.0.0.1:50052"}
    file = write_site(Site(2, "ward a", tmp_path / "state", settings))
    run = json.dumps(as_document(build({"data.at": "site", "train.max_length": 32})))
    message = records.to_message(Introduce(replace(BRIEFING, run=run, store="0" * 32), client=-1), node=77)
    message.metadata.__dict__["_message_id"] = "one"
    context = Context(1, 77, {NODE_KEY: str(file)}, RecordDict(), {})
    assert records.to_answer(client_app.app(message, context), 2) == Reply(2, {"loss": 2.5})
    (asked,) = service.asked
    assert asked.client == 2 and asked.briefing.store == str(tmp_path / "state" / ("0" * 32))
    assert json.loads(asked.briefing.run)["dataset"] == settings["dataset"]

    context.node_config[NODE_KEY] = str(tmp_path / "absent.toml")
    refused = records.to_answer(client_app.app(message, context), 2)
    assert isinstance(refused, Failure) and "absent.toml is not possible" in refused.reason
    (line,) = capsys.readouterr().err.splitlines()  # the log of the site, which sees no answer
    assert line.startswith("fedsplit: ") and "absent.toml is not possible" in line


def test_a_failure_goes_back_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = Failure(3, "Diverged", "client 3 diverged at step 5")
    monkeypatch.setattr(client_app, "service", Service(failure))
    assert records.to_answer(deliver(Train(BRIEFING, 3), partition=3), 3) == failure


def test_mods_work_around_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Reply(3, {"loss": 2.5}))
    monkeypatch.setattr(client_app, "service", service)
    run = json.dumps(as_document(Config(mods=("message_size_mod",))))
    for kind in (Introduce, Train, Evaluate):
        deliver(kind(replace(BRIEFING, run=run), client=3), partition=3)
    deliver(Train(replace(BRIEFING, run=json.dumps(as_document(Config()))), client=3), partition=3)
    assert [around is not None for around in service.around] == [False, True, False, False]
