"""Batches, poisoned pages and plain oracles for the tests of the kernels."""

from __future__ import annotations

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels import SamplingBatch
from stepwire_executor.kernels.rope_and_write_kv.reference import quantise
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, SCALE_DTYPE, KVPages, StaticScales
from torch import Tensor

CPU = torch.device("cpu")


def make_batch(
    query_lens: list[int], seq_lens: list[int], *, block_size: int = 16, seed: int = 0
) -> StepBatch:
    """Build a step whose blocks lie in random places of a pool with two spare blocks a sequence.

    Sequence i has query_lens[i] query tokens at its end and seq_lens[i] tokens in all.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in seq_lens]
    pool = torch.randperm(num_blocks(seq_lens, block_size), generator=generator).tolist()
    table = torch.full((len(seq_lens), max(counts, default=0) + 1), -1, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    for i, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = [pool.pop() for _ in range(counts[i])]
        table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(seq_len - query_len, seq_len):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
    return StepBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table,
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )


def num_blocks(seq_lens: list[int], block_size: int) -> int:
    """Return the size of the pool that make_batch draws from."""
    return sum(-(-n // block_size) + 2 for n in seq_lens)


def poisoned_pages(
    shape: tuple[int, int, int, int], dtype: torch.dtype, static: StaticScales | None = None
) -> KVPages:
    """Return pages that hold nothing but NaN, so that reading an unused slot shows."""

    def pages() -> Tensor:
        return torch.full(shape, torch.nan).to(dtype)

    def scales() -> Tensor | None:
        if dtype != FP8_DTYPE or static is not None:
            return None
        return torch.full(shape[:3], torch.nan, dtype=SCALE_DTYPE)

    return KVPages(
        key=pages(),
        value=pages(),
        key_scale=scales(),
        value_scale=scales(),
        static_key_scale=None if static is None else static.key,
        static_value_scale=None if static is None else static.value,
    )


def fill_pages(
    batch: StepBatch,
    keys: list[Tensor],
    values: list[Tensor],
    *,
    dtype: torch.dtype,
    block_size: int = 16,
    static: StaticScales | None = None,
) -> KVPages:
    """Return pages that hold keys[i], [seq_lens[i], num_kv_heads, head_dim], and NaN elsewhere."""
    lengths = batch.seq_lens.tolist()
    _, num_kv_heads, head_dim = keys[0].shape
    shape = (num_blocks(lengths, block_size), num_kv_heads, block_size, head_dim)
    pages = poisoned_pages(shape, dtype, static)
    for i, length in enumerate(lengths):
        place = torch.arange(length)
        blocks = batch.block_table[i].long()[place // block_size]
        offsets = place % block_size
        for target, scales, static_scale, x in (
            (pages.key, pages.key_scale, pages.static_key_scale, keys[i]),
            (pages.value, pages.value_scale, pages.static_value_scale, values[i]),
        ):
            if scales is not None:
                codes, scale = quantise(x)
                scales[blocks, :, offsets] = scale
            elif static_scale is not None:
                codes = static_codes(x, static_scale)
            else:
                target[blocks, :, offsets] = x.to(dtype)
                continue
            target.view(torch.uint8)[blocks, :, offsets] = codes.view(torch.uint8)
    return pages


def static_codes(x: Tensor, scale: float) -> Tensor:
    """Return the e4m3 codes of x / scale, saturated; NaN where x is not finite."""
    divided = torch.div(x.float(), torch.full_like(x, scale, dtype=torch.float32))
    is_finite = x.isfinite()
    return torch.where(is_finite, divided.clamp(-FP8_MAX, FP8_MAX), torch.nan).to(FP8_DTYPE)


def smallest_bfloat16_above(x: Tensor) -> Tensor:
    """Return the least bfloat16 that is at least x, which must be positive and finite."""
    nearest = x.to(torch.bfloat16)
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < x, above, nearest)


def stored(x: Tensor, dtype: torch.dtype, static_scale: float | None = None) -> Tensor:
    """Return x as float64 after a round trip through pages of dtype."""
    if static_scale is not None:
        return static_codes(x, static_scale).double() * static_scale
    if dtype == FP8_DTYPE:
        codes, scale = quantise(x)
        return codes.double() * scale.double().unsqueeze(-1)
    return x.to(dtype).double()


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend the last rows of one sequence in float64 over the whole context at once.

    query: [num_rows, num_heads, head_dim]; key, value: [seq_len, num_kv_heads, head_dim].
    """
    num_rows, num_heads, _ = query.shape
    seq_len, num_kv_heads, _ = key.shape
    key, value = (
        x.double().repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (key, value)
    )
    scores = torch.einsum("qhd,khd->hqk", query.double() * scale, key)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    last = torch.arange(seq_len - num_rows, seq_len).unsqueeze(1)
    position = torch.arange(seq_len)
    is_hidden = position > last
    if window is not None:
        is_hidden |= position <= last - window
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def sampling_batch(
    num_rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    streams: list[int] | None = None,
) -> SamplingBatch:
    """Build sampling parameters; a scalar holds for every row."""

    def row(value: float | list[float] | list[int], dtype: torch.dtype) -> Tensor:
        values = value if isinstance(value, list) else [value] * num_rows
        return torch.tensor(values, dtype=dtype)

    return SamplingBatch(
        temperature=row(temperature, torch.float32),
        top_k=row(top_k, torch.int32),
        top_p=row(top_p, torch.float32),
        min_p=row(min_p, torch.float32),
        seeds=row(seeds or list(range(num_rows)), torch.int64),
        positions=row(positions or [0] * num_rows, torch.int64),
        streams=row(streams or [0] * num_rows, torch.int64),
    )
