"""Sizes the KV pool and joins model, pages, slot table and engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch
from torch import Tensor

from stepwire_executor.config import Capacity, ExecutorConfig
from stepwire_executor.device import peak_bytes, total_and_used_bytes
from stepwire_executor.engine import StepEngine
from stepwire_executor.engine.device import DeviceEngine
from stepwire_executor.engine.device_queue import CudaQueue, DeviceQueue, HostQueue
from stepwire_executor.engine.graphs import CudaGraphs, capture_sizes
from stepwire_executor.engine.host import HostEngine
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.host import available_memory_bytes
from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kv_cache import KVCache, bytes_per_block
from stepwire_executor.memory import (
    DeviceMemory,
    KVCachePlan,
    plan_device_kv_cache,
    plan_kv_cache,
)
from stepwire_executor.model.loader import LoadedModel
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation.draft_model import DraftModel
from stepwire_executor.speculation.interface import VerificationRule
from stepwire_executor.speculation.rules import make_rule

GRAPH_BYTES = 4 << 20
"""Kept for each captured batch size beside the largest one's activations."""
LINEAR_CLASSES = (1, 17, 33, 65, 129, 257)
"""Numbers of tokens of which each has linear layers compiled for it and for those up to the next.
"""
_GIB = 1 << 30

_log: Any = structlog.get_logger("stepwire_executor.engine.building")

Built = tuple[StepEngine, KVCache, SlotTable]
OnPhase = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedModel:
    """A model and what its pages are like."""

    model: LoadedModel
    kv_dtype: torch.dtype
    """Of KV pages."""
    key_offsets: tuple[Tensor, ...] | None = None
    """What each layer's fp8 keys are centred by; see `engine.key_offsets`."""

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a KV block over all layers."""
        has_static_scales = self.model.static_kv_scales is not None
        return bytes_per_block(**self._geometry(block_size), has_static_scales=has_static_scales)

    def new_cache(self, num_blocks: int, block_size: int, device: torch.device) -> KVCache:
        """Allocate a pool; raises MemoryError or RuntimeError where it does not fit."""
        return KVCache(
            num_blocks=num_blocks,
            device=device,
            static_scales=self.model.static_kv_scales,
            key_offsets=self.key_offsets,
            **self._geometry(block_size),
        )

    def _geometry(self, block_size: int) -> dict[str, Any]:
        return {
            "num_layers": self.model.config.num_layers,
            "num_kv_heads": self.model.decoder.config.num_kv_heads,
            "block_size": block_size,
            "head_dim": self.model.config.head_dim,
            "dtype": self.kv_dtype,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is built from."""

    config: ExecutorConfig
    capacity: Capacity
    model: LoadedModel
    kernels: Kernels
    device: torch.device
    kv_dtype: torch.dtype
    """Of KV pages."""
    key_offsets: tuple[Tensor, ...] | None = None
    """What each layer's fp8 keys are centred by; see `engine.key_offsets`."""
    group: RankGroup = SINGLE_RANK
    """The ranks that compute together."""
    draft: PagedModel | None = None
    """The model that proposes tokens, if any: whole on every rank, its pages beside the target's
    under the same block ids."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a KV block over all layers, the draft model's included."""
        return self._target.block_bytes(self.capacity.block_size) + self.draft_block_bytes

    @property
    def draft_block_bytes(self) -> int:
        """The draft model's part of block_bytes."""
        return 0 if self.draft is None else self.draft.block_bytes(self.capacity.block_size)

    @property
    def rule(self) -> VerificationRule:
        """How drafts are verified."""
        return make_rule(self.config.speculative_verification, self.kernels.sample)

    def new_cache(self, num_blocks: int) -> KVCache:
        """Allocate the target's pool; raises ModelLoadError where it does not fit."""
        return self._new_cache(self._target, num_blocks)

    def new_draft_cache(self, num_blocks: int) -> KVCache:
        """As new_cache, of the draft model, which there must be."""
        assert self.draft is not None
        return self._new_cache(self.draft, num_blocks)

    def new_slots(self, *, num_blocks: int, max_model_len: int) -> SlotTable:
        """Make an empty slot table."""
        return SlotTable(
            max_num_seqs=self.capacity.max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=self.capacity.max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=self.capacity.block_size,
            vocab_size=self.model.config.vocab_size,
        )

    @property
    def _target(self) -> PagedModel:
        return PagedModel(model=self.model, kv_dtype=self.kv_dtype, key_offsets=self.key_offsets)

    def _new_cache(self, paged: PagedModel, num_blocks: int) -> KVCache:
        try:
            return paged.new_cache(num_blocks, self.capacity.block_size, self.device)
        except (MemoryError, RuntimeError):
            raise ModelLoadError(
                f"the KV cache of {num_blocks} blocks "
                f"({num_blocks * self.block_bytes / _GIB:.2f} GiB) does not fit in memory: lower "
                "--num-kv-blocks, --kv-cache-memory-bytes or --gpu-memory-utilization"
            ) from None


