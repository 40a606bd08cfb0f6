"""Two runs side by side, by hand."""

from __future__ import annotations

import pytest
import torch

from fedsplit.adaptation.comparison import Distance, differing, distances, kind_of, loose, tensor_distances
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings, PromptSettings
from fedsplit.updates import Adapters, Layer


def adapters(a: list[float], b: list[float], alpha: float = 1.0) -> Adapters:
    """One layer of rank 1 with the change alpha * b a."""
    tensors = {"l.lora_A.weight": torch.tensor([a]), "l.lora_B.weight": torch.tensor([b]).T}
    return Adapters(tensors, {"l": Layer(alpha, False)})


def test_distances_by_hand() -> None:
    """[[3, 0], [4, 0]] and 2 * [[0, 0], [2, 0]] differ by [[3, 0], [0, 0]]."""
    found = distances(adapters([1, 0], [3, 4]), adapters([1, 0], [0, 2], alpha=2.0))["l"]
    assert found.first == pytest.approx(5) and found.second == pytest.approx(4)
    assert found.relative == pytest.approx(3 / 5)
    assert found.cosine == pytest.approx(16 / 20)


def test_what_is_equal_zero_or_opposite() -> None:
    one = adapters([1, 2], [3, 4])
    same = distances(one, one)["l"]
    assert same.relative == pytest.approx(0, abs=1e-12) and same.cosine == pytest.approx(1)
    assert distances(one, adapters([1, 2], [-3, -4]))["l"].cosine == pytest.approx(-1)
    nothing = distances(adapters([1, 2], [0, 0]), one)["l"]
    assert nothing.relative is None and nothing.cosine is None


def test_layers_are_summed_as_one_vector() -> None:
    both = Distance(3.0, 1.0, 5.0, 2.0) + Distance(4.0, 1.0, 12.0, -1.0)
    assert (both.first, both.apart, both.inner) == (5.0, 13.0, 1.0)
    assert both.second == pytest.approx(2**0.5) and both.relative == pytest.approx(13 / 5)


def test_layers_that_are_not_in_both_are_left_out() -> None:
    assert distances(adapters([1, 2], [3, 4]), adapters([1, 2, 3], [3, 4])) == {}


def test_tensors_by_hand() -> None:
    """[3, 4] and [3, 0] are 4 apart; what has another shape, or is on one side only, is left out."""
    first = {"w": torch.tensor([3.0, 4.0]), "v": torch.zeros(2), "alone": torch.ones(1)}
    second = {"w": torch.tensor([3.0, 0.0]), "v": torch.zeros(3)}
    found = tensor_distances(first, second)
    assert found == {"w": Distance(5.0, 3.0, 4.0, 9.0)}
    assert found["w"].relative == pytest.approx(0.8) and found["w"].cosine == pytest.approx(0.6)


def test_factors_of_a_layer_are_not_taken_as_tensors() -> None:
    """Those of a kind that does more than to add their product are: it has no layers."""
    one = adapters([1, 2], [3, 4])
    head = Adapters({**one.tensors, "lm_head.weight": torch.ones(2, 2)}, one.layers)
    assert loose(head).keys() == {"lm_head.weight"}
    assert loose(Adapters(head.tensors, {})).keys() == head.tensors.keys()


def test_what_is_left_as_factors_is_one_kind() -> None:
    kinds = [kind_of(Config(lora=LoraSettings(method=name))) for name in ("lora", "rslora", "pissa", "dora", "ia3")]
    assert kinds == ["lora", "lora", "lora", "dora", "ia3"]
    assert kind_of(Config(prompt=PromptSettings(kind="prefix"))) == "prefix"


def test_only_settings_that_differ_are_named() -> None:
    first = Config(strategy_options={"mu": 0.1})
    second = Config(rounds=7, lora=LoraSettings(rank=(1, 4)))
    assert differing(first, second) == {"rounds": (5, 7), "lora.rank": (8, [1, 4]), "strategy.mu": (0.1, None)}
    assert differing(first, first) == {}
