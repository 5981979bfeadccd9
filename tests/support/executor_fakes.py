"""A model small enough to reason about, and the plans that drive it.

The decoder stores each token in its page and reads the sequence back through the block table,
so that a wrong position, block or copy changes the tokens that come out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams, StepPlan
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import RowLogprobs, SampleOutput, SamplingBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.runner import Runner
from stepwire_executor.slots import SlotTable
from torch import Tensor

VOCAB_SIZE = 97
BLOCK_SIZE = 4
NUM_BLOCKS = 32
MAX_MODEL_LEN = 40
MAX_NUM_SEQS = 4
POISON_TOKEN = 96


def expected_token(token_ids: list[int]) -> int:
    """What the decoder makes most likely after token_ids; never POISON_TOKEN."""
    return sum((place + 1) * token for place, token in enumerate(token_ids)) % POISON_TOKEN


def expected_continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """What greedy decoding gives."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(expected_token(tokens))
    return tokens[len(prompt) :]


class PagedEchoDecoder:
    """Logits are a function of the tokens found in the sequence's pages."""

    def __init__(self) -> None:
        self.num_forwards = 0
        self.before_forward: Callable[[], None] | None = None

    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        self.num_forwards += 1
        if self.before_forward is not None:
            self.before_forward()
        pages = cache.layers[0].key
        pages.view(-1)[batch.slot_mapping] = batch.token_ids.to(pages.dtype)
        rows = set(batch.logit_rows.tolist())
        logits = torch.full((len(rows), VOCAB_SIZE), -10.0)
        row = 0
        for index, length in enumerate(batch.seq_lens.tolist()):
            last = int(batch.cu_seqlens_q[index + 1]) - 1
            assert int(batch.positions[last]) == length - 1
            if last not in rows:
                continue
            tokens = pages[batch.block_table[index].clamp(min=0).long()].view(-1)[:length]
            ids = [int(token) for token in tokens]
            logits[row, expected_token(ids)] = 10.0
            if POISON_TOKEN in ids:
                logits[row] = float("nan")
            row += 1
        return logits


@dataclass
class GreedySampler:
    """Takes the likeliest token and remembers what it was asked."""

    batches: list[SamplingBatch] = field(default_factory=list)

    def __call__(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        self.batches.append(batch)
        token_ids = torch.argmax(torch.nan_to_num(logits), dim=-1)
        return SampleOutput(
            token_ids=token_ids,
            logprobs=tuple(
                None
                if num < 0
                else RowLogprobs(
                    logprob=-0.5, rank=1, top_token_ids=(1,) * num, top_logprobs=(-0.5,) * num
                )
                for num in batch.num_logprobs
            ),
            is_finite=torch.isfinite(logits).all(dim=-1),
        )


@dataclass
class FakeExecutor:
    """A runner and its parts."""

    decoder: PagedEchoDecoder
    sampler: GreedySampler
    slots: SlotTable
    runner: Runner


def make_executor(
    *,
    max_num_seqs: int = MAX_NUM_SEQS,
    num_blocks: int = NUM_BLOCKS,
    max_num_batched_tokens: int = 64,
) -> FakeExecutor:
    decoder, sampler = PagedEchoDecoder(), GreedySampler()
    slots = SlotTable(
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
    )
    cache = KVCache(
        num_layers=1,
        num_blocks=num_blocks,
        num_kv_heads=1,
        block_size=BLOCK_SIZE,
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    # What was never written must not look like a token that was.
    cache.layers[0].key.fill_(50.0)
    runner = Runner(decoder=decoder, sample=sampler, cache=cache, slots=slots)
    return FakeExecutor(decoder=decoder, sampler=sampler, slots=slots, runner=runner)


def sampling_params(**changes: object) -> SamplingParams:
    params = SamplingParams(top_p=1.0, repetition_penalty=1.0)
    params.MergeFrom(SamplingParams(**changes))  # type: ignore[arg-type]  # any field of it
    return params


def admission(
    slot: int,
    token_ids: list[int],
    block_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    num_computed_tokens: int = 0,
    params: SamplingParams | None = None,
) -> Admission:
    return Admission(
        slot=slot,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=block_ids,
        sampling_params=params or sampling_params(),
    )


def step(
    epoch: int,
    step_id: int,
    work: dict[int, int] | None = None,
    *,
    admissions: list[Admission] | None = None,
    released: list[int] | None = None,
    appended: list[tuple[int, int]] | None = None,
    copies: list[tuple[int, int]] | None = None,
) -> StepPlan:
    work = work or {}
    return StepPlan(
        epoch=epoch,
        step_id=step_id,
        released_slots=released or [],
        admissions=admissions or [],
        appended_slots=[slot for slot, _ in appended or []],
        appended_block_ids=[block for _, block in appended or []],
        copy_source_block_ids=[source for source, _ in copies or []],
        copy_target_block_ids=[target for _, target in copies or []],
        work_slots=list(work),
        work_num_tokens=list(work.values()),
    )
