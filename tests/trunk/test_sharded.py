"""Two processes that share the trunk's blocks compute what one process computes, and never wait for a third."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from split_models import RAW, Here, walked
from transformers import AutoModelForCausalLM

from fedsplit.adaptation import lora, run_adapters
from fedsplit.client.link import Link
from fedsplit.generation.decoding import ClientHalf
from fedsplit.lowrank import LowRank
from fedsplit.model.process_group import Shard
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.shard_group import LocalShards
from fedsplit.trunk.sharded import Follower, LeadingBlocks, ShardedBlocks
from fedsplit.trunk.trainable import TrainableAdapter
from fedsplit.wire.packets import StepKey
from fedsplit.wire.transport import TrunkLost


def config_of(model: Path, **more: object) -> Config:
    values: dict[str, object] = {"model": str(model), "cut": "1:3", "lora.rank": 3, "lora.dropout": 0.1}
    return build(values | {"trunk.tensor_parallel": 2} | more)


def mild(folder: Path, family: str) -> Path:
    """A model as the library draws it: float32 rounds what it computes to 1e-6, and that of `tiny_models` to 1e-5."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(folder)
    return folder


class Pair:
    """The same trunk in two processes and in one, with an adapter that is not zero."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.shards = LocalShards(config)
        whole, blocks = self.shards.lead(config, None)
        assert isinstance(blocks, LeadingBlocks)
        (part,) = run_adapters.bare_parts(config, ["trunk"])
        run_adapters.adapt(part, config)
        assert lora.read(whole).layers == lora.read(part).layers
        self.whole, self.blocks, self.plain = whole, blocks, Blocks(part)
        start = lora.read(whole).tensors
        for number, name in enumerate(sorted(start)):
            generator = torch.Generator().manual_seed(number)
            start[name] = torch.randn(start[name].shape, generator=generator) * 0.05
        self.adapter = TrainableAdapter(start, config.train, learns=True)

    def batch(self, learns: bool = True, wants_gradient: bool = True) -> PendingBatch:
        """Two steps of different length, one of them with padding."""
        generator = torch.Generator().manual_seed(3)
        inputs, masks = {}, {}
        for client, length in enumerate((7, 5)):
            key = StepKey(1, client, 0)
            inputs[key] = torch.randn(2, length, 32, generator=generator).requires_grad_(wants_gradient)
            if client:
                masks[key] = torch.ones(2, length, dtype=torch.bool)
                masks[key][0, -2:] = False
        snapshot = self.adapter.snapshot
        if not learns:
            snapshot = {name: tensor.detach() for name, tensor in snapshot.items()}
        return PendingBatch(inputs, masks, self.adapter, snapshot, seed=11)

    def compare(self, batch: PendingBatch, training: bool = True) -> float:
        """Largest difference of outputs and gradients."""
        found = []
        for blocks in (self.blocks, self.plain):
            output = blocks.run(batch, keeps_graph=True, training=training)
            generator = torch.Generator().manual_seed(5)
            sent = {key: torch.randn(hidden.shape, generator=generator) for key, hidden in batch.inputs.items()}
            of_adapter, of_inputs = blocks.differentiate(batch, output, sent, {})
            by_client = {f"input {key.client}": gradient for key, gradient in of_inputs.items()}
            found.append({"output": output.hidden.detach(), **of_adapter, **by_client})
        here, expected = found
        assert here.keys() == expected.keys()
        return max(float((here[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(config_of(mild(tmp_path_factory.mktemp("llama"), "llama")))
    yield made
    made.shards.close()


def test_outputs_and_all_gradients_are_those_of_one_process(pair: Pair) -> None:
    """Of A and B of all seven projections, and of the inputs."""
    batch = pair.batch()
    assert len(batch.snapshot) == 2 * 7 * 2
    assert pair.compare(batch) < 1e-6
    assert pair.compare(batch, training=False) < 1e-6


def test_all_processes_turn_their_adapters_off_together(pair: Pair) -> None:
    batch = pair.batch()
    batch.is_adapted = False
    found, expected = (blocks.run(batch, False, training=False).hidden for blocks in (pair.blocks, pair.plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    tuned = pair.plain.run(pair.batch(), False, training=False).hidden
    assert not torch.allclose(tuned, expected, atol=1e-3)
    assert pair.compare(pair.batch()) < 1e-6


@pytest.mark.parametrize(("learns", "wants_gradient"), [(True, False), (False, True)])
def test_gradients_that_nobody_wants_are_left_out_by_both(learns: bool, wants_gradient: bool, pair: Pair) -> None:
    assert pair.compare(pair.batch(learns, wants_gradient)) < 1e-6


def test_several_graphs_wait_at_once(pair: Pair) -> None:
    """As under `copies`, with micro-batches, and for steps that are computed again."""
    batches = [pair.batch(), pair.batch()]
    batches[1].seed = 12
    outputs = [pair.blocks.run(batch, keeps_graph=True) for batch in batches]
    assert not torch.equal(outputs[0].hidden, outputs[1].hidden)
    again = pair.blocks.run(batches[0], keeps_graph=False)
    assert torch.equal(again.hidden, outputs[0].hidden)
    sent = {key: torch.ones_like(hidden) for key, hidden in batches[0].inputs.items()}
    for batch, output in zip(batches, outputs, strict=True):
        of_adapter, _ = pair.blocks.differentiate(batch, output, sent, {})
        expected, _ = pair.plain.differentiate(batch, pair.plain.run(batch, keeps_graph=True), sent, {})
        for name, value in expected.items():
            torch.testing.assert_close(of_adapter[name], value, atol=1e-5, rtol=1e-5)


def test_folds_reach_every_piece_and_are_taken_back(pair: Pair) -> None:
    batch = pair.batch()
    before = pair.blocks.run(batch, keeps_graph=False).hidden
    changes = {}
    for number, (layer, _) in enumerate(sorted(lora.layers_of(pair.plain.part).items())):
        generator = torch.Generator().manual_seed(number)
        up = torch.randn(batch.snapshot[f"{layer}.lora_B.weight"].shape, generator=generator) * 0.1
        changes[layer] = LowRank(up, torch.randn(batch.snapshot[f"{layer}.lora_A.weight"].shape, generator=generator))
    changes["model.layers.0.mlp.up_proj"] = next(iter(changes.values()))  # the bottom's
    for blocks in (pair.blocks, pair.plain):
        blocks.fold(changes)
    assert pair.compare(batch) < 3e-6
    assert not torch.allclose(pair.blocks.run(batch, keeps_graph=False).hidden, before, atol=0.01)
    for blocks in (pair.blocks, pair.plain):
        blocks.unfold()
        blocks.commit()
    assert torch.equal(pair.blocks.run(batch, keeps_graph=False).hidden, before)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "qwen3", "gemma2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Joined outputs, biases and dropout of the model's own, norms of heads, and caps."""
    made = Pair(config_of(mild(tmp_path, family), kernels="library" if family == "phi3" else "fused"))
    try:
        assert made.compare(made.batch()) < 3e-6
    finally:
        made.shards.close()


