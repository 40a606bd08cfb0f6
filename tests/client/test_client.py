"""A client's training: against plain PEFT fine-tuning of the unsplit model, and by schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, without_dropout
from peft import get_peft_model
from transformers import get_scheduler

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.client.client import Client, Diverged
from fedsplit.client.link import Link
from fedsplit.corpora.sequences import Row, Sequences, stack
from fedsplit.corpora.shards import Shard, batch
from fedsplit.model.derivation import family_of
from fedsplit.model.kernels import IGNORED
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.optimization.optim import make_optimizer
from fedsplit.seeds import derive_seed
from fedsplit.settings.documents import build
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.stages import Gradients, GradientStage, LocalStep, Outcome, RoundStart
from fedsplit.trunk.local import LocalTrunk
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.updates import Task
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import SpoiledStep, StaleStep, UnboundedStep

STEPS = 20


def make_client(
    path: Path,
    schedule: str,
    cut=(1, 2),
    dropout=0.0,
    steps=STEPS,
    seed=0,
    codec="raw",
    micro_batches=1,
    kernels="library",
    train=None,
):
    """A client and its trunk in one process."""
    values = {"model": str(path), "cut": f"{cut[0]}:{cut[1]}", "seed": seed, "lora.rank": 2, "lora.dropout": dropout}
    values |= {"train.steps": steps, "train.batch_size": 3, "train.lr": 5e-3, "trunk.schedule": schedule}
    values |= {f"train.{name}": value for name, value in (train or {}).items()}
    config = build(values | {"wire.codec": codec, "train.micro_batches": micro_batches, "kernels": kernels})
    bottom, top = load_parts(path, cut, ["bottom", "top"], kernels=kernels)
    trunk = LocalTrunk(config)
    for part in (bottom, top):
        lora.add(part, config.lora, seed)
    for part in (bottom, trunk.server.part, top):
        without_dropout(part)
    generator = torch.Generator().manual_seed(1)
    shard = Shard(
        "ann",
        Sequences.packed(torch.randint(1, VOCABULARY, (10, 8), generator=generator)),
        Sequences.packed(torch.zeros(1, 8, dtype=torch.long)),
    )
    link = Link(trunk, make_codec(codec), SCHEDULES[schedule], incarnation="first")
    client = Client(0, shard, bottom, top, link, config.train, seed)
    return client, trunk.server, lora.read(bottom, top).tensors


def unsplit(path: Path, start: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """The unsplit model under PEFT, without any dropout, and its adapter by exported name, with these values."""
    base = load_unsplit(path)
    settings_of = LoraSettings(rank=(2,), dropout=0.0)
    whole = get_peft_model(base, make_config(settings_of, family_of(base.config))).eval()
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {n: p for n, p in names.items() if p.requires_grad}
    assert trained.keys() == start.keys()
    for name, parameter in trained.items():
        parameter.data = start[name].clone()
    return whole, trained


def fine_tune(
    path: Path, start: dict[str, torch.Tensor], blocks: Sequences, settings: TrainSettings, client: int = 0
) -> dict[str, torch.Tensor]:
    """Plain PEFT fine-tuning of the unsplit model, without any dropout, in the order of a client with seed 0."""
    whole, trained = unsplit(path, start)
    optimizer = make_optimizer(trained.values(), settings)
    for step in range(STEPS):
        rows = batch(blocks, step, settings.batch_size, derive_seed(0, "client", client))
        whole(input_ids=rows.ids, labels=rows.labels, attention_mask=rows.mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}


def central(
    path: Path, start: dict[str, torch.Tensor], blocks: Sequences, settings: TrainSettings, rounds: int
) -> dict[str, torch.Tensor]:
    """Plain fine-tuning of the unsplit model by PEFT, torch and transformers' schedulers, all features as they are."""
    whole, trained = unsplit(path, start)
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    total = rounds * settings.steps
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=int(settings.warmup * total), num_training_steps=total)
    for step in range(total):
        ids = batch(blocks, step, settings.batch_size * settings.accumulation, derive_seed(0, "client", 0)).ids
        for part in ids.split(settings.batch_size):
            (whole(input_ids=part, labels=part).loss / settings.accumulation).backward()
        if settings.clip:
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
            assert norm > settings.clip, "nothing to clip: the test would prove nothing"
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}


