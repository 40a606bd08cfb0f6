"""The fused functions are the ordinary ones: against dense float64, under ragged labels, with dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import without_dropout
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config

from fedsplit.adaptation import lora
from fedsplit.model import kernels
from fedsplit.model.kernels import IGNORED, causal_loss, keep_mask, lora_linear
from fedsplit.model.split import load_parts
from fedsplit.settings.sections import LoraSettings

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 9, 16, 53
PROBABILITIES = (0.02, 0.1, 0.5, 0.9)


def _labels(kind: str) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    if kind == "ragged":
        labels[0, 3:] = IGNORED
        labels[1, :5] = IGNORED
        labels[2, 4] = IGNORED
    elif kind == "one":
        labels[:] = IGNORED
        labels[1, -1] = 7
    elif kind == "none":
        labels[:] = IGNORED
    return labels


def _dense(hidden: Tensor, head: Tensor, labels: Tensor, cap: float | None = None) -> Tensor:
    """As transformers computes it, in float64."""
    logits = functional.linear(hidden.double(), head.double())[:, :-1]
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _inputs(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, generator=generator) * scale
    return hidden.to(dtype).requires_grad_(), torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("cap", [None, 5.0, 30.0])
@pytest.mark.parametrize("limit", [1, 5 * VOCABULARY, 2**23])
@pytest.mark.parametrize("kind", ["all", "ragged", "one"])
def test_the_loss_and_its_gradient_are_the_dense_ones(
    kind: str, limit: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of rows a run has; under another factor than one, too; with capped logits."""
    monkeypatch.setattr(kernels, "LOGITS", limit)
    (hidden, head), labels = _inputs(), _labels(kind)
    expected = _dense(hidden, head, labels, cap)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    loss = causal_loss(hidden, head, labels, cap)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-6 if cap else 1e-7)
    with torch.no_grad():
        torch.testing.assert_close(causal_loss(hidden, head, labels, cap), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(causal_loss(hidden.detach(), head, labels, cap), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("limit", [1, 5 * VOCABULARY, 2**23])
@pytest.mark.parametrize("wanted", ["all", "head", "low and up", "not the input"])
def test_a_head_that_learns_gets_the_dense_gradients(
    wanted: str, limit: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its weight, and of an adapter on it, summed over runs of rows; whichever of them want one."""
    monkeypatch.setattr(kernels, "LOGITS", limit)
    (hidden, head), labels = _inputs(), _labels("ragged")
    generator = torch.Generator().manual_seed(4)
    low, up = (torch.randn(*shape, generator=generator) for shape in ((ROWS, TOKENS, 2), (VOCABULARY, 2)))
    takes = {"all": "hidden head low up", "head": "head", "low and up": "low up", "not the input": "head low up"}
    named = {"hidden": hidden.detach(), "head": head, "low": low, "up": up}
    leaves = [named[name].requires_grad_() for name in takes[wanted].split()]
    wide = torch.cat([named["hidden"], low], 2).double(), torch.cat([head, up], 1).double()
    expected = _dense(*wide, labels, cap)
    loss = causal_loss(named["hidden"], head, labels, cap, low, up)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(causal_loss(named["hidden"], head, labels, cap, low, up), loss, rtol=1e-6, atol=0)


def test_a_narrow_head_that_learns_sums_its_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time: sums in bfloat16 would lose most of them."""
    monkeypatch.setattr(kernels, "LOGITS", 1)
    (hidden, head), labels = _inputs(dtype=torch.bfloat16), _labels("all")
    whole = head.float().requires_grad_()
    (mine,) = torch.autograd.grad(causal_loss(hidden, whole.to(torch.bfloat16), labels), whole)
    (dense,) = torch.autograd.grad(_dense(hidden, whole, labels), whole)
    assert mine.dtype == torch.float32
    assert functional.cosine_similarity(mine.flatten(), dense.flatten(), 0) > 0.9999


def test_a_label_without_probability_is_found_with_an_adapter_too() -> None:
    (hidden, head), labels = _inputs(scale=100.0), _labels("ragged")
    low, up = torch.ones(ROWS, TOKENS, 2), torch.ones(VOCABULARY, 2, requires_grad=True)
    expected = _dense(torch.cat([hidden, low], 2), torch.cat([head, up], 1), labels)
    assert expected > 100
    torch.testing.assert_close(causal_loss(hidden, head, labels, None, low, up).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap", [None, 1000.0])
def test_a_label_of_no_probability_has_a_finite_loss(cap: float | None) -> None:
    (hidden, head), labels = _inputs(scale=100.0), _labels("ragged")
    loss = causal_loss(hidden, head, labels, cap)
    expected = _dense(hidden, head, labels, cap)
    assert expected > 100
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(one, hidden)[0] for one in (loss, expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [_labels("none"), _labels("all")[:, :1]])
def test_without_any_label_the_loss_is_the_librarys_nan(labels: Tensor) -> None:
    hidden, head = _inputs()
    hidden = hidden[:, : labels.shape[1]].detach().requires_grad_()
    loss = causal_loss(hidden, head, labels)
    assert torch.isnan(loss) and torch.isnan(_dense(hidden, head, labels))
    loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_of_a_narrow_head_is_summed_in_float32(cap: float | None) -> None:
    (hidden, head), labels = _inputs(dtype=torch.bfloat16), _labels("ragged")
    loss = causal_loss(hidden, head, labels, cap)
    expected = _dense(hidden, head, labels, cap)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    mine, dense = (torch.autograd.grad(one, hidden)[0].double().flatten() for one in (loss, expected))
    assert functional.cosine_similarity(mine, dense, 0) > 0.9999


def _saved(compute: Callable[[], Tensor], but: set[int]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what its graph keeps: one tensor a storage, of those not in `but`."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in but:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return compute(), list(kept.values())


def _bytes(kept: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def test_the_loss_keeps_one_gradient_and_no_logits() -> None:
    (hidden, head), labels = _inputs(), _labels("all")
    _, kept = _saved(lambda: causal_loss(hidden, head, labels), {head.untyped_storage().data_ptr()})
    floating = [tensor for tensor in kept if tensor.is_floating_point()]
    assert [tensor.shape for tensor in floating] == [(ROWS * (TOKENS - 1), HIDDEN)]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_as_many_are_kept_as_should_be(p: float) -> None:
    torch.manual_seed(5)
    shape = torch.Size((999, 1001))
    mask, keep = keep_mask(shape, p, torch.device("cpu"))
    assert mask.shape == shape and set(mask.unique().tolist()) == {0, 1}
    assert abs(keep - (1 - p)) <= 0.5 / 65536
    deviation = (keep * (1 - keep) / mask.numel()) ** 0.5
    assert abs(float(mask.double().mean()) - keep) < 5 * deviation
    for axis, length in enumerate(shape):  # no row and no column is favoured
        means = mask.double().mean(axis)
        assert (means - keep).abs().max() < 6 * (keep * (1 - keep) / length) ** 0.5


def test_hardly_anything_is_kept_where_hardly_anything_may_be() -> None:
    torch.manual_seed(5)
    mask, keep = keep_mask(torch.Size((1000, 1000)), 1 - 1e-9, torch.device("cpu"))
    assert keep == 1 / 65536
    assert 0 < int(mask.sum()) < 40


@pytest.mark.parametrize("p", PROBABILITIES)
def test_draws_are_decided_by_the_seed_and_independent(p: float) -> None:
    def draw(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return keep_mask(torch.Size((401, 503)), p, torch.device("cpu"))[0]

    first, second = draw(5), draw()
    assert torch.equal(draw(5), first)
    for other in (second, draw(6), first.roll(1, 1), first.roll(4, 1), first.roll(1, 0)):
        pair = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]).double())[0, 1]
        assert abs(float(pair)) < 5 / first.numel() ** 0.5


def _projection(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (2, 7, 12), "weight": (12, 20), "bias": (20,), "down": (3, 12), "up": (20, 3)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in ("x", "down", "up"):
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("learns", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_projection_with_its_adapter_is_the_sum_of_both(
    p: float, biased: bool, learns: tuple[bool, bool, bool]
) -> None:
    """Values and gradients, whichever of input, A and B want one."""
    given = _projection()
    for name, wanted in zip(("x", "down", "up"), learns, strict=True):
        given[name].requires_grad_(wanted)
    if not biased:
        given["bias"] = torch.zeros(20)
    torch.manual_seed(9)
    output = lora_linear(**given | {"bias": given["bias"] if biased else None}, scaling=1.7, dropout=p)
    torch.manual_seed(9)
    mask, keep = keep_mask(torch.Size((14, 12)), p, torch.device("cpu")) if p else (torch.ones(14, 12), 1.0)
    x, weight, bias, down, up = (tensor.double() for tensor in given.values())
    dropped = x * mask.view(2, 7, 12) / keep
    expected = x @ weight + bias + 1.7 * dropped @ down.t() @ up.t()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    wanting = [tensor for tensor in given.values() if tensor.requires_grad]
    assert output.requires_grad == bool(wanting)
    if wanting:
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
        mine = torch.autograd.grad(output, wanting, factor)
        theirs = torch.autograd.grad(expected, wanting, factor.double())
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_dropout_keeps_a_byte_an_element_and_nothing_is_drawn_without_one() -> None:
    given = _projection()
    weights = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    state = torch.get_rng_state()
    _, kept = _saved(lambda: lora_linear(**given, scaling=1.0), weights)
    assert [tensor.shape for tensor in kept] == [(3, 14)]
    assert torch.equal(torch.get_rng_state(), state)
    _, kept = _saved(lambda: lora_linear(**given, scaling=1.0, dropout=0.1), weights)
    assert sorted((tensor.dtype.itemsize, tensor.shape) for tensor in kept) == [(1, (14, 12)), (4, (3, 14))]


def test_adapters_of_a_narrow_projection_stay_wide() -> None:
    given = _projection()
    narrow = {name: given[name].detach().bfloat16() for name in ("x", "weight", "bias")}
    narrow["x"].requires_grad_()
    output = lora_linear(**given | narrow, scaling=1.7)
    assert output.dtype == torch.bfloat16
    wanting = [narrow["x"], given["down"], given["up"]]
    gradients = torch.autograd.grad(output.float().square().sum(), wanting)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.fixture(scope="module")
def shaped_like_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Much wider than a rank, as models are."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"n_embd": 192, "n_layer": 4, "n_head": 3, "vocab_size": 61, "n_positions": 64}
    AutoModelForCausalLM.from_config(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


def test_what_a_pending_forward_of_the_trunk_keeps(shaped_like_gpt2: Path) -> None:
    """At most twenty times its hidden states a block; the library's code keeps nearly twice that."""
    hidden = torch.randn(4, 64, 192).requires_grad_()
    kept = {}
    for name in ("fused", "library"):
        (trunk,) = load_parts(shaped_like_gpt2, (1, 3), ["trunk"], kernels=name)
        lora.add(trunk, LoraSettings(rank=(4,), dropout=0.1), seed=0)
        without_dropout(trunk.train())
        given = {tensor.untyped_storage().data_ptr() for tensor in (hidden, *trunk.parameters())}
        _, saved = _saved(lambda: trunk(hidden), given)  # noqa: B023
        kept[name] = _bytes(saved) / hidden.nbytes / len(trunk.blocks)
    assert kept["fused"] <= 20 < 30 < kept["library"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_library_may_add_to_the_output_in_place(dtype: torch.dtype) -> None:
    """As Falcon does with the outputs of its attention and MLP."""
    x = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    weight, down, up = torch.randn(4, 5, dtype=dtype), torch.randn(2, 4), torch.randn(5, 2)
    apart = lora_linear(x, weight, None, down, up, scaling=0.5) + 1
    (expected,) = torch.autograd.grad(apart.square().sum(), x)
    output = lora_linear(x, weight, None, down, up, scaling=0.5)
    output += 1
    assert torch.equal(output, apart)
    assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], expected)
