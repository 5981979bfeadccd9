"""Whatever the plans do on the way, each sequence gets the tokens it would get alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire.executor.v1.executor_pb2 import Admission
from support.executor_fakes import (
    BLOCK_SIZE,
    ENGINES,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    EngineName,
    admission,
    expected_continuation,
    make_executor,
    step,
)

BUDGET = 16


@dataclass
class Running:
    """The scheduler's view of one admitted sequence."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)

    def check(self) -> None:
        prompt = self.token_ids[: self.num_prompt_tokens]
        num_generated = len(self.token_ids) - self.num_prompt_tokens
        assert self.token_ids[self.num_prompt_tokens :] == expected_continuation(
            prompt, num_generated
        )


@pytest.mark.parametrize("engine_name", ENGINES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_order_of_joins_chunks_preemptions_and_moves_gives_the_same_tokens(
    engine_name: EngineName, data: st.DataObject
) -> None:
    executor = make_executor(max_num_batched_tokens=BUDGET, engine_name=engine_name)
    executor.runner.open_epoch(1)
    running: dict[int, Running] = {}
    preempted: list[Running] = []
    free_blocks = set(range(NUM_BLOCKS))
    tokens = st.integers(min_value=0, max_value=20)

    def take_block() -> int:
        block = data.draw(st.sampled_from(sorted(free_blocks)), label="block")
        free_blocks.discard(block)
        return block

    for step_id in range(1, data.draw(st.integers(2, 12), label="num_steps") + 1):
        released, appended = [], []
        admissions: list[Admission] = []
        for slot in list(running):
            fate = data.draw(st.sampled_from(["stay", "stay", "leave", "preempt"]), label="fate")
            if fate != "stay":
                sequence = running.pop(slot)
                free_blocks |= set(sequence.block_ids)
                released.append(slot)
                if fate == "preempt":
                    preempted.append(sequence)
        for slot in range(MAX_NUM_SEQS):
            if slot in running or not data.draw(st.booleans(), label="join"):
                continue
            if preempted:
                old = preempted.pop()
                joined = Running(old.token_ids, old.num_prompt_tokens)
            else:
                prompt = data.draw(st.lists(tokens, min_size=1, max_size=20), label="prompt")
                joined = Running(prompt, len(prompt))
            running[slot] = joined
            admissions.append(
                admission(slot, joined.token_ids, [], num_prompt_tokens=joined.num_prompt_tokens)
            )
        work: dict[int, int] = {}
        for slot, sequence in running.items():
            left = min(BUDGET - sum(work.values()), len(sequence.token_ids) - sequence.num_computed)
            num_tokens = data.draw(st.integers(0, max(0, left)), label="num_tokens")
            end = sequence.num_computed + num_tokens
            num_missing = -(-end // BLOCK_SIZE) - len(sequence.block_ids)
            if num_tokens == 0 or end >= MAX_MODEL_LEN or num_missing > len(free_blocks):
                continue
            for _ in range(num_missing):
                sequence.block_ids.append(take_block())
                appended.append((slot, sequence.block_ids[-1]))
            work[slot] = num_tokens
        result = executor.runner.execute(
            step(1, step_id, work, admissions=admissions, released=released, appended=appended)
        )
        for slot, num_tokens in work.items():
            running[slot].num_computed += num_tokens
        finished = [s for s in work if running[s].num_computed == len(running[s].token_ids)]
        assert list(result.sampled_slots) == finished
        for slot, token in zip(result.sampled_slots, result.sampled_token_ids, strict=True):
            running[slot].token_ids.append(token)
            running[slot].check()
