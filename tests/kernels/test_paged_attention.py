"""Attention over pages: right against a plain float64 softmax, and bit-stable in every row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.native import KernelBuildError, load_library
from stepwire_executor.kernels.select import native_kernels, reference_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, StaticScales
from support.kernels_support import fill_pages, make_batch, plain_attention, stored
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
STATIC_SCALES = [StaticScales(key=0.02, value=0.05), StaticScales(key=3.7, value=0.25)]
"""The second's keys are mostly codes below 1, the first's values leave the range and saturate."""


def random_context(
    seq_lens: list[int], num_kv_heads: int, head_dim: int
) -> tuple[list[Tensor], list[Tensor]]:
    keys = [torch.randn(n, num_kv_heads, head_dim) for n in seq_lens]
    # Values vary in size from token to token, so that fp8 scales do.
    values = [
        torch.randn_like(key) * (1 + torch.arange(len(key)) % 7).view(-1, 1, 1) for key in keys
    ]
    return keys, values


def check(
    kernels: Kernels,
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_heads: int = 3,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    page_dtype: torch.dtype | None = None,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    static: StaticScales | None = None,
) -> None:
    page_dtype = page_dtype or dtype
    batch = make_batch(query_lens, seq_lens, block_size=block_size)
    keys, values = random_context(seq_lens, num_kv_heads, head_dim)
    pages = fill_pages(batch, keys, values, dtype=page_dtype, block_size=block_size, static=static)
    query = (torch.randn(sum(query_lens), num_heads, head_dim) * 2).to(dtype)
    scale = head_dim**-0.5
    got = kernels.paged_attention(
        query, pages, batch, scale=scale, sliding_window=window, softcap=softcap
    )
    assert got.dtype == dtype
    assert got.is_contiguous()
    for i, rows in enumerate(query.split(query_lens)):
        expected = plain_attention(
            rows,
            stored(keys[i], page_dtype, None if static is None else static.key),
            stored(values[i], page_dtype, None if static is None else static.value),
            scale=scale,
            window=window,
            softcap=softcap,
        )
        actual = got.split(query_lens)[i].double()
        error = (actual - expected).abs().max() if rows.numel() else torch.zeros(())
        assert error <= TOLERANCE[dtype] * max(1.0, float(values[i].abs().max())), error


@pytest.mark.parametrize(
    "seq_len", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1100]
)
def test_one_query_attends_to_exactly_its_context(kernels: Kernels, seq_len: int) -> None:
    check(kernels, [1], [seq_len])


@pytest.mark.parametrize("group", [1, 3, 5, 7, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_every_group_of_heads_reads_its_own_keys(
    kernels: Kernels, group: int, num_kv_heads: int
) -> None:
    check(
        kernels,
        [1, 20, 3],
        [70, 20, 33],
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=32,
    )


@pytest.mark.parametrize("head_dim", [20, 32, 40, 64, 80, 96, 128, 256])
def test_any_head_dim_works(kernels: Kernels, head_dim: int) -> None:
    check(kernels, [5, 1], [21, 90], head_dim=head_dim, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.float16, torch.bfloat16, FP8_DTYPE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pages_of_any_dtype_stand_for_their_values(
    kernels: Kernels, dtype: torch.dtype, page_dtype: torch.dtype
) -> None:
    check(kernels, [1, 9], [130, 40], dtype=dtype, page_dtype=page_dtype)


@pytest.mark.parametrize("static", STATIC_SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_static_scales_multiply_keys_and_values(
    kernels: Kernels, dtype: torch.dtype, static: StaticScales
) -> None:
    options = {"dtype": dtype, "page_dtype": FP8_DTYPE, "static": static}
    check(kernels, [1, 9, 2], [600, 40, 30], num_heads=4, num_kv_heads=2, **options)  # type: ignore[arg-type]  # see check
    check(kernels, [1, 17], [65, 40], softcap=1.5, window=20, **options)  # type: ignore[arg-type]  # see check


def test_twice_the_static_scale_is_twice_the_scores_or_the_result(kernels: Kernels) -> None:
    batch = make_batch([1, 12], [20, 30])
    keys = [torch.randn(n, 1, 32) for n in (20, 30)]
    pages = fill_pages(batch, keys, keys, dtype=FP8_DTYPE, static=StaticScales(key=0.3, value=0.7))
    query = torch.randn(13, 2, 32)
    doubled = replace(pages, static_value_scale=1.4)
    assert torch.equal(
        kernels.paged_attention(query, doubled, batch, scale=0.2),
        kernels.paged_attention(query, pages, batch, scale=0.2) * 2,
    )
    doubled = replace(pages, static_key_scale=0.6)
    assert torch.equal(
        kernels.paged_attention(query, doubled, batch, scale=0.2),
        kernels.paged_attention(query, pages, batch, scale=0.4),
    )


def test_scales_that_pages_cannot_have_are_refused(native: Kernels) -> None:
    batch = make_batch([1], [2])
    keys = [torch.randn(2, 2, 16)]
    query = torch.randn(1, 2, 16)
    dynamic = fill_pages(batch, keys, keys, dtype=FP8_DTYPE)
    static = fill_pages(batch, keys, keys, dtype=FP8_DTYPE, static=STATIC_SCALES[0])
    plain = fill_pages(batch, keys, keys, dtype=torch.float32)
    assert dynamic.value_scale is not None
    for pages in (
        replace(dynamic, static_key_scale=1.0),
        replace(dynamic, value_scale=None),
        replace(dynamic, value_scale=None, static_value_scale=1.0),
        replace(dynamic, value_scale=dynamic.value_scale.float()),
        replace(static, static_value_scale=None),
        replace(static, static_key_scale=0.0),
        replace(static, static_value_scale=float("nan")),
        replace(plain, static_key_scale=1.0, static_value_scale=1.0),
    ):
        with pytest.raises(ValueError, match="scales"):
            native.paged_attention(query, pages, batch, scale=1.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("is_key", [True, False])
def test_a_poisoned_fp8_vector_reaches_its_own_sequence_only(
    kernels: Kernels, poison: float, is_key: bool
) -> None:
    batch = make_batch([2, 2, 2], [20, 20, 20])
    keys, values = ([torch.randn(20, 1, 32) for _ in range(3)] for _ in range(2))
    query = torch.randn(6, 2, 32)
    clean = kernels.paged_attention(
        query, fill_pages(batch, keys, values, dtype=FP8_DTYPE), batch, scale=0.2
    )
    (keys if is_key else values)[1][18, 0, 5] = poison
    pages = fill_pages(batch, keys, values, dtype=FP8_DTYPE)
    got = kernels.paged_attention(query, pages, batch, scale=0.2)
    assert torch.equal(got[:2], clean[:2])
    assert torch.equal(got[4:], clean[4:])
    assert got[2:4].isnan().all()


def test_every_fp8_code_is_read_as_torch_reads_it(kernels: Kernels) -> None:
    batch = make_batch([1], [1])
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE)
    pages = fill_pages(batch, [torch.ones(1, 1, 256)], [torch.ones(1, 1, 256)], dtype=FP8_DTYPE)
    assert pages.value_scale is not None
    block = int(batch.block_table[0, 0])
    pages.value.view(torch.uint8)[block, 0, 0] = codes.view(torch.uint8)
    pages.value_scale[block, 0, 0] = 0.5
    got = kernels.paged_attention(torch.ones(1, 1, 256), pages, batch, scale=1.0)
    assert torch.equal(got[0, 0].nan_to_num(7e7), (codes.float() * 0.5).nan_to_num(7e7))


@pytest.mark.parametrize("window", [1, 2, 16, 64, 100, 600])
def test_a_window_hides_what_lies_before_it(kernels: Kernels, window: int) -> None:
    check(kernels, [1, 40, 1], [700, 130, 5], window=window)


def test_softcap_bends_scores(kernels: Kernels) -> None:
    check(kernels, [1, 17], [65, 40], softcap=1.5)
    check(kernels, [1, 17], [65, 40], softcap=30.0, window=20)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 128])
def test_any_block_size_works(kernels: Kernels, block_size: int) -> None:
    check(kernels, [1, 30], [140, 61], block_size=block_size)


def test_a_sequence_without_query_tokens_is_left_alone(kernels: Kernels) -> None:
    check(kernels, [1, 0, 2], [4, 9, 18])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_native_agrees_with_plain_attention_on_random_batches(data: st.DataObject) -> None:
    try:
        kernels = native_kernels(load_library())
    except KernelBuildError:
        kernels = reference_kernels()
    lengths = data.draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(0, 150)).filter(lambda x: sum(x) > 0),
            min_size=1,
            max_size=4,
        )
    )
    num_kv_heads = data.draw(st.integers(1, 3))
    check(
        kernels,
        [query for query, _ in lengths],
        [query + before for query, before in lengths],
        num_heads=num_kv_heads * data.draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.sampled_from([8, 24, 64])),
        window=data.draw(st.none() | st.integers(1, 100)),
        page_dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, FP8_DTYPE])),
    )


class Rows:
    """Sequences whose rows may be computed in any company; equal bits are expected."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, page_dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.page_dtype = page_dtype
        self.seq_lens = [1300, 513, 64, 17, 200]
        self.keys, self.values = random_context(self.seq_lens, 2, 64)
        self.queries = [torch.randn(n, 6, 64).to(dtype) for n in self.seq_lens]

    def attend(
        self,
        chunks: list[tuple[int, int, int]],
        *,
        seed: int = 0,
        block_size: int = 16,
        window: int | None = None,
    ) -> list[Tensor]:
        """Attend rows first to last of sequence i for each (i, first, last) in one step."""
        query_lens = [last - first for _, first, last in chunks]
        seq_lens = [last for _, _, last in chunks]
        batch = make_batch(query_lens, seq_lens, seed=seed, block_size=block_size)
        pages = fill_pages(
            batch,
            [self.keys[i][:last] for i, _, last in chunks],
            [self.values[i][:last] for i, _, last in chunks],
            dtype=self.page_dtype,
            block_size=block_size,
        )
        query = torch.cat([self.queries[i][first:last] for i, first, last in chunks])
        out = self.kernels.paged_attention(query, pages, batch, scale=0.125, sliding_window=window)
        return list(out.split(query_lens))