FEATURES = {"schedule": "cosine", "warmup": 0.25, "accumulation": 2, "clip": 0.1, "optimizer_state": "keep"}
"""All at once; the norms of the tiny models' gradients are above this at every step."""


@pytest.mark.parametrize(("cut", "micro_batches"), [((0, 1), 1), ((1, 2), 2), ((2, 3), 3)])
def test_all_features_at_once_follow_plain_fine_tuning(model_path: Path, cut: tuple[int, int], micro_batches) -> None:
    """Three rounds of one client, whose optimisers' state is kept: the adapters of the unsplit model's training."""
    client, server, given = make_client(
        model_path, "shared", cut, steps=4, micro_batches=micro_batches, train={"weight_decay": 0.01, **FEATURES}
    )
    client = replace(client, rounds=3)
    start = {**given, **server.adapters.read().tensors}
    tensors, moments = given, {}
    for round in range(1, 4):
        update = client.train(tensors, round, moments=moments)
        tensors, moments = update.adapters.tensors, update.moments
    assert update.examples == 4 * 2 * 3
    federated = {**tensors, **server.adapters.read().tensors}
    for name, parameter in central(model_path, start, client.shard.train, client.settings, 3).items():
        assert (federated[name] - parameter).abs().max() <= 1e-5, name
        assert (start[name] - parameter).abs().max() > 1e-3, name


