"""Attention over KV pages by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.interface import PagedAttention
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.native.pages import check_pages
from stepwire_executor.kv_cache import KVPages


def make_paged_attention(library: NativeLibrary) -> PagedAttention:
    """Return the operation; see `interface.PagedAttention`."""
    run = library.paged_attention

    def paged_attention(
        query: Tensor,
        pages: KVPages,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        _, num_heads, head_dim = query.shape
        num_blocks, num_kv_heads, block_size, _ = pages.key.shape
        check_pages(pages, head_dim, has_softcap=softcap is not None)
        if query.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"query must be float32, bfloat16 or float16, not {query.dtype}")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, not {sliding_window}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be positive, not {softcap}")
        cu_seqlens_q, seq_lens, block_table = batch.cu_seqlens_q, batch.seq_lens, batch.block_table
        num_seqs = seq_lens.shape[0]
        for index in (cu_seqlens_q, seq_lens, block_table):
            if index.dtype != torch.int32 or not index.is_contiguous():
                raise ValueError("cu_seqlens_q, seq_lens and block_table must be contiguous int32")
        if cu_seqlens_q.shape[0] != num_seqs + 1 or block_table.shape[0] != num_seqs:
            raise ValueError("cu_seqlens_q, seq_lens and block_table disagree on num_seqs")
        if query.stride(2) != 1:
            query = query.contiguous()
        # Rows past the last sequence's, which pad a batch, are zero.
        out = torch.zeros(query.shape, dtype=query.dtype)
        problem = run(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            DTYPE_CODES[query.dtype],
            pages.key.data_ptr(),
            pages.value.data_ptr(),
            0 if pages.key_scale is None else pages.key_scale.data_ptr(),
            0 if pages.value_scale is None else pages.value_scale.data_ptr(),
            DTYPE_CODES[pages.key.dtype],
            num_blocks,
            cu_seqlens_q.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            block_table.shape[1],
            out.data_ptr(),
            num_seqs,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            scale * (pages.static_key_scale or 1.0),
            sliding_window or 0,
            softcap or 0.0,
            pages.static_value_scale or 1.0,
            torch.get_num_threads(),
        )
        if problem:
            raise ValueError("block_table lacks a block that a sequence's length needs")
        return out

    return paged_attention
