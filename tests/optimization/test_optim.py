"""The optimisers are those of the settings, step by step by hand; and what they remember can be taken along."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from fedsplit.errors import SettingError
from fedsplit.optimization.optim import check_optimizer, make_optimizer, moments, restore, step
from fedsplit.settings.sections import TrainSettings


def steps(settings: TrainSettings, gradients: list[float], shares: list[float] | None = None) -> float:
    """Where a parameter that begins at 1 ends."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([parameter], settings)
    for gradient, share in zip(gradients, shares or [1.0] * len(gradients), strict=True):
        parameter.grad = torch.tensor([gradient])
        step(optimizer, share)
    return float(parameter.detach())


def test_two_steps_by_hand() -> None:
    """AdamW's first step is lr * sign(gradient), after decay by lr * weight_decay; the second likewise here."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([parameter], TrainSettings(lr=0.1, weight_decay=0.5))
    expected = torch.tensor([1.0, -2.0])
    for _ in range(2):
        parameter.grad = torch.tensor([3.0, -0.5])
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0])
    assert parameter.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_moments_decay_as_the_settings_say() -> None:
    """With both decays at 0 every step is lr * g / (|g| + eps)."""
    settings = TrainSettings(lr=0.1, beta1=0.0, beta2=0.0, eps=0.5)
    assert steps(settings, [2.0, -1.0]) == pytest.approx(1 - 0.1 * 2 / 2.5 + 0.1 * 1 / 1.5, rel=1e-6)


def test_momentum_and_shares_of_the_rate_by_hand() -> None:
    settings = TrainSettings(optimizer="sgd", lr=0.1, momentum=0.5)
    assert steps(settings, [2.0, 1.0, 0.0]) == pytest.approx(1 - 0.1 * (2 + 2 + 1), rel=1e-6)
    assert steps(settings, [2.0, 1.0, 0.0], [0.0, 0.5, 1.0]) == pytest.approx(1 - 0.1 * (0 + 1 + 1), rel=1e-6)
    assert steps(TrainSettings(optimizer="sgd", lr=0.1), [2.0, 1.0]) == pytest.approx(0.7, rel=1e-6)


def test_nothing_to_train_needs_no_optimiser() -> None:
    assert make_optimizer([], TrainSettings()) is None
    assert moments(None, {}) == {}
    restore(None, {}, {"x:exp_avg": torch.ones(1)})


@pytest.mark.parametrize("settings", [TrainSettings(lr=0.1), TrainSettings(optimizer="sgd", lr=0.1, momentum=0.9)])
def test_what_no_longer_fits_begins_anew(settings: TrainSettings) -> None:
    """Moments of another shape, or of what does not train now, are left out, with their count of steps."""
    before = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("stays", "grows", "rests")}
    optimizer = make_optimizer(before.values(), settings)
    for parameter in before.values():
        parameter.grad = torch.ones_like(parameter)
    step(optimizer)
    kept = moments(optimizer, before)
    assert {name.partition(":")[0] for name in kept} == set(before)
    now = {"stays": torch.nn.Parameter(torch.ones(2, 3)), "grows": torch.nn.Parameter(torch.ones(4, 3))}
    again = make_optimizer(now.values(), settings)
    restore(again, now, kept)
    found = moments(again, now)
    assert found.keys() == {name for name in kept if name.startswith("stays:")}
    assert all(torch.equal(value, kept[name]) for name, value in found.items())


class Broken(ModuleType):
    """Stands for a bitsandbytes without a library for this machine."""

    def __init__(self) -> None:
        super().__init__("bitsandbytes.optim")

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, parameters, **_) -> None:
            super().__init__(parameters, lr=0.1)

        def step(self) -> None:
            raise RuntimeError("no kernel for this device\nand more lines")


def test_an_optimiser_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(optimizer="adamw8bit")
    check_optimizer(TrainSettings())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SettingError, match=r"^train.optimizer: adamw8bit is not possible; .*bitsandbytes is installed"):
        check_optimizer(settings)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", Broken())
    with pytest.raises(SettingError, match=r"adamw \| sgd; bitsandbytes cannot make a step here \(no kernel") as caught:
        check_optimizer(settings)
    assert "\n" not in str(caught.value)


def test_eight_bits_hold_the_moments() -> None:
    """Where bitsandbytes is installed and works; it is no dependency."""
    pytest.importorskip("bitsandbytes")
    settings = TrainSettings(optimizer="adamw8bit", lr=0.01)
    try:
        check_optimizer(settings)
    except SettingError as error:
        pytest.skip(str(error))
    plain = torch.nn.Parameter(torch.ones(64, 128))
    generator = torch.Generator().manual_seed(0)
    trained = [torch.nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    optimizers = [make_optimizer([parameter], settings) for parameter in trained]
    reference = make_optimizer([plain], TrainSettings(lr=0.01))
    for number in range(6):
        gradient = torch.randn(64, 128, generator=generator)
        for parameter, optimizer in zip([plain, *trained], [reference, *optimizers], strict=True):
            parameter.grad = gradient.clone()
            step(optimizer)
        if number == 2:  # another life goes on to the bit
            kept = moments(optimizers[1], {"x": trained[1]})
            assert any(value.dtype == torch.uint8 for value in kept.values())
            trained[1] = torch.nn.Parameter(trained[1].detach().clone())
            optimizers[1] = make_optimizer([trained[1]], settings)
            restore(optimizers[1], {"x": trained[1]}, kept)
    assert torch.equal(trained[0], trained[1])
    assert (trained[0] - plain).abs().mean() < 0.1 * (1 - plain).abs().mean()
