"""Parts of a causal language model: bottom, trunk and top. Chained, the parts compute exactly the unsplit model.

A part is an object of the library's model class, with only the part's blocks. So attention masks, rotary positions and
sliding windows remain the library's code.

Shapes: B sequences, T tokens, D hidden, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fedsplit.model.cutting import NoPositions, Passing, compute_first, cut_lists, enter, entering, fix_kinds, put_first
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD
from fedsplit.model.kernels import causal_loss
from fedsplit.model.library_head import LibraryHead

Kind = Literal["bottom", "trunk", "top"]

SCORE = "score"
"""Name of the classification head in all of the library's sequence classifiers."""


class Part(nn.Module):
    """Consecutive blocks of a causal language model, with the embedding before them or the head after them.

    Submodules have the same names as in the unsplit model, except that block numbers start at 0.
    `fedsplit.model.split.load_parts` loads parts from a checkpoint.

    Attributes:
        kind: "bottom", "trunk" or "top".
        family: Record of the model family.
        blocks: Numbers of the part's blocks in the unsplit model.
        config: Configuration of the model, cut down to the part.
        fused: True if the part computes with `fedsplit.model.kernels`, False for the library's code alone.
        dtype: Type of base weights and computation. Adapters are always float32.
        adapter: Names in the part of the adapter's parameters.
        virtual: Number P of virtual tokens before the text. The bottom sends hidden states of P + T positions.
            `fedsplit.adaptation.prompts` sets `virtual` and `ahead`.
        ahead: Length of the trained past: positions of keys and values before the input of every block.
        rank_budget: The part's `fedsplit.adaptation.rank_budget.RankBudget`; None if ranks are not reallocated.
    """

    adapter: frozenset[str] = frozenset()
    virtual: int = 0
    ahead: int = 0
    rank_budget: Any = None  # of a package above this one, whose types are unknown here

    def __init__(
        self,
        kind: Kind,
        family: Family,
        blocks: range,
        model: PreTrainedModel,
        fused: bool,
        dtype: torch.dtype,
    ) -> None:
        """Cuts a part out of a model.

        Args:
            kind: The part to cut out.
            family: Record of the model family.
            blocks: Numbers of the blocks to keep.
            model: A causal language model or sequence classifier on the meta device. The call takes it apart.
            fused: If true, the part computes with `fedsplit.model.kernels`.
            dtype: Type of base weights and computation.
        """
        super().__init__()
        self.kind = kind
        self.family = family
        self.blocks = blocks
        self.config = model.config
        self.fused = fused
        self.dtype = dtype

        if kind == "top" and hasattr(model, family.head):
            self._library_head = LibraryHead(model, family.decoder, family.head)
        decoder = model.get_submodule(family.decoder)
        depth = self.config.num_hidden_layers
        part_blocks = nn.ModuleList(getattr(decoder, family.blocks)[blocks.start : blocks.stop])
        setattr(decoder, family.blocks, part_blocks)
        # The library's decoder loops over as many blocks as the configuration says, and picks a mask by block type.
        if getattr(self.config, "is_heterogeneous", False):
            put_first(self.config, blocks, depth)
        else:
            fix_kinds(self.config, blocks, depth)
            cut_lists(self.config, blocks, depth)
            self.config.num_hidden_layers = len(blocks)
        cut_lists(decoder, blocks, depth)
        if getattr(self.config, "num_kv_shared_layers", 0):
            self.config.num_kv_shared_layers = 0  # counted from the last block; the blocks know by themselves

        # Modules that belong to another part let their input pass unchanged.
        if kind != "bottom":
            setattr(decoder, family.embedding, Passing(dtype))
            for name in family.positions:
                setattr(decoder, name, NoPositions())
            for name in family.before:
                # A norm that serves at both ends stays in the top, for the end. What the norm makes of the top's
                # input does not count, since `enter` replaces the input of the first block.
                if kind == "trunk" or name not in family.after:
                    setattr(decoder, name, Passing(dtype))
            if part_blocks:
                part_blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
        if kind != "top":
            for name in family.after:
                if kind == "bottom" and name in family.before:
                    compute_first(getattr(decoder, name), decoder)
                else:
                    setattr(decoder, name, Passing(dtype))
        elif hasattr(model, SCORE):
            self.score = model.score
        else:
            self.lm_head = getattr(model, family.head)

        outermost = family.decoder.partition(".")[0]
        setattr(self, outermost, getattr(model, outermost))
        self.base_model_prefix = outermost  # PEFT reads this attribute of every model

    @property
    def decoder(self) -> Any:  # a class of the library, with attributes by the names in the family's record
        """The library's decoder, with the part's blocks."""
        return self.get_submodule(self.family.decoder)

    @property
    def routers(self) -> list[nn.Module]:
        """Routers of the blocks with experts, in the order of the blocks."""
        if self.family.router is None:
            return []
        outer, _, inner = self.family.router.partition(".")
        routers = []
        for block in getattr(self.decoder, self.family.blocks):
            router = getattr(getattr(block, outer), inner, None)  # a dense block of a sparse model has none
            if router is not None:
                routers.append(router)
        return routers

    @property
    def experts(self) -> int:
        """Number of experts in each block with experts; 0 for a family without experts."""
        return self.config.num_experts if self.family.router else 0

    def unsplit_name(self, name: str) -> str:
        """Returns the name of the part's submodule or parameter in the unsplit model.

        For the trunk of a model with a cut at block 2, "model.layers.0.mlp" is "model.layers.2.mlp".
        """
        prefix = f"{self.family.decoder}.{self.family.blocks}."
        outermost, dot, rest = name.partition(".")
        if outermost == HEAD:
            return f"{self.family.head}{dot}{rest}"
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(number) + self.blocks.start}{dot}{rest}"

    def _computing(self, device: torch.device) -> torch.autocast:
        """Returns a context in which float32 adapters are multiplied with 16-bit hidden states in 16 bits."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _decode(self, mask: Tensor | None, **inputs: Any) -> Tensor:
        """Runs the library's decoder. `inputs` are keyword arguments, first the tokens or hidden states."""
        first_input: Tensor = next(iter(inputs.values()))
        options = {"use_cache": False, **inputs}
        with self._computing(first_input.device):
            if self.kind == "bottom":
                return self.decoder(attention_mask=mask, **options).last_hidden_state
            if not self.blocks:  # a top without blocks: what follows the last block
                hidden = first_input
                for name in self.family.after:
                    hidden = getattr(self.decoder, name)(hidden)
                return hidden
            with entering(first_input):
                options["inputs_embeds"] = torch.zeros_like(first_input)  # read for its shape and type alone
                return self.decoder(attention_mask=mask, **options).last_hidden_state

    def past(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Returns the trained keys and values (rows, H, `ahead`, W) of each block. Empty without prefix tuning."""
        return []

    def extend(
        self,
        start: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        """Continues sequences with cached keys and values; see `fedsplit.model.caches`.

        Args:
            start: New tokens (B, T) for a bottom; new hidden states (B, T, D) for a trunk or top.
            mask: (B, earlier and new positions), 0 on padding; None without padding.
            positions: Positions of the new tokens in the sequences, (B, T) or (1, T); None for the library's count.
            cache: The library's cache for the part's blocks. The call adds the new keys and values.

        Returns:
            Hidden states (B, T, D). A top returns the input of the head.
        """
        name = "input_ids" if start.ndim == 2 else "inputs_embeds"
        options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self._decode(mask, **{name: start}, **options)


class Bottom(Part):
    """The embedding and the first blocks, at the client."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes hidden states (B, T, D) from tokens (B, T). `mask` (B, T) is 0 on padding."""
        return self._decode(mask, input_ids=ids)


class Trunk(Part):
    """The middle blocks, at the server."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes hidden states (B, T, D) from hidden states (B, T, D). `mask` (B, T) is 0 on padding."""
        return self._decode(mask, inputs_embeds=hidden)


class Top(Part):
    """The last blocks, the final norm and the head, at the client."""

    def logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes logits (B, T, V) from hidden states (B, T, D). `mask` (B, T) is 0 on padding."""
        return self.predict(self.read(hidden, mask))

    def predict(self, hidden: Tensor) -> Tensor:
        """Applies the head to the output of the last block (B, T, D). Returns logits (B, T, V)."""
        with self._computing(hidden.device):
            return self._library_head(hidden, self.lm_head)

    @property
    def cap(self) -> float | None:
        """Bound of the soft cap on logits; None for a model without a cap."""
        return self.family.cap

    @property
    def classifies(self) -> bool:
        """True if the head predicts the class of a sequence, False if the head predicts the next token."""
        return hasattr(self, SCORE)

    def scores(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes class logits (B, C) from the hidden state of each sequence's last token that is not padding."""
        return self.classify(self.read(hidden, mask), mask)

    def classify(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes class logits (B, C) from the output of the last block (B, T, D)."""
        with self._computing(states.device):
            logits = self.score(states)
        last: Tensor | int = states.shape[1] - 1
        if mask is not None:
            last = mask.long().sum(1) - 1  # padding is on the right
        return logits[torch.arange(len(states), device=states.device), last]

    def read(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the output of the last block (B, T, D) from hidden states (B, T, D)."""
        return self._decode(mask, inputs_embeds=hidden)

    def aligned(self, states: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns logits in float32 and the predicted labels, position by position.

        Args:
            states: Output of the last block (B, T, D).
            labels: As for `forward`.
            mask: (B, T), 0 on padding.

        Returns:
            Logits (B, T - 1, V) and labels (B, T - 1); for a classifier, (B, C) and (B,).
        """
        if self.classifies:
            return self.classify(states, mask).float(), labels
        logits = self.predict(states)
        return logits[:, :-1].float(), labels[:, 1:]  # each position predicts the next token

    def cross_entropy(self, states: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the mean cross-entropy in nats, a scalar, from the output of the last block (B, T, D)."""
        if self.classifies:
            return functional.cross_entropy(self.classify(states, mask).float(), labels)
        head = self.lm_head
        fused = self.fused and self.family.plain_head
        if fused and hasattr(head, "causal_loss"):  # a trained head, fully or by LoRA
            return head.causal_loss(states, labels, self.cap)
        is_plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        if fused and is_plain:
            return causal_loss(states, head.weight, labels, self.cap)
        # Every other head, at the cost of all logits in memory.
        return ForCausalLMLoss(self.predict(states), labels, head.out_features)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
        term: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Computes the loss, a scalar, from hidden states (B, T, D) and labels (B, T).

        Args:
            hidden: The trunk's output.
            labels: Tokens (B, T), not shifted, -100 for tokens without a loss; for a classifier classes (B,).
            mask: (B, T), 0 on padding. A classifier needs padding on the right.
            objective: Function from the results of `aligned` to the loss. None for the mean cross-entropy in nats,
                which the fused kernels compute without holding all logits.
            term: Function from the input of the head (B, T, D) to a term of the loss; None for no term.
        """
        states = self.read(hidden, mask)
        if objective is None:
            loss = self.cross_entropy(states, labels, mask)
        else:
            loss = objective(*self.aligned(states, labels, mask))
        return loss if term is None else loss + term(states)


PARTS: dict[Kind, type[Part]] = {"bottom": Bottom, "trunk": Trunk, "top": Top}


def ranges(blocks: int, bounds: tuple[int, int]) -> dict[Kind, range]:
    """Returns the block numbers of each part.

    Args:
        blocks: Number of blocks of the model.
        bounds: The cut (LO, HI). The trunk has the blocks from LO to HI - 1.

    Example:
        >>> ranges(6, (1, 5))
        {'bottom': range(0, 1), 'trunk': range(1, 5), 'top': range(5, 6)}
    """
    low, high = bounds
    return {"bottom": range(low), "trunk": range(low, high), "top": range(high, blocks)}
