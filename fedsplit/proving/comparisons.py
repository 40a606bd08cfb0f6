"""A small model, uncut and cut, and the comparisons between both.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from fedsplit.adaptation import adapter_files, lora
from fedsplit.adaptation.injection import exported, make_config
from fedsplit.model.caches import Past
from fedsplit.model.derivation import build
from fedsplit.model.families import Family
from fedsplit.model.library_head import without_extras
from fedsplit.model.miniature import VOCABULARY
from fedsplit.model.parts import Kind
from fedsplit.model.routers import RouterSums, listening
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.settings.sections import LoraSettings
from fedsplit.updates import Adapters

_ROWS, _TOKENS = 2, 12
_NEW_TOKENS = 3

PADDED = "padding right"
"""Name of the check with padding as in training."""

ROUNDING = 1e-5
"""Largest difference of logits between the parts and the uncut model that PEFT makes of a file."""

_LEAK = 1e-4
"""Largest change of a token's logits by later tokens, as a share of the largest logit. Rounding may differ."""

KERNELS = 1e-4
"""Largest difference of a gradient by fedsplit's faster kernels, as a share of the tensor's largest gradient."""

SETTINGS = LoraSettings(rank=(2,), alpha=4.0, dropout=0.0)


class Difference(Exception):
    """Two values are not equal. The message says how much they differ."""


def same(found: Tensor, expected: Tensor) -> None:
    """Compares two tensors.

    Raises:
        Difference: The tensors are not equal to the bit.
    """
    if found.shape != expected.shape:
        raise Difference(f"the shape is {tuple(found.shape)}, and {tuple(expected.shape)} uncut")
    if torch.equal(found, expected):
        return
    largest = float((found - expected).abs().max())
    raise Difference(f"differs from the uncut model by up to {largest:.2g}")


