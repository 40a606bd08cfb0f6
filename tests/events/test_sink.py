"""What counts as a sink."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedsplit.events import Notice, Sink


def test_a_sink_has_two_methods_whether_it_is_a_subclass_or_not() -> None:
    class Plain:
        def handle(self, event: object) -> None: ...

        def close(self) -> None: ...

    class Half:
        def handle(self, event: object) -> None: ...

    assert isinstance(Plain(), Sink)
    assert not isinstance(Half(), Sink)


def test_a_subclass_needs_no_method_to_close() -> None:
    class Own(Sink):
        def handle(self, event: object) -> None: ...

    class Forgot(Sink):
        pass

    sink = Own()
    sink.handle(Notice(text="x"))
    sink.close()
    with pytest.raises(TypeError, match="abstract"):
        Forgot()


def test_a_users_sink_imports_nothing_heavy() -> None:
    code = "import sys, fedsplit.events; print(sorted({'torch', 'rich', 'flwr', 'ray', 'peft'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