def build_host_engine(parts: EngineParts, on_phase: OnPhase) -> Built:
    """Build the engine of a CPU. Raises ModelLoadError."""
    plan = _agreed(parts, _host_plan(parts))
    cache = parts.new_cache(plan.num_blocks)
    slots = parts.new_slots(num_blocks=plan.num_blocks, max_model_len=plan.max_model_len)
    engine = HostEngine(
        decoder=parts.model.decoder,
        sample=parts.kernels.sample,
        cache=cache,
        max_num_seqs=slots.max_num_seqs,
        vocab_size=slots.vocab_size,
        rule=parts.rule,
        proposer=_new_draft_model(parts, slots, HostQueue(), is_host_engine=True),
    )
    return engine, cache, slots


def build_device_engine(parts: EngineParts, on_phase: OnPhase) -> Built:
    """Build the engine of a GPU, compile its kernels and capture its graphs.

    on_phase: told what is being done. Raises ModelLoadError.
    """
    is_gpu = parts.device.type == "cuda"
    queue: DeviceQueue = CudaQueue(parts.device) if is_gpu else HostQueue()
    try:
        if not is_gpu:
            plan = _host_plan(parts)
        else:
            on_phase("compile kernels")
            plan = _warn(_measured_plan(parts, queue))
        plan = _agreed(parts, plan)
        cache = parts.new_cache(plan.num_blocks)
        slots = parts.new_slots(num_blocks=plan.num_blocks, max_model_len=plan.max_model_len)
        engine = _device_engine(parts, queue, cache, slots, _new_draft_model(parts, slots, queue))
        if is_gpu and _is_captured(parts):
            on_phase("capture graphs")
            graph_bytes = peak_bytes(parts.device, lambda: engine.capture(CudaGraphs()))
            _log.info("graphs_captured", mib=graph_bytes >> 20)
    except torch.OutOfMemoryError:
        raise ModelLoadError(
            "the GPU's memory ran out while steps were tried: lower --gpu-memory-utilization "
            f"(now {parts.config.gpu_memory_utilization}), --max-num-batched-tokens (now "
            f"{parts.capacity.max_num_batched_tokens}) or --max-num-seqs (now "
            f"{parts.capacity.max_num_seqs}), or add --enforce-eager"
        ) from None
    return engine, cache, slots


def _host_plan(parts: EngineParts) -> KVCachePlan:
    return _warn(
        plan_kv_cache(
            parts.config,
            parts.capacity,
            max_model_len=parts.model.max_model_len,
            block_bytes=parts.block_bytes,
            available_bytes=available_memory_bytes(),
        )
    )


def _agreed(parts: EngineParts, plan: KVCachePlan) -> KVCachePlan:
    """What every rank of the group has room for; their shards and machines may differ."""
    num_blocks, max_model_len = parts.group.least(plan.num_blocks, plan.max_model_len)
    return replace(plan, num_blocks=num_blocks, max_model_len=max_model_len)