@pytest.fixture(
    params=[
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, FP8_DTYPE),
    ],
    ids=["float32", "bfloat16", "fp8 pages"],
)
def rows(request: pytest.FixtureRequest, native: Kernels) -> Rows:
    return Rows(native, *request.param)


@pytest.mark.parametrize("window", [None, 100])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(rows: Rows, window: int | None) -> None:
    chunks = [(i, n - 1, n) for i, n in enumerate(rows.seq_lens)]
    alone = [rows.attend([chunk], window=window)[0] for chunk in chunks]
    together = rows.attend(chunks, seed=1, window=window)
    crowded = rows.attend(chunks * 8, seed=2, window=window)
    for i, expected in enumerate(alone):
        assert torch.equal(together[i], expected)
        assert torch.equal(crowded[i], expected)
        assert torch.equal(crowded[i + 7 * len(chunks)], expected)


def test_a_row_has_the_same_bits_however_its_sequence_is_cut(rows: Rows) -> None:
    for i, length in ((1, 513), (4, 200)):
        whole = rows.attend([(i, 0, length)])[0]
        for size in (1, 7, 64, 100):
            firsts = list(range(0, length, size))
            if size == 1:
                firsts = firsts[:3] + firsts[-5:]
            for first in firsts:
                last = min(first + size, length)
                chunk = rows.attend([(i, first, last), (3, 16, 17)])[0]
                assert torch.equal(chunk, whole[first:last])


