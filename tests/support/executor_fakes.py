"""A model small enough to reason about, and the plans that drive it.

The decoder stores each token in its page and reads the sequence back through the block table,
so that a wrong position, block or copy changes the tokens that come out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from stepwire.executor.v1.executor_pb2 import Admission, SamplingParams, StepPlan
from stepwire_executor.batch import StepBatch
from stepwire_executor.engine.device import DeviceEngine
from stepwire_executor.engine.device_queue import DeviceQueue, HostQueue
from stepwire_executor.engine.graphs import RepeatedCalls
from stepwire_executor.engine.host import HostEngine
from stepwire_executor.kernels.interface import Sample, SampleOutput, SamplingBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.runner import Runner
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.interface import DraftProposer, VerificationRule
from torch import Tensor

VOCAB_SIZE = 97
BLOCK_SIZE = 4
NUM_BLOCKS = 32
MAX_MODEL_LEN = 40
MAX_NUM_SEQS = 4
POISON_TOKEN = 96
EngineName = Literal["host", "device", "graphs"]
ENGINES: tuple[EngineName, ...] = ("host", "device", "graphs")
"""The engine of a CPU; the one of a device, eager; and the same with captured decode steps."""


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
        self.num_poisoned_forwards = 0
        """How many of the next forwards give NaN."""
        self.before_forward: Callable[[], None] | None = None

    def hidden_states(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """The logits themselves: the head adds nothing."""
        self.num_forwards += 1
        if self.before_forward is not None:
            self.before_forward()
        pages = cache.layers[0].key
        is_stored = batch.slot_mapping >= 0
        pages.view(-1)[batch.slot_mapping[is_stored]] = batch.token_ids[is_stored].to(pages.dtype)
        ends = batch.cu_seqlens_q[1:]
        logits = torch.full((len(batch.logit_rows), VOCAB_SIZE), -10.0)
        for row, query in enumerate(batch.logit_rows.tolist()):
            index = int(torch.searchsorted(ends, query, right=True))
            if index == len(ends) or batch.seq_lens[index] == 0:
                continue  # padding
            # Rows further on belong to drafts behind this one.
            length = int(batch.seq_lens[index]) - (int(ends[index]) - 1 - query)
            assert int(batch.positions[query]) == length - 1
            tokens = pages[batch.block_table[index].clamp(min=0).long()].view(-1)[:length]
            ids = [int(token) for token in tokens]
            logits[row, expected_token(ids)] = 10.0
            if POISON_TOKEN in ids or self.num_poisoned_forwards > 0:
                logits[row] = float("nan")
        self.num_poisoned_forwards -= 1
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


@dataclass
class GreedySampler:
    """Takes the likeliest token and remembers what it was asked."""

    batches: list[SamplingBatch] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """As adjusted."""

    def __call__(self, logits: Tensor, batch: SamplingBatch) -> SampleOutput:
        # Tensors of a step may be views of memory that the next step writes.
        names = [each.name for each in fields(batch)]
        self.batches.append(SamplingBatch(**{n: getattr(batch, n).clone() for n in names}))
        self.logits.append(logits.clone())
        token_ids = torch.argmax(torch.nan_to_num(logits), dim=-1)
        return SampleOutput(token_ids=token_ids, is_finite=torch.isfinite(logits).any(dim=-1))


class GatedMark:
    """Reached once the gate that the queue had is open."""

    def __init__(self, queue: GatedQueue) -> None:
        self._queue = queue
        self._gate = queue.gate

    @property
    def is_reached(self) -> bool:
        return self._gate.is_set()

    def wait(self) -> None:
        assert self._gate.wait(10)
        if self._queue.error is not None:
            raise self._queue.error

    def ms_since(self, earlier: object) -> float:
        return 1.0


class GatedQueue(HostQueue):
    """A device that works but does not say so until the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: RuntimeError | None = None

    def mark(self) -> GatedMark:
        return GatedMark(self)


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
    engine_name: EngineName = "host",
    queue: DeviceQueue | None = None,
    decoder: PagedEchoDecoder | None = None,
    sample: Sample | None = None,
    rule: VerificationRule | None = None,
    proposer: DraftProposer | None = None,
) -> FakeExecutor:
    decoder, sampler = decoder or PagedEchoDecoder(), GreedySampler()
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
    engine: HostEngine | DeviceEngine
    if engine_name == "host":
        engine = HostEngine(
            decoder=decoder,
            sample=sample or sampler,
            cache=cache,
            max_num_seqs=max_num_seqs,
            vocab_size=VOCAB_SIZE,
            rule=rule,
            proposer=proposer,
        )
    else:
        engine = DeviceEngine(
            decoder=decoder,
            sample=sample or sampler,
            cache=cache,
            slots=slots,
            queue=queue or HostQueue(),
            rule=rule,
            proposer=proposer,
        )
        if engine_name == "graphs":
            engine.capture(RepeatedCalls())
    decoder.num_forwards = 0
    sampler.batches.clear()
    sampler.logits.clear()
    return FakeExecutor(
        decoder=decoder, sampler=sampler, slots=slots, runner=Runner(engine=engine, slots=slots)
    )


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
    drafts: dict[int, list[int]] | None = None,
) -> StepPlan:
    work = work or {}
    drafts = drafts or {}
    assert set(drafts) <= set(work)
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
        work_num_drafts=[len(drafts.get(slot, [])) for slot in work] if drafts else [],
        draft_token_ids=[token for slot in work for token in drafts.get(slot, [])],
    )
