"""State of a trunk that forwards and backwards share."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.settings.sections import TrainSettings
from fedsplit.trunk.admission import Admission
from fedsplit.trunk.answers import Answers
from fedsplit.trunk.blocks import Blocks
from fedsplit.trunk.gradients import UnclippedGradient
from fedsplit.trunk.intake import Intake
from fedsplit.trunk.memory import Budget
from fedsplit.trunk.pending import PendingBatch
from fedsplit.trunk.registry import AdapterRegistry
from fedsplit.trunk.schedules import Schedule
from fedsplit.trunk.status import RoundCounts
from fedsplit.wire.packets import StepKey
from fedsplit.wire.steps import Steps, UnknownStep


@dataclass(frozen=True)
class TrunkState:
    """Objects that all steps of a trunk share. Each class documents its object.

    Attributes:
        seed: Seed of the run, for dropout.
        settings: Settings of local training, and of the trunk's optimisers.
        schedule: Rule by which clients share the trunk.
        blocks: Blocks with adapters.
        adapters: Trainable adapters.
        steps: Steps that wait for a gradient or for a clipping coefficient.
        budget: Budget of resident memory.
        admission: Admission control under the budget.
        intake: Decoder and checks of clients' tensors.
        answers: Encoder of the trunk's tensors, and counter of bytes.
        counts: Events of the round.
    """

    seed: int
    settings: TrainSettings
    schedule: Schedule
    blocks: Blocks
    adapters: AdapterRegistry
    steps: Steps[PendingBatch | UnclippedGradient]
    budget: Budget
    admission: Admission
    intake: Intake
    answers: Answers
    counts: RoundCounts

    def pending_batch(self, key: StepKey) -> PendingBatch:
        """Returns the batch of a step that waits for a gradient.

        Raises:
            RefusedStep: The step does not wait for a gradient.
        """
        held = self.steps.held(key)
        if isinstance(held, UnclippedGradient):  # pending under `clipping_key`, a key without a forward
            raise UnknownStep(f"no forward is pending for {key}")
        return held
