"""Requests on a whole executor of a soft fake model, with drafts or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from stepwire.executor.v1.executor_pb2 import SamplingParams
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.sample.reference import sample
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.interface import Drafts, DraftSample, DrawnTokens
from stepwire_executor.speculation.rules import RuleName, make_rule
from stepwire_executor.step_work import AppliedPlan, Int64Array, StepWork
from support.executor_fakes import (
    BLOCK_SIZE,
    POISON_TOKEN,
    VOCAB_SIZE,
    EngineName,
    FakeExecutor,
    PagedEchoDecoder,
    admission,
    expected_token,
    make_executor,
    sampling_params,
    step,
)
from torch import Tensor

BLOCKS_PER_SLOT = 8
PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11])
NUM_TOKENS = 20
"""Of each request; the step that ends the last one may give more."""

PARAMS = {
    "greedy with penalties": sampling_params(frequency_penalty=0.7, repetition_penalty=1.3),
    "seeded": sampling_params(temperature=0.8, seed=11),
    "seeded with everything": sampling_params(
        temperature=1.2,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        seed=2**63 + 5,
        stream=3,
        presence_penalty=0.4,
        frequency_penalty=0.6,
        repetition_penalty=1.2,
        logit_bias={7: 2.0, 8: -3.0},
        min_tokens=9,
        suppressed_token_ids=[0, 7, 20],
    ),
}

_LOGITS = 1.5 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
_LOGITS[:, 1] = 4.0  # A token that penalties have to work against.
_LOGITS[:, POISON_TOKEN] = -torch.inf

DraftsOf = Callable[[int, list[int]], list[int]]
"""Drafts for (slot, its tokens so far)."""


def logits_after(token_ids: list[int]) -> Tensor:
    """Return what the soft model says after token_ids: [VOCAB_SIZE] float32."""
    return _LOGITS[expected_token(token_ids)].clone()


class SoftDecoder(PagedEchoDecoder):
    """Puts some probability on every token."""

    def hidden_states(self, batch: StepBatch, cache: KVCache) -> Tensor:
        return _LOGITS[super().hidden_states(batch, cache).argmax(dim=1)]


class SoftProposer:
    """A draft model that is the model itself."""

    def clear(self) -> None:
        pass

    def take(self, applied: AppliedPlan, slots: SlotTable) -> None:
        pass

    def propose(self, work: StepWork, slots: SlotTable, sample: DraftSample) -> Drafts:
        """Draw place by place, for all sequences that want a draft there."""
        most = int(work.num_drafts.max())
        token_ids = torch.zeros(work.slots.size, most, dtype=torch.int64)
        probabilities = torch.zeros(work.slots.size, most, VOCAB_SIZE)
        is_drawn_from = False
        for place in range(most):
            rows = np.flatnonzero(work.num_drafts > place)
            drawn = self._draw(rows, token_ids[rows, :place], work, slots, sample)
            token_ids[rows, place] = drawn.token_ids
            if drawn.probabilities is not None:
                probabilities[rows, place] = drawn.probabilities
                is_drawn_from = True
        is_draft = torch.arange(most) < torch.from_numpy(work.num_drafts).unsqueeze(1)
        return Drafts(
            num_tokens=work.num_drafts,
            token_ids=token_ids[is_draft],
            probabilities=probabilities[is_draft] if is_drawn_from else None,
        )

    def _draw(
        self,
        rows: Int64Array,
        before: Tensor,
        work: StepWork,
        slots: SlotTable,
        sample: DraftSample,
    ) -> DrawnTokens:
        chosen = work.slots[rows]
        logits = [
            logits_after(slots.token_ids[slot, : slots.num_tokens[slot]].tolist() + drafts)
            for slot, drafts in zip(chosen, before.tolist(), strict=True)
        ]
        return sample(torch.stack(logits), chosen, before)


@dataclass
class Outputs:
    """What requests gave."""

    token_ids: list[list[int]] = field(default_factory=lambda: [[] for _ in PROMPTS])
    num_drafts: int = 0
    num_accepted: int = 0


def generate(
    engine_name: EngineName,
    rule: RuleName,
    params: SamplingParams,
    *,
    drafts_of: DraftsOf | None = None,
    num_proposed: tuple[int, ...] = (),
) -> Outputs:
    """Decode all of PROMPTS together: with drafts that are named, or proposed by the model itself.

    num_proposed: drafts to ask for, slot by slot; empty: the plans name drafts, if any.
    """
    executor = make_executor(
        num_blocks=BLOCKS_PER_SLOT * len(PROMPTS),
        engine_name=engine_name,
        decoder=SoftDecoder(),
        sample=sample,
        rule=make_rule(rule, sample),
        proposer=SoftProposer() if num_proposed else None,
    )
    executor.runner.open_epoch(1)
    outputs = Outputs()
    for step_id in range(1, NUM_TOKENS + 1):
        _step(executor, step_id, outputs, params, drafts_of, num_proposed)
    outputs.token_ids = [tokens[:NUM_TOKENS] for tokens in outputs.token_ids]
    return outputs


def _step(
    executor: FakeExecutor,
    step_id: int,
    outputs: Outputs,
    params: SamplingParams,
    drafts_of: DraftsOf | None,
    num_proposed: tuple[int, ...],
) -> None:
    work, drafts, appended = {}, {}, []
    for slot, prompt in enumerate(PROMPTS):
        left = NUM_TOKENS - len(outputs.token_ids[slot])
        if left <= 0:
            continue
        known = prompt + outputs.token_ids[slot]
        work[slot] = len(prompt) if step_id == 1 else 1
        named = [] if drafts_of is None else drafts_of(slot, known)
        if num_proposed:
            named = [0] * num_proposed[slot]
        drafts[slot] = named[: left - 1]
        num_blocks = int(executor.slots.num_table_blocks[slot])
        needed = -(-(len(known) + len(drafts[slot])) // BLOCK_SIZE)
        first = slot * BLOCKS_PER_SLOT
        appended += [(slot, first + place) for place in range(num_blocks, needed)]
    if not work:
        return
    admissions = []
    if step_id == 1:
        admissions = [
            admission(slot, prompt, [], params=params) for slot, prompt in enumerate(PROMPTS)
        ]
    plan = step(1, step_id, work, admissions=admissions, appended=appended, drafts=drafts)
    if num_proposed:
        del plan.draft_token_ids[:]
    result = executor.runner.execute(plan)
    token_ids = iter(result.sampled_token_ids)
    for slot, count in zip(result.sampled_slots, result.num_sampled_tokens, strict=True):
        outputs.token_ids[slot] += islice(token_ids, count)
        outputs.num_accepted += count - 1
    outputs.num_drafts += sum(result.num_draft_tokens)
