"""The split model is the unsplit model: values and gradients, at every cut, with any padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BLOCKS, without_dropout
from peft import get_peft_model
from split_models import batch_of, logits_of

from fedsplit.adaptation import lora
from fedsplit.adaptation.injection import make_config
from fedsplit.client.link import Link
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.sections import LoraSettings, TrainSettings
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.server import TrunkServer
from fedsplit.wire.codecs import make_codec
from fedsplit.wire.packets import Packet, StepKey

CUTS = [cut for cut in itertools.product(range(BLOCKS + 1), repeat=2) if cut[0] < cut[1]]
KINDS = ("bottom", "trunk", "top")
PADDINGS = ("none", "left", "right")


def _settings(dropout: float) -> LoraSettings:
    return LoraSettings(rank=(3,), alpha=5.0, dropout=dropout)


def _parts(
    path: Path,
    cut: tuple[int, int],
    dropout: float,
    dtype: torch.dtype = torch.float32,
    kernels: str = "library",
    size: float = 0.3,
):
    """The parts with adapters, none of them zero."""
    parts = load_parts(path, cut, KINDS, dtype, kernels)
    for part in parts:
        lora.add(part, _settings(dropout), seed=0)
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return parts


def _pair(path: Path, cut: tuple[int, int], dropout: float, dtype: torch.dtype = torch.float32, **how):
    """The parts, and the whole model under PEFT with the same adapters."""
    parts = _parts(path, cut, dropout, dtype, **how)
    whole = get_peft_model(load_unsplit(path, dtype), make_config(_settings(dropout), parts[0].family))
    given = lora.read(*parts).tensors
    names = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in whole.named_parameters()}
    trained = {n: p for n, p in names.items() if p.requires_grad}
    assert trained.keys() == given.keys()
    for name, parameter in trained.items():
        parameter.data = given[name].clone()
    return parts, whole, trained


def _gradients(parts) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for part in parts for name, parameter in lora.parameters(part).items()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    return found


Values = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _compare(pair, padding: str, dtype: torch.dtype = torch.float32) -> Values:
    """Logits, loss and the gradient of every adapter parameter: the parts', and the whole model's."""
    ids, mask, labels = batch_of(padding)
    parts, whole, trained = pair
    for module in (*parts, whole.eval()):
        module.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        reference = whole(input_ids=ids, attention_mask=mask, labels=labels)
    reference.loss.backward()
    bottom, trunk, top = parts
    loss = top(trunk(bottom(ids, mask), mask), labels, mask)
    loss.backward()
    gradients = _gradients(parts)
    values = {name: (gradients[name], parameter.grad) for name, parameter in trained.items()}
    return values | {"loss": (loss, reference.loss), "logits": (logits_of(parts, ids, mask), reference.logits)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_equals_unsplit_bit_for_bit(any_model_path: Path, dtype: torch.dtype, cut: tuple[int, int]) -> None:
    """Dropout off."""
    pair = _pair(any_model_path, cut, 0.0, dtype)
    for padding in PADDINGS:
        for name, (mine, theirs) in _compare(pair, padding, dtype).items():
            assert torch.equal(mine, theirs), f"{name}, padding {padding}"


@pytest.mark.parametrize("cut", [(0, 3), (1, 2)])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_a_split_classifier_is_the_unsplit_one_to_the_bit(
    any_model_path: Path, padding: str, cut: tuple[int, int]
) -> None:
    """Loss, logits, and the gradients of adapters and head, against the library's classifier under PEFT."""
    parts = load_parts(any_model_path, cut, KINDS, classes=3)
    for part in parts:
        lora.add(part, _settings(0.0), seed=0)
        for name, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    how = make_config(_settings(0.0), parts[0].family)
    how.task_type, how.modules_to_save = "SEQ_CLS", ["score"]
    whole = get_peft_model(load_unsplit(any_model_path, classes=3, pad=0), how).eval()
    names = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p
        for n, p in whole.named_parameters()
        if p.requires_grad
    }
    given = lora.read(*parts).tensors
    assert names.keys() == given.keys() and "score.weight" in given
    for name, parameter in names.items():
        parameter.data = given[name].clone()
    ids, mask, _ = batch_of(padding)
    classes = torch.tensor([2, 0, 1])
    if mask is not None:  # the library finds the end of a sequence by the padding token
        ids = ids.masked_fill(mask == 0, 0)
    reference = whole(input_ids=ids, attention_mask=mask, labels=classes)
    reference.loss.backward()
    bottom, trunk, top = parts
    hidden = trunk(bottom(ids, mask), mask)
    loss = top(hidden, classes, mask)
    loss.backward()
    assert torch.equal(top.scores(hidden, mask), reference.logits) and torch.equal(loss, reference.loss)
    for name, gradient in _gradients(parts).items():
        assert torch.equal(gradient, names[name].grad), name


@pytest.mark.parametrize("cut", CUTS)
def test_fused_kernels_are_the_unsplit_model_to_rounding(any_model_path: Path, cut: tuple[int, int]) -> None:
    """By norms.

    Adapters are smaller than above, where the library itself is 1e-5 away from the gradients in float64.
    """
    pair = _pair(any_model_path, cut, 0.0, kernels="fused", size=0.1)
    for padding in PADDINGS:
        for name, (mine, theirs) in _compare(pair, padding).items():
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), f"{name}, padding {padding}"


