"""Lives of sequences in which a draft model must keep up with its target.

Each scenario returns the drafts of the steps in which the draft model had what it needs: where it
is the target, all that were asked for are proposed, and all of them are accepted.
"""

from __future__ import annotations

from collections.abc import Callable

from support.drafting import BLOCK_SIZE, VOCAB_SIZE, DraftedSequence, DraftingExecutor, Tally
from support.executor_fakes import sampling_params

Scenario = Callable[[DraftingExecutor], Tally]

PENALISED = sampling_params(
    temperature=0.9,
    seed=7,
    frequency_penalty=0.4,
    presence_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias={5: 1.5, 9: -2.0},
)
SEEDED = sampling_params(temperature=1.1, seed=3, stream=2, top_p=0.95, top_k=60)
LATE = sampling_params(temperature=0.7, seed=5, min_tokens=9, suppressed_token_ids=[1, 2, 40])


def prompt(length: int, seed: int = 1) -> list[int]:
    """Token ids that do not repeat soon."""
    return [(seed * 31 + 17 * place * (seed + 2)) % VOCAB_SIZE for place in range(length)]


def _drafted(executor: DraftingExecutor, sequence: DraftedSequence, *, num_steps: int = 8) -> Tally:
    """Some steps with 3 drafts each."""
    before = sequence.tally
    for _ in range(num_steps):
        executor.step(3)
    return sequence.tally - before


def different_numbers_of_drafts(executor: DraftingExecutor) -> Tally:
    """Greedy and seeded sequences side by side, each with its own number of drafts a step."""
    params = [sampling_params(), PENALISED, SEEDED, LATE]
    sequences = [
        executor.join(slot, prompt(5 + 3 * slot, seed=slot), params=each)
        for slot, each in enumerate(params)
    ]
    for _ in range(30):
        executor.step({0: 1, 1: 4, 2: 2, 3: 5})
    return sum((sequence.tally for sequence in sequences), Tally())


def prefix_hit(executor: DraftingExecutor) -> Tally:
    """Another sequence begins in the blocks of one that drafts."""
    first = executor.join(0, prompt(4 * BLOCK_SIZE + 3), params=SEEDED)
    executor.step(3)
    second = executor.join(1, first.token_ids, cached_blocks=first.block_ids[:4], params=PENALISED)
    return _drafted(executor, second) + first.tally


def prefix_hit_without_drafts(executor: DraftingExecutor) -> Tally:
    """Another sequence begins in blocks that the draft model has never seen."""
    first = executor.join(0, prompt(4 * BLOCK_SIZE + 3))
    for _ in range(2 * BLOCK_SIZE):
        executor.step()
    executor.leave(first, keep_blocks=True)
    second = executor.join(1, first.token_ids, cached_blocks=first.block_ids[:5])
    return _drafted(executor, second)


def prefix_hit_on_a_half_drafted_block(executor: DraftingExecutor) -> Tally:
    """Another sequence begins in a block of which the draft model has computed the start only."""
    first = executor.join(0, prompt(2 * BLOCK_SIZE + 1))
    executor.step(2)
    for _ in range(2 * BLOCK_SIZE):
        executor.step()
    executor.leave(first, keep_blocks=True)
    second = executor.join(1, first.token_ids, cached_blocks=first.block_ids[:4])
    return _drafted(executor, second)


def preemption(executor: DraftingExecutor) -> Tally:
    """A sequence comes back in blocks that others had, and is prefilled in chunks."""
    sequence = executor.join(0, prompt(10), params=PENALISED)
    tally = _drafted(executor, sequence)
    executor.leave(sequence)
    other = executor.join(1, prompt(50, seed=4))
    tally += _drafted(executor, other)
    executor.leave(other)
    back = executor.join(
        0, sequence.token_ids, num_prompt_tokens=sequence.num_prompt_tokens, params=PENALISED
    )
    assert not set(sequence.block_ids) & set(executor.free_blocks[-3:])
    while back.num_computed + 7 < len(back.token_ids):
        executor.step(2, chunks={0: 7})
    return tally + _drafted(executor, back)


def pause(executor: DraftingExecutor) -> Tally:
    """Three drafts a step, then none for a while, then three again."""
    sequence = executor.join(0, prompt(6), params=SEEDED)
    tally = _drafted(executor, sequence)
    for _ in range(3 * BLOCK_SIZE + 1):
        executor.step(0)
    return tally + _drafted(executor, sequence)


def reused_blocks(executor: DraftingExecutor) -> Tally:
    """A sequence gets the blocks of another one, whose tokens were others."""
    first = executor.join(0, prompt(40))
    tally = _drafted(executor, first)
    executor.leave(first)
    second = executor.join(0, prompt(40, seed=6))
    executor.step(0)
    assert set(second.block_ids) & set(first.block_ids)
    return tally + _drafted(executor, second)


def slow_catching_up(executor: DraftingExecutor) -> Tally:
    """Prompts longer than a step's budget; while one is caught up with, others draft."""
    short = executor.join(0, prompt(3), params=SEEDED)
    executor.step(3)
    long = executor.join(1, prompt(90, seed=5))
    while len(long.token_ids) == 90:
        executor.step(0, chunks={1: 20})
    while not long.last.num_drafts:
        executor.step(3)
    before = long.tally
    return _drafted(executor, short) + long.tally - before


def copied_block(executor: DraftingExecutor) -> Tally:
    """A sequence goes on in a copy of its last block; the original's place had other content."""
    first = executor.join(0, prompt(40))
    _drafted(executor, first)
    executor.leave(first)
    source = executor.join(1, prompt(2 * BLOCK_SIZE, seed=8))
    executor.step(1)
    target = executor.free_blocks.pop()
    second = executor.join(
        2, [*prompt(2 * BLOCK_SIZE, seed=8), 3], cached_blocks=[source.block_ids[0], target]
    )
    executor.step(0, copies=[(source.block_ids[1], target)])
    return _drafted(executor, second)


def new_epoch(executor: DraftingExecutor) -> Tally:
    """Everything is forgotten; then a sequence is said to have computed what it has not."""
    first = executor.join(0, prompt(40))
    tally = _drafted(executor, first)
    executor.open_epoch()
    # The pages of an epoch are undefined, so that all of a sequence is computed again.
    second = executor.join(0, prompt(40, seed=2))
    return tally + _drafted(executor, second)


ALL: tuple[Scenario, ...] = (
    different_numbers_of_drafts,
    prefix_hit,
    prefix_hit_without_drafts,
    prefix_hit_on_a_half_drafted_block,
    preemption,
    pause,
    reused_blocks,
    copied_block,
    new_epoch,
)
"""For any executor; slow_catching_up wants one with a budget of 32 tokens a step."""
