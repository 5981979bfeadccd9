"""Steps launched before the ones ahead are finished give the tokens of steps taken in turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.runner import PendingStep
from support.executor_fakes import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    POISON_TOKEN,
    EngineName,
    admission,
    expected_continuation,
    make_executor,
    sampling_params,
    step,
)

BLOCKS_PER_SLOT = 8
PENALTIES = sampling_params(presence_penalty=0.5)
"""Too small to change a token: they make the step take the way of rows that are looked at."""


@dataclass
class Tenant:
    """A sequence in a slot, as a scheduler that waits for no result sees it."""

    prompt: list[int]
    num_launched: int = 0
    outcomes: list[int | None] = field(default_factory=list)
    """Tokens in the order of their steps; None for a failure."""

    def check(self) -> None:
        if POISON_TOKEN in self.prompt:
            assert self.outcomes == [None] * len(self.outcomes)
        else:
            assert self.outcomes == expected_continuation(self.prompt, len(self.outcomes))


@pytest.mark.parametrize("engine_name", ["device", "graphs"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_in_flight_change_nothing(engine_name: EngineName, data: st.DataObject) -> None:
    executor = make_executor(engine_name=engine_name)
    runner = executor.runner
    runner.open_epoch(1)
    slots: dict[int, Tenant] = {}
    everyone: list[Tenant] = []
    in_flight: deque[tuple[PendingStep, dict[int, Tenant]]] = deque()
    prompts = st.lists(st.integers(0, 20), min_size=1, max_size=6)

    def finish() -> None:
        pending, work = in_flight.popleft()
        pending.wait()
        result = pending.finish()
        tokens = dict(zip(result.sampled_slots, result.sampled_token_ids, strict=True))
        failed = {failure.slot for failure in result.failures}
        assert set(tokens) | failed == set(work)
        assert not set(tokens) & failed
        for slot, tenant in work.items():
            tenant.outcomes.append(tokens.get(slot))

    for step_id in range(1, data.draw(st.integers(2, 14), label="num_steps") + 1):
        released, admissions, work = [], [], {}
        for slot in range(MAX_NUM_SEQS):
            if slot in slots and data.draw(st.integers(0, 4), label="leave") == 0:
                released.append(slot)
                del slots[slot]
            if slot not in slots and data.draw(st.booleans(), label="join"):
                prompt = data.draw(prompts, label="prompt")
                if data.draw(st.integers(0, 5), label="poison") == 0:
                    prompt = [*prompt, POISON_TOKEN]
                slots[slot] = Tenant(prompt)
                everyone.append(slots[slot])
                blocks = list(range(slot * BLOCKS_PER_SLOT, (slot + 1) * BLOCKS_PER_SLOT))
                is_special = data.draw(st.booleans(), label="is_special")
                admissions.append(
                    admission(slot, prompt, blocks, params=PENALTIES if is_special else None)
                )
        for slot, tenant in slots.items():
            is_room = len(tenant.prompt) + tenant.num_launched < BLOCKS_PER_SLOT * BLOCK_SIZE
            if is_room and data.draw(st.integers(0, 4), label="work") > 0:
                work[slot] = len(tenant.prompt) if tenant.num_launched == 0 else 1
                tenant.num_launched += 1
        pending = runner.launch(step(1, step_id, work, admissions=admissions, released=released))
        in_flight.append((pending, {slot: slots[slot] for slot in work}))
        while len(in_flight) > data.draw(st.integers(0, 2), label="in_flight"):
            finish()
    while in_flight:
        finish()
    for tenant in everyone:
        tenant.check()
