"""Normalisation, gated activation, rotary embedding and the write into pages, in Triton."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.rms_norm import reference as norm_reference
from stepwire_executor.kernels.rope_and_write_kv import MIN_AMAX
from stepwire_executor.kernels.rope_and_write_kv import reference as rope_reference
from stepwire_executor.kv_cache import FP8_DTYPE, KVPages, StaticScales
from support.kernels_support import (
    make_batch,
    num_blocks,
    poisoned_pages,
    smallest_bfloat16_above,
    static_codes,
)
from support.triton_interpreter import DEVICE, DTYPES, on_device, requires_triton
from torch import Tensor

pytestmark = requires_triton
pytest.importorskip("triton")

from stepwire_executor.kernels.rms_norm.triton import rms_norm  # noqa: E402 # after the skip
from stepwire_executor.kernels.rope_and_write_kv.triton import rope_and_write_kv  # noqa: E402
from stepwire_executor.kernels.silu_and_mul.triton import silu_and_mul  # noqa: E402

ULP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=1.01 * ULP[dtype], atol=2e-6)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return norm_reference.rms_norm(x.double(), weight.double(), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 577])
def test_rows_are_normalised(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size, device=DEVICE).to(dtype)
    weight = torch.randn(size, device=DEVICE).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5), normalised(x, weight), dtype)
    assert_close(rms_norm(x, weight.float(), 1e-5), normalised(x, weight), dtype)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_summed_in_place_and_then_normalised(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 50, device=DEVICE).to(dtype)
    residual, weight = torch.randn_like(x), torch.randn(50, device=DEVICE).to(dtype)
    before, total = x.clone(), residual + x
    got = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    assert_close(got, normalised(total, weight), dtype)
    # Rows of a wider tensor, with a residual of its own layout.
    wide, residual = torch.cat((x, x), dim=-1), torch.zeros_like(x)
    assert torch.equal(rms_norm(wide[..., 50:], weight, 1e-5, residual), rms_norm(x, weight, 1e-5))
    assert torch.equal(residual, x)


def test_heads_of_a_fused_projection_are_normalised_where_they_lie() -> None:
    fused, weight = torch.randn(4, 10 * 32, device=DEVICE), torch.randn(32, device=DEVICE)
    heads = fused[:, 64:256].view(4, 6, 32)
    for view in (heads, fused[:, :32], heads.transpose(0, 1), fused[:, :64].view(4, 1, 2, 32)):
        assert_close(rms_norm(view, weight, 1e-5), normalised(view, weight), torch.float32)


def test_rows_are_independent() -> None:
    x, weight = torch.randn(9, 300, device=DEVICE), torch.randn(300, device=DEVICE)
    x[4] = torch.nan
    norm, silu = rms_norm(x, weight, 1e-5), silu_and_mul(x)
    for row in (slice(0, 1), slice(3, 4), slice(5, 9)):
        assert torch.equal(rms_norm(x[row], weight, 1e-5), norm[row])
        assert torch.equal(silu_and_mul(x[row]), silu[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 1030])
def test_the_gate_multiplies(size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2 * size, device=DEVICE) * 20).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    expected = gate / (1 + torch.exp(-gate)) * up
    wide = torch.cat((x, x), dim=1)
    for view in (x, wide[:, 2 * size :]):
        got = silu_and_mul(view)
        torch.testing.assert_close(got.double(), expected, rtol=1.5 * ULP[dtype], atol=2e-6)
    assert silu_and_mul(x[:0]).shape == (0, size)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_gate_saturates_without_nan() -> None:
    x = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e30]], device=DEVICE)
    torch.testing.assert_close(silu_and_mul(x), expected, rtol=1e-6, atol=1e-5)


def angles(max_positions: int, rotary_dim: int) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    phase = torch.arange(max_positions).double().unsqueeze(1) * rates
    return torch.cat((phase.cos(), phase.sin()), dim=1).float()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
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
        num_heads: int = 9,
        num_kv_heads: int = 2,
        static: StaticScales | None = None,
        has_offset: bool = False,
    ) -> Case:
        """Build views of one fused projection, as the model has them."""
        seq_lens = [n + 3 for n in query_lens]
        num_tokens, total = sum(query_lens), num_heads + 2 * num_kv_heads
        heads = torch.randn(num_tokens, total, head_dim, device=DEVICE).to(dtype)
        shape = (num_blocks(seq_lens, 16), num_kv_heads, 16, head_dim)
        pages = on_device(poisoned_pages(shape, page_dtype, static))
        if has_offset:
            offset = 3 * torch.randn(num_kv_heads, head_dim, device=DEVICE)
            pages = dataclasses.replace(pages, key_offset=offset)
        return cls(
            query=heads[:, :num_heads],
            key=heads[:, num_heads : num_heads + num_kv_heads],
            value=heads[:, num_heads + num_kv_heads :],
            table=angles(max(seq_lens), rotary_dim).to(DEVICE),
            pages=pages,
            batch=on_device(make_batch(query_lens, seq_lens)),
        )

    def copy(self) -> Case:
        """Return the same arguments in their own memory."""
        fields = {x.name: getattr(self.pages, x.name) for x in dataclasses.fields(self.pages)}
        copies = {name: x.clone() for name, x in fields.items() if isinstance(x, Tensor)}
        pages = dataclasses.replace(self.pages, **copies)
        return dataclasses.replace(self, query=self.query.clone(), pages=pages)

    def run(self) -> None:
        """Call the kernel."""
        rope_and_write_kv(self.query, self.key, self.value, self.table, self.pages, self.batch)

    def run_reference(self) -> None:
        """Call the reference."""
        rope_reference.rope_and_write_kv(
            self.query, self.key, self.value, self.table, self.pages, self.batch
        )


PAGE_KINDS = [*((dtype, False) for dtype in DTYPES), (FP8_DTYPE, False), (FP8_DTYPE, True)]


@pytest.mark.parametrize(("page_dtype", "has_offset"), PAGE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (20, 12)])
def test_queries_and_pages_are_the_references(
    dtype: torch.dtype, page_dtype: torch.dtype, has_offset: bool, head_dim: int, rotary_dim: int
) -> None:
    case = Case.make(
        dtype,
        page_dtype,
        query_lens=[1, 4],
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        has_offset=has_offset,
    )
    case.batch.slot_mapping[2] = -1
    other = case.copy()
    case.run()
    other.run_reference()
    # Both are rounded, so that they may lie a whole step apart.
    torch.testing.assert_close(case.query, other.query, rtol=2.02 * ULP[dtype], atol=2e-6)
    # Values are not rotated: they are the same, bit for bit, NaN of what nothing wrote included.
    bits = torch.uint8
    assert torch.equal(case.pages.value.view(bits), other.pages.value.view(bits))
    if page_dtype != FP8_DTYPE:
        rtol = 2.02 * max(ULP[page_dtype], ULP[torch.float32])
        torch.testing.assert_close(
            case.pages.key.double(), other.pages.key.double(), rtol=rtol, atol=2e-6, equal_nan=True
        )
        return
    scales = [x.pages.value_scale for x in (case, other)]
    assert scales[0] is not None
    assert scales[1] is not None
    assert torch.equal(scales[0].view(torch.int16), scales[1].view(torch.int16))
    # A rotation that was rounded otherwise may move a key to the next code, 1/8 of it, or let
    # another of its scales win, with which it is as close.
    got, expected = (dequantised_keys(x.pages) for x in (case, other))
    largest = expected.nan_to_num().abs().max()
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(
        got, expected, rtol=0.13, atol=float(largest) / 448 * 2**-7, equal_nan=True
    )


def dequantised_keys(pages: KVPages) -> Tensor:
    """What keys of fp8 pages stand for."""
    assert pages.key_scale is not None
    return pages.key.float() * pages.key_scale.float().unsqueeze(-1)


def test_a_token_has_the_same_bits_in_any_company() -> None:
    case = Case.make(torch.float32, FP8_DTYPE, query_lens=[6])
    alone = case.copy()
    case.run()
    for i in range(6):
        one = dataclasses.replace(
            alone.batch,
            positions=alone.batch.positions[i : i + 1],
            slot_mapping=alone.batch.slot_mapping[i : i + 1],
        )
        row = slice(i, i + 1)
        rope_and_write_kv(
            alone.query[row], alone.key[row], alone.value[row], alone.table, alone.pages, one
        )
    assert torch.equal(case.query, alone.query)
    assert torch.equal(case.pages.key.view(torch.uint8), alone.pages.key.view(torch.uint8))


def test_places_outside_the_pages_and_the_table_touch_nothing() -> None:
    case = Case.make(torch.float32, torch.float32, query_lens=[3])
    case.batch.slot_mapping[:] = torch.tensor([-1, case.pages.key.shape[0] * 16, 1 << 40])
    case.batch.positions[2] = 1 << 40
    case.run()
    assert case.pages.key.isnan().all()
    assert case.pages.value.isnan().all()
    assert not case.query.isnan().any()


def fp8_round_trip(values: Tensor) -> tuple[Tensor, Tensor]:
    """Store rows, [num_rows, head_dim], as values of one head; return codes and scales."""
    num_rows, head_dim = values.shape
    pages = on_device(poisoned_pages((num_rows, 1, 1, head_dim), FP8_DTYPE))
    batch = dataclasses.replace(
        make_batch([num_rows], [num_rows], block_size=1), slot_mapping=torch.arange(num_rows)
    )
    value = values.unsqueeze(1).to(DEVICE)
    table = angles(num_rows, 2).to(DEVICE)
    rope_and_write_kv(value.clone(), value, value, table, pages, on_device(batch))
    assert pages.value_scale is not None
    return pages.value.view(num_rows, head_dim).cpu(), pages.value_scale.view(num_rows).cpu()


def test_every_fp8_code_survives_a_round_trip() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    numbers[numbers.isnan()] = 0.0  # 0x7f and 0xff
    got, scale = fp8_round_trip(numbers.unsqueeze(0))
    assert scale.tolist() == [1.0]  # the largest code is 448
    assert torch.equal(got[0].float(), numbers)
    assert torch.equal(got[0].float().signbit()[1:127], numbers.signbit()[1:127])


def test_fp8_rounds_to_nearest_even_as_torch_does() -> None:
    between = torch.arange(127, dtype=torch.uint8).view(FP8_DTYPE).float()
    middles = (between[1:] + between[:-1]) / 2
    nudged = torch.cat((middles, middles * (1 + 1e-6), middles * (1 - 1e-6), -middles))
    values = torch.cat((nudged, torch.tensor([448.0]))).unsqueeze(0)
    got, _ = fp8_round_trip(values)
    assert torch.equal(got.float(), values.to(FP8_DTYPE).float())


def test_fp8_scales_follow_the_largest_magnitude() -> None:
    values = torch.randn(20, 24) * torch.logspace(-20, 20, 20).unsqueeze(1)
    values[7] = 0.0
    got, scale = fp8_round_trip(values)
    exact = values.abs().amax(dim=1).clamp(min=MIN_AMAX) / 448
    assert torch.equal(scale, smallest_bfloat16_above(exact))
    assert got[7].float().abs().max() == 0
    is_scaled = values.abs().amax(dim=1) > MIN_AMAX
    assert bool((got[is_scaled].float().abs().amax(dim=1) == 448).all())


def test_a_vector_that_is_not_finite_reads_as_nan_and_harms_no_neighbour() -> None:
    values = torch.randn(6, 16)
    _, clean_scale = fp8_round_trip(values)
    for row, poison in ((0, torch.nan), (2, torch.inf), (3, -torch.inf)):
        values[row, 3] = poison
    values.view(torch.int32)[5] = 0x7FFFFFFF  # a NaN that rounding up would carry into the sign
    got, scale = fp8_round_trip(values)
    is_finite = values.isfinite().all(dim=1)
    assert torch.equal(scale.isnan(), ~is_finite)
    assert torch.equal(scale[is_finite], clean_scale[is_finite])
    restored = got.float() * scale.unsqueeze(1)
    assert restored[~is_finite].isnan().all()
    assert restored[is_finite].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_scales_divide_keys_and_values(dtype: torch.dtype) -> None:
    static = StaticScales(key=0.37, value=0.004)  # a value of 1.8 saturates
    case = Case.make(dtype, FP8_DTYPE, query_lens=[3, 5], static=static)
    other = case.copy()
    other.run_reference()
    case.run()
    slots = case.batch.slot_mapping
    blocks, offsets = slots // 16, slots % 16
    values = case.pages.value[blocks, :, offsets]
    expected = static_codes(case.value, static.value)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert bool((values.float().abs() == 448).any())
    # A rotation that was rounded otherwise may move a key to the next code: 1/8 of it.
    keys, reference = (x.pages.key.float()[blocks, :, offsets] for x in (case, other))
    torch.testing.assert_close(keys, reference, rtol=0.126, atol=2**-9)


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
def test_what_is_not_finite_stays_so_under_static_scales() -> None:
    case = Case.make(
        torch.float32, FP8_DTYPE, query_lens=[3], static=StaticScales(key=0.5, value=1e-3)
    )
    case.value[1, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
    case.run()
    slot = int(case.batch.slot_mapping[1])
    codes = case.pages.value.view(torch.uint8)[slot // 16, 0, slot % 16, :4]
    assert (codes & 0x7F).tolist() == [0x7F, 0x7F, 0x7F, 0x7E]