@pytest.mark.parametrize("cut", [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_one_client_shared_follows_plain_peft_fine_tuning(model_path: Path, cut: tuple[int, int]) -> None:
    """Same order, same AdamW on all three parts: equal adapters after 20 steps."""
    client, server, given = make_client(model_path, "shared", cut)
    start = {**given, **server.adapters.read().tensors}
    update = client.train(given, round=1)
    federated = {**update.adapters.tensors, **server.adapters.read().tensors}

    trained = fine_tune(model_path, start, client.shard.train, client.settings)
    for name, parameter in trained.items():
        assert (federated[name] - parameter).abs().max() <= 1e-5, name
        assert (start[name] - parameter).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    ("schedule", "learning"),
    [
        ("shared", {"bottom", "trunk", "top"}),
        ("batched", {"bottom", "trunk", "top"}),
        ("frozen", {"bottom", "top"}),
        ("forward-only", {"top"}),
    ],
)
def test_which_parts_learn_under_which_schedule(model_path: Path, schedule: str, learning: set[str]) -> None:
    client, server, given = make_client(model_path, schedule, steps=2)
    trunk_before = server.adapters.read().tensors
    after = client.train(given, round=1).adapters.tensors
    changed = {
        "bottom": any(not torch.equal(after[n], given[n]) for n in lora.parameters(client.bottom)),
        "trunk": any(not torch.equal(t, trunk_before[n]) for n, t in server.adapters.read().tensors.items()),
        "top": any(not torch.equal(after[n], given[n]) for n in lora.parameters(client.top)),
    }
    assert {part for part, did in changed.items() if did} == learning
    assert (server.traffic.gradient.up == 0) == (schedule == "forward-only")


def test_frozen_trunk_without_a_bottom_sends_no_gradient(model_path: Path) -> None:
    client, server, given = make_client(model_path, "frozen", cut=(0, 2), steps=2)
    update = client.train(given, round=1)
    assert server.traffic.gradient.up == 0
    assert len(server.steps) == 0
    assert any(not torch.equal(update.adapters.tensors[n], given[n]) for n in given)


def test_training_depends_on_what_it_is_given_alone(model_path: Path) -> None:
    """A second attempt, after one that broke off between backward and step, gives the same to the bit."""
    client, _, given = make_client(model_path, "frozen", dropout=0.3, steps=3)
    first = client.train(given, round=2).adapters.tensors
    broken, second = (replace(client, link=replace(client.link, attempt=attempt)) for attempt in (1, 2))
    broken.step(client.shard.train.ids[:2], StepKey(2, 0, 0))
    torch.manual_seed(99)
    again = second.train(given, round=2).adapters.tensors
    with pytest.raises(StaleStep, match="round 2, client 0, step 0"):
        broken.train(given, round=2)
    other_round = client.train(given, round=3).adapters.tensors
    assert all(torch.equal(first[name], again[name]) for name in given)
    assert any(not torch.equal(first[name], other_round[name]) for name in given)


def test_padding_is_neither_seen_nor_predicted(model_path: Path) -> None:
    client, server, _ = make_client(model_path, "frozen")
    client.bottom.eval(), client.top.eval()
    ids = client.shard.train.ids[:2].clone()
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    short = client.step(ids[:, :5], StepKey(1, 0, 0))
    padded = client.step(ids, StepKey(1, 0, 1), mask)
    assert padded == pytest.approx(float(short), rel=1e-5)
    assert server.traffic.activation.up == (2 * 5 + 2 * 8) * 32 * 4 + 2 * 8


def padded_rows(kind: str) -> Sequences:
    """Ten sequences of different lengths, of which the ends only are predicted, or all, or all of equal length."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(10):
        ids = torch.randint(1, VOCABULARY, (8 if kind == "equal" else 3 + number % 6,), generator=generator).tolist()
        labels = [IGNORED] * (number % 2 + 1) + ids[number % 2 + 1 :] if kind == "completions" else ids
        rows.append(Row(ids, labels, "ann"))
    return stack(rows, pad=0)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", ["completions", "texts"])
def test_padded_sequences_train_as_the_unsplit_model(model_path: Path, kind: str, micro_batches: int) -> None:
    """Twenty steps on sequences of different lengths with labels of their own, against plain PEFT fine-tuning."""
    client, server, given = make_client(model_path, "shared", micro_batches=micro_batches)
    rows = padded_rows(kind)
    client = replace(client, shard=Shard("ann", rows, rows))
    start = {**given, **server.adapters.read().tensors}
    update = client.train(given, round=1)
    federated = {**update.adapters.tensors, **server.adapters.read().tensors}
    for name, parameter in fine_tune(model_path, start, rows, client.settings).items():
        assert (federated[name] - parameter).abs().max() <= (1e-5 if micro_batches == 1 else 1e-4), name
    batches = [batch(rows, step, 3, derive_seed(0, "client", 0)) for step in range(STEPS)]
    assert update.tokens == sum(batch.tokens for batch in batches) < STEPS * 3 * 8


def test_a_rounds_loss_is_the_mean_over_what_was_predicted(model_path: Path) -> None:
    client, _, given = make_client(model_path, "frozen", steps=4)
    rows = padded_rows("completions")
    client = replace(client, shard=Shard("ann", rows, rows))
    losses, counts, step = [], [], Client.step

    def watched(self, ids, key, mask=None, labels=None, rate=1.0, **more):
        losses.append(float(step(self, ids, key, mask, labels, rate, **more)))
        counts.append(int((labels[:, 1:] != IGNORED).sum()))
        return torch.tensor(losses[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "step", watched)
        update = client.train(given, 1)
    assert len(set(counts)) > 1
    assert update.loss == pytest.approx(sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts), rel=1e-6)


@pytest.mark.parametrize(
    ("samples", "epochs", "accumulation", "sizes"),
    [(7, 1, 1, [3, 3, 1]), (4, 2, 1, [3, 1, 3, 1]), (6, 1, 1, [3, 3]), (8, 1, 2, [6, 2]), (2, 2, 1, [2, 2])],
)
def test_an_epoch_trains_each_sequence_once(
    tiny_models: dict[str, Path], samples: int, epochs: int, accumulation: int, sizes: list[int]
) -> None:
    """The last batch of a pass is what is left; round by round, in an order drawn anew for each pass."""
    client, _, given = make_client(tiny_models["gpt2"], "frozen", train={"accumulation": accumulation})
    settings = TrainSettings(epochs=epochs, samples=samples, batch_size=3, accumulation=accumulation)
    client = replace(client, settings=settings, rounds=2)
    used = [tuple(row) for row in client.shard.train.ids[:samples].tolist()]
    seen: list[list[tuple[int, ...]]] = []
    step = Client.step

    def watched(self, ids, *args, **more):
        seen.append([tuple(row) for row in ids.tolist()])
        return step(self, ids, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "step", watched)
        updates = [client.train(given, round) for round in (1, 2)]
    assert client.steps == len(sizes) and [len(rows) for rows in seen] == sizes * 2
    assert [(update.examples, update.tokens) for update in updates] == [(samples * epochs, samples * epochs * 8)] * 2
    rows = [row for batch in seen for row in batch]
    passes = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    assert len(passes) == 2 * epochs and all(sorted(one) == sorted(used) for one in passes)
    assert samples < 6 or passes[0] != passes[1]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_who_diverges_is_told_the_likely_settings(tiny_models: dict[str, Path], clip: float) -> None:
    client, server, given = make_client(tiny_models["gpt2"], "shared", train={"lr": 1e20, "clip": clip})
    with pytest.raises(Diverged, match=r"--train.lr \(1e\+20\) is too large: lower it") as caught:
        client.train(given, round=1)
    assert ("--train.clip" in str(caught.value)) == (not clip)
    assert all(torch.isfinite(tensor).all() for tensor in server.adapters.read().tensors.values())


@pytest.mark.parametrize(("refusal", "error"), [(SpoiledStep, SpoiledStep), (UnboundedStep, Diverged)])
def test_only_values_make_a_client_speak_of_divergence(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, refusal: type[SpoiledStep], error: type[Exception]
) -> None:
    """A wrong type or shape has nothing to do with the learning rate."""

    def refuse(*args: object, **more: object) -> None:
        raise refusal("no")

    client, _, given = make_client(tiny_models["gpt2"], "shared", steps=1)
    monkeypatch.setattr(Client, "step", refuse)
    with pytest.raises(error):
        client.train(given, 1)


def test_bf16_on_the_wire_halves_the_bytes_and_stays_close(model_path: Path) -> None:
    raw, raw_server, given = make_client(model_path, "shared", steps=5)
    narrow, narrow_server, _ = make_client(model_path, "shared", steps=5, codec="bf16")
    exact, rounded = raw.train(given, 1), narrow.train(given, 1)
    assert narrow_server.traffic.activation.up * 2 == raw_server.traffic.activation.up
    assert narrow_server.traffic.gradient.down * 2 == raw_server.traffic.gradient.down
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.loss != exact.loss


@pytest.mark.parametrize("schedule", ["shared", "accumulate", "copies"])
def test_micro_batches_are_the_whole_batch(model_path: Path, schedule: str) -> None:
    """Three parts of a batch under way at once give the batch's gradients on all three parts of the model."""
    whole, whole_server, given = make_client(model_path, schedule, steps=4)
    split, split_server, _ = make_client(model_path, schedule, steps=4, micro_batches=3)
    one, three = whole.train(given, 1), split.train(given, 1)
    assert three.loss == pytest.approx(one.loss, rel=1e-6)
    for name, tensor in one.adapters.tensors.items():
        assert torch.allclose(tensor, three.adapters.tensors[name], atol=2e-6), name
    for server in (whole_server, split_server):
        assert server.end_round([0]).steps == (1 if schedule == "accumulate" else 4)
    ones, threes = (
        s.adapters.copies()[0].adapters if schedule == "copies" else s.adapters.read()
        for s in (whole_server, split_server)
    )
    for name, tensor in ones.tensors.items():
        assert torch.allclose(tensor, threes.tensors[name], atol=2e-6), name


@pytest.mark.parametrize("schedule", ["shared", "accumulate", "copies", "frozen", "forward-only"])
def test_accumulated_batches_are_one_large_batch(tiny_models: dict[str, Path], schedule: str) -> None:
    """Two batches of three are a batch of six, at client and trunk, with and without clipping and micro-batches."""
    model_path = tiny_models["llama"]
    plain = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}  # Adam's first steps make a rounding a whole step
    for more in (plain, {**plain, "clip": 0.1}):
        whole, whole_server, given = make_client(model_path, schedule, steps=3, train={"batch_size": 6, **more})
        split, split_server, _ = make_client(
            model_path, schedule, steps=3, micro_batches=2, train={"accumulation": 2, **more}
        )
        one, two = whole.train(given, 1), split.train(given, 1)
        assert (two.examples, two.tokens) == (one.examples, one.tokens)
        assert two.loss == pytest.approx(one.loss, rel=1e-6)
        pairs = [(one.adapters.tensors, two.adapters.tensors)]
        for server in (whole_server, split_server):
            expected = {"accumulate": 1, "shared": 3, "copies": 3}.get(schedule, 0)
            assert server.end_round([0]).steps == expected
        read = [
            s.adapters.copies()[0].adapters if schedule == "copies" else s.adapters.read()
            for s in (whole_server, split_server)
        ]
        for ones, twos in [*pairs, (read[0].tensors, read[1].tensors)]:
            for name, tensor in ones.items():
                assert torch.allclose(tensor, twos[name], atol=2e-6), name


