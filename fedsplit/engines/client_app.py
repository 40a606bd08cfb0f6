"""Flower's client side: a thin door to the `ClientService` of this process, with the run's mods around training."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.engines.trunk_places import find_trunk
from fedsplit.federation import records
from fedsplit.federation.client_service import ClientService
from fedsplit.federation.messages import Request, Train
from fedsplit.federation.mods import Mod, ModChain, load_mods
from fedsplit.settings.documents import from_document

app = ClientApp()

service = ClientService(find_trunk)
"""Service of all clients that this process plays."""


def answer(message: Message, context: Context) -> Message:
    """Answers a message; the client is the partition of the node."""
    request = records.to_request(message, int(context.node_config["partition-id"]))
    mods = _mods_of(request)
    around = ModChain(mods, message, context) if mods else None
    return Message(records.to_content(service.answer(request, around)), reply_to=message)


def _mods_of(request: Request) -> Sequence[Mod]:
    """Returns the mods around a request. Mods work around training alone."""
    return _mods_of_run(request.briefing.run) if isinstance(request, Train) else ()


@functools.lru_cache(maxsize=1)
def _mods_of_run(run: str) -> Sequence[Mod]:
    """Returns the mods of a run, loaded once in a process.

    Args:
        run: Configuration of the run, as JSON.
    """
    document = json.loads(run)
    return load_mods(from_document(document)) if document.get("mods") else ()


# One for all kinds of messages: the request says what is to be done.
for _handler in (app.query(), app.train(), app.evaluate()):
    _handler(answer)
