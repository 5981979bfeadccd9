"""What an engine asks of who proposes drafts and of the rule by which they are verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import AppliedPlan, Int64Array, StepWork

NO_DRAFT = -1
"""Behind the last row of each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Tokens that may follow the last known one of some sequences of a step."""

    num_tokens: Int64Array
    """[num_seqs], for each of the work list's sequences; at most what the plan asks for."""
    token_ids: Tensor
    """[num_drafts] int64 on the engine's device, concatenated in the order of the work list."""
    probabilities: Tensor | None = None
    """[num_drafts, vocab_size] float32, what each was drawn from; None: each was certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTokens:
    """What a rule drew from a draft model's logits."""

    token_ids: Tensor
    """[num_rows] int64."""
    probabilities: Tensor | None = None
    """[num_rows, vocab_size] float32, what each was drawn from; None where the rule that drew
    verifies without."""


class DraftSample(Protocol):
    """Draws drafts as the engine will sample from the model: same adjustments, same parameters."""

    def __call__(self, logits: Tensor, slots: Int64Array, drafts: Tensor) -> DrawnTokens:
        """Draw the next draft of each of some slots.

        logits: [num_rows, vocab_size] float32 of the draft model, overwritten. slots: [num_rows],
        distinct. drafts: [num_rows, num_before] int64, what was drawn for them in this step
        before, which stands behind their last known token.
        """
        ...


class DraftProposer(Protocol):
    """A draft model beside the engine's own; used from the engine's thread."""

    def clear(self) -> None:
        """Forget every slot."""
        ...

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        """Take a plan's releases, admissions, appended blocks and copies.

        Called for every plan, with drafts or without, before its work is done or counted. After
        a step with drafts the next call finds what was accepted: slots.num_computed_tokens then
        counts exactly the accepted drafts beyond what was known.
        """
        ...

    def propose(self, work: StepWork, slots: SlotTable, sample: DraftSample) -> Drafts:
        """Propose at most work.num_drafts tokens for each sequence; fewer or none is fine.

        Every known token is in slots.token_ids: no earlier step is in flight. The drafts of
        sequence i stand at positions slots.num_tokens[slot] onwards, for which its block table
        has places.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRows:
    """The logit rows of a step, as far as drafts are concerned; tensors of the logits' device.

    A sequence with K drafts has K + 1 rows in a row: one behind its last known token and one
    behind each draft.
    """

    first_rows: Tensor
    """[num_sampled] int64, the first row of each sequence that samples."""
    next_drafts: Tensor
    """[num_rows] int64, the draft that stands behind the row; NO_DRAFT at each sequence's last."""
    probabilities: Tensor | None = None
    """[num_drafts, vocab_size] float32 of the rows that have a draft, in their order; None: each
    draft was certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRows:
    """What a rule made of a step's rows; nothing of it was waited for."""

    token_ids: Tensor
    """[num_rows] int64. Of each sequence the first num_accepted + 1 are kept; the others are
    what stands behind a draft that was not accepted."""
    is_finite: Tensor
    """[num_rows] bool; a sequence fails where the last row that it keeps is not finite."""
    num_accepted: Tensor
    """[num_sampled] int64, drafts."""


class VerificationRule(Protocol):
    """How drafts are drawn and how many of them are accepted."""

    def draw(self, logits: Tensor, batch: SamplingBatch) -> DrawnTokens:
        """Draw a draft a row from a draft model's adjusted logits, [num_rows, vocab_size]."""
        ...

    def verify(self, logits: Tensor, batch: SamplingBatch, rows: DraftRows) -> VerifiedRows:
        """Sample a step's rows and accept a prefix of each sequence's drafts.

        logits: [num_rows, vocab_size] float32, adjusted, may be overwritten. A row that is not
        finite accepts nothing.
        """
        ...
