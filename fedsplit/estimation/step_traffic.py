"""Bytes of a training step and of an evaluation between a client and the trunk, as the ledger of a run counts them.

Hidden states and gradients are random tensors of the right shape and type, encoded by the run's own codec. All
sequences have full length, without padding, so that no mask crosses.

Shapes: B sequences of T positions, D hidden, E experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedsplit.client.micro_batches import batches_of
from fedsplit.estimation.party_shapes import Parties
from fedsplit.model.devices import CPU, random_state
from fedsplit.model.routers import RouterSums
from fedsplit.wire.by_role import codec_of
from fedsplit.wire.casting import EXACT
from fedsplit.wire.codecs import Role
from fedsplit.wire.example_numbers import encoded_examples
from fedsplit.wire.packets import StepKey

Kind = Literal["activation", "gradient"]
Direction = Literal["up", "down"]

Traffic = Counter[str]
"""Bytes by kind and direction, such as "activation_up", in the names of summary.json."""

_ROLES = ("activation_up", "activation_down", "gradient_up", "gradient_down")
"""Settings of the wire that name the codec of one role."""

_NUMBER = EXACT.encode(torch.tensor(0.0, dtype=torch.float64)).nbytes
"""Bytes of a squared norm, and of a clipping coefficient."""


class StepTraffic:
    """Bytes of steps and evaluations of one client.

    Example:
        >>> from fedsplit.settings.config import Config
        >>> traffic = StepTraffic(Parties(Config()))
        >>> traffic.step(rows=4)["activation_up"]  # 4 x 128 positions of width 128, in float32
        262144
    """

    def __init__(self, parties: Parties, codec: str = "", micro_batches: int = 0) -> None:
        """Takes the parties of a run.

        Args:
            parties: The parties.
            codec: A codec, or a chain of codecs, in place of the run's in all roles; empty for the run's.
            micro_batches: Micro-batches of a batch; 0 for those of the run.
        """
        self._parties = parties
        self._micro_batches = micro_batches or parties.config.train.micro_batches
        self._encoded: dict[tuple[int, int, str, str, bool], int] = {}
        self._states: dict[tuple[int, int, torch.dtype], Tensor] = {}
        wire = parties.config.wire
        if codec:
            wire = replace(wire, **dict.fromkeys(_ROLES, ""), codec=codec)
        self._codecs = [span.codec(wire, parties.config.seed) for span in parties.spans]
        self._needs_examples = codec_of(wire, parties.config.seed).needs_examples

    def step(self, rows: int) -> Traffic:
        """Returns the bytes of a training step.

        Args:
            rows: Sequences of the step, over all its batches.
        """
        traffic: Traffic = Counter()
        for micros in self.parts(rows):
            for size in micros:
                traffic += self.micro_batch(size)
        return traffic + self.clipping()

    def parts(self, rows: int) -> list[list[int]]:
        """Returns the sequences of each micro-batch of a step, batch by batch.

        Args:
            rows: Sequences of the step, over all its batches.
        """
        parties = self._parties
        settings = parties.config.train
        batches = batches_of(
            torch.zeros(rows, settings.max_length, dtype=torch.long),
            None,
            None,
            batches=settings.accumulation,
            micros=self._micro_batches,
            virtual=parties.bottom.virtual,
            demands=parties.demands,
        )
        return [[len(micro.ids) for micro in batch] for batch in batches]

    def micro_batch(self, rows: int) -> Traffic:
        """Returns the bytes of the training of one micro-batch, without clipping."""
        traffic = self._forward(rows, "activation", training=True) + self._backward(rows)
        if self._parties.demands.compares:
            # The base model's forward is none of training: neither sums of routers nor numbers of examples cross
            # beside it.
            traffic += self._forward(rows, "reference", training=False)
        return traffic

    def evaluation(self, rows: int, has_reference: bool) -> Traffic:
        """Returns the bytes of the evaluation of one batch.

        Args:
            rows: Sequences of the batch.
            has_reference: True if a metric or the objective compares with the base model.
        """
        traffic = self._forward(rows, "evaluation", training=False)
        if has_reference:
            traffic += self._forward(rows, "reference", training=False)
        return traffic

    def _forward(self, rows: int, kind: str, training: bool) -> Traffic:
        """Returns the bytes of hidden states up to the trunk, through its stages, and down."""
        parties = self._parties
        positions = parties.positions if kind != "reference" else parties.config.train.max_length
        sums = self._sums_bytes() if training else 0
        numbers = self._numbers_bytes(rows) if training else 0
        # One stage hands the state of the random generator to the next (`fedsplit.wire.packets.RANDOM`).
        state = random_state(CPU).nbytes if training else 0
        last = len(parties.stages) - 1
        traffic: Traffic = Counter()
        for stage in range(len(parties.stages)):
            below = self._bytes(rows, positions, stage, "activation", "up", training) + sums
            above = self._bytes(rows, positions, stage, "activation", "down", training) + sums
            from_below = below + numbers + (state if stage > 0 else 0)
            to_above = above + (state if stage < last else 0)
            if stage == 0:
                traffic[f"{kind}_up"] += from_below
            else:
                traffic["between_stages_up"] += from_below
                traffic["between_stages_down"] += to_above
            if stage == last:
                traffic[f"{kind}_down"] += to_above
        return traffic

    def _backward(self, rows: int) -> Traffic:
        """Returns the bytes of gradients up to the trunk, through its stages, and down."""
        parties = self._parties
        traffic: Traffic = Counter()
        if not parties.schedule.expects_backward(parties.wants_gradient):
            return traffic
        sums = self._gradient_of_sums_bytes()
        last = len(parties.stages) - 1
        for stage in range(len(parties.stages)):
            gradient = self._bytes(rows, parties.positions, stage, "gradient", "up", True)
            up = gradient + sums + self._numbers_bytes(rows)
            # A stage above the first owes the stage below a gradient, if anything below learns.
            wanted = parties.wants_gradient or (stage > 0 and parties.schedule.learns)
            down = self._bytes(rows, parties.positions, stage, "gradient", "down", True) if wanted else 0
            if stage == last:
                traffic["gradient_up"] += up
            if stage == 0:
                traffic["gradient_down"] += down
            else:
                traffic["between_stages_up"] += up
                traffic["between_stages_down"] += down
        return traffic

    def clipping(self) -> Traffic:
        """Returns the bytes of the squared norm and of the coefficient of a step."""
        parties = self._parties
        traffic: Traffic = Counter()
        if not parties.config.train.clip or not parties.trunk_learns:
            return traffic
        traffic["gradient_up"] += _NUMBER
        traffic["gradient_down"] += _NUMBER
        for stage in range(1, len(parties.stages)):
            traffic["between_stages_up"] += _NUMBER
            traffic["between_stages_down"] += _NUMBER if parties.stage_learns(stage) else 0
        return traffic

    def _numbers_bytes(self, rows: int) -> int:
        """Returns the bytes of the examples' numbers, which some codecs need; 0 for the others."""
        return encoded_examples(tuple(range(rows))).nbytes if self._needs_examples else 0

    def _sums_bytes(self) -> int:
        """Returns the bytes of the routers' sums (2E + 1,); 0 without a loss that balances experts."""
        if not self._parties.coefficient:
            return 0
        return EXACT.encode(RouterSums.none(self._parties.bottom.experts).packed()).nbytes

    def _gradient_of_sums_bytes(self) -> int:
        """Returns the bytes of the gradient (E,) by the routers' sums."""
        if not self._parties.coefficient:
            return 0
        return EXACT.encode(RouterSums.none(self._parties.bottom.experts).probabilities).nbytes

    def _bytes(
        self,
        rows: int,
        positions: int,
        stage: int,
        kind: Kind,
        direction: Direction,
        training: bool,
    ) -> int:
        """Returns the bytes of an encoded tensor (B, T, D) that enters or leaves a stage.

        Args:
            rows: Sequences B.
            positions: Positions T.
            stage: Number of the stage.
            kind: Hidden states or gradients.
            direction: "up" towards the trunk. A gradient enters a stage from above.
            training: False for evaluation.
        """
        place = (rows * positions, stage, kind, direction, training)
        # Only the shape, the codec and the type decide about the bytes. Equal places are encoded once.
        if place not in self._encoded:
            # Hidden states have the type behind the part below; so have the gradients by them.
            enters_below = (kind, direction) in (("activation", "up"), ("gradient", "down"))
            dtype = self._parties.dtype_behind(stage - 1 if enters_below else stage)
            # Gradients by float16 hidden states are float32, since small values would become zero.
            is_wide = kind == "gradient" and dtype == torch.float16
            tensor = self._random(rows, positions, torch.float32 if is_wide else dtype)
            examples = tuple(range(rows)) if training and self._needs_examples else ()
            key = StepKey(round=1, client=0, step=0)
            role = Role(kind, direction, key, training, dtype, examples)
            self._encoded[place] = self._codecs[stage].encode(tensor, role).nbytes
        return self._encoded[place]

    def _random(self, rows: int, positions: int, dtype: torch.dtype) -> Tensor:
        """Returns a random tensor (B, T, D), the same for the same arguments."""
        key = (rows, positions, dtype)
        if key not in self._states:
            generator = torch.Generator().manual_seed(0)
            width = self._parties.facts.width
            values = torch.randn(rows, positions, width, generator=generator)
            self._states[key] = values.to(dtype)
        return self._states[key]
