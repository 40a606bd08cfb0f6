"""Direct preference optimisation through the split, against TRL's trainer on the unsplit model."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from test_client import unsplit
from test_further_arguments import Split
from torch import Tensor

from fedsplit.corpora.sequences import Row, Sequences, stack
from fedsplit.model.kernels import IGNORED
from fedsplit.objectives.dpo import DPO
from fedsplit.objectives.log_ratios import log_likelihoods, log_ratios
from fedsplit.objectives.objective import demands_of

GENERATOR = torch.Generator().manual_seed(4)
LOGITS, BASE = torch.randn(4, 3, 5, generator=GENERATOR), torch.randn(4, 3, 5, generator=GENERATOR)
LABELS = torch.tensor([[1, 2, 3], [IGNORED, 0, 4], [IGNORED, 2, IGNORED], [4, IGNORED, IGNORED]])


def pairs(count: int = 5) -> Sequences:
    """Pairs of different lengths, whose prompts are not predicted."""
    generator = torch.Generator().manual_seed(6)
    rows = []
    for number in range(count):
        prompt = torch.randint(1, VOCABULARY, (2 + number % 2,), generator=generator).tolist()
        for more in (1 + number % 4, 4 - number % 3):
            answer = torch.randint(1, VOCABULARY, (more,), generator=generator).tolist()
            rows.append(Row([*prompt, *answer], [IGNORED] * len(prompt) + answer, "ann", source=number))
    return stack(rows, pad=0)


def by_hand(row: int, logits: Tensor) -> float:
    total = 0.0
    for place in range(3):
        label = int(LABELS[row, place])
        if label != IGNORED:
            total += float(logits[row, place].log_softmax(-1)[label])
    return total


def test_log_ratios_are_sums_over_what_is_predicted() -> None:
    assert log_likelihoods(LOGITS, LABELS).tolist() == pytest.approx([by_hand(row, LOGITS) for row in range(4)])
    chosen, rejected = log_ratios(LOGITS, LABELS, BASE)
    expected = [by_hand(row, LOGITS) - by_hand(row, BASE) for row in range(4)]
    assert chosen.tolist() == pytest.approx(expected[0::2]) and rejected.tolist() == pytest.approx(expected[1::2])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_paper(smoothing: float) -> None:
    ratios = [by_hand(row, LOGITS) - by_hand(row, BASE) for row in range(4)]
    losses = []
    for chosen, rejected in ((ratios[0], ratios[1]), (ratios[2], ratios[3])):
        margin = 0.3 * (chosen - rejected)
        right, wrong = math.log1p(math.exp(-margin)), math.log1p(math.exp(margin))
        losses.append((1 - smoothing) * right + smoothing * wrong)
    assert float(DPO(0.3, smoothing)(LOGITS, LABELS, BASE)) == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_it_compares_pairs_with_the_base_model() -> None:
    demands = demands_of(DPO())
    assert (demands.compares, demands.mean_over, demands.rows) == (True, "pairs", 2)
    assert float(DPO()(BASE, LABELS, BASE)) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"label_smoothing": 0.5}, {"loss_type": "hinge"}, {"label_smoothing": 0.1, "loss_type": "ipo"}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        DPO(**options)


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes TRL's trainer for a model under PEFT."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    def make(model: Any, path: Path, **options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.eos_token = " "
        rows = datasets.Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "e"}] * 2)
        out = str(tmp_path_factory.mktemp("trl"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options |= {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
            config = trl.DPOConfig(output_dir=out, **options)
            trainer = trl.DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        # Of an adapter that it gets, TRL keeps a copy as the reference. The reference of a new one is the base model.
        trainer.model.delete_adapter("ref")
        return trainer

    return make


def as_trls(rows: Sequences) -> dict[str, Tensor]:
    """A batch as TRL's collator makes it: all chosen texts, then all rejected ones."""
    order = [*range(0, len(rows), 2), *range(1, len(rows), 2)]
    mask = torch.ones_like(rows.ids, dtype=torch.bool) if rows.mask is None else rows.mask
    predicted = rows.labels != IGNORED
    return {
        "input_ids": rows.ids[order],
        "attention_mask": mask[order].long(),
        "completion_mask": predicted[order].long(),
    }


@pytest.mark.parametrize(("micro_batches", "accumulation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("options", [{}, {"beta": 0.4}, {"loss_type": "ipo", "beta": 0.2}])
def test_a_step_is_that_of_trls_trainer(
    tiny_models: dict[str, Path], trainer_of: Any, options: dict[str, Any], micro_batches: int, accumulation: int
) -> None:
    """Loss, gradients of all adapters, accuracy and margin, on padded pairs of different lengths."""
    rows = pairs()
    split = Split(tiny_models["llama"], DPO(**options), rows, 1, micro_batches, accumulation, 8 // accumulation)
    whole, trained = unsplit(tiny_models["llama"], split.start)
    trainer = trainer_of(whole, tiny_models["llama"], **options)
    loss = trainer._compute_loss(trainer.model, as_trls(split.batch(0)), return_outputs=False)
    loss.backward()
    assert split.update.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in trained.items()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-2
    for name, gradient in gradients.items():
        assert (split.moved[name] - gradient).abs().max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize("cut", [(0, 1), (1, 2), (0, 3)])
def test_some_steps_are_those_of_trls_loss(tiny_models: dict[str, Path], trainer_of: Any, cut: tuple[int, int]) -> None:
    rows, steps = pairs(), 4
    split = Split(tiny_models["llama"], DPO(), rows, steps, batch_size=4, cut=cut)
    whole, trained = unsplit(tiny_models["llama"], split.start)
    trainer = trainer_of(whole, tiny_models["llama"])
    optimizer = torch.optim.SGD(trained.values(), lr=split.rate)
    losses = []
    for step in range(steps):
        loss = trainer._compute_loss(trainer.model, as_trls(split.batch(step)), return_outputs=False)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert split.update.loss == pytest.approx(sum(losses) / steps, rel=1e-6)
    for name, parameter in trained.items():
        assert (split.federated[name] - parameter).abs().max() <= 1e-6, name
        assert (split.start[name] - parameter).abs().max() > 1e-4, name


def test_held_out_pairs_have_trls_loss_accuracy_and_margin(tiny_models: dict[str, Path], trainer_of: Any) -> None:
    from fedsplit.client.heldout import held_out_batches, through_split
    from fedsplit.metrics.metric import load_metrics
    from fedsplit.metrics.preference import PREFERENCE
    from fedsplit.scores import means, pooled

    rows = pairs(7)
    split = Split(tiny_models["llama"], DPO(beta=0.3), rows, steps=1, batch_size=4)
    metrics = load_metrics(PREFERENCE, {}, options={"preference_margin.beta": 0.3})
    batches = held_out_batches(split.client.shard, 100, 4, rows=2)
    assert [len(batch) for _, batch in batches] == [4, 4, 4, 2]
    found = pooled(through_split(split.client, split.update.adapters.tensors, 1, batches, metrics))

    whole, _ = unsplit(tiny_models["llama"], split.federated)
    trainer = trainer_of(whole, tiny_models["llama"], beta=0.3)
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, as_trls(rows), return_outputs=False)
    reported = trainer._metrics["eval"]
    assert found.tokens == 7
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    measured = means(found.metrics)
    assert measured["preference_accuracy"] == pytest.approx(reported["rewards/accuracies"][0])
    assert measured["preference_margin"] == pytest.approx(reported["rewards/margins"][0], rel=1e-4)
    assert 0 < measured["preference_accuracy"] < 1
