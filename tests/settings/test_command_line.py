"""All errors of a command line, and the flags without one."""

from __future__ import annotations

import pytest

from fedsplit.errors import InputError, UnknownValue
from fedsplit.settings.command_line import Parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--run", required=True)
    parser.add_argument("--client", type=int)
    parser.add_argument("--how", choices=["cat", "svd"], default="cat")
    parser.add_argument("--chat", action="store_true")
    return parser


def test_flags_without_an_error_have_their_values(parser: Parser) -> None:
    flags = parser.read(["--run", "here", "--client", "-1", "--chat"]).checked()
    assert (flags.run, flags.client, flags.how, flags.chat) == ("here", -1, "cat", True)


@pytest.mark.parametrize(
    ("argv", "messages", "refused"),
    [
        (["--client", "x"], ["argument --client: invalid int", "the following arguments are required"], "run client"),
        (["--run", "--client", "x"], ["--run: expected a value", "argument --client: invalid int"], "run client"),
        (
            ["--run=a", "--how=x", "--client=y"],
            ["argument --how: invalid ch", "argument --client: invalid"],
            "how client",
        ),
        (["--run", "a", "--client", "x", "--client", "3"], ["argument --client: invalid int"], "client"),
        (["--run", "a", "--cleint", "3"], ["there is no flag --cleint; did you mean --client or"], "client chat"),
        (["--run", "a", "--cleint", "3", "--client", "4"], ["there is no flag --cleint"], "chat"),
        (["--run", "a", "more"], ["there is no flag more; see --help"], ""),
        (["--chat=3", "--how", "cat"], ["argument --chat: ignored explicit", "the following arguments"], "chat run"),
    ],
)
def test_wrong_flags_are_reported_together_and_have_no_value(
    argv: list[str], messages: list[str], refused: str, parser: Parser
) -> None:
    call = parser.read(argv)
    assert len(call.errors) == len(messages), call.errors
    for error, message in zip(call.errors, messages, strict=True):
        assert str(error).startswith(message), call.errors
    for name in ("run", "client", "how", "chat"):
        if name in refused.split():
            with pytest.raises(UnknownValue):
                getattr(call.flags, name)
        else:
            getattr(call.flags, name)
    with pytest.raises(InputError):
        call.checked()


def test_subcommands_have_wrong_flags_too() -> None:
    parser = Parser()
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in ("merge", "export"):
        added = commands.add_parser(name)
        added.add_argument("folders", nargs="+")
        added.add_argument("--rank", type=int)
        added.add_argument("--out", required=True)
    call = parser.read(["merge", "a", "b", "--rank", "x", "--nope"])
    assert call.flags.folders == ["a", "b"]
    assert [str(error).split(";")[0] for error in call.errors] == [
        "argument --rank: invalid int value: 'x'",
        "the following arguments are required: --out",
        "there is no flag --nope",
    ]
    for argv in ([], ["split", "a"]):
        with pytest.raises(InputError, match="COMMAND"):
            parser.read(argv)


def test_options_are_taken_by_the_settings_that_a_command_names(parser: Parser) -> None:
    argv = ["--run", "a", "--metric.rouge.stem", "true", "--metric.Mine.name=x", "--strategy.mu", "1"]
    call = parser.read(argv, ["metric"])
    assert call.options == {"metric": {"rouge.stem": True, "Mine.name": "x"}}
    assert [str(error) for error in call.errors] == ["there is no flag --strategy.mu; see --help for the list"]
    empty = parser.read(["--run", "a", "--metric.rouge.stem"], ["metric"])
    assert empty.refused == {"metric_options"}
