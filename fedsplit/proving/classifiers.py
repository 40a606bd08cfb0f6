"""A small classifier of sequences, uncut, for the comparisons with its parts.

The library's class for sequence classification has the decoder of a language model, and a head `score` of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fedsplit.errors import SettingError
from fedsplit.model.parts import SCORE
from fedsplit.model.unsplit import load_unsplit
from fedsplit.proving.comparisons import PADDED, Subject

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

CLASSES = 3
"""Number of classes of the small classifier. A head for more classes has more rows, and computes alike."""

_PAD = 1
"""Padding token, by which the library finds the last token of a sequence. No text of a proof has the token."""


def check_class(config: PretrainedConfig, small: PretrainedConfig) -> None:
    """Checks that transformers has a sequence classifier of a type, with the head that the top trains.

    Args:
        config: Configuration of the text decoder.
        small: Its miniature.

    Raises:
        SettingError: There is no such class.
    """
    allowed = "a type with a class for sequence classification, or another --data.format"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        kind = f"a model of type {config.model_type}, of which transformers has no sequence classifier"
        raise SettingError("model", kind, allowed)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(small)
    if not isinstance(getattr(model, SCORE, None), nn.Linear):
        kind = f"a model of type {config.model_type}, whose sequence classifier has no plain head {SCORE}"
        raise SettingError("model", kind, allowed)


class ClassifierSubject(Subject):
    """The uncut small classifier, and what it computes. Its decoder is read from the files of a language model."""

    classes = CLASSES
    _head: Tensor | None = None

    def _make_masks(self) -> dict[str, Tensor]:
        """Returns a mask (B, T) with padding on the right, where training has it."""
        return {PADDED: super()._make_masks()[PADDED]}

    def _make_labels(self) -> Tensor:
        """Returns classes (B,)."""
        return torch.arange(len(self.ids)) % CLASSES

    def batch(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens (B, T), with the padding token where the mask is 0, and the mask (B, T) of a check."""
        ids, mask = super().batch(name)
        return (ids if mask is None else ids.masked_fill(mask == 0, _PAD)), mask

    def load(self) -> PreTrainedModel:
        """Returns the uncut classifier, at each call with the same head."""
        model = load_unsplit(self.folder, classes=CLASSES, pad=_PAD).eval()
        model.config.problem_type = "single_label_classification"  # whatever else config.json asks for
        if self._head is None:
            self._head = torch.randn_like(model.score.weight) * 0.1
        model.score.weight.data.copy_(self._head)
        return model

    def peft_config(self) -> PeftConfig:
        """Returns PEFT's configuration of the adapters and the head."""
        config = super().peft_config()
        config.task_type, config.modules_to_save = "SEQ_CLS", [SCORE]
        return config

    def give_head(self, top: nn.Module) -> None:
        """Gives the part top the head of the uncut classifier."""
        assert self._head is not None
        top.get_submodule(SCORE).get_parameter("weight").data.copy_(self._head)

    def _predict_further(self) -> None:
        """Computes nothing: a classifier writes no text, and trains no loss of routers."""