class Subject:
    """The uncut small model, and what it computes.

    Attributes:
        classes: Number of classes of a classifier; 0 for a language model.
        folder: Folder with the small model.
        family: Record of the model's type.
        ids: Tokens (B, T).
        masks: Masks (B, T) by kind of padding, 0 on padding.
        labels: Tokens (B, T) to predict; for a classifier classes (B,).
        logits: Logits by name of the check.
        cached: Logits of a text that grows token by token; None if the library has no cache for the type.
        balance: Auxiliary loss of the routers; None for a model without routers to balance.
        loss: Loss of the model with adapters, with padding on the right.
        adapter: Values of the adapters by name in a file.
        gradients: Their gradients.
    """

    classes = 0

    def __init__(self, folder: Path, config: PretrainedConfig, family: Family) -> None:
        """Draws the model, writes it to a folder, and computes all expected values.

        Args:
            folder: An empty folder.
            config: Configuration of the small model.
            family: Record of the model's type.
        """
        self.folder = folder / "model"
        self.family = family
        self.config = config
        _write(config, self.folder)
        # Without the smallest ids, among which is the padding token of a classifier.
        self.ids = torch.randint(3, VOCABULARY, (_ROWS, _TOKENS))
        self.masks = self._make_masks()
        self.labels = self._make_labels()
        self.model = self.load()
        self.logits = {"logits": self._predict("logits")}
        for name in self.masks:
            self.logits[name] = self._predict(name)
        self.cached: list[Tensor] | None = None
        self.balance: Tensor | None = None
        self._predict_further()
        self._learn()

    def _make_masks(self) -> dict[str, Tensor]:
        """Returns masks (B, T) by kind of padding."""
        left, right = torch.ones_like(self.ids), torch.ones_like(self.ids)
        left[1, :4] = 0
        right[1, -4:] = 0
        return {"padding left": left, PADDED: right}

    def _make_labels(self) -> Tensor:
        """Returns the labels (B, T) of the loss."""
        labels = self.ids.masked_fill(self.masks[PADDED] == 0, -100)
        labels[0, :3] = -100  # as of a prompt
        return labels

    def batch(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens (B, T) and the mask (B, T) of a check; no mask for a check without padding."""
        return self.ids, self.masks.get(name)

    def load(self) -> PreTrainedModel:
        """Returns the uncut model."""
        return load_unsplit(self.folder).eval()

    def peft_config(self) -> PeftConfig:
        """Returns PEFT's configuration of the adapters."""
        return make_config(SETTINGS, self.family)

    def give_head(self, top: nn.Module) -> None:
        """Gives the part top a head that no file has. A language model's head is in its files."""

    def _predict_further(self) -> None:
        """Computes what not every model has."""
        self.cached = self._cached()
        self.balance = self._balance()

    def _learn(self) -> None:
        """Computes the loss, and the gradient of every adapter."""
        ids, mask = self.batch(PADDED)
        # Another object than `self.model`, since PEFT changes the model that it gets.
        whole = get_peft_model(self.load(), self.peft_config()).eval()
        trained = {_exported(name): value for name, value in whole.named_parameters() if value.requires_grad}
        self.adapter = {}
        for name, parameter in trained.items():
            # Values for all factors: with B at zero, as at the start of training, the gradient of A would be zero
            # anywhere.
            parameter.data = torch.randn_like(parameter) * 0.1
            self.adapter[name] = parameter.data.clone()
        # The loss of the routers is compared by itself, in `_check_balance`.
        options = without_extras(self.model)
        output = whole(input_ids=ids, attention_mask=mask, labels=self.labels, **options)
        self.loss = output.loss.detach()
        output.loss.backward()
        self.gradients = {name: value.grad for name, value in trained.items() if value.grad is not None}

    @torch.no_grad()
    def _predict(self, name: str) -> Tensor:
        """Returns the logits of a check."""
        ids, mask = self.batch(name)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def check_causality(self) -> None:
        """Checks that later tokens do not change the logits of earlier ones.

        Raises:
            Difference: They do. The next token, which is the target of training, would be known.
        """
        earlier = _TOKENS - _NEW_TOKENS
        ids = self.ids.clone()
        ids[:, earlier:] = VOCABULARY + 2 - ids[:, earlier:]  # inside 3 to VOCABULARY - 1, as all ids
        logits = self.model(input_ids=ids, use_cache=False).logits
        expected = self.logits["logits"]
        change = float((logits - expected)[:, :earlier].abs().max())
        # In this form, NaN counts as a difference, too.
        if not change <= _LEAK * float(expected.abs().max()):
            raise Difference(f"later tokens change logits of earlier tokens by up to {change:.2g}")

    @torch.no_grad()
    def _cached(self) -> list[Tensor] | None:
        """Returns the logits of a prompt and of the tokens after it, with a cache; None if the library has no cache."""
        mask = self.masks["padding left"]
        options = {**without_extras(self.model), "use_cache": True}
        cache = DynamicCache(config=self.config)
        outputs = []
        for start, stop in _passes():
            text = mask.cumsum(1) - 1
            try:
                output = self.model(
                    input_ids=self.ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=text.clamp(min=0)[:, start:stop],
                    past_key_values=cache,
                    **options,
                )
            except Exception:  # noqa: BLE001  # whatever the library raises, it has no cache of this kind for the type
                return None
            outputs.append(output.logits)
        return outputs

    @torch.no_grad()
    def _balance(self) -> Tensor | None:
        """Returns the auxiliary loss of the routers; None for a model without routers to balance."""
        if self.family.router is None:
            return None
        mask = self.masks["padding right"]
        output = self.model(
            input_ids=self.ids, attention_mask=mask, output_router_logits=True, use_cache=False, labels=self.ids
        )
        return output.aux_loss


def _passes() -> Iterator[tuple[int, int]]:
    """Yields the tokens of each pass of a generation: the prompt, then one token after the other."""
    prompt = _TOKENS - _NEW_TOKENS
    yield 0, prompt
    for token in range(prompt, _TOKENS):
        yield token, token + 1


def _exported(name: str) -> str:
    """Returns the name of a parameter of PEFT's model, in a file."""
    return exported(name.removeprefix("base_model.model.").replace(".modules_to_save.", "."))


def _write(config: PretrainedConfig, folder: Path) -> None:
    """Writes a random model of a configuration.

    The library draws weights so small that wrong wiring would hardly show, and norms that change nothing. So noise is
    added.
    """
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


class Chain:
    """The small model, cut in three, with its checks."""

    def __init__(self, subject: Subject, cut: tuple[int, int]) -> None:
        """Loads the three parts.

        Args:
            subject: The uncut model.
            cut: The cut (LO, HI).
        """
        self._subject = subject
        self._cut = cut
        self._adapters: dict[str, nn.Parameter] = {}
        self._parts = self._load("library")

    def _load(self, kernels: str) -> list[Any]:
        """Returns bottom, trunk and top."""
        subject = self._subject
        kinds: list[Kind] = ["bottom", "trunk", "top"]
        parts = load_parts(subject.folder, self._cut, kinds, kernels=kernels, classes=subject.classes)
        subject.give_head(parts[-1])
        return parts

    def _predict(self, name: str) -> Tensor:
        """Returns the logits of a check."""
        bottom, trunk, top = self._parts
        ids, mask = self._subject.batch(name)
        hidden = trunk(bottom(ids, mask), mask)
        return top.scores(hidden, mask) if top.classifies else top.logits(hidden, mask)

    def _learn(self, parts: Sequence[Any]) -> tuple[Tensor, dict[str, nn.Parameter]]:
        """Adds adapters to parts, and computes the loss and all gradients; returns the loss and the adapters."""
        subject = self._subject
        adapters: dict[str, nn.Parameter] = {}
        for part in parts:
            lora.add(part, SETTINGS, seed=0)
            adapters |= lora.parameters(part)
        strange = sorted(adapters.keys() ^ subject.adapter.keys())
        if strange:
            raise Difference(f"PEFT adapts other layers of the uncut model; {strange[0]} is in one of them alone")
        for name, parameter in adapters.items():
            parameter.data.copy_(subject.adapter[name])
        bottom, trunk, top = parts
        ids, mask = subject.batch(PADDED)
        loss: Tensor = top(trunk(bottom(ids, mask), mask), subject.labels, mask)
        loss.backward()
        return loss.detach(), adapters

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yields each check by name. A check raises `Difference`, or whatever the library raises."""
        for name in self._subject.logits:
            yield name, functools.partial(self._check_logits, name)
        if self._subject.cached is not None:
            yield "cache", self._check_cache
        if self._subject.balance is not None:
            yield "balance", self._check_balance
        # Last, since the check of the loss adds adapters to the parts.
        yield "loss", self._check_loss
        yield "gradients", self._check_gradients

    def single_checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yields each check that one cut suffices for, by name. They come after all of `checks`."""
        if not self._subject.classes:
            yield "causality", self._subject.check_causality
        yield "export", self._check_export
        yield "kernels", self._check_kernels

    @torch.no_grad()
    def _check_logits(self, name: str) -> None:
        """Compares logits of all positions, padding included; of a classifier, the logits of the classes."""
        same(self._predict(name), self._subject.logits[name])

    @torch.no_grad()
    def _check_cache(self) -> None:
        """Compares logits of a text that grows token by token, with padding on the left."""
        mask = self._subject.masks["padding left"]
        prompt = mask[:, : _TOKENS - _NEW_TOKENS]
        bottom, trunk, top = (Past(part, prompt) for part in self._parts)
        assert self._subject.cached is not None
        for (start, stop), expected in zip(_passes(), self._subject.cached, strict=True):
            hidden = trunk.extend(bottom.extend(self._subject.ids[:, start:stop]))
            same(self._parts[2].predict(top.extend(hidden)), expected)

    @torch.no_grad()
    def _check_balance(self) -> None:
        """Compares the auxiliary loss of the routers, summed from part to part."""
        subject = self._subject
        mask = subject.masks["padding right"]
        sums: RouterSums | None = None
        hidden = subject.ids
        for part in self._parts:
            with listening(part) as heard:
                hidden = part.read(hidden, mask) if part.kind == "top" else part(hidden, mask)
            before = sums or RouterSums.none(part.config.num_experts)
            sums = before.after(heard, part.config.num_experts_per_tok, mask)
        assert sums is not None and subject.balance is not None
        loss, expected = sums.loss(), subject.balance
        if not torch.allclose(loss, expected, rtol=1e-6):
            raise Difference(f"the auxiliary loss is {float(loss):.6g}, and {float(expected):.6g} uncut")

    def _check_loss(self) -> None:
        """Adds adapters to the parts, and compares the loss. The gradients are computed on the way."""
        loss, self._adapters = self._learn(self._parts)
        same(loss, self._subject.loss)

    def _check_gradients(self) -> None:
        """Compares the gradient of every adapter."""
        expected = self._subject.gradients
        for name, parameter in self._adapters.items():
            if name not in expected:  # an expert that no token has chosen
                if parameter.grad is not None and bool(parameter.grad.any()):
                    raise Difference(f"{name} has a gradient, and none uncut")
                continue
            if parameter.grad is None:
                raise Difference(f"{name} has no gradient")
            try:
                same(parameter.grad, expected[name])
            except Difference as error:
                raise Difference(f"{name} {error}") from None

    def _check_kernels(self) -> None:
        """Compares loss and gradients of the faster kernels, which are the default, up to rounding."""
        subject = self._subject
        loss, adapters = self._learn(self._load("fused"))
        if not torch.allclose(loss, subject.loss, rtol=KERNELS):
            same(loss, subject.loss)
        for name, expected in subject.gradients.items():
            found = adapters[name].grad
            if found is None:
                raise Difference(f"{name} has no gradient")
            largest = float((found - expected).abs().max())
            # The smallest step of the type is for tensors whose gradients are almost 0 everywhere. NaN counts as a
            # difference.
            allowed = KERNELS * float(expected.abs().max()) + torch.finfo(found.dtype).eps
            if not largest <= allowed:
                raise Difference(f"{name} differs from the uncut model by up to {largest:.2g}")

    @torch.no_grad()
    def _check_export(self) -> None:
        """Writes the adapters of the parts to a file, and compares the uncut model that PEFT makes of the file."""
        subject = self._subject
        folder = subject.folder.parent / "adapter"
        tensors = {name: parameter.detach() for name, parameter in self._adapters.items()}
        adapters = Adapters(tensors, {})
        adapter_files.save(folder, adapters, SETTINGS, subject.family, base=str(subject.folder))
        whole = PeftModel.from_pretrained(subject.load(), str(folder)).eval()
        found = self._predict("logits")
        expected = whole(input_ids=subject.ids, use_cache=False).logits
        if not torch.allclose(found, expected, rtol=0, atol=ROUNDING):  # PEFT may add in another order
            same(found, expected)
