"""Attention over pages by Triton: right against a plain float64 softmax on every path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from stepwire_executor.kernels.paged_attention.triton_config import choose_split_tokens
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache, StaticScales
from support.kernels_support import fill_pages, make_batch, plain_attention, stored
from support.triton_attention import attend
from support.triton_interpreter import DEVICE, IS_INTERPRETED, requires_triton

pytestmark = requires_triton
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
STATIC_SCALES = [StaticScales(key=0.02, value=0.05), StaticScales(key=3.7, value=0.25)]
"""The second's keys are mostly codes below 1, the first's values leave the range and saturate."""
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, FP8_DTYPE),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, FP8_DTYPE),
    (torch.bfloat16, FP8_DTYPE),
    *([] if IS_INTERPRETED else [(torch.bfloat16, torch.bfloat16)]),
]


def check(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    page_dtype: torch.dtype | None = None,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    static: StaticScales | None = None,
) -> None:
    page_dtype = page_dtype or dtype
    batch = make_batch(query_lens, seq_lens, block_size=block_size)
    keys = [torch.randn(n, num_kv_heads, head_dim) for n in seq_lens]
    # Values vary in size from token to token, so that fp8 scales do.
    values = [
        torch.randn_like(key) * (1 + torch.arange(len(key)) % 7).view(-1, 1, 1) for key in keys
    ]
    pages = fill_pages(batch, keys, values, dtype=page_dtype, block_size=block_size, static=static)
    query = (torch.randn(sum(query_lens), num_heads, head_dim) * 2).to(dtype)
    scale = head_dim**-0.5
    got = attend(query, pages, batch, scale=scale, window=window, softcap=softcap)
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
        largest = max([1.0, *values[i].abs().flatten().tolist()])
        torch.testing.assert_close(
            got.split(query_lens)[i].double(),
            expected,
            rtol=0,
            atol=TOLERANCE[dtype] * largest,
        )


@pytest.mark.parametrize("seq_len", [1, 2, 15, 16, 17, 511, 512, 513, 1030])
def test_one_query_attends_to_exactly_its_context(seq_len: int) -> None:
    check([1], [seq_len])


@pytest.mark.parametrize("query_len", range(2, 9))
def test_drafts_attend_causally_across_a_split(query_len: int) -> None:
    check([query_len], [513 + query_len // 2], num_heads=3)


@pytest.mark.parametrize(
    ("query_len", "seq_len"), [(9, 9), (64, 64), (33, 50), (17, 513), (40, 530)]
)
def test_a_chunk_of_a_prompt_attends_to_what_came_before(query_len: int, seq_len: int) -> None:
    check([query_len], [seq_len])


@pytest.mark.parametrize("group", [1, 3, 5, 7, 16])
def test_every_group_of_heads_reads_its_own_keys(group: int) -> None:
    check([1, 20, 8], [70, 20, 33], num_heads=group * 2, num_kv_heads=2)


@pytest.mark.parametrize("head_dim", [20, 64, 80, 96, 128, 256])
def test_any_head_dim_works(head_dim: int) -> None:
    check([2, 10], [21, 40], head_dim=head_dim)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_pages_of_any_dtype_stand_for_their_values(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    dtype, page_dtype = dtypes
    check([1, 9, 2], [600, 40, 30], dtype=dtype, page_dtype=page_dtype, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 128])
def test_any_block_size_works(block_size: int) -> None:
    check([1, 30], [140, 61], block_size=block_size)
    check([1, 12], [140, 61], block_size=block_size, dtype=torch.float16, page_dtype=FP8_DTYPE)


@pytest.mark.parametrize("window", [1, 2, 16, 64, 100, 600])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    check([1, 40, 5], [700, 130, 530], window=window)


def test_softcap_bends_scores() -> None:
    check([1, 17], [65, 40], softcap=1.5)
    check([1, 17], [65, 40], softcap=30.0, window=20)
    check([1, 17], [65, 40], softcap=2.0, dtype=torch.float16, page_dtype=FP8_DTYPE)


def test_a_sequence_without_query_tokens_is_left_alone() -> None:
    check([1, 0, 2, 0], [4, 9, 18, 0])


@pytest.fixture
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """Have torch.empty return NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
def test_every_element_is_written() -> None:
    assert torch.empty(1).isnan()
    check([1, 0, 20, 3], [600, 7, 20, 30], num_heads=6, num_kv_heads=2, head_dim=20)
    check([2], [1500], window=100)


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
def test_a_row_of_a_sequence_without_context_is_zero() -> None:
    batch = make_batch([1, 1], [5, 5])
    keys = [torch.randn(5, 1, 16) for _ in range(2)]
    pages = fill_pages(batch, keys, keys, dtype=torch.float32)
    batch.seq_lens[1] = 0
    got = attend(torch.randn(2, 2, 16), pages, batch, scale=1.0)
    assert got[0].abs().min() > 0
    assert not got[1].any()


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
def test_rows_that_pad_a_batch_are_zero() -> None:
    batch = make_batch([1, 0, 0], [5, 0, 0])
    keys = [torch.randn(n, 1, 16) for n in (5, 0, 0)]
    pages = fill_pages(batch, keys, keys, dtype=torch.float32)
    got = attend(torch.randn(4, 2, 16), pages, batch, scale=1.0)
    assert got[0].abs().min() > 0
    assert not got[1:].any()


