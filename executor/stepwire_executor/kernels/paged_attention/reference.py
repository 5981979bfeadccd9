"""Attention over KV pages in torch, one sequence and one stretch of context at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.dtypes import accumulation_dtype
from stepwire_executor.kv_cache import KVPages

TILE_TOKENS = 512
"""Context tokens that are gathered at a time, rounded down to whole pages."""


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

    Tiles start at multiples of the page size and are joined by an online softmax (Milakov &
    Gimelshein 2018), so that memory does not grow with the context.
    """
    num_heads, num_kv_heads = query.shape[1], pages.key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} KV heads")
    # Rows past the last sequence's, which pad a batch, are zero.
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts = batch.cu_seqlens_q.tolist()
    for index, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if rows.start < rows.stop:
            out[rows] = _attend(
                query[rows],
                pages,
                batch.block_table[index],
                seq_len=seq_len,
                scale=scale,
                window=sliding_window,
                softcap=softcap,
            ).to(out.dtype)
    return out


def _attend(
    query: Tensor,
    pages: KVPages,
    blocks: Tensor,
    *,
    seq_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend the last rows of one sequence; query: [num_rows, num_heads, head_dim]."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = pages.key.shape[1]
    group = num_heads // num_kv_heads
    dtype = accumulation_dtype(query)
    # [num_kv_heads, num_rows * group, head_dim]: heads of a group share their keys.
    grouped = query.to(dtype).view(num_rows, num_kv_heads, group, head_dim).transpose(0, 1)
    if pages.static_key_scale is not None:
        scale = scale * pages.static_key_scale
    grouped = grouped.reshape(num_kv_heads, num_rows * group, head_dim) * scale
    last = torch.arange(seq_len - num_rows, seq_len, device=query.device)
    last = last.repeat_interleave(group).unsqueeze(1)  # [num_rows * group, 1]

    maximum = torch.full_like(grouped[..., :1], -torch.inf)
    total = torch.zeros_like(maximum)
    weighted = torch.zeros_like(grouped)
    first_needed = 0 if window is None else max(0, seq_len - num_rows - window + 1)
    tile = max(1, TILE_TOKENS // pages.block_size) * pages.block_size
    for start in range(first_needed // tile * tile, seq_len, tile):
        stop = min(start + tile, seq_len)
        key = _gather(pages.key, pages.key_scale, blocks, start, stop, dtype)
        value = _gather(pages.value, pages.value_scale, blocks, start, stop, dtype)
        scores = grouped @ key.transpose(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(start, stop, device=query.device)
        is_hidden = position > last
        if window is not None:
            is_hidden |= position <= last - window
        scores = scores.masked_fill(is_hidden, -torch.inf)
        new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        # A row that has seen nothing yet keeps -inf; exp(-inf - -inf) would be NaN.
        pivot = new_maximum.masked_fill(new_maximum == -torch.inf, 0.0)
        weights = torch.exp(scores - pivot)
        decay = torch.exp(maximum - pivot)
        total = total * decay + weights.sum(dim=-1, keepdim=True)
        weighted = weighted * decay + weights @ value
        maximum = new_maximum
    if pages.static_value_scale is not None:
        weighted = weighted * pages.static_value_scale
    attended = (weighted / total).view(num_kv_heads, num_rows, group, head_dim)
    return attended.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _gather(
    pages: Tensor, scales: Tensor | None, blocks: Tensor, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Return tokens start (a multiple of the page size) to stop: [num_kv_heads, n, head_dim]."""
    size = pages.shape[2]
    wanted = blocks[start // size : -(-stop // size)].long()
    tile = pages[wanted].to(dtype)
    if scales is not None:
        tile = tile * scales[wanted].to(dtype).unsqueeze(-1)
    tile = tile.transpose(0, 1).reshape(pages.shape[1], -1, pages.shape[3])
    # Slots past the sequence's end may hold anything, NaN included: they are cut, not masked.
    return tile[:, : stop - start]