@pytest.mark.parametrize("window", [None, 20])
def test_queries_of_a_draft_have_the_bits_of_one_at_a_time(rows: Rows, window: int | None) -> None:
    """At every offset of a block, and around the place where long contexts are split."""
    for i, begin, end in ((3, 0, 17), (4, 100, 134), (1, 496, 513)):
        places = [(i, place, place + 1) for place in range(begin, end)]
        alone = torch.cat(rows.attend(places, window=window))
        for size in range(2, 18):
            firsts = range(begin, end - size + 1)
            drafts = rows.attend([(i, first, first + size) for first in firsts], window=window)
            for first, got in zip(firsts, drafts, strict=True):
                assert torch.equal(got, alone[first - begin : first - begin + size])


def test_a_row_has_the_same_bits_wherever_its_blocks_lie(rows: Rows) -> None:
    expected = rows.attend([(0, 1299, 1300)])[0]
    for seed in (1, 2):
        for block_size in (8, 16, 64):
            moved = rows.attend([(0, 1299, 1300)], seed=seed, block_size=block_size)[0]
            assert torch.equal(moved, expected)


def test_a_row_has_the_same_bits_with_any_number_of_threads(rows: Rows) -> None:
    chunks = [(0, 1290, 1300), (1, 512, 513)]
    torch.set_num_threads(1)
    expected = rows.attend(chunks)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        for got, wanted in zip(rows.attend(chunks), expected, strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(rows.attend(chunks[:1])[0], expected[0])


@pytest.mark.parametrize("seen", [99, 100])
def test_the_future_of_a_sequence_cannot_reach_a_row(rows: Rows, seen: int) -> None:
    expected = rows.attend([(4, 0, seen)])[0]
    rows.keys[4][seen:] = torch.nan
    rows.values[4][seen:] = torch.nan
    assert torch.equal(rows.attend([(4, 0, 200)])[0][:seen], expected)


@pytest.mark.parametrize("window", [20, 21])
def test_what_a_window_hides_cannot_reach_a_row(rows: Rows, window: int) -> None:
    """Tokens are multiplied in pairs by some CPUs: a window may begin and end inside one."""
    for first, last in ((150, 151), (151, 152), (150, 200)):
        expected = rows.attend([(4, first, last)], window=window)[0]
        keys, values = rows.keys[4].clone(), rows.values[4].clone()
        rows.keys[4][: first + 1 - window] = torch.nan
        rows.values[4][: first + 1 - window] = torch.nan
        assert torch.equal(rows.attend([(4, first, last)], window=window)[0], expected)
        rows.keys[4], rows.values[4] = keys, values


def test_a_table_that_lacks_a_block_is_refused(native: Kernels) -> None:
    batch = make_batch([1], [40])
    keys, values = random_context([40], 1, 32)
    pages = fill_pages(batch, keys, values, dtype=torch.float32)
    for bad in (-1, 10**6):
        batch.block_table[0, 1] = bad
        with pytest.raises(ValueError, match="block_table"):
            native.paged_attention(torch.randn(1, 2, 32), pages, batch, scale=1.0)
