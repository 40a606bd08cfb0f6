"""The record of a model's type: names of the embedding, blocks, norm and head inside the library's classes.

`fedsplit.model.derivation` finds the names out. `fedsplit.model.split` builds parts by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STACKED = ("gate_up_proj", "down_proj")
"""Names of the experts' matrices, each one parameter (E, out, in), in the order of the library's modules."""


@dataclass(frozen=True)
class Family:
    """Names of modules in the models of one type and configuration.

    Attributes:
        decoder: Name of the decoder inside the language model, dotted if nested; also the prefix in checkpoints.
        blocks: Name of the list of blocks inside the decoder.
        embedding: Name of the token embedding inside the decoder.
        positions: Names of the modules inside the decoder that compute learned positions. The bottom alone has them.
        before: Names of the modules inside the decoder through which hidden states pass before the first block. The
            bottom alone has them.
        after: Names of the modules through which hidden states pass after the last block, in their order. The top alone
            has them.
        targets: Names of the projections inside a block that get an adapter by default, last component only.
        further: Names of the projections beside a mixture of experts, which get an adapter only if `lora.targets` names
            them.
        uncalled: Names of the projections whose weights the library's code reads by itself, last component only. Such a
            projection gets no adapter, and is not quantised.
        norms: Names of the norms inside a block, last component only.
        narrows: Names of the MLP projections back to the hidden size, by their last components.
        transposed: True if the projections are `Conv1D`, which stores weights as (in, out).
        head: Name of the head inside the language model. A part calls it `lm_head`.
        cap: Soft cap on logits; None for no cap.
        plain_head: True if logits are the head's product under the soft cap, without a bias, and nothing else.
        biased_head: True if the head has a bias.
        outgrows: Key of the configuration for a length beyond which rotary positions change. The library computes
            longer text anew. None for fixed rotary positions.
        router: Name of the router inside a block with experts, if the library's loss balances the experts by the
            router's output; else None.
        balances: True if the library has a loss that balances the experts of the type.
        parameters: Parameters outside of projection modules that can have adapters: dotted names inside a block, by the
            names for `lora.targets`. A parameter gets an adapter only if `lora.targets` names the parameter.

    Example:
        >>> family = Family("model", "layers", "embed_tokens", parameters={"gate": "mlp.gate.weight"})
        >>> family.asked(["q_proj", "gate"])
        ['gate']
    """

    decoder: str
    blocks: str
    embedding: str
    positions: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    narrows: tuple[str, ...] = ()
    transposed: bool = False
    head: str = "lm_head"
    cap: float | None = None
    plain_head: bool = True
    biased_head: bool = False
    outgrows: str | None = None
    router: str | None = None
    balances: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)

    def asked(self, targets: Sequence[str]) -> list[str]:
        """Returns the targets that are keys of `parameters`."""
        return [name for name in targets if name in self.parameters]
