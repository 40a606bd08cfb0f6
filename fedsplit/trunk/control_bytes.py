"""Control messages of a trunk, their replies and their errors as bytes, for a door to another machine.

A message names its class, which is looked up in `EXCHANGES` alone, and the run that it belongs to. A reply is read as
the type that the message declares. An error crosses as the name of its class and as words. Nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from fedsplit.errors import InputError, SettingError
from fedsplit.optimization.own_stage import StageFailed
from fedsplit.trunk import port
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun
from fedsplit.wire.frames import TrunkFailed, error_named
from fedsplit.wire.steps import RefusedStep
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.typed_values import Form, MalformedValue, as_bytes, form_of, from_bytes

_LONGEST_WORDS = 2**12


@dataclass(frozen=True)
class Exchange:
    """A message and its reply.

    Attributes:
        message: Form of the message.
        reply: Form of the reply.
    """

    message: Form
    reply: Form


def _exchange(kind: type[port.Control[Any]]) -> Exchange:
    """Returns the forms of a control message, whose class declares the type of the reply."""
    (base,) = kind.__orig_bases__  # type: ignore[attr-defined]  # Python sets the attribute for a generic base
    (reply,) = get_args(base)
    message: Any = kind  # mypy takes a class with a hash of its own for one without
    return Exchange(form_of(message), form_of(reply))


_NOTHING: Any = type(None)
"""Type of the reply to a message that asks for nothing."""

EXCHANGES: dict[type[Any], Exchange] = {
    BeginRun: Exchange(form_of(BeginRun), form_of(Begun)),
    FinishRun: Exchange(form_of(FinishRun), form_of(_NOTHING)),
    **{
        kind: _exchange(kind)
        for kind in (
            port.BeginGroup,
            port.Leave,
            port.EndRound,
            port.AssignCopies,
            port.AssignAgain,
            port.ReadCopies,
            port.ReadAdapter,
            port.WriteAdapter,
            port.Fold,
            port.Unfold,
            port.Commit,
            port.ReadMoments,
            port.Restore,
            port.MeasureStep,
            port.TakeTrace,
            port.ReadStatus,
        )
    },
}
"""Forms of all messages, by class."""

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (TrunkLost, StageFailed, InputError, MalformedValue, RefusedStep)
}
"""Errors of a trunk by name, beside those of `fedsplit.wire.frames.error_named`."""

_BY_NAME = {kind.__name__: kind for kind in EXCHANGES}


def _error(name: str, words: str) -> Exception:
    """Returns an error of the trunk. A name that is unknown here is an error of the trunk, too: `TrunkFailed`.

    Example:
        >>> _error("TrunkLost", "the trunk serves another run"), _error("SystemExit", "")
        (TrunkLost('the trunk serves another run'), TrunkFailed('SystemExit'))
    """
    kind = _ERRORS.get(name) or error_named(name)
    if kind is TrunkFailed:  # of whatever class it was
        words = ": ".join(filter(None, (name, words)))
    return kind(words)


@dataclass(frozen=True)
class _Head:
    """Part of a message that is read first.

    Attributes:
        kind: Name of the message's class.
        run: Name of the run; empty for a message of no run.
    """

    kind: str
    run: str


@dataclass(frozen=True)
class _Failed:
    """An error in place of a reply.

    Attributes:
        error: Name of the error's class.
        words: Message of the error.
        setting: Setting, value and allowed values of a `SettingError`; empty for another error.
    """

    error: str
    words: str
    setting: tuple[str, ...] = ()


_HEAD = form_of(_Head)
_FAILED = form_of(_Failed)
_IS_REPLY, _IS_ERROR = b"\x01", b"\x00"


def message_as_bytes(message: Any, run: str = "") -> bytes:
    """Returns a message as bytes.

    Args:
        message: A message of one of the classes in `EXCHANGES`.
        run: Name of the run that the message belongs to; empty for `BeginRun`.

    Example:
        >>> message_from_bytes(message_as_bytes(port.Leave(4), "trunk-1"))
        (Leave(client=4), 'trunk-1')
    """
    head = as_bytes(_HEAD, _Head(type(message).__name__, run))
    body = as_bytes(EXCHANGES[type(message)].message, message)
    return len(head).to_bytes(4, "little") + head + body


def message_from_bytes(data: bytes) -> tuple[Any, str]:
    """Returns a message, and the name of its run.

    Args:
        data: The bytes. A stranger's may be any.

    Raises:
        MalformedValue: The bytes are no message.
    """
    end = 4 + int.from_bytes(data[:4], "little")
    head = from_bytes(_HEAD, data[4:end])
    kind = _BY_NAME.get(head.kind)
    if kind is None:
        raise MalformedValue(f"a trunk knows no message {head.kind[:40]!r}")
    return from_bytes(EXCHANGES[kind].message, data[end:]), head.run


def reply_as_bytes(kind: type[Any], reply: Any) -> bytes:
    """Returns the reply to a message, or an error in its place, as bytes.

    Args:
        kind: Class of the message.
        reply: The reply, or an exception.

    Example:
        >>> reply_from_bytes(port.MeasureStep, reply_as_bytes(port.MeasureStep, 0.25))
        0.25
    """
    if isinstance(reply, Exception):
        return error_as_bytes(reply)
    return _IS_REPLY + as_bytes(EXCHANGES[kind].reply, reply)


def error_as_bytes(error: Exception) -> bytes:
    """Returns an error in place of a reply as bytes. Only names and words cross: an object would have to be pickled."""
    setting: tuple[str, ...] = ()
    if isinstance(error, SettingError):
        setting = (error.setting, str(error.value), error.allowed)
    failed = _Failed(type(error).__name__, str(error)[:_LONGEST_WORDS], setting)
    return _IS_ERROR + as_bytes(_FAILED, failed)


def reply_from_bytes(kind: type[Any], data: bytes) -> Any:
    """Returns the reply to a message.

    Args:
        kind: Class of the message.
        data: The bytes of the reply.

    Raises:
        MalformedValue: The bytes are no reply to such a message.
        Exception: The error in place of the reply. An error of a class that this side does not know becomes a
            `fedsplit.wire.frames.TrunkFailed`.
    """
    if data[:1] == _IS_REPLY:
        return from_bytes(EXCHANGES[kind].reply, data[1:])
    if data[:1] != _IS_ERROR:
        raise MalformedValue("the bytes are neither a reply nor an error")
    failed = from_bytes(_FAILED, data[1:])
    if len(failed.setting) == 3:
        raise SettingError(*failed.setting)
    raise _error(failed.error, failed.words)
