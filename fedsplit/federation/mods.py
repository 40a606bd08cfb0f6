"""Flower's mods: functions around the training of a client, such as clipping or noise for differential privacy.

A mod sees a message with the adapters that the client starts from and the strategy's settings, and the reply with the
adapters after training and the client's metrics. Adapters are as they are trained: all that the client sends back, in
float32, whether the server had to send them or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from fedsplit.errors import SettingError
from fedsplit.federation import records
from fedsplit.federation.messages import ADAPTERS, Failure, Reply, Train, TrainFrom
from fedsplit.loading import OWN, Kind, described, make, name_of, options_by_name
from fedsplit.settings.config import Config

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
"""A mod: takes a message, the node's context, and the function to call next."""

_HOME = "flwr.clientapp.mod"

_NAMES = ("LocalDpMod", "adaptiveclipping_mod", "arrays_size_mod", "fixedclipping_mod", "message_size_mod")

MOD = Kind(
    setting="mods",
    builtin=lambda: {name: f"{_HOME}:{name}" for name in _NAMES},
    allowed=f"{' | '.join(_NAMES)}, {OWN}",
    functions=True,
)
"""Mods, for `--mods`."""


class ModFailed(Exception):
    """A mod refused a message, or cannot be used with the strategy."""


def load_mods(config: Config) -> list[Mod]:
    """Returns the mods of a run, the outermost first. A class, such as `LocalDpMod`, is called with its options.

    Args:
        config: Configuration of the run.

    Raises:
        SettingError: A name is none, or a class refuses its options.

    Example:
        >>> [mod.__name__ for mod in load_mods(Config(mods=("fixedclipping_mod",)))]
        ['fixedclipping_mod']
    """
    options = options_by_name(MOD, config.mods, config.mod_options)
    mods = []
    for name in config.mods:
        mod = make(MOD, name, options[name_of(name)], {}, f"mods.{name_of(name)}")
        if not callable(mod):
            raise SettingError("mods", name, "a function of message, context and the next function")
        mods.append(mod)
    return mods


class _Settings(ConfigRecord):
    """Settings of a strategy for its mods, which remembers the settings that were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(dict(settings))
        self.__dict__["read"] = set[str]()

    def __getitem__(self, key: str) -> Any:
        self.__dict__["read"].add(key)
        return super().__getitem__(key)


class ModChain:
    """The mods around one request to train."""

    def __init__(self, mods: Sequence[Mod], message: Message, context: Context) -> None:
        """Holds the mods.

        Args:
            mods: The mods, the outermost first.
            message: Message that brought the request. The mods see its metadata.
            context: Context of the node, in which mods may keep state.
        """
        self._mods = mods
        self._message = message
        self._context = context

    def __call__(self, request: Train, given: Mapping[str, Tensor], train: TrainFrom) -> Reply:
        """Trains a client behind the mods.

        Args:
            request: Request to train.
            given: Adapters that the client starts from, as far as they are sent back, by exported name.
            train: Trains from such adapters, and returns the reply without a codec.

        Returns:
            The reply as the mods leave it.

        Raises:
            ModFailed: A mod returned an error, or no mod read a setting of the strategy.
        """
        client = request.client

        def innermost(message: Message, context: Context) -> Message:
            shown = records.from_arrays(message.content.array_records[ADAPTERS])
            reply = train(shown)
            sent = {name: reply.tensors[ADAPTERS][name] for name in given}  # mods compare the order, too
            content = records.to_content(replace(reply, tensors={**reply.tensors, ADAPTERS: sent}))
            return Message(content, reply_to=message)

        call: Callable[[Message, Context], Message] = innermost
        # From the innermost to the outermost: each mod calls the function that has been made before it.
        for mod in reversed(self._mods):
            call = partial(_called, mod, call)
        settings = _Settings({**request.task.settings, records.ROUND: request.round})
        content = RecordDict({ADAPTERS: records.to_arrays(given), records.CONFIG: settings})
        answer = records.to_answer(call(_with_content(self._message, content), self._context), client)
        if isinstance(answer, Failure):
            raise ModFailed(answer.reason)
        unread = sorted(request.task.settings.keys() - settings.__dict__["read"])
        if unread:
            raise ModFailed(f"no mod of --mods reads {unread[0]}, which the strategy sends")
        return answer


def _called(
    mod: Mod,
    call_next: Callable[[Message, Context], Message],
    message: Message,
    context: Context,
) -> Message:
    return mod(message, context, call_next)


def _with_content(message: Message, content: RecordDict) -> Message:
    """Returns a message with the metadata of another one."""
    with records.named_run():  # in a process of Flower's simulation, no run has a name
        shown = Message(content, dst_node_id=message.metadata.dst_node_id, message_type=MessageType.TRAIN)
    shown.metadata.__dict__.update(message.metadata.__dict__)  # as Flower's own grids set the id
    return shown


def tried(
    config: Config,
    request: Train,
    given: Mapping[str, Tensor],
    train: TrainFrom,
) -> Reply:
    """Trains an invented client behind the mods of a run, before the run begins; see `ModChain`.

    Raises:
        ModFailed: A mod refuses the message, raises an error, or leaves a setting of the strategy unread.
    """
    client = request.client
    facts: dict[str, bool | float | int | str] = {"partition-id": client, "num-partitions": config.clients}
    context = Context(
        run_id=1,
        node_id=client + 1,
        node_config=facts,
        state=RecordDict(),
        run_config={},
    )
    with records.named_run():
        message = Message(RecordDict(), dst_node_id=client + 1, message_type=MessageType.TRAIN)
        try:
            return ModChain(load_mods(config), message, context)(request, given, train)
        except (ModFailed, SettingError):
            raise
        except (Exception, SystemExit) as error:  # a user's mod may raise anything
            raise ModFailed(described(error)) from error
