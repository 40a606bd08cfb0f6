"""The project's own parts, worked by hand."""

import pytest
import torch
from my_project.data import STATIONS, load
from my_project.objective import Focal
from my_project.strategy import Cautious
from torch.nn import functional

from strategies.example import lora, one_round


def test_the_strategy_goes_a_part_of_the_way() -> None:
    clients = [lora(A=[[1, 0]], B=[[2]]), lora(A=[[1, 0]], B=[[6]])]
    _, B = one_round(Cautious(rate=0.25), lora(A=[[1, 0]], B=[[0]]), clients).factors("layer")
    assert B.tolist() == [[1.0]]  # a quarter of the way from 0 to the average, 4


def test_the_loss_without_focus_is_the_cross_entropy() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    labels = torch.tensor([[1, -100]])
    expected = functional.cross_entropy(logits[0, :1], labels[0, :1])
    assert Focal(gamma=0.0)(logits, labels) == pytest.approx(expected.item())


def test_every_station_has_texts() -> None:
    texts = load()
    assert texts.keys() == STATIONS.keys()
    assert all(texts.values()) and load() == texts