def test_a_text_is_continued_as_in_one_process(pair: Pair) -> None:
    """With padding, with two texts one after the other, and with another snapshot in between."""
    bottom, top = run_adapters.bare_parts(pair.config, ["bottom", "top"])
    found = []
    for part, blocks in ((pair.whole, pair.blocks), (pair.plain.part, pair.plain)):
        here = Here(part, blocks=blocks)
        here.server.adapters.write(pair.adapter.snapshot, {})
        half = ClientHalf(0, bottom, top, Link(here, RAW, SCHEDULES["shared"], "run", "first"))
        first = walked(half, [[5, 9, 3], [7]])
        blocks.run(pair.batch(), keeps_graph=False)
        found.append([first, walked(half, [[7, 1]])])
    for text, expected in zip(*found, strict=True):
        torch.testing.assert_close(text, expected, atol=1e-5, rtol=1e-5)


def test_a_lost_process_is_the_loss_of_the_trunk(tmp_path: Path) -> None:
    """At once, and at every later call."""
    made = Pair(config_of(mild(tmp_path, "llama")))
    batch = made.batch()
    output = made.blocks.run(batch, keeps_graph=True)
    (process,) = made.shards._processes
    process.kill()
    sent = {key: torch.ones_like(hidden) for key, hidden in batch.inputs.items()}
    for _ in range(2):
        with pytest.raises(TrunkLost, match="a process of the trunk is lost, or not in step"):
            made.blocks.differentiate(batch, output, sent, {})
    with pytest.raises(TrunkLost):
        made.blocks.run(batch, keeps_graph=False)
    assert process.poll() is not None


class Script:
    """A group of one process that hears prepared messages."""

    shard = Shard(0, 1)

    def __init__(self, *messages: tuple[dict[str, Any], list[torch.Tensor | None]]) -> None:
        self.messages = list(messages)

    def hear(self) -> tuple[dict[str, Any], list[torch.Tensor | None]]:
        if not self.messages:
            raise RuntimeError("the first process is gone")
        return self.messages.pop(0)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_a_follower_frees_what_nobody_needs(pair: Pair) -> None:
    """Graphs and caches of steps that were given up would fill the memory."""

    def message(action: str, *tensors: torch.Tensor | None, freed: tuple[int, ...] = (), **arguments: object) -> Any:
        return {"action": action, "freed": list(freed), "arguments": arguments}, list(tensors)

    (part,) = run_adapters.bare_parts(pair.config, ["trunk"])
    run_adapters.adapt(part, pair.config)
    snapshot = pair.adapter.snapshot
    shapes = {name: list(tensor.shape) for name, tensor in snapshot.items()}
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in snapshot.values()])
    step = {"seed": 0, "training": True, "wants_gradient": False}
    group: Any = Script(
        message("take_snapshot", flat, shapes=shapes, learned=list(shapes)),
        message("forward", torch.ones(1, 2, 32), None, number=1, **step),
        message("forward", torch.ones(1, 2, 32), None, number=2, **step),
        message("forward", torch.ones(1, 2, 32), None, number=0, **step),
        message("extend", torch.ones(1, 2, 32), None, torch.arange(2)[None], number=3),
        message("extend", torch.ones(1, 2, 32), None, torch.arange(2)[None], number=4),
        message("backward", torch.ones(1, 2, 32), number=2, wants_input=False, freed=(3, 1)),
    )
    follower = Follower(ShardedBlocks(part, pair.blocks._styles, group), group)
    with pytest.raises(RuntimeError, match="the first process is gone"):
        follower.work()
    assert (follower._graphs, [*follower._caches]) == ({}, [4])


def test_the_first_process_names_what_is_to_be_freed(pair: Pair) -> None:
    said: list[dict[str, Any]] = []
    say = pair.blocks._group.say
    try:
        pair.blocks._group.say = lambda fields, tensors=(): (said.append(dict(fields)), say(fields, tensors))[1]  # type: ignore
        outputs = [pair.blocks.run(pair.batch(), keeps_graph=True) for _ in range(2)]
        numbers = [fields["arguments"]["number"] for fields in said if fields["action"] == "forward"]
        del outputs[0]
        gc.collect()
        pair.blocks.run(pair.batch(), keeps_graph=False)
    finally:
        pair.blocks._group.say = say  # type: ignore[method-assign]
    freed = [number for fields in said for number in fields["freed"]]
    assert numbers[0] in freed and numbers[1] not in freed
