"""Attention over pages by Triton: a row has the same bits in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stepwire_executor.kv_cache import FP8_DTYPE
from support.kernels_support import fill_pages, make_batch
from support.triton_attention import attend
from support.triton_interpreter import requires_triton
from torch import Tensor

pytestmark = requires_triton


class Rows:
    """Sequences whose rows may be computed in any company; equal bits are expected."""

    def __init__(self, dtype: torch.dtype, page_dtype: torch.dtype) -> None:
        self.page_dtype = page_dtype
        self.seq_lens = [1030, 530, 17]
        self.keys = [torch.randn(n, 1, 32) for n in self.seq_lens]
        self.values = [torch.randn(n, 1, 32) for n in self.seq_lens]
        self.queries = [torch.randn(n, 3, 32).to(dtype) for n in self.seq_lens]

    def attend(
        self,
        chunks: list[tuple[int, int, int]],
        *,
        seed: int = 0,
        block_size: int = 16,
        window: int | None = None,
        max_query_len: int | None = None,
        min_blocks: int = 0,
    ) -> list[Tensor]:
        """Attend rows first to last of sequence i for each (i, first, last) in one step."""
        query_lens = [last - first for _, first, last in chunks]
        batch = make_batch(
            query_lens, [last for _, _, last in chunks], seed=seed, block_size=block_size
        )
        pages = fill_pages(
            batch,
            [self.keys[i][:last] for i, _, last in chunks],
            [self.values[i][:last] for i, _, last in chunks],
            dtype=self.page_dtype,
            block_size=block_size,
        )
        missing = max(0, min_blocks - batch.block_table.shape[1])
        batch = replace(
            batch, block_table=torch.nn.functional.pad(batch.block_table, (0, missing), value=-1)
        )
        query = torch.cat([self.queries[i][first:last] for i, first, last in chunks])
        out = attend(query, pages, batch, scale=0.2, window=window, max_query_len=max_query_len)
        return list(out.split(query_lens))


@pytest.fixture(
    params=[
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, FP8_DTYPE),
    ],
    ids=["float32", "float16", "fp8 pages"],
)
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows(*request.param)


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(rows: Rows, window: int | None) -> None:
    chunks = [(i, n - 1, n) for i, n in enumerate(rows.seq_lens)]
    alone = [rows.attend([chunk], window=window, max_query_len=1)[0] for chunk in chunks]
    together = rows.attend([*chunks, (2, 0, 17), *chunks], seed=1, window=window)
    for i, expected in enumerate(alone):
        assert torch.equal(together[i], expected)
        assert torch.equal(together[i + len(chunks) + 1], expected)


@pytest.mark.parametrize(("size", "window"), [(1, None), (5, 100), (9, None), (10, 100)])
def test_a_row_has_the_same_bits_however_its_prompt_is_cut(
    rows: Rows, size: int, window: int | None
) -> None:
    """Chunks of up to 8 tokens are decoded, longer ones are prefilled."""
    begin, end = 507, 517
    whole = rows.attend([(1, begin, end)], window=window)[0]
    for first in range(begin, end, size):
        last = min(first + size, end)
        chunk = rows.attend([(1, first, last)], window=window)[0]
        assert torch.equal(chunk, whole[first - begin : last - begin])


def test_a_row_has_the_same_bits_wherever_its_blocks_lie(rows: Rows) -> None:
    for chunk in ((0, 1029, 1030), (1, 510, 520)):
        expected = rows.attend([chunk])[0]
        for block_size in (8, 64):
            assert torch.equal(rows.attend([chunk], seed=1, block_size=block_size)[0], expected)


def test_the_first_of_two_splits_alone_has_the_bits_of_a_join() -> None:
    """A sequence of one split skips the join, which would have left its bits as they are."""
    rows = Rows(torch.float16, torch.float16)
    alone = rows.attend([(1, 509, 512)])[0]
    joined = rows.attend([(1, 509, 516)])[0][:3]
    assert torch.equal(alone, joined)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, FP8_DTYPE)])
def test_a_row_has_the_same_bits_in_splits_of_any_length(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """A table wide enough for longer splits: rows are still equal, decoded or prefilled."""
    rows = Rows(*dtypes)
    width = 65_536 // 64
    whole = rows.attend([(0, 1015, 1030)], block_size=64, min_blocks=width)[0]
    for first in range(1015, 1030, 5):
        chunk = rows.attend([(0, first, first + 5)], block_size=64, min_blocks=width)[0]
        assert torch.equal(chunk, whole[first - 1015 : first - 1010])
