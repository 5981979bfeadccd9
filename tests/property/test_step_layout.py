"""The layout of any step equals one that is written out token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams
from stepwire_executor.engine.layout import lay_out
from stepwire_executor.errors import PlanError
from stepwire_executor.sampling.host_state import HostSampling
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import StepWork, has_duplicates

NUM_SLOTS = 6
BLOCK_SIZE = 4
MAX_LEN = 32


@st.composite
def works(draw: st.DrawFn, *, is_plain: bool) -> StepWork:
    """Work of some slots; is_plain: one token of each, no drafts, as in most steps."""
    slots = draw(st.permutations(range(NUM_SLOTS)))[: draw(st.integers(1, NUM_SLOTS))]
    starts, ends, is_sampled, num_drafts = [], [], [], []
    for _ in slots:
        start = draw(st.integers(0, MAX_LEN - 12))
        starts.append(start)
        ends.append(start + (1 if is_plain else draw(st.integers(1, 8))))
        is_sampled.append(draw(st.booleans()))
        has_drafts = is_sampled[-1] and not is_plain
        num_drafts.append(draw(st.integers(0, 3)) if has_drafts else 0)
    return StepWork(
        slots=np.array(slots, np.int64),
        starts=np.array(starts, np.int64),
        known_ends=np.array(ends, np.int64),
        is_sampled=np.array(is_sampled, np.bool_),
        tenancies=np.zeros(len(slots), np.int64),
        num_drafts=np.array(num_drafts, np.int64),
        num_planned_drafts=np.array(num_drafts, np.int64),
        draft_token_ids=np.zeros(sum(num_drafts), np.int64),
    )


def _table(num_blocks: int = NUM_SLOTS * MAX_LEN // BLOCK_SIZE) -> SlotTable:
    table = SlotTable(
        max_num_seqs=NUM_SLOTS,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=256,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vocab_size=100,
    )
    blocks = np.random.default_rng(0).permutation(num_blocks)
    table.block_table[:] = blocks.reshape(NUM_SLOTS, -1)
    return table


@given(work=st.one_of(works(is_plain=True), works(is_plain=False)))
def test_every_step_is_laid_out_token_by_token(work: StepWork) -> None:
    table = _table()
    slots, positions, places, starts = [], [], [], [0]
    rows: list[tuple[int, int, int, int]] = []  # slot, position, drafts before, query row
    first_rows: list[int] = []
    for i, slot in enumerate(work.slots.tolist()):
        for position in range(int(work.starts[i]), int(work.known_ends[i] + work.num_drafts[i])):
            block = int(table.block_table[slot, position // BLOCK_SIZE])
            slots.append(slot)
            positions.append(position)
            places.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(len(slots))
        if work.is_sampled[i]:
            first_rows.append(len(rows))
            num_rows = int(work.num_drafts[i]) + 1
            rows += [
                (slot, int(work.known_ends[i]) + k, k, len(slots) - num_rows + k)
                for k in range(num_rows)
            ]

    layout = lay_out(table, work)

    assert layout.slots.tolist() == slots
    assert layout.positions.tolist() == positions
    assert layout.slot_mapping.tolist() == places
    assert layout.cu_seqlens_q.tolist() == starts
    assert layout.max_query_len == max(b - a for a, b in itertools.pairwise(starts))
    found = (layout.rows.slots, layout.rows.positions, layout.rows.num_drafts_before)
    assert [each.tolist() for each in found] == [[row[k] for row in rows] for k in range(3)]
    assert layout.logit_rows.tolist() == [row[3] for row in rows]
    assert layout.draft_rows.tolist() == [row[3] for row in rows if row[2]]
    assert layout.rows.first_rows.tolist() == first_rows
    assert layout.rows.num_rows.tolist() == (1 + work.num_drafts[work.is_sampled]).tolist()
    draft_counts = work.num_drafts[work.is_sampled]
    before = (np.cumsum(draft_counts) - draft_counts).tolist()
    assert layout.rows.draft_starts.tolist() == [
        before[i] for i, count in enumerate(draft_counts.tolist()) for _ in range(count + 1)
    ]


@given(data=st.data(), work=works(is_plain=False))
def test_rows_are_kept_up_to_what_was_accepted(data: st.DataObject, work: StepWork) -> None:
    draft_counts = work.num_drafts[work.is_sampled].tolist()
    accepted = [data.draw(st.integers(0, count)) for count in draft_counts]

    kept = work.rows.kept(np.array(accepted, np.int64))

    assert kept.tolist() == [
        k <= taken
        for count, taken in zip(draft_counts, accepted, strict=True)
        for k in range(count + 1)
    ]


@given(work=works(is_plain=True), data=st.data())
def test_two_tokens_in_one_place_are_refused(work: StepWork, data: st.DataObject) -> None:
    table = _table()
    if work.slots.size < 2:
        return
    i, j = data.draw(st.permutations(range(work.slots.size)))[:2]
    work.starts[j] = work.starts[i]  # the same offset within the same block
    work.known_ends[j] = work.known_ends[i]
    table.block_table[work.slots[j]] = table.block_table[work.slots[i]]
    with pytest.raises(PlanError, match="same place"):
        lay_out(table, work)


@given(values=st.lists(st.integers(-5, 5), max_size=8))
def test_duplicates_are_found(values: list[int]) -> None:
    assert has_duplicates(np.array(values, np.int64)) == (len(set(values)) < len(values))


@given(data=st.data())
def test_parameters_are_those_of_each_slots_latest_admission(data: st.DataObject) -> None:
    sampling = HostSampling(max_num_seqs=NUM_SLOTS, vocab_size=100)
    expected = dict.fromkeys(range(NUM_SLOTS), (0.0, 0, 0))
    for seed in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            slot = data.draw(st.integers(0, NUM_SLOTS - 1))
            num_logprobs = data.draw(st.one_of(st.none(), st.integers(0, 3)))
            params = SamplingParams(
                temperature=0.5, top_p=1.0, repetition_penalty=1.0, seed=seed + 1
            )
            if num_logprobs is not None:
                params.num_logprobs = num_logprobs
            admission = Admission(slot=slot, num_prompt_tokens=1, sampling_params=params)
            sampling.admit(admission, np.zeros(1, np.int64))
            expected[slot] = (0.5, seed + 1, num_logprobs is not None)
            continue
        slots = np.array(
            data.draw(st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=8)), np.int64
        )
        batch = sampling.gather(
            slots, np.arange(slots.size), np.zeros_like(slots), lambda row: np.zeros(0, np.int64)
        )
        wanted = [expected[slot] for slot in slots.tolist()]
        assert batch.parameters.temperature.tolist() == [each[0] for each in wanted]
        assert batch.parameters.seeds.tolist() == [each[1] for each in wanted]
        assert batch.rows_with_logprobs.tolist() == [
            row for row, each in enumerate(wanted) if each[2]
        ]
        assert batch.parameters.positions.tolist() == list(range(slots.size))
