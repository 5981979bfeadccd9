"""Normalisation, gated activation, rotary embedding and the write into pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.rope_and_write_kv import MIN_AMAX
from stepwire_executor.kernels.rope_and_write_kv.reference import quantise
from stepwire_executor.kernels.select import reference_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, KVPages, StaticScales
from support.kernels_support import (
    make_batch,
    num_blocks,
    poisoned_pages,
    smallest_bfloat16_above,
    static_codes,
)
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=1.01 * ULP[dtype], atol=2e-6)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 64, 576, 1001])
def test_rows_are_normalised(kernels: Kernels, size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), normalised(x, weight), dtype)
    wide = weight.float()
    assert_close(kernels.rms_norm(x, wide, 1e-5), normalised(x, wide), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_summed_in_place_and_then_normalised(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    x, residual = torch.randn(2, 3, 50).to(dtype), torch.randn(2, 3, 50).to(dtype)
    weight, before, total = torch.randn(50).to(dtype), x.clone(), residual + x
    got = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    assert_close(got, normalised(total, weight), dtype)


def test_heads_of_a_fused_projection_are_normalised_in_place(kernels: Kernels) -> None:
    fused, weight = torch.randn(4, 10 * 32), torch.randn(32)
    heads = fused[:, 64:256].view(4, 6, 32)
    assert_close(kernels.rms_norm(heads, weight, 1e-5), normalised(heads, weight), torch.float32)
    assert_close(
        kernels.rms_norm(fused[:, :32], weight, 1e-5),
        normalised(fused[:, :32], weight),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 48, 1536])
def test_the_gate_multiplies(kernels: Kernels, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 2 * size) * 20).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(
        kernels.silu_and_mul(x).double(), expected, rtol=1.5 * ULP[dtype], atol=2e-6
    )


def test_the_gate_saturates_without_nan(kernels: Kernels) -> None:
    x = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, 1.0, 1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e30]])
    torch.testing.assert_close(kernels.silu_and_mul(x), expected, rtol=1e-6, atol=1e-5)


def angles(max_positions: int, rotary_dim: int) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    phase = torch.arange(max_positions).double().unsqueeze(1) * rates
    return torch.cat((phase.cos(), phase.sin()), dim=1).float()


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Turn each pair as a complex number."""
    half = table.shape[1] // 2
    turn = torch.complex(table[:, :half].double(), table[:, half:].double())[positions]
    x = x.double()
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn.unsqueeze(1)
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), dim=-1)