def test_accumulation_holds_no_more_at_the_trunk_than_a_batch(model_path: Path) -> None:
    """However many batches a step has: what is pending, and the answers that are kept for who asks again."""
    client, server, given = make_client(model_path, "shared", steps=2, micro_batches=2, train={"accumulation": 5})
    seen, send = [], client.link.trunk.send

    def watched(packet):
        answer = send(packet)
        kept = server.steps._clients[0]
        seen.append((len(kept.pending), len(kept.answers)))
        return answer

    client.link.trunk.send = watched
    client.train(given, 1)
    assert len(seen) == 2 * 5 * 2 * 2
    assert max(pending for pending, _ in seen) <= 2 and max(answers for _, answers in seen) <= 2


@pytest.mark.parametrize("schedule", ["shared", "copies", "accumulate", "frozen", "forward-only"])
def test_clipping_is_by_the_norm_over_all_that_learns(model_path: Path, schedule: str) -> None:
    """One step, with plain SGD, which shows the size of a gradient: that of `clip_grad_norm_` on the unsplit model."""
    plain = {"optimizer": "sgd", "lr": 1.0, "clip": 0.1}
    client, server, given = make_client(model_path, schedule, steps=1, micro_batches=3, train=plain)
    start = {**given, **server.adapters.read().tensors}
    learning = {
        "frozen": set(given),
        "forward-only": set(lora.parameters(client.top)),
    }.get(schedule, set(start))
    update = client.train(given, 1)
    server.end_round([0])
    after = server.adapters.copies()[0].adapters if schedule == "copies" else server.adapters.read()
    moved = {n: start[n] - t for n, t in {**update.adapters.tensors, **after.tensors}.items()}
    base = load_unsplit(model_path)
    settings_of = LoraSettings(rank=(2,), dropout=0.0)
    whole = get_peft_model(base, make_config(settings_of, family_of(base.config))).eval()
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    for name, tensor in start.items():
        names[name].data = tensor.clone()
    ids = batch(client.shard.train, 0, 3, derive_seed(0, "client", 0)).ids
    whole(input_ids=ids, labels=ids).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([names[name] for name in learning], 0.1)
    assert norm > 0.2
    for name in start:
        expected = names[name].grad if name in learning else torch.zeros_like(start[name])
        assert torch.allclose(moved[name], expected, atol=1e-6, rtol=1e-3), name
    assert float(sum(tensor.square().sum() for tensor in moved.values()).sqrt()) == pytest.approx(0.1, rel=1e-3)


