"""Flower's client side: a thin door to the `ClientService` of this process, with the run's mods around training."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.durable import NotWritten
from fedsplit.engines.trunk_places import find_trunk
from fedsplit.errors import InputError
from fedsplit.federation import records
from fedsplit.federation.client_service import ClientService, failure_of
from fedsplit.federation.client_site import NODE_KEY, Site, read_site
from fedsplit.federation.messages import Request, Train
from fedsplit.federation.mods import Mod, ModChain, load_mods
from fedsplit.settings.documents import from_document

app = ClientApp()

service = ClientService(find_trunk)
"""Service of all clients that this process plays."""


def answer(message: Message, context: Context) -> Message:
    """Answers a message; the client is that of the node's site, or else the partition of the node."""
    if NODE_KEY not in context.node_config:
        return _answer(records.to_request(message, int(context.node_config["partition-id"])), message, context)
    try:
        site = _site_at(str(context.node_config[NODE_KEY]))
        request = site.received(records.to_request(message, site.client))
    except (InputError, NotWritten) as error:
        # The log of the site, too: the answer goes to the operator alone.
        for each in error.errors if isinstance(error, InputError) else [error]:
            print("fedsplit:", each, file=sys.stderr, flush=True)
        return Message(records.to_content(failure_of(-1, error)), reply_to=message)
    return _answer(request, message, context)


@functools.lru_cache(maxsize=1)
def _site_at(path: str) -> Site:
    """Returns the site with a file, read once in a process."""
    return read_site(Path(path))


def _answer(request: Request, message: Message, context: Context) -> Message:
    """Carries out a request, with the run's mods around training."""
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
