"""Sequences whose keys and values lie in pages, scattered over a pool full of NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.rope_and_write_kv.reference import quantise
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, KVCache, KVPages, bytes_per_block
from torch import Tensor

from benchmarks.gpu.operations import attend, make_batch

Chunk = tuple[int, int, int]
"""(sequence, first, last): the query tokens first to last of a sequence."""

_NAN_CODE = 0x7F
STATIC_SCALES = {"static_key_scale": 0.03125, "static_value_scale": 0.07}
"""By the fields of KVPages; what they do not reach saturates."""


def with_static_scales(pages: KVPages) -> KVPages:
    """The same e4m3 pages without a scale a token and head."""
    scales: dict[str, Any] = {"key_scale": None, "value_scale": None, **STATIC_SCALES}
    return dataclasses.replace(pages, **scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Shapes and options of one attention layer."""

    num_kv_heads: int
    group: int
    """Query heads a KV head."""
    head_dim: int
    block_size: int
    """Tokens a page."""
    dtype: torch.dtype
    """Of queries."""
    page_dtype: torch.dtype
    """Of keys and values; float8_e4m3fn brings scales."""
    window: int | None = None
    softcap: float | None = None
    has_static_scales: bool = False
    """e4m3 pages have one scale for all keys and one for all values."""

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    @property
    def name(self) -> str:
        """For messages."""
        parts = [f"D{self.head_dim} group {self.group} pages of {self.block_size}"]
        parts += [f"{str(self.dtype)[6:]} over {str(self.page_dtype)[6:]}"]
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["static scales"] if self.has_static_scales else []
        return ", ".join(parts)

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of the keys and values of so many tokens, scales included."""
        return num_tokens * bytes_per_block(
            num_layers=1,
            num_kv_heads=self.num_kv_heads,
            block_size=1,
            head_dim=self.head_dim,
            dtype=self.page_dtype,
        )


class PagedSequences:
    """Random keys and values of some sequences; every other slot of the pool is NaN."""

    def __init__(
        self,
        case: AttentionCase,
        seq_lens: Sequence[int],
        *,
        generator: torch.Generator,
        first_block: int = 0,
        num_spare_blocks: int = 3,
        table_width: int | None = None,
        is_poisoned: bool = True,
    ) -> None:
        """Deal blocks from first_block on in random order; the tables are -1 padded.

        is_poisoned False leaves the unused slots zero, as a fresh cache has them.
        """
        self.case = case
        self.seq_lens = list(seq_lens)
        self._device = generator.device
        counts = [math.ceil(n / case.block_size) for n in seq_lens]
        num_blocks = first_block + sum(counts) + num_spare_blocks
        self._width = table_width or max(1, *counts) + 1
        cache = KVCache(
            num_layers=1,
            num_blocks=num_blocks,
            num_kv_heads=case.num_kv_heads,
            block_size=case.block_size,
            head_dim=case.head_dim,
            dtype=case.page_dtype,
            device=self._device,
        )
        (self.pages,) = cache.layers
        if case.has_static_scales:
            self.pages = with_static_scales(self.pages)
        if is_poisoned:
            _poison(self.pages)
        order = torch.randperm(num_blocks - first_block, generator=generator, device=self._device)
        order = (order + first_block).to(torch.int32)
        self._table = torch.full(
            (len(seq_lens), self._width), -1, dtype=torch.int32, device=self._device
        )
        for index, stretch in enumerate(order[: sum(counts)].split(counts)):
            self._table[index, : counts[index]] = stretch
        for index, length in enumerate(self.seq_lens):
            if length:
                self._fill(index, length, generator)

    def _fill(self, index: int, length: int, generator: torch.Generator) -> None:
        case = self.case
        shape = (length, case.num_kv_heads, case.head_dim)
        place = torch.arange(length, device=self._device)
        blocks, offsets = self._blocks(index, place), place % case.block_size
        for target, scales, kind, spread in (
            (self.pages.key, self.pages.key_scale, "key", 1.0),
            (self.pages.value, self.pages.value_scale, "value", 3.0),
        ):
            x = torch.randn(shape, generator=generator, device=self._device)
            # Magnitudes differ from token to token, so that a forgotten scale shows.
            x *= 1 + spread * ((place * 7) % 5).view(-1, 1, 1) / 5
            if target.dtype != FP8_DTYPE:
                target[blocks, :, offsets] = x.to(target.dtype)
                continue
            if scales is None:
                scaled = x / STATIC_SCALES[f"static_{kind}_scale"]
                codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
            else:
                codes, scale = quantise(x)
                scales[blocks, :, offsets] = scale.to(scales.dtype)
            target.view(torch.uint8)[blocks, :, offsets] = codes.view(torch.uint8)

    def _blocks(self, index: int, place: Tensor) -> Tensor:
        return self._table[index].long()[place // self.case.block_size]

    @property
    def max_context(self) -> int:
        """Tokens of a sequence that the block tables have room for."""
        return self._width * self.case.block_size

    def moved(self, generator: torch.Generator) -> PagedSequences:
        """The same sequences in other blocks of a pool of the same size."""
        other = object.__new__(PagedSequences)
        other.case, other.seq_lens = self.case, self.seq_lens
        other._device, other._width = self._device, self._width
        num_blocks = self.pages.key.shape[0]
        order = torch.randperm(num_blocks, generator=generator, device=self._device)
        other.pages = dataclasses.replace(
            self.pages,
            **{name: _gathered(x, order) for name, x in _tensors(self.pages).items()},
        )
        place_of = torch.empty_like(order)
        place_of[order] = torch.arange(num_blocks, device=self._device)
        moved = place_of[self._table.clamp(min=0).long()].to(torch.int32)
        other._table = torch.where(self._table < 0, self._table, moved)
        return other

    def queries(self, generator: torch.Generator) -> list[Tensor]:
        """A query for every token: [seq_len, num_heads, head_dim] a sequence."""
        case = self.case
        return [
            (
                2 * torch.randn(
                    (n, case.num_heads, case.head_dim), generator=generator, device=self._device
                )
            ).to(case.dtype)
            for n in self.seq_lens
        ]  # fmt: skip

    def batch(self, chunks: Sequence[Chunk]) -> StepBatch:
        """A step over chunks; slots of later tokens keep what they hold."""
        device, size = self._device, self.case.block_size
        positions = [torch.arange(first, last, device=device) for _, first, last in chunks]
        slots = [
            self._blocks(index, place) * size + place % size
            for (index, _, _), place in zip(chunks, positions, strict=True)
        ]
        lengths = torch.tensor([last - first for _, first, last in chunks])
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        return make_batch(
            positions=torch.cat(positions),
            slot_mapping=torch.cat(slots),
            cu_seqlens_q=cu_seqlens.to(torch.int32).to(device),
            seq_lens=torch.tensor(
                [last for _, _, last in chunks], dtype=torch.int32, device=device
            ),
            block_table=self._table[[index for index, _, _ in chunks]].contiguous(),
            max_query_len=int(lengths.max()),
        )

    def attend(
        self, queries: Sequence[Tensor], chunks: Sequence[Chunk], *, num_padding_rows: int = 0
    ) -> list[Tensor]:
        """Run the kernels over chunks in one step; queries as self.queries made them."""
        rows = [queries[index][first:last] for index, first, last in chunks]
        if num_padding_rows:
            shape = (num_padding_rows, self.case.num_heads, self.case.head_dim)
            rows.append(torch.full(shape, torch.nan, dtype=self.case.dtype, device=self._device))
        out = attend(
            torch.cat(rows),
            self.pages,
            self.batch(chunks),
            scale=self.case.scale,
            window=self.case.window,
            softcap=self.case.softcap,
        )
        return list(out.split([len(x) for x in rows]))

    def expected(self, query: Tensor, chunk: Chunk) -> Tensor:
        """Attention of one chunk in float64: the softmax of all its scores at once.

        query: [last - first, num_heads, head_dim]. The stored keys and values are taken as
        they are, so that only the arithmetic is compared.
        """
        case, (index, first, last) = self.case, chunk
        place = torch.arange(last, device=self._device)
        blocks, offsets = self._blocks(index, place), place % case.block_size
        key, value = (
            stored(self.pages, kind, blocks, offsets).transpose(0, 1) for kind in ("key", "value")
        )
        num_rows = last - first
        grouped = query.double().view(num_rows, case.num_kv_heads, case.group, case.head_dim)
        grouped = grouped.transpose(0, 1).reshape(case.num_kv_heads, -1, case.head_dim)
        scores = (grouped * case.scale) @ key.transpose(1, 2)
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        own = torch.arange(first, last, device=self._device).repeat_interleave(case.group)
        is_hidden = place > own.unsqueeze(1)
        if case.window is not None:
            is_hidden |= place <= own.unsqueeze(1) - case.window
        weights = scores.masked_fill_(is_hidden, -torch.inf).softmax(dim=-1)
        attended = (weights @ value).view(case.num_kv_heads, num_rows, case.group, case.head_dim)
        return attended.transpose(0, 1).reshape(num_rows, case.num_heads, case.head_dim)


def _tensors(pages: KVPages) -> dict[str, Tensor]:
    values = {field.name: getattr(pages, field.name) for field in dataclasses.fields(pages)}
    return {name: x for name, x in values.items() if isinstance(x, Tensor)}


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    if x.dtype == FP8_DTYPE:
        return x.view(torch.uint8)[order].view(FP8_DTYPE)
    return x[order]


def _poison(pages: KVPages) -> None:
    for x in _tensors(pages).values():
        if x.dtype == FP8_DTYPE:
            x.view(torch.uint8).fill_(_NAN_CODE)
        else:
            x.fill_(torch.nan)


def stored(pages: KVPages, kind: str, blocks: Tensor, offsets: Tensor) -> Tensor:
    """What slots of "key" or "value" stand for: [num_slots, num_kv_heads, head_dim] float64."""
    x: Tensor = getattr(pages, kind)
    scales: Tensor | None = getattr(pages, f"{kind}_scale")
    if x.dtype != FP8_DTYPE:
        return x[blocks, :, offsets].double()
    codes = x.view(torch.uint8)[blocks, :, offsets].view(FP8_DTYPE).double()
    if scales is None:
        return codes * STATIC_SCALES[f"static_{kind}_scale"]
    return codes * scales[blocks, :, offsets].double().unsqueeze(-1)
