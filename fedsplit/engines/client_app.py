"""Flower's client side: a thin door to the `ClientService` of this process."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.engines.trunk_places import find_trunk
from fedsplit.federation import records
from fedsplit.federation.client_service import ClientService

app = ClientApp()

service = ClientService(find_trunk)
"""Service of all clients that this process plays."""


def answer(message: Message, context: Context) -> Message:
    """Answers a message; the client is the partition of the node."""
    request = records.to_request(message, int(context.node_config["partition-id"]))
    return Message(records.to_content(service.answer(request)), reply_to=message)


# One for all kinds of messages: the request says what is to be done.
for _handler in (app.query(), app.train(), app.evaluate()):
    _handler(answer)
