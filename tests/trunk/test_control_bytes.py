"""Control messages as bytes: every message and reply of the port comes back to the bit, and so do errors."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from declared_values import plain, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.errors import InputError, SettingError
from fedsplit.optimization.own_stage import StageFailed
from fedsplit.trunk import port
from fedsplit.trunk.control_bytes import (
    EXCHANGES,
    error_as_bytes,
    message_as_bytes,
    message_from_bytes,
    reply_as_bytes,
    reply_from_bytes,
)
from fedsplit.trunk.run_terms import BeginRun, Begun, FinishRun
from fedsplit.wire.frames import TrunkFailed
from fedsplit.wire.steps import ForeignStep, UnboundedStep
from fedsplit.wire.transport import TrunkLost
from fedsplit.wire.typed_values import MalformedValue, as_bytes, form_of


def reply_of(kind: type[Any]) -> Any:
    """The type that a message declares for its reply."""
    of_runs = {BeginRun: Begun, FinishRun: type(None)}
    return of_runs.get(kind) or get_args(kind.__orig_bases__[0])[0]


def test_every_message_of_the_port_has_a_form() -> None:
    of_the_port = {kind for kind in port.Control.__subclasses__() if kind.__module__ == port.__name__}
    assert of_the_port | {BeginRun, FinishRun} == EXCHANGES.keys()


@pytest.mark.parametrize("kind", EXCHANGES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_message_comes_back_to_the_bit(kind: type[Any], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    run = data.draw(st.text(max_size=40))
    found, found_run = message_from_bytes(message_as_bytes(message, run))
    assert (plain(found), found_run) == (plain(message), run)


@pytest.mark.parametrize("kind", EXCHANGES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_reply_comes_back_to_the_bit(kind: type[Any], data: st.DataObject) -> None:
    reply = data.draw(values(reply_of(kind)))
    assert plain(reply_from_bytes(kind, reply_as_bytes(kind, reply))) == plain(reply)


@pytest.mark.parametrize(
    "error",
    [TrunkLost("gone"), ForeignStep("old"), UnboundedStep("NaN"), StageFailed("mine"), InputError("wrong")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_raised_as_the_same_class(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        reply_from_bytes(port.ReadStatus, reply_as_bytes(port.ReadStatus, error))
    assert (type(raised.value), str(raised.value)) == (type(error), str(error))


def test_a_wrong_setting_keeps_its_parts() -> None:
    with pytest.raises(SettingError) as raised:
        reply_from_bytes(port.Commit, error_as_bytes(SettingError("clients", 0, "1 or more")))
    assert (raised.value.setting, raised.value.value, raised.value.allowed) == ("clients", "0", "1 or more")


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ZeroDivisionError("division by zero")], ids=repr)
def test_another_error_is_an_error_of_the_trunk_that_names_the_class(error: Exception) -> None:
    with pytest.raises(TrunkFailed, match=type(error).__name__):
        reply_from_bytes(port.Commit, error_as_bytes(error))


def test_a_name_chooses_no_class_of_the_program() -> None:
    class Escape(Exception):
        pass

    with pytest.raises(TrunkFailed, match="Escape: out"):
        reply_from_bytes(port.Commit, error_as_bytes(Escape("out")))


@given(st.binary(max_size=64))
def test_bytes_of_a_stranger_are_no_message_and_no_reply(data: bytes) -> None:
    with pytest.raises(MalformedValue):
        message_from_bytes(data)
    with pytest.raises(MalformedValue):
        reply_from_bytes(port.ReadAdapter, data)


def test_an_unknown_message_is_refused_by_its_name() -> None:
    whole = message_as_bytes(port.Commit())
    with pytest.raises(MalformedValue, match="a trunk knows no message 'Commot'"):
        message_from_bytes(whole.replace(b"Commit", b"Commot"))


def test_a_reply_of_another_type_is_refused() -> None:
    """As from a trunk of another version."""
    with pytest.raises(MalformedValue, match="not a number"):
        reply_from_bytes(port.MeasureStep, b"\x01" + as_bytes(form_of(int), 3))