def test_clipping_costs_sixteen_bytes_a_step_and_nothing_where_it_is_off(model_path: Path) -> None:
    traffic = []
    for clip in (0.0, 0.1):
        client, server, given = make_client(model_path, "shared", steps=3, train={"accumulation": 2, "clip": clip})
        client.train(given, 1)
        traffic.append(server.traffic)
    assert traffic[0].gradient.up == traffic[0].gradient.down == 3 * 2 * 3 * 8 * 32 * 4
    for way in ("up", "down"):
        assert getattr(traffic[1].gradient, way) - getattr(traffic[0].gradient, way) == 3 * 8
    assert traffic[1].activation.up == traffic[0].activation.up


def test_a_rate_above_the_whole_is_refused(model_path: Path) -> None:
    client, _, _ = make_client(model_path, "shared")
    for step, rate in enumerate((1.5, -0.1, float("nan"))):
        with pytest.raises(SpoiledStep, match=r"not a share from 0 to 1|rate of a packet is nan"):
            client.step(client.shard.train[:3].ids, StepKey(1, 0, step), rate=rate)


def test_what_an_optimiser_remembers_is_kept_where_that_is_asked_for(model_path: Path) -> None:
    """Of a factor that rests in a round, what there was; otherwise every round begins anew."""
    client, _, given = make_client(model_path, "frozen", steps=2, train={"optimizer_state": "keep"})
    assert make_client(model_path, "frozen", steps=2)[0].train(given, 1).moments == {}
    first = client.train(given, 1)
    assert {name.partition(":")[0] for name in first.moments} == set(given)
    resting = Task(trains=frozenset("B"))
    second = client.train(first.adapters.tensors, 2, resting, None, first.moments)
    assert second.moments.keys() == first.moments.keys()
    for name, value in second.moments.items():
        assert torch.equal(value, first.moments[name]) == (".lora_A." in name), name
    later = client.train(given, 3, None, None, first.moments).adapters.tensors
    anew = replace(client, link=replace(client.link, attempt=1)).train(given, 3).adapters.tensors
    assert any(not torch.equal(later[name], anew[name]) for name in given)


def test_micro_batches_weigh_by_what_is_predicted(model_path: Path) -> None:
    ids, mask = torch.randint(1, VOCABULARY, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, 3:] = 0
    losses = []
    for micro_batches in (1, 3):
        client, _, _ = make_client(model_path, "frozen", micro_batches=micro_batches)
        losses.append(float(client.step(ids, StepKey(1, 0, 0), mask)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_stages_state_goes_with_the_update(tiny_models: dict[str, Path]) -> None:
    class Counts(GradientStage):
        def begin(self, start: RoundStart) -> None:
            self.count = start.kept.get("count", torch.tensor(0))

        def __call__(self, gradients: Gradients, step: LocalStep) -> Gradients:
            self.count = self.count + 1
            return gradients

        def end(self, parameters: Mapping[str, torch.Tensor]) -> Outcome:
            return Outcome(kept={"count": self.count})

    client, _, given = make_client(tiny_models["gpt2"], "frozen", steps=2)
    first = client.train(given, 1, stage=Counts())
    second = client.train(given, 2, stage=Counts(), kept=first.kept)
    assert (int(first.kept["count"]), int(second.kept["count"])) == (2, 4)
    assert client.train(given, 3).kept == {}
