"""The Triton kernels under test, called as the executor calls them.

The one place that knows their signatures, so that a change of one is a change here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.kernels.linear import triton as linear_triton
from stepwire_executor.kernels.paged_attention import triton as attention_triton
from stepwire_executor.kernels.rms_norm.triton import rms_norm
from stepwire_executor.kernels.rope_and_write_kv.triton import rope_and_write_kv
from stepwire_executor.kernels.sample import reference as sample_reference
from stepwire_executor.kernels.sample import triton as sample_triton
from stepwire_executor.kernels.silu_and_mul.triton import silu_and_mul
from stepwire_executor.kv_cache import KVPages
from torch import Tensor

__all__ = [
    "attend",
    "choose",
    "choose_by_reference",
    "linear",
    "make_batch",
    "pack_weight",
    "rms_norm",
    "rope_and_write_kv",
    "sampling_batch",
    "silu_and_mul",
    "split_tokens",
]

linear = linear_triton.linear
pack_weight = linear_triton.pack_weight


def attend(
    query: Tensor,
    pages: KVPages,
    batch: StepBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend as `interface.PagedAttention`, with what the batch says of its query lengths."""
    return attention_triton.paged_attention(
        query, pages, batch, scale=scale, sliding_window=window, softcap=softcap
    )


def default_split_tokens(max_context: int) -> int:
    """Tokens of context a split, where block tables hold max_context tokens a sequence."""
    return attention_triton.choose_split_tokens(max_context)


@contextlib.contextmanager
def split_tokens(num_tokens: int) -> Iterator[None]:
    """Let launches in the block cut the context into splits of num_tokens, a power of two."""
    before = attention_triton.choose_split_tokens
    attention_triton.choose_split_tokens = lambda max_context: num_tokens
    try:
        yield
    finally:
        attention_triton.choose_split_tokens = before


def make_batch(
    *,
    positions: Tensor,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    token_ids: Tensor | None = None,
    logit_rows: Tensor | None = None,
    max_query_len: int | None = None,
) -> StepBatch:
    """A step's tensors; without token ids they are zeros, and no logits are wanted."""
    return StepBatch(
        token_ids=torch.zeros_like(positions) if token_ids is None else token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        block_table=block_table,
        logit_rows=positions[:0] if logit_rows is None else logit_rows,
        max_query_len=max_query_len,
    )


def sampling_batch(
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor | None = None,
    streams: Tensor | None = None,
) -> SamplingBatch:
    """Parameters of rows; without positions and streams these are zeros."""
    zeros = torch.zeros_like(seeds)
    return SamplingBatch(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=zeros if positions is None else positions,
        streams=zeros if streams is None else streams,
    )


def choose(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Token ids, [num_rows] int64, and whether each could be chosen, by the Triton sampler."""
    out = sample_triton.sample(logits, batch)
    return out.token_ids, out.is_finite


def choose_by_reference(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """As choose, by the torch reference on the logits' device; may overwrite logits."""
    out = sample_reference.sample(logits, batch)
    return out.token_ids, out.is_finite
