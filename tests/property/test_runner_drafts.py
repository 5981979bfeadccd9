"""Drafts, right or wrong, change how many tokens a step gives and never which."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire.executor.v1.executor_pb2 import StepResult
from stepwire_executor.runner import PendingStep
from support.executor_fakes import (
    BLOCK_SIZE,
    ENGINES,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    POISON_TOKEN,
    VOCAB_SIZE,
    EngineName,
    FakeExecutor,
    admission,
    expected_continuation,
    make_executor,
    sampling_params,
    step,
)

BLOCKS_PER_SLOT = 8
PENALTIES = sampling_params(presence_penalty=0.5)
"""Too small to change a token: they make the step take the way of rows that are looked at."""
WITH_LOGPROBS = sampling_params(num_logprobs=1)


@dataclass
class Tenant:
    """A sequence in a slot, as a scheduler that does not always wait for results sees it."""

    slot: int
    prompt: list[int]
    has_logprobs: bool
    num_blocks: int
    num_computed: int = 0
    outcomes: list[int | None] = field(default_factory=list)
    """Tokens in their order; None for a failure."""
    num_pending: int = 0
    """Tokens that steps in flight will give, but for accepted drafts."""
    is_open: bool = False
    """Whether a step in flight has drafts."""
    has_spare: bool = False
    """Whether its blocks have a place for the token behind all drafts."""

    @property
    def num_launched(self) -> int:
        return len(self.outcomes) + self.num_pending

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_launched

    def check(self) -> None:
        if POISON_TOKEN in self.prompt:
            assert self.outcomes == [None] * len(self.outcomes)
        else:
            assert self.outcomes == expected_continuation(self.prompt, len(self.outcomes))


def _by_slot(result: StepResult) -> dict[int, list[int]]:
    token_ids = iter(result.sampled_token_ids)
    counts = zip(result.sampled_slots, result.num_sampled_tokens, strict=True)
    by_slot = {slot: list(islice(token_ids, count)) for slot, count in counts}
    assert not list(token_ids)
    return by_slot


@dataclass
class _Flight:
    pending: PendingStep
    work: dict[int, tuple[Tenant, list[int]]]
    """Of the slots that sample, with their drafts."""
    is_speculative: bool


class _Run:
    def __init__(self, executor: FakeExecutor) -> None:
        self.executor = executor
        self.in_flight: deque[_Flight] = deque()

    def finish(self) -> None:
        flight = self.in_flight.popleft()
        flight.pending.wait()
        result = flight.pending.finish()
        tokens = _by_slot(result)
        failed = {failure.slot for failure in result.failures}
        assert set(tokens) | failed == set(flight.work)
        assert not set(tokens) & failed
        drafted = {slot: len(drafts) for slot, (_, drafts) in flight.work.items()}
        verified = dict(zip(result.sampled_slots, result.num_draft_tokens, strict=False))
        assert verified == ({s: drafted[s] for s in tokens} if flight.is_speculative else {})
        described = [t for s in tokens if flight.work[s][0].has_logprobs for t in tokens[s]]
        assert [each.token_id for each in result.logprobs] == described
        for slot, (tenant, drafts) in flight.work.items():
            self._take(tenant, drafts, tokens.get(slot))

    def _take(self, tenant: Tenant, drafts: list[int], tokens: list[int] | None) -> None:
        tenant.num_pending -= 1
        num_accepted = 0
        if tokens is not None:
            num_accepted = len(tokens) - 1
            # As many drafts as are right, no fewer, and the token behind them.
            right = 0
            while right < len(drafts) and drafts[right] == tokens[right]:
                right += 1
            assert right == num_accepted
        tenant.outcomes.extend(tokens if tokens is not None else [None])
        tenant.num_computed += num_accepted
        if drafts:
            tenant.is_open = False
            num_tokens = len(tenant.prompt) + len(tenant.outcomes)  # no later step's
            tenant.num_blocks = min(tenant.num_blocks, -(-num_tokens // BLOCK_SIZE))

    def check_table(self, tenants: dict[int, Tenant]) -> None:
        slots = self.executor.slots
        for slot, tenant in tenants.items():
            if tenant.is_open:
                continue
            assert slots.num_tokens[slot] == tenant.num_tokens
            assert slots.num_computed_tokens[slot] == tenant.num_computed
            assert slots.num_table_blocks[slot] == tenant.num_blocks
            own = range(slot * BLOCKS_PER_SLOT, slot * BLOCKS_PER_SLOT + tenant.num_blocks)
            row = slots.block_table[slot].tolist()
            assert row == [*own] + [-1] * (slots.max_blocks_per_seq - len(own))


def _draw_drafts(data: st.DataObject, tenant: Tenant) -> list[int]:
    """Predicted tokens behind the launched ones, all right or one of them wrong."""
    most = min(BLOCKS_PER_SLOT * BLOCK_SIZE, MAX_MODEL_LEN) - tenant.num_tokens
    num_drafts = data.draw(st.integers(0, max(0, min(6, most))), label="num_drafts")
    known = tenant.num_launched
    drafts = expected_continuation(tenant.prompt, known + num_drafts)[known:]
    wrong = data.draw(st.integers(0, 2 * num_drafts), label="wrong")
    if wrong < num_drafts:
        drafts[wrong] = data.draw(st.integers(0, VOCAB_SIZE - 1), label="draft")
    return drafts


@pytest.mark.parametrize("engine_name", ENGINES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_drafts_change_how_many_tokens_come_and_never_which(
    engine_name: EngineName, data: st.DataObject
) -> None:
    run = _Run(make_executor(engine_name=engine_name))
    run.executor.runner.open_epoch(1)
    tenants: dict[int, Tenant] = {}
    everyone: list[Tenant] = []
    prompts = st.lists(st.integers(0, 20), min_size=1, max_size=6)
    most_in_flight = 0 if engine_name == "host" else 2
    for step_id in range(1, data.draw(st.integers(2, 14), label="num_steps") + 1):
        released, admissions, appended = [], [], []
        for slot in range(MAX_NUM_SEQS):
            if slot in tenants and data.draw(st.integers(0, 5), label="leave") == 0:
                released.append(slot)
                del tenants[slot]
            if slot not in tenants and data.draw(st.booleans(), label="join"):
                prompt = data.draw(prompts, label="prompt")
                if data.draw(st.integers(0, 5), label="poison") == 0:
                    prompt = [*prompt, POISON_TOKEN]
                num_blocks = -(-len(prompt) // BLOCK_SIZE)
                params = data.draw(
                    st.sampled_from([None, PENALTIES, WITH_LOGPROBS]), label="params"
                )
                tenants[slot] = Tenant(slot, prompt, params is WITH_LOGPROBS, num_blocks)
                everyone.append(tenants[slot])
                blocks = [slot * BLOCKS_PER_SLOT + index for index in range(num_blocks)]
                admissions.append(admission(slot, prompt, blocks, params=params))
        work: dict[int, int] = {}
        drafts: dict[int, list[int]] = {}
        sampled: dict[int, tuple[Tenant, list[int]]] = {}
        for slot, tenant in tenants.items():
            left = 1 if tenant.is_open else tenant.num_tokens - tenant.num_computed
            is_room = tenant.num_tokens <= BLOCKS_PER_SLOT * BLOCK_SIZE
            # At most one step can go on behind one with drafts before the table is known again.
            can_go_on = not tenant.is_open or tenant.has_spare
            if not (is_room and can_go_on) or data.draw(st.integers(0, 4), label="work") == 0:
                continue
            work[slot] = data.draw(st.integers(1, left), label="num_tokens")
            if work[slot] == left:
                if not tenant.is_open and data.draw(st.booleans(), label="speculate"):
                    drafts[slot] = _draw_drafts(data, tenant)
                sampled[slot] = (tenant, drafts.get(slot, []))
            end = 0
            if not tenant.is_open:
                end = tenant.num_computed + work[slot] + len(drafts.get(slot, []))
                is_room = end < BLOCKS_PER_SLOT * BLOCK_SIZE
                tenant.has_spare = is_room and data.draw(st.booleans(), label="has_spare")
                end += tenant.has_spare
            else:
                tenant.has_spare = False
            for _ in range(-(-end // BLOCK_SIZE) - tenant.num_blocks):
                appended.append((slot, slot * BLOCKS_PER_SLOT + tenant.num_blocks))
                tenant.num_blocks += 1
            tenant.num_computed += work[slot]
        pending = run.executor.runner.launch(
            step(
                1,
                step_id,
                work,
                admissions=admissions,
                released=released,
                appended=appended,
                drafts=drafts,
            )
        )
        is_speculative = any(drafts.values())
        run.in_flight.append(_Flight(pending, sampled, is_speculative))
        for tenant, drafted in sampled.values():
            tenant.num_pending += 1
            tenant.is_open |= bool(drafted)
        while len(run.in_flight) > data.draw(st.integers(0, most_in_flight), label="in_flight"):
            run.finish()
        if not run.in_flight:
            run.check_table(tenants)
    while run.in_flight:
        run.finish()
    run.check_table(tenants)
    for tenant in everyone:
        tenant.check()