@pytest.mark.parametrize("static", STATIC_SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_static_scales_multiply_keys_and_values(dtype: torch.dtype, static: StaticScales) -> None:
    options = {"dtype": dtype, "page_dtype": FP8_DTYPE, "static": static}
    check([1, 9, 2], [600, 40, 30], num_heads=4, num_kv_heads=2, **options)  # type: ignore[arg-type]  # see check
    check([1, 17], [65, 40], softcap=1.5, window=20, **options)  # type: ignore[arg-type]  # see check


def test_twice_the_static_scale_is_twice_the_scores_or_the_result() -> None:
    batch = make_batch([1, 12], [20, 30])
    keys = [torch.randn(n, 1, 32) for n in (20, 30)]
    pages = fill_pages(batch, keys, keys, dtype=FP8_DTYPE, static=StaticScales(key=0.3, value=0.7))
    query = torch.randn(13, 2, 32)
    doubled = replace(pages, static_value_scale=1.4)
    assert torch.equal(
        attend(query, doubled, batch, scale=0.2),
        attend(query, pages, batch, scale=0.2) * 2,
    )
    doubled = replace(pages, static_key_scale=0.6)
    assert torch.equal(
        attend(query, doubled, batch, scale=0.2),
        attend(query, pages, batch, scale=0.4),
    )


def test_scales_that_pages_cannot_have_are_refused() -> None:
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
            attend(query, pages, batch, scale=1.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("is_key", [True, False])
def test_a_poisoned_fp8_vector_reaches_its_own_sequence_only(poison: float, is_key: bool) -> None:
    batch = make_batch([2, 2, 2], [20, 20, 20])
    keys, values = ([torch.randn(20, 1, 32) for _ in range(3)] for _ in range(2))
    query = torch.randn(6, 2, 32)
    clean = attend(query, fill_pages(batch, keys, values, dtype=FP8_DTYPE), batch, scale=0.2)
    (keys if is_key else values)[1][18, 0, 5] = poison
    pages = fill_pages(batch, keys, values, dtype=FP8_DTYPE)
    got = attend(query, pages, batch, scale=0.2)
    assert torch.equal(got[:2], clean[:2])
    assert torch.equal(got[4:], clean[4:])
    assert got[2:4].isnan().all()


def test_every_fp8_code_is_read_as_torch_reads_it() -> None:
    batch = make_batch([1], [1])
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE)
    pages = fill_pages(batch, [torch.ones(1, 1, 256)], [torch.ones(1, 1, 256)], dtype=FP8_DTYPE)
    assert pages.value_scale is not None
    block = int(batch.block_table[0, 0])
    pages.value.view(torch.uint8)[block, 0, 0] = codes.view(torch.uint8)
    pages.value_scale[block, 0, 0] = 0.5
    for dtype in (torch.float32, torch.float16):
        got = attend(torch.ones(1, 1, 256, dtype=dtype), pages, batch, scale=1.0).float()
        expected = codes.float() * 0.5
        # The interpreter takes the two codes of NaN for 480.
        is_tested = ~expected.isnan() | (not IS_INTERPRETED)
        torch.testing.assert_close(
            got[0, 0][is_tested], expected[is_tested], rtol=0, atol=0, equal_nan=True
        )


def test_a_query_too_large_for_float16_is_scaled() -> None:
    batch = make_batch([1], [3])
    keys = [torch.randn(3, 1, 16)]
    pages = fill_pages(batch, keys, keys, dtype=FP8_DTYPE)
    query = (torch.randn(1, 1, 16) * 1e7).bfloat16()
    expected = plain_attention(query, *(stored(keys[0], FP8_DTYPE),) * 2, scale=1e-7)
    got = attend(query, pages, batch, scale=1e-7)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-2)


