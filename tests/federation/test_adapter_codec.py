"""Adapters through a codec: both sides agree, what is lost is sent later, and a resumed run is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_federation import federate
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.federation.adapter_codec import AdapterCodec
from fedsplit.settings.documents import build
from fedsplit.wire.encoded import MalformedPacket
from strategies.fedavg import FedAvg
from strategies.fedex_lora import FedExLoRA
from strategies.rolora import RoLoRA

NAMES = ["h.0.lora_A.weight", "h.0.lora_B.weight"]


def normal(seed: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def test_what_a_change_has_lost_is_sent_with_the_next_one() -> None:
    client, server = (AdapterCodec("topk:0.1,int8", 0, NAMES) for _ in range(2))
    given = {NAMES[1]: torch.zeros(4, 8)}
    total = torch.zeros(4, 8)
    for round in range(1, 41):
        sent = client.encode_changes({NAMES[1]: normal(round)}, given, 3, round)
        total += server.decode_changes(sent, given, 3, round)[NAMES[1]]
        state = client.state(3)
        client = AdapterCodec("topk:0.1,int8", 0, NAMES)  # a client has a new codec for each request
        client.restore(3, {**state, "gradient/up/0/0": torch.ones(1)})
    lost = state["adapter/gradient/up/1/0"]
    assert torch.allclose(sum(map(normal, range(1, 41))) - total, lost, atol=1e-3)


def test_a_change_of_what_was_not_given_is_refused() -> None:
    codec = AdapterCodec("int8", 0, NAMES)
    given = dict.fromkeys(NAMES, torch.zeros(4, 8))
    sent = codec.encode_changes({NAMES[0]: normal(0)}, given, 0, 1)
    for wrong in ({NAMES[1]: given[NAMES[1]]}, {NAMES[0]: torch.zeros(2, 8)}, {NAMES[0]: torch.zeros(8, 8)}):
        with pytest.raises(MalformedPacket):
            codec.decode_changes(sent, wrong, 0, 1)


@pytest.mark.parametrize("strategy", [FedAvg, RoLoRA, FedExLoRA])
def test_a_resumed_run_with_a_codec_of_adapters_is_the_uninterrupted_one(
    tiny_models: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    values = {"model": str(tiny_models["gpt2"]), "clients": 3, "rounds": 3, "cut": "1:2", "dataset": str(corpus_file)}
    values |= {"partition": "natural", "lora.rank": 2, "train.max_length": 16, "train.steps": 1, "train.lr": 0.05}
    values |= {"train.batch_size": 2, "fraction": 0.7, "eval.samples": 2, "eval.after": 1}
    config = build({**values, "adapter.codec": "topk:0.2,int8"})
    federate(config, tmp_path / "straight", strategy(), monkeypatch)
    for rounds in (1, 3):
        resume = str(tmp_path / "stopped") if rounds > 1 else ""
        federate(replace(config, rounds=rounds, resume=resume), tmp_path / "stopped", strategy(), monkeypatch)
    straight, stopped = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in straight.items())
