"""Who introduces itself takes part; who does not is named, and absent."""

from __future__ import annotations

import pytest

from fedsplit.federation.clients import ClientNode, RollCall
from fedsplit.federation.introductions import Introduction, introduce
from fedsplit.federation.messages import Answer, Failure, Reply
from fedsplit.updates import Adapters

NOTHING = Adapters({}, {})
START = {"bottom": NOTHING, "top": NOTHING}
NO_LUCK = Failure(-1, "ValueError", "ValueError: no luck")
BROKE = Failure(-1, "OSError", "OSError: broke")


def introduced(client: int, start: dict[str, Adapters] | None = None) -> Answer:
    """Returns an introduction, of which only the introduction itself tells the client."""
    given = START if client == 0 and start is None else start or {}
    reply = introduce(Introduction(client, f"owner {client}", {}, given))
    return Reply(-1, reply.metrics, reply.tensors, reply.about)


def called(*answers: Answer, count: int = 3) -> list[ClientNode]:
    """Returns the clients after the answers of the nodes 50, 51, …"""
    roll = RollCall(count)
    for node, answer in enumerate(answers, 50):
        roll.hear(node, answer)
    return roll.nodes()


def test_all_clients_take_part_in_any_order() -> None:
    nodes = called(introduced(2), introduced(0), introduced(1))
    assert nodes == [ClientNode(51, "owner 0"), ClientNode(52, "owner 1"), ClientNode(50, "owner 2")]


@pytest.mark.parametrize(
    ("answers", "absent"),
    [
        ([introduced(0), introduced(2), NO_LUCK], {1: "ValueError: no luck"}),
        ([NO_LUCK, BROKE, introduced(1)], dict.fromkeys((0, 2), "ValueError: no luck or OSError: broke")),
        ([introduced(0), introduced(1), introduced(1)], dict.fromkeys((1, 2), "two nodes say that they are client 1")),
        (
            [introduced(0), introduced(7), introduced(1)],
            {2: "a node says that it is client 7, and there is none of that number"},
        ),
        ([introduced(0, {"top": NOTHING}), introduced(1), introduced(2)], {0: "it did not say what training starts"}),
        ([introduced(0), Reply(-1, about="{"), introduced(2)], {1: "a client introduced itself in a wrong form"}),
        ([introduced(1), introduced(2)], {0: "it was not heard"}),
    ],
    ids=["failed", "two failed", "twice", "no such number", "no start", "malformed", "silent"],
)
def test_a_client_without_a_usable_introduction_is_absent(answers: list[Answer], absent: dict[int, str]) -> None:
    nodes = called(*answers)
    assert [client for client, node in enumerate(nodes) if node.absent] == sorted(absent)
    assert all(nodes[client].absent.startswith(reason) for client, reason in absent.items())
    assert [node.name for node in nodes if not node.absent] == [f"owner {n}" for n in range(3) if n not in absent]
    assert len({node.node for node in nodes}) == 3


def test_a_failure_belongs_to_its_client_where_the_engine_knows_it() -> None:
    broke, lucky = Failure(2, "OSError", "OSError: broke"), Failure(0, "ValueError", "ValueError: no luck")
    nodes = called(broke, introduced(1), lucky)
    assert [node.absent for node in nodes] == ["ValueError: no luck", "", "OSError: broke"]