def test_a_key_and_value_of_zeros_are_read_as_zeros() -> None:
    batch = make_batch([1], [2])
    zeros = [torch.zeros(2, 1, 16)]
    pages = fill_pages(batch, zeros, zeros, dtype=FP8_DTYPE)
    assert not attend(torch.randn(1, 1, 16).half(), pages, batch, scale=1.0).any()


def test_blocks_far_into_the_pool_are_found() -> None:
    """Block 7 starts at element 7 * 2^29, past 2^31; untouched pages take no memory on a CPU."""
    if not IS_INTERPRETED:
        pytest.skip("would take gigabytes of a GPU's memory")
    block_size = 2**21
    batch = make_batch([1], [2], block_size=block_size)
    batch.block_table[0, 0] = 7
    cache = KVCache(
        num_layers=1,
        num_blocks=8,
        num_kv_heads=1,
        block_size=block_size,
        head_dim=256,
        dtype=FP8_DTYPE,
        device=DEVICE,
    )
    (pages,) = cache.layers
    assert pages.key_scale is not None
    assert pages.value_scale is not None
    pages.value.view(torch.uint8)[7, 0, :2] = 0x40  # 2.0
    pages.key_scale[7, 0, :2] = 1.0
    pages.value_scale[7, 0, :2] = 1.0
    got = attend(torch.ones(1, 1, 256).half(), pages, batch, scale=1.0)
    assert torch.equal(got, torch.full_like(got, 2.0))


def test_values_and_keys_far_from_one_keep_their_precision() -> None:
    """fp8 vectors are multiplied by their scales in float16, which must hold them."""
    batch = make_batch([1], [40])
    for size in (3e-3, 300.0, 4000.0):
        keys, values = (torch.randn(40, 1, 32), torch.randn(40, 1, 32) * size)
        pages = fill_pages(batch, [keys * size], [values], dtype=FP8_DTYPE)
        query = torch.randn(1, 1, 32).half()
        got = attend(query, pages, batch, scale=0.2 / size).double()
        expected = plain_attention(
            query, stored(keys * size, FP8_DTYPE), stored(values, FP8_DTYPE), scale=0.2 / size
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=4e-3 * size)


def test_no_block_table_is_cut_into_more_than_the_most_splits() -> None:
    assert [choose_split_tokens(n) for n in (1, 4096, 32_768, 32_769, 131_072, 1_000_000)] == [
        512, 512, 512, 1024, 2048, 16_384
    ]  # fmt: skip


def test_wrong_arguments_are_refused() -> None:
    batch = make_batch([1], [2])
    keys = [torch.randn(2, 2, 16)]
    pages = fill_pages(batch, keys, keys, dtype=torch.float32)
    query = torch.randn(1, 2, 16)
    with pytest.raises(ValueError, match="divide"):
        attend(torch.randn(1, 3, 16), pages, batch, scale=1.0)
    with pytest.raises(ValueError, match="elements"):
        attend(torch.randn(1, 2, 32), pages, batch, scale=1.0)
    with pytest.raises(ValueError, match="query must be"):
        attend(query.double(), pages, batch, scale=1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        attend(query, pages, batch, scale=0.0)
    with pytest.raises(ValueError, match="sliding_window"):
        attend(query, pages, batch, scale=1.0, window=0)
    with pytest.raises(ValueError, match="softcap"):
        attend(query, pages, batch, scale=1.0, softcap=0.0)