def _warn(plan: KVCachePlan) -> KVCachePlan:
    if plan.warning is not None:
        _log.warning("kv_cache_small", detail=plan.warning)
    return plan


def _new_draft_model(
    parts: EngineParts, slots: SlotTable, queue: DeviceQueue, *, is_host_engine: bool = False
) -> DraftModel | None:
    """Allocate the draft model's pages beside the target's. Raises ModelLoadError."""
    if parts.draft is None:
        return None
    model = parts.draft.model
    return DraftModel(
        decoder=model.decoder,
        cache=parts.new_draft_cache(slots.num_blocks),
        queue=queue,
        max_model_len=model.max_model_len,
        draft_vocab_size=model.config.vocab_size,
        vocab_size=slots.vocab_size,
        max_num_batched_tokens=slots.max_num_batched_tokens,
        trims_block_tables=is_host_engine,
    )


def _is_captured(parts: EngineParts) -> bool:
    return parts.kernels.is_capturable and not parts.config.enforce_eager


def _device_engine(
    parts: EngineParts,
    queue: DeviceQueue,
    cache: KVCache,
    slots: SlotTable,
    draft_model: DraftModel | None,
) -> DeviceEngine:
    return DeviceEngine(
        decoder=parts.model.decoder,
        sample=parts.kernels.sample,
        cache=cache,
        slots=slots,
        queue=queue,
        rule=parts.rule,
        proposer=draft_model,
    )


def _measured_plan(parts: EngineParts, queue: DeviceQueue) -> KVCachePlan:
    """Run the largest steps over a pool of one block and see what they leave.

    Compiles on the way what any later step launches: kernels differ by the number of sequences,
    rounded up to a power of two, by whether a sequence is prefilled, and linear layers by the
    class of the number of tokens.
    """
    capacity, device = parts.capacity, parts.device
    slots = parts.new_slots(num_blocks=1, max_model_len=parts.model.max_model_len)
    draft_model = _new_draft_model(parts, slots, queue)
    engine = _device_engine(parts, queue, parts.new_cache(1), slots, draft_model)
    total_bytes, used_bytes = total_and_used_bytes(device)

    def run_padding(lengths: list[int]) -> None:
        engine.run_padding(lengths)
        if draft_model is not None:
            draft_model.run_padding(lengths, slots)

    def run_steps() -> None:
        for num_tokens in LINEAR_CLASSES:
            if num_tokens <= min(capacity.max_num_batched_tokens, slots.max_model_len):
                run_padding([num_tokens])
        num_seqs = 1
        while True:
            longest = min(capacity.max_num_batched_tokens - num_seqs + 1, slots.max_model_len)
            run_padding([longest] + [1] * (num_seqs - 1))
            if num_seqs == capacity.max_num_seqs:
                return
            num_seqs = min(2 * num_seqs, capacity.max_num_seqs)

    activation_bytes = peak_bytes(device, run_steps)
    decode_bytes = peak_bytes(device, lambda: engine.run_padding([1] * capacity.max_num_seqs))
    num_graphs = len(capture_sizes(capacity.max_num_seqs))
    memory = DeviceMemory(
        total_bytes=total_bytes,
        used_bytes=used_bytes,
        activation_bytes=activation_bytes,
        graph_bytes=decode_bytes + GRAPH_BYTES * num_graphs if _is_captured(parts) else 0,
    )
    _log.info(
        "device_memory",
        total_mib=total_bytes >> 20,
        used_mib=used_bytes >> 20,
        activation_mib=activation_bytes >> 20,
        graph_mib=memory.graph_bytes >> 20,
    )
    return plan_device_kv_cache(
        parts.config,
        capacity,
        memory,
        max_model_len=slots.max_model_len,
        block_bytes=parts.block_bytes,
    )
