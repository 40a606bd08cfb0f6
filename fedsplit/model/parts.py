"""What a causal LM is cut into: bottom, trunk and top, each of which computes what it did in the whole.

A part is the model's own class with the other blocks cut away, so that masks, rotary positions
and windows stay the library's code.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from fedsplit.model.families import Family
from fedsplit.model.kernels import causal_loss

Kind = Literal["bottom", "trunk", "top"]


SCORE = "score"
"""The name of the head of all the library's classifiers of sequences."""


class _NoPositions(nn.Module):
    """Stands where a part has no learned positions to add: the hidden states carry them already."""

    def forward(self, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros((), device=positions.device)


class Part(nn.Module):
    """A run of consecutive blocks of a causal LM, and what belongs before or after them.

    Submodules keep the names they have in the unsplit model; only the numbers of the blocks start at 0.

    Attributes:
        kind: "bottom", "trunk" or "top".
        family: The family's record.
        blocks: The numbers of its blocks in the unsplit model.
        config: The model's configuration, cut to this part.
        fused: Whether it computes with `fedsplit.model.kernels` where it can; else with the library's code alone.
        dtype: The type of its base weights and of its computation; adapters are float32 always.
        adapter: The parameters that are its adapter's, by their names here.
        virtual: Virtual tokens before the text, P positions that the bottom puts there and that cross; see
            `fedsplit.adaptation.prompts`, as for the next.
        ahead: Positions of past keys and values that were trained, which stand before whatever the part is given.
        budget: Where ranks are dealt out, this part's `fedsplit.adaptation.rank_budget.RankBudget`; else None.
    """

    adapter: frozenset[str] = frozenset()
    virtual: int = 0
    ahead: int = 0
    budget: Any = None

    def __init__(self, kind: Kind, family: Family, blocks: range, whole: Any, fused: bool, dtype: torch.dtype) -> None:
        """Cuts a part out of a model.

        Args:
            kind: Which part.
            family: The family's record.
            blocks: The blocks to keep.
            whole: The library's causal LM, or classifier of sequences, on the meta device; taken apart by this.
            fused: Whether to compute with `fedsplit.model.kernels`.
            dtype: The type to compute in.
        """
        super().__init__()
        self.kind, self.family, self.blocks, self.config = kind, family, blocks, whole.config
        self.fused, self.dtype = fused, dtype
        decoder = whole.get_submodule(family.decoder)
        kept = getattr(decoder, family.blocks)[blocks.start : blocks.stop]
        setattr(decoder, family.blocks, nn.ModuleList(kept))
        self.config.num_hidden_layers = len(blocks)
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[blocks.start : blocks.stop]
        if kind != "bottom":
            setattr(decoder, family.embedding, nn.Identity())
            if family.positions:
                setattr(decoder, family.positions, _NoPositions())
            if family.dropout:
                setattr(decoder, family.dropout, nn.Identity())
        if kind != "top":
            setattr(decoder, family.norm, nn.Identity())
        elif hasattr(whole, "score"):
            self.score = whole.score
        else:
            self.lm_head = whole.lm_head
        outermost = family.decoder.partition(".")[0]
        setattr(self, outermost, getattr(whole, outermost))
        self.base_model_prefix = outermost  # PEFT takes a part for a model of the library's, which has this

    @property
    def decoder(self) -> Any:
        """The library's decoder, with this part's blocks."""
        return self.get_submodule(self.family.decoder)

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of its blocks with experts, in the order of the blocks."""
        inner, _, name = (self.family.router or "").partition(".")
        blocks = getattr(self.decoder, self.family.blocks) if inner else []
        return [router for block in blocks if (router := getattr(getattr(block, inner), name, None)) is not None]

    @property
    def experts(self) -> int:
        """Experts of each block that has any; 0 where the family has none."""
        return self.config.num_experts if self.family.router else 0

    def whole_name(self, name: str) -> str:
        """The name in the unsplit model of a submodule or parameter of this part."""
        prefix = f"{self.family.decoder}.{self.family.blocks}."
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) + self.blocks.start}{dot}{rest}"

    def _computing(self, device: torch.device) -> torch.autocast:
        """Products of float32 adapters with narrower hidden states are made in the narrower type."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _decode(self, mask: Tensor | None, **start: Any) -> Tensor:
        with self._computing(next(iter(start.values())).device):
            return self.decoder(attention_mask=mask, **{"use_cache": False, **start}).last_hidden_state

    def past(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, H, `ahead`, W) that were trained to stand before any text, block by block, if any."""
        return []

    def extend(self, start: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Tensor:
        """What follows on positions whose keys and values are known; see `fedsplit.model.caches`.

        Args:
            start: New tokens (B, T) of a bottom, new hidden states (B, T, D) of another part.
            mask: (B, all positions so far and the new ones), 0 on padding; None where there is none.
            positions: Of the new tokens in their sequences, (B, T) or (1, T); None: as the library counts them.
            cache: The library's, of this part's blocks; grows.

        Returns:
            Hidden states (B, T, D); of a top, those that its head reads.
        """
        name = "input_ids" if start.ndim == 2 else "inputs_embeds"
        how = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self._decode(mask, **{name: start}, **how)


class Bottom(Part):
    """The embedding and the first blocks; at the client."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T) to hidden states (B, T, D); `mask` (B, T) is 0 on padding."""
        return self._decode(mask, input_ids=ids)


class Trunk(Part):
    """The blocks in the middle; at the server."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to hidden states (B, T, D)."""
        return self._decode(mask, inputs_embeds=hidden)


class Top(Part):
    """The last blocks, the final norm and the head; at the client."""

    def logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to logits (B, T, V)."""
        return self.predict(self.read(hidden, mask))

    def predict(self, hidden: Tensor) -> Tensor:
        """What the head makes of the last block's hidden states (B, T, D): logits (B, T, V)."""
        with self._computing(hidden.device):
            logits = self.lm_head(hidden)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @property
    def cap(self) -> float | None:
        """What no logit exceeds, where the family caps them softly."""
        return getattr(self.config, self.family.cap_key) if self.family.cap_key else None

    @property
    def classifies(self) -> bool:
        """Whether its head tells the classes of sequences, and not the next token."""
        return hasattr(self, "score")

    def scores(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to logits of classes (B, C), by the last token that is no padding."""
        return self.classify(self.read(hidden, mask), mask)

    def classify(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last block's hidden states (B, T, D) to logits of classes (B, C)."""
        with self._computing(states.device):
            logits = self.score(states)
        last = states.shape[1] - 1 if mask is None else mask.long().sum(1) - 1
        return logits[torch.arange(len(states), device=states.device), last]

    def read(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) to the last block's hidden states (B, T, D), which the head reads."""
        return self._decode(mask, inputs_embeds=hidden)

    def aligned(self, states: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits in float32 and the labels that they predict, position by position.

        Args:
            states: The last block's hidden states (B, T, D).
            labels: As for `forward`.
            mask: (B, T), 0 on padding.

        Returns:
            Logits (B, T - 1, V) and labels (B, T - 1); of a part that classifies, (B, C) and (B,).
        """
        if self.classifies:
            return self.classify(states, mask).float(), labels
        return self.predict(states)[:, :-1].float(), labels[:, 1:]

    def cross_entropy(self, states: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the mean loss in nats, a scalar, as `forward` does, of the last block's hidden states (B, T, D)."""
        if self.classifies:
            return functional.cross_entropy(self.classify(states, mask).float(), labels)
        head = self.lm_head
        if self.fused and hasattr(head, "causal_loss"):  # a head that learns
            return head.causal_loss(states, labels, self.cap)
        bare = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        if self.fused and bare:
            return causal_loss(states, head.weight, labels, self.cap)
        return ForCausalLMLoss(self.predict(states), labels, head.out_features)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) and labels (B, T) to the loss, a scalar.

        Labels are the tokens themselves, -100 where no loss is wanted; they are shifted here. Of a part that classifies
        they are classes (B,), and the loss is that of the sequences; padding must be at the right.

        Args:
            hidden: The trunk's output.
            labels: The labels.
            mask: (B, T), 0 on padding.
            objective: The loss of logits and labels as `aligned` returns them; the mean cross-entropy in nats where not
                given, without all logits at once where the kernels are fused.
        """
        states = self.read(hidden, mask)
        if objective is None:
            return self.cross_entropy(states, labels, mask)
        return objective(*self.aligned(states, labels, mask))


PARTS: dict[Kind, type[Part]] = {"bottom": Bottom, "trunk": Trunk, "top": Top}


def ranges(blocks: int, bounds: tuple[int, int]) -> dict[Kind, range]:
    """Which blocks each part has.

    Args:
        blocks: Number of blocks of the model.
        bounds: The trunk is the blocks from the first number to below the second.
    """
    low, high = bounds
    return {"bottom": range(low), "trunk": range(low, high), "top": range(high, blocks)}
