"""Where the drafts of a step come from: its plan, or a draft model."""

from __future__ import annotations

import torch

from stepwire_executor.errors import PlanError
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.interface import DraftProposer, Drafts, DraftSample
from stepwire_executor.step_work import AppliedPlan


class DraftSource:
    """An engine's drafts."""

    def __init__(self, proposer: DraftProposer | None) -> None:
        """proposer: None where there is no draft model."""
        self._proposer = proposer

    def clear(self) -> None:
        """Forget every slot."""
        if self._proposer is not None:
            self._proposer.clear()

    def drafts(
        self, applied: AppliedPlan, slots: SlotTable, sample: DraftSample
    ) -> tuple[Drafts, bool]:
        """The drafts of a plan, and whether they are of a draft model; to be asked of every plan.

        Tokens that the plan names lie in host memory. Raises PlanError where it leaves them to a
        draft model that is not there.
        """
        work = applied.work
        if self._proposer is not None:
            self._proposer.take(applied, slots)
        if not work.is_left_to_model:
            token_ids = torch.from_numpy(work.draft_token_ids)
            return Drafts(num_tokens=work.num_drafts, token_ids=token_ids), False
        if self._proposer is None:
            raise PlanError(
                "work_num_drafts: no drafts are named, and this executor has no draft model"
            )
        return self._proposer.propose(work, slots, sample), True
