"""Drives a small real model with a draft model, as a scheduler would, one plan at a time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from stepwire.executor.v1.executor_pb2 import SamplingParams, StepPlan, StepResult
from stepwire_executor.config import (
    ExecutorConfig,
    SpeculativeVerificationName,
    blocks_for,
    resolve_capacity,
)
from stepwire_executor.engine.building import (
    EngineParts,
    PagedModel,
    build_device_engine,
    build_host_engine,
)
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.kernels import Kernels, select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, sampling_params
from support.model_steps import CPU

BLOCK_SIZE = 4
VOCAB_SIZE = 101
BUILDERS = {"host": build_host_engine, "device": build_device_engine}


def write_tiny_model(path: Path, *, num_layers: int = 2, seed: int = 3, **changes: int) -> Path:
    """A Llama whose logits differ from position to position."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
    }
    config = transformers.LlamaConfig(**{**settings, **changes}, initializer_range=0.3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def load_tiny_model(
    path: Path, *, kernels: Kernels | None = None, group: RankGroup = SINGLE_RANK
) -> LoadedModel:
    return load_model(
        path,
        dtype=torch.float32,
        kernels=kernels or select_kernels(CPU),
        device=CPU,
        group=group,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Drafts of several sequences or steps."""

    num_asked: int = 0
    """Drafts that plans asked for."""
    num_drafts: int = 0
    """Drafts that were verified."""
    num_accepted: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            num_asked=self.num_asked + other.num_asked,
            num_drafts=self.num_drafts + other.num_drafts,
            num_accepted=self.num_accepted + other.num_accepted,
        )

    def __sub__(self, other: Tally) -> Tally:
        return self + Tally(
            num_asked=-other.num_asked,
            num_drafts=-other.num_drafts,
            num_accepted=-other.num_accepted,
        )


@dataclass(slots=True)
class DraftedSequence:
    """What a scheduler knows of a sequence, and what became of its drafts."""

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    block_ids: list[int]
    num_computed: int
    tally: Tally = Tally()
    last: Tally = Tally()
    """Of the last step that sampled."""

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass
class DraftingExecutor:
    """A runner over tiny models, and a pool of blocks dealt in a scattered order."""

    runner: Runner
    num_blocks: int
    free_blocks: list[int] = field(default_factory=list)
    sequences: dict[int, DraftedSequence] = field(default_factory=dict)
    epoch: int = 0
    next_step_id: int = 1
    _released: list[int] = field(default_factory=list)
    _joining: list[DraftedSequence] = field(default_factory=list)

    def open_epoch(self) -> None:
        self.epoch += 1
        self.next_step_id = 1
        self.sequences.clear()
        self.free_blocks = list(range(self.num_blocks))
        random.Random(self.epoch).shuffle(self.free_blocks)
        self.runner.open_epoch(self.epoch)

    def join(
        self,
        slot: int,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int | None = None,
        params: SamplingParams | None = None,
        cached_blocks: Sequence[int] = (),
    ) -> DraftedSequence:
        """Admit a sequence with the next step; cached_blocks: full ones that hold its start."""
        sequence = DraftedSequence(
            slot=slot,
            token_ids=list(token_ids),
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            params=params or sampling_params(),
            block_ids=list(cached_blocks),
            num_computed=len(cached_blocks) * BLOCK_SIZE,
        )
        self.sequences[slot] = sequence
        self._joining.append(sequence)
        return sequence

    def leave(self, sequence: DraftedSequence, *, keep_blocks: bool = False) -> None:
        """Release a sequence with the next step; keep_blocks: they stay as they are."""
        del self.sequences[sequence.slot]
        self._released.append(sequence.slot)
        if not keep_blocks:
            # The last freed is the first dealt out.
            self.free_blocks.extend(sequence.block_ids)

    def step(
        self,
        num_drafts: Mapping[int, int] | int = 0,
        *,
        chunks: Mapping[int, int] | None = None,
        only: Sequence[int] | None = None,
        copies: Sequence[tuple[int, int]] = (),
    ) -> StepResult:
        """Compute all that is known of each sequence, or a chunk, and drafts behind it.

        num_drafts: by slot, or of all. chunks: known tokens to compute, by slot; a chunk that does
        not reach the last one has no drafts. only: slots that work.
        """
        admissions = [
            admission(
                s.slot,
                s.token_ids,
                s.block_ids,
                num_prompt_tokens=s.num_prompt_tokens,
                num_computed_tokens=s.num_computed,
                params=s.params,
            )
            for s in self._joining
        ]
        plan = StepPlan(
            epoch=self.epoch,
            step_id=self.next_step_id,
            released_slots=self._released,
            admissions=admissions,
            copy_source_block_ids=[source for source, _ in copies],
            copy_target_block_ids=[target for _, target in copies],
        )
        working = [s for s in self.sequences.values() if only is None or s.slot in only]
        for sequence in working:
            missing = len(sequence.token_ids) - sequence.num_computed
            chunk = min(missing, (chunks or {}).get(sequence.slot, missing))
            drafts = num_drafts if isinstance(num_drafts, int) else num_drafts.get(sequence.slot, 0)
            drafts = drafts if chunk == missing else 0
            end = sequence.num_computed + chunk + drafts
            while len(sequence.block_ids) < blocks_for(end, BLOCK_SIZE):
                sequence.block_ids.append(self.free_blocks.pop())
                plan.appended_slots.append(sequence.slot)
                plan.appended_block_ids.append(sequence.block_ids[-1])
            plan.work_slots.append(sequence.slot)
            plan.work_num_tokens.append(chunk)
            plan.work_num_drafts.append(drafts)
            sequence.num_computed += chunk
        if not any(plan.work_num_drafts):
            del plan.work_num_drafts[:]
        self._released, self._joining = [], []
        self.next_step_id += 1
        result = self.runner.execute(plan)
        assert not result.failures
        asked = dict(zip(plan.work_slots, plan.work_num_drafts, strict=False))
        self._book(result, asked)
        return result

    def _book(self, result: StepResult, asked: Mapping[int, int]) -> None:
        token_ids = iter(result.sampled_token_ids)
        num_drafts = result.num_draft_tokens or [0] * len(result.sampled_slots)
        sampled = zip(result.sampled_slots, result.num_sampled_tokens, num_drafts, strict=True)
        for slot, num_tokens, drafted in sampled:
            sequence = self.sequences[slot]
            assert num_tokens - 1 <= drafted <= asked.get(slot, 0)
            sequence.token_ids.extend(next(token_ids) for _ in range(num_tokens))
            sequence.num_computed += num_tokens - 1
            sequence.last = Tally(
                num_asked=asked.get(slot, 0), num_drafts=drafted, num_accepted=num_tokens - 1
            )
            sequence.tally += sequence.last
            if asked.get(slot):
                num_kept = blocks_for(len(sequence.token_ids), BLOCK_SIZE)
                self.free_blocks.extend(sequence.block_ids[num_kept:])
                del sequence.block_ids[num_kept:]


def make_drafting_executor(
    model: LoadedModel,
    draft: LoadedModel | None,
    *,
    engine_name: str = "host",
    kernels: Kernels | None = None,
    num_blocks: int = 1024,
    max_num_batched_tokens: int = 512,
    group: RankGroup = SINGLE_RANK,
    is_fp8: bool = False,
    rule: SpeculativeVerificationName = "sampled",
) -> DraftingExecutor:
    config = ExecutorConfig(
        model="m",
        max_num_seqs=4,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max_num_batched_tokens,
        speculative_verification=rule,
    )

    def paged(each: LoadedModel) -> PagedModel:
        return PagedModel(
            model=each,
            kv_dtype=FP8_DTYPE if is_fp8 else torch.float32,
            key_offsets=measure_key_offsets(each, CPU) if is_fp8 else None,
        )

    own = paged(model)
    parts = EngineParts(
        config=config,
        capacity=resolve_capacity(config, is_gpu=False),
        model=model,
        kernels=kernels or select_kernels(CPU),
        device=CPU,
        group=group,
        kv_dtype=own.kv_dtype,
        key_offsets=own.key_offsets,
        draft=None if draft is None else paged(draft),
    )
    engine, _, slots = BUILDERS[engine_name](parts, lambda phase: None)
    executor = DraftingExecutor(
        runner=Runner(engine=engine, slots=slots, group=group), num_blocks=num_blocks
    )
    executor.open_epoch()
    return executor
