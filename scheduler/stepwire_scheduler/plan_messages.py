"""Plans and results between plain data and the messages of the plan stream."""

from __future__ import annotations

import math

from stepwire.executor.v1 import executor_pb2

from stepwire_scheduler.errors import PlanStreamError
from stepwire_scheduler.plan import Admission, StepOutcome, StepPlan
from stepwire_scheduler.sequence import Logprobs


def serialize_plan(epoch: int, plan: StepPlan) -> bytes:
    """Encode a plan as an ExecuteRequest."""
    message = executor_pb2.ExecuteRequest(
        step_plan=executor_pb2.StepPlan(
            epoch=epoch,
            step_id=plan.step_id,
            released_slots=plan.released_slots,
            admissions=[_encode_admission(admission) for admission in plan.admissions],
            appended_slots=plan.appended_slots,
            appended_block_ids=plan.appended_block_ids,
            work_slots=plan.work_slots,
            work_num_tokens=plan.work_num_tokens,
        )
    )
    if plan.work_num_drafts:
        message.step_plan.work_num_drafts.extend(plan.work_num_drafts)
        message.step_plan.draft_token_ids.extend(plan.draft_token_ids)
    return message.SerializeToString()


def parse_result(plan: StepPlan, result: executor_pb2.StepResult) -> StepOutcome:
    """Line a result up with the sequences that its plan sampled.

    Raises PlanStreamError where the slots are not those that the plan asked for, or the tokens
    cannot come of the plan's drafts.
    """
    failures = {failure.slot: failure.reason for failure in result.failures}
    # Slots as they were when the plan was made: a sequence may have left its slot since.
    expected = plan.work_slots
    if len(plan.sampled_sequences) < len(expected):
        slot_of_work = dict(zip(map(id, plan.work_sequences), plan.work_slots, strict=True))
        expected = [slot_of_work[id(sequence)] for sequence in plan.sampled_sequences]
    sampled = list(result.sampled_slots)
    if failures and not failures.keys() <= set(plan.work_slots):
        raise _disagreement(plan, "failed slots that it was not given")
    if sampled != [slot for slot in expected if slot not in failures]:
        raise _disagreement(plan, "sampled other slots than it was asked to")
    timings = result.timings
    busy_ms = plausible_ms(timings.forward_ms + timings.sample_ms)
    if plan.work_num_drafts:
        num_sampled, num_drafts = _check_drafts(plan, result)
        counts = dict(zip(sampled, num_sampled, strict=True))
        num_drafts_of = dict(zip(sampled, num_drafts, strict=True))
        num_sampled = [counts.get(slot, 0) for slot in expected]
        return StepOutcome(
            step_id=plan.step_id,
            sampled_token_ids=list(result.sampled_token_ids),
            logprobs=_parse_logprobs(plan, num_sampled, result) if result.logprobs else [],
            failures=failures,
            num_sampled_tokens=num_sampled,
            num_draft_tokens=[num_drafts_of.get(slot, 0) for slot in expected],
            busy_ms=busy_ms,
        )
    if (
        list(result.num_sampled_tokens) != [1] * len(sampled)
        or len(result.sampled_token_ids) != len(sampled)
        or result.num_draft_tokens
    ):
        raise _disagreement(plan, "sampled another number of tokens")
    token_ids = list(result.sampled_token_ids)
    if failures:
        by_slot = dict(zip(sampled, token_ids, strict=True))
        token_ids = [by_slot.get(slot, 0) for slot in expected]
    logprobs: list[Logprobs | None] = []
    if result.logprobs:
        logprobs = _parse_logprobs(plan, [int(slot not in failures) for slot in expected], result)
        if failures:  # which have a token here, though none that counts
            entries = iter(logprobs)
            logprobs = [None if slot in failures else next(entries) for slot in expected]
    return StepOutcome(
        step_id=plan.step_id,
        sampled_token_ids=token_ids,
        logprobs=logprobs,
        failures=failures,
        busy_ms=busy_ms,
    )


def plausible_ms(value: float) -> float:
    """Return a duration that an executor measured, 0 where it cannot be one."""
    return value if 0 <= value < math.inf else 0.0


def _check_drafts(plan: StepPlan, result: executor_pb2.StepResult) -> tuple[list[int], list[int]]:
    """How many tokens each sampled slot has, and how many drafts were verified for it."""
    num_sampled, num_drafts = list(result.num_sampled_tokens), list(result.num_draft_tokens)
    num_slots = len(result.sampled_slots)
    if len(num_sampled) != num_slots or sum(num_sampled) != len(result.sampled_token_ids):
        raise _disagreement(plan, "sampled another number of tokens")
    if len(num_drafts) != num_slots:
        raise _disagreement(plan, "does not say how many drafts it verified")
    starts: dict[int, int] = {}
    num_asked: dict[int, int] = {}
    start = 0
    for slot, count in zip(plan.work_slots, plan.work_num_drafts, strict=True):
        num_asked[slot], starts[slot] = count, start
        start += count
    first = 0
    for slot, count, num_verified in zip(
        result.sampled_slots, num_sampled, num_drafts, strict=True
    ):
        if num_verified > num_asked[slot]:
            raise _disagreement(plan, "verified more drafts than it was asked to")
        if not 1 <= count <= num_verified + 1:
            raise _disagreement(plan, "accepted more drafts than there were")
        if plan.draft_token_ids:
            drafts = plan.draft_token_ids[starts[slot] : starts[slot] + count - 1]
            if list(result.sampled_token_ids[first : first + count - 1]) != drafts:
                raise _disagreement(plan, "accepted other tokens than were drafted")
        first += count
    return num_sampled, num_drafts


def _parse_logprobs(
    plan: StepPlan, num_sampled: list[int], result: executor_pb2.StepResult
) -> list[Logprobs | None]:
    """One for each token; num_sampled: tokens of each of the plan's sampled sequences."""
    entries = iter(result.logprobs)
    parsed: list[Logprobs | None] = []
    for sequence, count in zip(plan.sampled_sequences, num_sampled, strict=True):
        if sequence.request.sampling_params.num_logprobs is None:
            parsed.extend([None] * count)
            continue
        for _ in range(count):
            entry = next(entries, None)
            if entry is None:
                raise _disagreement(plan, "lacks log-probabilities")
            parsed.append(
                Logprobs(
                    token_id=entry.token_id,
                    logprob=entry.logprob,
                    rank=entry.rank,
                    top_token_ids=tuple(entry.top_token_ids),
                    top_logprobs=tuple(entry.top_logprobs),
                )
            )
    return parsed


def _encode_admission(admission: Admission) -> executor_pb2.Admission:
    params = admission.sampling_params
    return executor_pb2.Admission(
        slot=admission.slot,
        token_ids=admission.token_ids,
        num_prompt_tokens=admission.num_prompt_tokens,
        num_computed_tokens=admission.num_computed_tokens,
        block_ids=admission.block_ids,
        sampling_params=executor_pb2.SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            stream=admission.stream,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(params.logit_bias),
            min_tokens=params.min_tokens,
            suppressed_token_ids=admission.suppressed_token_ids,
            num_logprobs=params.num_logprobs,
        ),
    )


def _disagreement(plan: StepPlan, what: str) -> PlanStreamError:
    return PlanStreamError(f"step {plan.step_id} {what}", cause="disagreed")