def test_fused_kernels_do_not_depend_on_the_cut(any_model_path: Path) -> None:
    """Dropout included, which is drawn in the order of the blocks. Kernels in 16 bits are those of each family."""
    dtype = torch.bfloat16 if any_model_path.name in ("llama", "mixtral") else torch.float32
    ids, mask, labels = batch_of("left")
    outcomes = []
    for cut in CUTS:
        bottom, trunk, top = parts = _parts(any_model_path, cut, 0.3, dtype, "fused")
        for part in parts:
            part.train()
        torch.manual_seed(11)
        loss = top(trunk(bottom(ids, mask), mask), labels, mask)
        loss.backward()
        outcomes.append({"loss": loss.detach(), **_gradients(parts)})
    for other in outcomes[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in outcomes[0].items())


@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_bfloat16_is_close_to_float32(any_model_path: Path, kernels: str) -> None:
    """The loss within 0.1 %, the gradients' cosine above 0.999; hidden states cross as bfloat16.

    Adapters are as small as training leaves them: with large ones the tiny model doubles any rounding many times.
    """
    ids, mask, labels = batch_of("right")
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        bottom, trunk, top = parts = _parts(any_model_path, (1, 2), 0.0, dtype, kernels, size=0.03)
        up = bottom(ids, mask)
        down = trunk(up, mask)
        assert up.dtype == down.dtype == dtype
        loss = top(down, labels, mask)
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([gradient.flatten() for gradient in _gradients(parts).values()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.999


class Direct:
    """A trunk in this process, without anybody in front."""

    def __init__(self, server: TrunkServer) -> None:
        self.server = server

    def send(self, packet: Packet) -> Callable[[], Packet]:
        answer = (self.server.backward if "gradient" in packet.tensors else self.server.forward)(packet)
        return lambda: answer

    def leave(self, client: int) -> None:
        self.server.leave(client)


@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_hidden_states_and_gradients_cross_in_the_type_of_computation(any_model_path: Path, kernels: str) -> None:
    """With a trunk behind a wire that loses nothing, the gradients are those of the chain, to the bit."""
    ids, mask, labels = batch_of("left")
    found = []
    for wired in (False, True):
        bottom, trunk, top = parts = _parts(any_model_path, (1, 2), 0.0, torch.bfloat16, kernels)
        for part in parts:
            without_dropout(part)
        server = TrunkServer(trunk, make_codec("raw"), "shared", TrainSettings(), seed=0)
        hidden = bottom(ids, mask)
        if wired:
            crossing = Link(Direct(server), make_codec("raw"), SCHEDULES["shared"]).send(hidden, StepKey(1, 0, 0), mask)
            output = crossing.output()
            top(output, labels, mask).backward()
            crossing.send_back(output.grad)
            crossing.finish()
        else:
            top(trunk(hidden, mask), labels, mask).backward()
        found.append([parameter.grad for part in (bottom, top) for parameter in lora.parameters(part).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    nbytes, sent = ids.numel() * trunk.config.hidden_size * 2, server.traffic
    assert sent.activation.down == sent.gradient.up == sent.gradient.down == nbytes


def test_an_adapter_on_the_head_gives_the_same_with_fused_kernels(tiny_models: dict[str, Path]) -> None:
    _, _, labels = batch_of("none")
    settings, losses, gradients = LoraSettings(dropout=0.0, targets=("o_proj", "lm_head")), [], []
    for kernels in ("library", "fused"):
        (top,) = load_parts(tiny_models["llama"], (1, 2), ["top"], kernels=kernels)
        lora.add(top, settings, seed=0)
        hidden = torch.randn(3, 13, 32, generator=torch.Generator().manual_seed(8))
        losses.append(top(hidden, labels))
        losses[-1].backward()
        gradients.append(lora.parameters(top)["lm_head.lora_B.weight"].grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cut", [(0, BLOCKS), (1, 2), (2, 3)])
def test_with_dropout_equal_under_the_same_random_state(any_model_path: Path, cut: tuple[int, int]) -> None:
    """The reference runs without a cache of keys: a cache changes the layout, and with it the last bit."""
    ids, _, labels = batch_of("none")
    parts, whole, trained = _pair(any_model_path, cut, dropout=0.3)
    for module in (*parts, whole):
        module.train()
    torch.manual_seed(11)
    reference = whole(input_ids=ids, labels=labels, use_cache=False).loss
    reference.backward()
    torch.manual_seed(11)
    bottom, trunk, top = parts
    loss = top(trunk(bottom(ids)), labels)
    loss.backward()
    assert torch.equal(loss, reference)
    for part in parts:
        for name, parameter in lora.parameters(part).items():
            assert torch.equal(parameter.grad, trained[name].grad), name
    torch.manual_seed(12)
    assert not torch.equal(top(trunk(bottom(ids)), labels), reference)


@pytest.mark.parametrize("cut", [(0, 0), (2, 1), (1, BLOCKS + 1)])
def test_an_impossible_cut_is_refused(model_path: Path, cut: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside a model of 3 blocks"):
        load_parts(model_path, cut, KINDS)
