"""Plans and results between plain data and the messages of the plan stream."""

from __future__ import annotations

from stepwire.executor.v1 import executor_pb2

from stepwire_scheduler.errors import PlanStreamError
from stepwire_scheduler.plan import Admission, StepOutcome, StepPlan
from stepwire_scheduler.sequence import Logprobs


def serialize_plan(epoch: int, plan: StepPlan) -> bytes:
    """Encode a plan as an ExecuteRequest."""
    return executor_pb2.ExecuteRequest(
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
    ).SerializeToString()


def parse_result(plan: StepPlan, result: executor_pb2.StepResult) -> StepOutcome:
    """Line a result up with the sequences that its plan sampled.

    Raises PlanStreamError where the slots are not those that the plan asked for.
    """
    failures = {failure.slot: failure.reason for failure in result.failures}
    # Slots as they were when the plan was made: a sequence may have left its slot since.
    slot_of_work = dict(zip(map(id, plan.work_sequences), plan.work_slots, strict=True))
    expected = [slot_of_work[id(sequence)] for sequence in plan.sampled_sequences]
    sampled = list(result.sampled_slots)
    if not failures.keys() <= set(plan.work_slots):
        raise _disagreement(plan, "failed slots that it was not given")
    if sampled != [slot for slot in expected if slot not in failures]:
        raise _disagreement(plan, "sampled other slots than it was asked to")
    if any(count != 1 for count in result.num_sampled_tokens) or len(
        result.sampled_token_ids
    ) != len(sampled):
        raise _disagreement(plan, "sampled another number of tokens")
    token_ids = list(result.sampled_token_ids)
    if failures:
        by_slot = dict(zip(sampled, token_ids, strict=True))
        token_ids = [by_slot.get(slot, 0) for slot in expected]
    return StepOutcome(
        step_id=plan.step_id,
        sampled_token_ids=token_ids,
        logprobs=_parse_logprobs(plan, expected, failures, result) if result.logprobs else [],
        failures=failures,
    )


def _parse_logprobs(
    plan: StepPlan,
    slots: list[int],
    failures: dict[int, str],
    result: executor_pb2.StepResult,
) -> list[Logprobs | None]:
    entries = iter(result.logprobs)
    parsed: list[Logprobs | None] = []
    for slot, sequence in zip(slots, plan.sampled_sequences, strict=True):
        if slot in failures or sequence.request.sampling_params.num_logprobs is None:
            parsed.append(None)
            continue
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
