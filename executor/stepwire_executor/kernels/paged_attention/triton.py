"""Attention over KV pages by Triton kernels."""

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.launch import (
    COMPUTE_DTYPES,
    TRITON_TYPES,
    capability,
    ceil_div,
    next_power_of_two,
)
from stepwire_executor.kernels.native.pages import check_pages
from stepwire_executor.kernels.paged_attention.triton_cases import COMPILE_CASES
from stepwire_executor.kernels.paged_attention.triton_combine import combine_splits_kernel
from stepwire_executor.kernels.paged_attention.triton_config import (
    COMBINE_STAGES,
    MAX_DECODE_QUERY,
    choose_config,
    choose_dot_dtype,
    choose_split_tokens,
)
from stepwire_executor.kernels.paged_attention.triton_decode import decode_attention_kernel
from stepwire_executor.kernels.paged_attention.triton_prefill import prefill_attention_kernel
from stepwire_executor.kernels.paged_attention.triton_tile import VALUE_GAIN
from stepwire_executor.kv_cache import FP8_DTYPE, KVPages

__all__ = ["COMPILE_CASES", "paged_attention"]


def paged_attention(
    query: Tensor,
    pages: KVPages,
    batch: StepBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend each query causally to its sequence's pages; see `interface.PagedAttention`.

    Sequences of up to MAX_DECODE_QUERY query tokens go to the decode kernel, longer ones to the
    prefill kernel; lengths stay on the device, and every launch is fixed by the shapes of the
    arguments. batch.max_query_len saves the launch of a kernel without work. Block ids that a
    length needs must be in range: the device cannot raise.

    A row's bits depend on the width of the block table, by which `choose_split_tokens` goes: steps
    whose rows are to agree need tables of one width. Uses float32 scratch of num_rows * num_heads
    * num_splits * (head_dim + 2) elements, with at most MAX_DECODE_QUERY rows a sequence and as
    many splits as cover the table, MAX_SPLITS at most.
    Raises ValueError for dtypes, shapes or layouts that the kernels do not take.
    """
    _check(query, pages, batch, scale, sliding_window, softcap)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = pages.key.shape[1]
    num_seqs = batch.seq_lens.shape[0]
    if num_tokens == 0 or num_seqs == 0:
        return torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    # The kernels write every row: the decode kernel also zeros, where rows pad a batch.
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.stride(2) != 1:
        query = query.contiguous()
    longest = min(num_tokens, batch.max_query_len or num_tokens)
    dot_dtype = choose_dot_dtype(query.dtype, pages.key.dtype, head_dim=head_dim)
    config = choose_config(
        capability(query.device),
        head_dim=head_dim,
        dot_dtype=dot_dtype,
        page_dtype=pages.key.dtype,
    )
    max_context = max(1, batch.block_table.shape[1]) * pages.block_size
    split_tokens = choose_split_tokens(max_context)
    window = sliding_window or 0
    shared = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "BLOCK_SIZE": pages.block_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_two(head_dim)),
        "BLOCK_SEQS": next_power_of_two(num_seqs),
        "SPLIT_TOKENS": split_tokens,
        "DOT_DTYPE": tl.dtype(TRITON_TYPES[dot_dtype]),
        "IS_SCALED": pages.key_scale is not None,
        "RESCALES_QUERY": query.dtype == torch.bfloat16 and dot_dtype == torch.float16,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": sliding_window is not None,
    }
    value_factor = pages.static_value_scale or 1.0
    if pages.value_scale is not None:
        value_factor = 1.0 / VALUE_GAIN.value
    context = (
        pages.key,
        pages.value,
        None if pages.key_scale is None else pages.key_scale.view(torch.int16),
        None if pages.value_scale is None else pages.value_scale.view(torch.int16),
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        num_seqs,
    )
    scalars = (
        query.stride(0),
        query.stride(1),
        scale * (pages.static_key_scale or 1.0) * math.log2(math.e),
        softcap or 0.0,
        window,
        value_factor,
    )

    max_splits = ceil_div(max_context, split_tokens)
    if sliding_window is not None:
        max_splits = min(max_splits, (window + MAX_DECODE_QUERY) // split_tokens + 2)
    num_rows = min(num_tokens, num_seqs * min(MAX_DECODE_QUERY, longest))
    split_weighted = query.new_empty(
        (num_rows, num_heads, max_splits, head_dim), dtype=torch.float32
    )
    split_state = query.new_empty((num_rows, num_heads, max_splits, 2), dtype=torch.float32)
    tile = config.decode
    row_blocks = ceil_div(
        min(MAX_DECODE_QUERY, longest) * (num_heads // num_kv_heads), tile.block_m
    )
    num_programs = min(
        num_seqs * row_blocks * max_splits * num_kv_heads,
        _num_multiprocessors(query.device) * config.decode_programs_per_multiprocessor,
    )
    decode_attention_kernel[(num_programs,)](
        query,
        out,
        split_weighted,
        split_state,
        *context,
        max_splits,
        num_tokens,
        *scalars,
        **shared,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        MAX_QUERY=MAX_DECODE_QUERY,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if max_splits > 1:
        combine_splits_kernel[(num_rows, num_heads)](
            out,
            split_weighted,
            split_state,
            batch.cu_seqlens_q,
            batch.seq_lens,
            num_seqs,
            max_splits,
            window,
            value_factor,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=shared["BLOCK_D"],
            BLOCK_SEQS=shared["BLOCK_SEQS"],
            SPLIT_TOKENS=split_tokens,
            MAX_QUERY=MAX_DECODE_QUERY,
            STAGES=COMBINE_STAGES,
            HAS_WINDOW=shared["HAS_WINDOW"],
            num_warps=1,
        )
    if longest > MAX_DECODE_QUERY:
        tile = config.prefill
        # Every sequence of prefill has more than MAX_DECODE_QUERY tokens and may end in a block
        # that is not full.
        num_prompts = min(num_seqs, num_tokens // (MAX_DECODE_QUERY + 1))
        num_blocks = num_tokens * (num_heads // num_kv_heads) // tile.block_m + num_prompts
        prefill_attention_kernel[(num_blocks, num_kv_heads)](
            query,
            out,
            *context,
            *scalars,
            **shared,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            MAX_DECODE_QUERY=MAX_DECODE_QUERY,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # interpreted: one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
    query: Tensor,
    pages: KVPages,
    batch: StepBatch,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> None:
    """Raise ValueError for arguments that the kernels would misread."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = pages.key.shape[1]
    num_seqs = batch.seq_lens.shape[0]
    if query.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"query must be float32, bfloat16 or float16, not {query.dtype}")
    if pages.key.dtype not in (*COMPUTE_DTYPES, FP8_DTYPE) or pages.value.dtype != pages.key.dtype:
        raise ValueError(
            f"pages of {pages.key.dtype} keys and {pages.value.dtype} values are not supported"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")
    if pages.key.shape[3] != head_dim or pages.value.shape != pages.key.shape:
        raise ValueError(f"pages of shape {tuple(pages.key.shape)} do not hold {head_dim} elements")
    check_pages(pages, head_dim, has_softcap=softcap is not None)
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    for index in (batch.cu_seqlens_q, batch.seq_lens, batch.block_table):
        if index.dtype != torch.int32 or index.stride(-1) != 1:
            raise ValueError("cu_seqlens_q, seq_lens and block_table must be dense int32")
    if batch.cu_seqlens_q.shape[0] != num_seqs + 1 or batch.block_table.shape[0] != num_seqs:
        raise ValueError("cu_seqlens_q, seq_lens and block_table disagree on num_seqs")