def mixed(x: Tensor, size: int) -> Tensor:
    """Multiply stretches of size elements by the Hadamard matrix as it is defined."""
    place = torch.arange(size)
    parity = torch.zeros(size, size, dtype=torch.int64)
    for bit in range(size.bit_length()):
        parity += (place.unsqueeze(1) & place) >> bit & 1
    matrix = torch.where(parity % 2 == 1, -1.0, 1.0).double() / size**0.5
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def read(pages: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    blocks, offsets = slots // pages.shape[2], slots % pages.shape[2]
    x = pages.double()[blocks, :, offsets]
    return x if scales is None else x * scales.double()[blocks, :, offsets].unsqueeze(-1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeCase:
    """Arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    pages: KVPages
    batch: StepBatch

    @classmethod
    def make(
        cls,
        dtype: torch.dtype,
        page_dtype: torch.dtype,
        *,
        query_lens: list[int],
        head_dim: int = 64,
        rotary_dim: int = 64,
        static: StaticScales | None = None,
        has_offset: bool = False,
    ) -> RopeCase:
        """Build views of one fused projection, as the model has them."""
        seq_lens = [n + 3 for n in query_lens]
        num_tokens = sum(query_lens)
        fused = torch.randn(num_tokens, 9 * head_dim).to(dtype)
        heads = fused.view(num_tokens, 9, head_dim)
        pages = poisoned_pages((num_blocks(seq_lens, 16), 2, 16, head_dim), page_dtype, static)
        if has_offset:
            pages = dataclasses.replace(pages, key_offset=3 * torch.randn(2, head_dim))
        return cls(
            query=heads[:, :5],
            key=heads[:, 5:7],
            value=heads[:, 7:],
            table=angles(max(seq_lens), rotary_dim),
            pages=pages,
            batch=make_batch(query_lens, seq_lens),
        )

    def run(self, kernels: Kernels) -> None:
        kernels.rope_and_write_kv(
            self.query, self.key, self.value, self.table, self.pages, self.batch
        )


PAGE_KINDS = [*((dtype, False) for dtype in DTYPES), (FP8_DTYPE, False), (FP8_DTYPE, True)]


@pytest.mark.parametrize(("page_dtype", "has_offset"), PAGE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (20, 12)])
def test_queries_turn_and_keys_and_values_are_stored(
    kernels: Kernels,
    dtype: torch.dtype,
    page_dtype: torch.dtype,
    head_dim: int,
    rotary_dim: int,
    has_offset: bool,
) -> None:
    case = RopeCase.make(
        dtype,
        page_dtype,
        query_lens=[1, 20],
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        has_offset=has_offset,
    )
    query = rotated(case.query, case.table, case.batch.positions)
    key = rotated(case.key, case.table, case.batch.positions)
    value = case.value.double()
    if case.pages.key_offset is not None:
        key = key - case.pages.key_offset.double()
    if page_dtype == FP8_DTYPE:
        size = {64: 64, 80: 16, 20: 2}[head_dim]
        query, key = mixed(query, size), mixed(key, size)
    case.run(kernels)
    assert_close(case.query, query, dtype)
    for pages, scales, expected in (
        (case.pages.key, case.pages.key_scale, key),
        (case.pages.value, case.pages.value_scale, value),
    ):
        got = read(pages, scales, case.batch.slot_mapping)
        if page_dtype == FP8_DTYPE:
            # Half a step of e4m3: 2^-4 of the value or 2^-10 of the smallest normal's 2^-6.
            step = expected.abs().amax(-1, keepdim=True) / 448
            assert bool(((got - expected).abs() <= expected.abs() * 0.0626 + step * 2**-9).all())
        else:
            torch.testing.assert_close(
                got, expected, rtol=1.01 * ULP[page_dtype], atol=2e-6, check_dtype=False
            )


def test_a_key_has_the_scale_of_four_that_rounds_it_best(kernels: Kernels) -> None:
    case = RopeCase.make(torch.float32, FP8_DTYPE, query_lens=[40])
    key = mixed(rotated(case.key, case.table, case.batch.positions), 64)
    codes, scale = quantise(key)
    plain = codes.double() * scale.double().unsqueeze(-1)
    case.run(kernels)
    got = read(case.pages.key, case.pages.key_scale, case.batch.slot_mapping)
    error, plain_error = ((x - key).square().sum(dim=-1) for x in (got, plain))
    assert bool((error <= plain_error * (1 + 1e-4)).all())
    assert float(error.sum()) < 0.95 * float(plain_error.sum())


def test_an_offset_of_zero_changes_nothing(kernels: Kernels) -> None:
    case = RopeCase.make(torch.float32, FP8_DTYPE, query_lens=[20])
    pages = {x.name: getattr(case.pages, x.name) for x in dataclasses.fields(case.pages)}
    copies = {name: x.clone() for name, x in pages.items() if isinstance(x, Tensor)}
    zero = dataclasses.replace(case.pages, **copies, key_offset=torch.zeros(2, 64))
    other = dataclasses.replace(case, query=case.query.clone(), pages=zero)
    case.run(kernels)
    other.run(kernels)
    assert torch.equal(case.query, other.query)
    assert torch.equal(case.pages.key.view(torch.uint8), zero.key.view(torch.uint8))


@pytest.mark.parametrize("sign", [1, -1])
def test_attention_does_not_see_the_offset_but_for_what_it_saves(
    kernels: Kernels, sign: int
) -> None:
    """A common part of keys is what an offset is for; of the wrong sign it doubles the error."""
    case = RopeCase.make(torch.float32, torch.float32, query_lens=[40])
    batch = make_batch([40], [40])
    common = 4 * torch.randn(2, 64)
    still = torch.zeros_like(case.table)
    still[:, :32] = 1.0  # no rotation
    case.key.add_(common)
    fp8 = poisoned_pages(tuple(case.pages.key.shape), FP8_DTYPE)  # type: ignore[arg-type] # four numbers
    results = []
    for pages in (
        case.pages,
        fp8,
        dataclasses.replace(fp8, key_offset=sign * common),
    ):
        query = case.query[:, :4].clone()
        kernels.rope_and_write_kv(query, case.key, case.value, still, pages, batch)
        results.append(kernels.paged_attention(query, pages, batch, scale=0.125))
    exact, plain, centred = results
    error, plain_error = (float((x - exact).square().mean().sqrt()) for x in (centred, plain))
    assert plain_error < 0.2 * float(exact.std())
    if sign > 0:
        assert error < 0.6 * plain_error
    else:
        assert error > 1.2 * plain_error


def test_offsets_that_pages_cannot_have_are_refused(native: Kernels) -> None:
    case = RopeCase.make(torch.float32, FP8_DTYPE, query_lens=[2], has_offset=True)
    offset = case.pages.key_offset
    assert offset is not None
    for wrong in (offset[:1], offset.double(), torch.zeros(64, 2).T):
        with pytest.raises(ValueError, match="key_offset"):
            dataclasses.replace(case, pages=dataclasses.replace(case.pages, key_offset=wrong)).run(
                native
            )
    plain = RopeCase.make(torch.float32, torch.float32, query_lens=[2])
    pages = dataclasses.replace(plain.pages, key_offset=offset)
    with pytest.raises(ValueError, match="key_offset"):
        dataclasses.replace(plain, pages=pages).run(native)
    with pytest.raises(ValueError, match="softcap"):
        native.paged_attention(
            case.query[:, :4].contiguous(), case.pages, case.batch, scale=1.0, softcap=30.0
        )


def test_no_slot_but_the_named_ones_is_written(kernels: Kernels) -> None:
    for page_dtype in (torch.float32, FP8_DTYPE):
        case = RopeCase.make(torch.float32, page_dtype, query_lens=[4, 19])
        case.batch.slot_mapping[2] = -1
        case.run(kernels)
        slots = case.batch.slot_mapping
        is_written = torch.zeros(case.pages.key.shape[0] * 16, dtype=torch.bool)
        is_written[slots[slots >= 0]] = True
        is_written = is_written.view(-1, 1, 16).expand(-1, 2, -1)
        for pages in (case.pages.key, case.pages.value):
            is_number = pages.double().isnan().logical_not()
            assert torch.equal(is_number.all(dim=-1), is_written)
            assert torch.equal(is_number.any(dim=-1), is_written)


def fp8_round_trip(kernels: Kernels, values: Tensor) -> tuple[Tensor, Tensor]:
    """Store rows, [num_rows, head_dim], as values of one head; return codes and scales."""
    num_rows, head_dim = values.shape
    pages = poisoned_pages((num_rows, 1, 1, head_dim), FP8_DTYPE)
    batch = dataclasses.replace(
        make_batch([num_rows], [num_rows], block_size=1), slot_mapping=torch.arange(num_rows)
    )
    value = values.unsqueeze(1)
    kernels.rope_and_write_kv(value.clone(), value, value, angles(num_rows, 2), pages, batch)
    assert pages.value_scale is not None
    return pages.value.view(num_rows, head_dim), pages.value_scale.view(num_rows)


def test_every_fp8_code_survives_a_round_trip(kernels: Kernels) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE)
    numbers = codes.float()
    numbers[numbers.isnan()] = 0.0  # 0x7f and 0xff
    got, scale = fp8_round_trip(kernels, numbers.unsqueeze(0))
    assert scale.tolist() == [1.0]  # the largest code is 448
    assert torch.equal(got[0].float(), numbers)
    assert torch.equal(got[0].float().signbit()[1:127], numbers.signbit()[1:127])


def test_fp8_rounds_to_nearest_even_as_torch_does(kernels: Kernels) -> None:
    between = torch.arange(127, dtype=torch.uint8).view(FP8_DTYPE).float()
    middles = (between[1:] + between[:-1]) / 2
    nudged = torch.cat((middles, middles * (1 + 1e-6), middles * (1 - 1e-6), -middles))
    values = torch.cat((nudged, torch.tensor([448.0]))).unsqueeze(0)
    got, _ = fp8_round_trip(kernels, values)
    assert torch.equal(got.float(), values.to(FP8_DTYPE).float())


def test_fp8_scales_follow_the_largest_magnitude(kernels: Kernels) -> None:
    values = torch.randn(40, 24) * torch.logspace(-20, 20, 40).unsqueeze(1)
    values[7] = 0.0
    got, scale = fp8_round_trip(kernels, values)
    exact = values.abs().amax(dim=1).clamp(min=MIN_AMAX) / 448
    assert torch.equal(scale, smallest_bfloat16_above(exact))
    assert got[7].float().abs().max() == 0
    is_scaled = values.abs().amax(dim=1) > MIN_AMAX
    assert bool((got[is_scaled].float().abs().amax(dim=1) == 448).all())
    assert not got.float().isnan().any()
    restored = got.float() * scale.unsqueeze(1)
    bound = values.abs() * 0.0626 + scale.unsqueeze(1) * 2.0**-9
    assert bool(((restored - values).abs() <= bound).all())


def test_a_vector_that_is_not_finite_reads_as_nan_and_harms_no_neighbour(
    kernels: Kernels,
) -> None:
    values = torch.randn(6, 16)
    _, clean_scale = fp8_round_trip(kernels, values)
    for row, poison in ((0, torch.nan), (2, torch.inf), (3, -torch.inf)):
        values[row, 3] = poison
    values.view(torch.int32)[5] = 0x7FFFFFFF  # a NaN that rounding up would carry into the sign
    got, scale = fp8_round_trip(kernels, values)
    is_finite = values.isfinite().all(dim=1)
    assert torch.equal(scale.isnan(), ~is_finite)
    assert torch.equal(scale[is_finite], clean_scale[is_finite])
    restored = got.float() * scale.unsqueeze(1)
    assert restored[~is_finite].isnan().all()
    assert restored[is_finite].isfinite().all()


def test_native_agrees_with_the_reference_on_pages(native: Kernels) -> None:
    for dtype in DTYPES:
        case = RopeCase.make(dtype, FP8_DTYPE, query_lens=[30])
        other = dataclasses.replace(
            case,
            query=case.query.clone(),
            pages=poisoned_pages(tuple(case.pages.key.shape), FP8_DTYPE),  # type: ignore[arg-type] # four numbers
        )
        case.run(native)
        other.run(reference_kernels())
        # Values are not rotated, so both must round alike, bit for bit.
        assert torch.equal(case.pages.value.view(torch.uint8), other.pages.value.view(torch.uint8))
        slots = case.batch.slot_mapping
        assert torch.equal(
            read(case.pages.value, case.pages.value_scale, slots),
            read(other.pages.value, other.pages.value_scale, slots),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(native: Kernels, dtype: torch.dtype) -> None:
    num_rows = 200
    x, weight = torch.randn(num_rows, 577).to(dtype), torch.randn(577).to(dtype)
    gate = torch.randn(num_rows, 400).to(dtype)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        norm, silu = native.rms_norm(x, weight, 1e-5), native.silu_and_mul(gate)
        for i in range(0, num_rows, 13):
            row = slice(i, i + 1)
            assert torch.equal(native.rms_norm(x[row], weight, 1e-5), norm[row])
            assert torch.equal(native.silu_and_mul(gate[row]), silu[row])


def test_places_outside_the_pages_are_refused(native: Kernels) -> None:
    case = RopeCase.make(torch.float32, torch.float32, query_lens=[4])
    case.batch.slot_mapping[1] = case.pages.key.shape[0] * 16
    with pytest.raises(ValueError, match="slot_mapping"):
        case.run(native)
    case = RopeCase.make(torch.float32, torch.float32, query_lens=[4])
    case.batch.positions[3] = 10**6
    with pytest.raises(ValueError, match="position"):
        case.run(native)
    assert case.pages.key.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_scales_divide_keys_and_values(kernels: Kernels, dtype: torch.dtype) -> None:
    static = StaticScales(key=0.37, value=0.004)  # a value of 1.8 saturates
    case = RopeCase.make(dtype, FP8_DTYPE, query_lens=[3, 20], static=static)
    key = rotated(case.key, case.table, case.batch.positions)
    case.run(kernels)
    slots = case.batch.slot_mapping
    blocks, offsets = slots // 16, slots % 16
    values = case.pages.value[blocks, :, offsets]
    expected = static_codes(case.value, static.value)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert bool((values.float().abs() == 448).any())
    keys = case.pages.key.double()[blocks, :, offsets] * static.key
    # Half a step of e4m3, and half of its smallest subnormal.
    bound = key.abs() * 0.0626 + static.key * 2.0**-10
    assert bool(((keys - key).abs() <= bound).all())


def test_what_is_not_finite_stays_so_under_static_scales(kernels: Kernels) -> None:
    case = RopeCase.make(
        torch.float32, FP8_DTYPE, query_lens=[3], static=StaticScales(key=0.5, value=1e-3)
    )
    case.value[1, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
    case.run(kernels)
    slot = int(case.batch.slot_mapping[1])
    codes = case.pages.value.view(torch.uint8)[slot // 16, 0, slot % 16, :4]
    assert (codes & 0x7F).tolist() == [0x7F, 0x7F, 0x7F, 0x7E]
