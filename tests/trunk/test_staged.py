"""A trunk in stages gives the numbers of a trunk in one piece, to the bit, and joins what its stages report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import same_numbers
import torch
from test_local import RAW, config_of, packet

from fedsplit.trunk.doors import join
from fedsplit.trunk.local import LocalTrunk, load_trunks
from fedsplit.trunk.staged import StagedTrunk
from fedsplit.trunk.status import Bytes
from fedsplit.wire.packets import Packet, StepKey

CASES = [
    "shared", "batched", "accumulate", "copies", "frozen", "llama", "experts", "fold", "personal-factors", "prefix",
    "accumulation", "padded", "resumed",
]  # fmt: skip
"""Cases that differ in the trunk. The others differ in strategies, bottom or top, of which no stage knows."""


@pytest.mark.parametrize("case", CASES)
def test_stages_give_the_numbers_of_one_piece_to_the_bit(
    case: str, tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = []
    for stages in ("", "0:1:2"):
        settings = {"cut": "0:2", "lora.dropout": 0.1, "trunk.stages": stages}
        if case.startswith("p") and case != "padded" and case != "personal-factors":
            del settings["lora.dropout"]
        found.append(same_numbers.play(case, tiny_models, corpus_file, tmp_path / f"run-{stages or 'whole'}", settings))
    whole, staged = found
    assert staged["losses"] == whole["losses"]
    assert staged["files"] == whole["files"]


def test_texts_are_generated_through_stages_as_through_one_piece(tiny_models: dict[str, Path]) -> None:
    answers = []
    for stages in ("", "0:1:2"):
        config = config_of(tiny_models, cut="0:2", trunk__stages=stages)
        port = join(config, load_trunks(config, "run", "first"))
        texts = []
        for step, length in enumerate((3, 1, 1)):
            hidden = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(step))
            key = StepKey(0, 0, step, run="run", session="text")
            answer = port.send(Packet(key, {"hidden": RAW.encode(hidden)}, training=False, incarnation="first"))()
            texts.append(RAW.decode(answer.tensors["hidden"]))
        assert port.status().sessions == 1
        end = StepKey(0, 0, 3, run="run", session="text")
        port.send(Packet(end, training=False, incarnation="first"))()
        assert port.status().sessions == 0
        answers.append(texts)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_base_weights_answer_through_stages_as_through_one_piece(tiny_models: dict[str, Path]) -> None:
    answers = []
    for stages in ("", "0:1:2"):
        config = config_of(tiny_models, cut="0:2", trunk__stages=stages)
        port = join(config, load_trunks(config, "run", "first"))
        port.write({name: tensor + 0.1 for name, tensor in port.read().tensors.items()})
        asked = replace(packet(0), training=False)
        tuned, base = (port.send(replace(asked, is_adapted=on))().tensors["hidden"] for on in (True, False))
        assert not torch.allclose(RAW.decode(tuned), RAW.decode(base), atol=1e-3)
        answers.append(RAW.decode(base))
        assert port.status().traffic.reference == Bytes(asked.nbytes, asked.nbytes)
    assert torch.equal(*answers)


def test_the_ledger_counts_what_clients_send_once_and_what_stages_send_apart(tiny_models: dict[str, Path]) -> None:
    settings = {"cut": "0:2", "train__clip": 1.0}
    whole = LocalTrunk(config_of(tiny_models, **settings), "run")
    config = config_of(tiny_models, trunk__stages="0:1:2", wire__codec="bf16", **settings)
    halved = LocalTrunk(config_of(tiny_models, wire__codec="bf16", **settings), "run")
    staged = join(config, load_trunks(config, "run", "first"))
    for port in (whole, halved, staged):
        for what in ("hidden", "gradient"):
            port.send(packet(0, what))()
    traffic = staged.status().traffic
    inside = traffic.between_stages
    traffic.between_stages = Bytes()
    in_one_piece = halved.status().traffic
    assert traffic == in_one_piece  # the run's codec, towards clients
    assert traffic.gradient.packets == in_one_piece.gradient.packets
    assert traffic.gradient.framing == in_one_piece.gradient.framing
    one_way = whole.status().traffic.activation.up
    # The first stage sends exact hidden states with the state of the dropout, and passes on the client's gradient. The
    # second answers with rounded hidden states for the client, with an exact gradient, and with a norm of 8 bytes.
    assert inside.up == one_way + one_way + len(torch.get_rng_state())
    assert inside.down == one_way // 2 + one_way + 8


def test_counts_are_those_of_one_stage_and_parameters_those_of_all(tiny_models: dict[str, Path]) -> None:
    config = config_of(tiny_models, cut="0:2", trunk__stages="0:1:2")
    stages = load_trunks(config, "run", "first")[0]
    port = StagedTrunk(stages)
    for step in range(2):
        for what in ("hidden", "gradient"):
            port.send(packet(0, what, step))()
    counts = port.end_round([0])
    assert (counts.steps, counts.forwards, counts.backwards, counts.sequences) == (2, 2, 2, 4)
    parts = [stage.status().parameters for stage in stages]
    assert port.status().parameters == {name: sum(part[name] for part in parts) for name in ("total", "trainable")}
    assert port.status().incarnation == "first"


def test_a_run_goes_on_with_other_stages_to_the_bit(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    """With the moments of the trunk's optimiser, dropout and momentum."""
    settings: dict[str, object] = {"cut": "0:2", "lora.dropout": 0.1}
    expected = same_numbers.play("head", tiny_models, corpus_file, tmp_path / "whole", settings)
    for number, stages in enumerate((("0:1:2", ""), ("", "0:1:2"))):
        out = tmp_path / str(number)
        for first_or_second, more in zip(stages, ({"rounds": 1}, {"resume": str(out)}), strict=True):
            found = same_numbers.play(
                "head", tiny_models, corpus_file, out, {**settings, **more, "trunk.stages": first_or_second}
            )
        assert found["files"] == expected["files"]
