"""Linear layers: right against float64, and bit-equal rows whatever their number."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.native import KernelBuildError, load_library
from stepwire_executor.kernels.select import native_kernels, reference_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(
    kernels: Kernels,
    num_rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    x = torch.randn(num_rows, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    packed = kernels.pack_weight(weight)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    assert packed.num_bytes >= weight.nbytes
    got = kernels.linear(x, packed, bias, out_dtype)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.shape == expected.shape
    assert got.dtype == (out_dtype or dtype)
    magnitude = x.double().abs() @ weight.double().abs().T + 1
    bound = EPSILON[got.dtype] * expected.abs() + 2.0**-21 * magnitude
    assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(32, 64), (1, 1), (31, 3), (33, 65), (100, 576), (960, 128)]
)
def test_any_shape_multiplies_right(
    kernels: Kernels, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    for num_rows in (1, 2, 3, 9):
        check(kernels, num_rows, out_features, in_features, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_and_the_result_can_stay_wide(kernels: Kernels, dtype: torch.dtype) -> None:
    check(kernels, 5, 70, 48, dtype, has_bias=True)
    check(kernels, 5, 70, 48, dtype, has_bias=True, out_dtype=torch.float32)
    check(kernels, 5, 70, 48, dtype, out_dtype=torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
def test_random_shapes_multiply_right(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool
) -> None:
    try:
        kernels = native_kernels(load_library())
    except KernelBuildError:
        kernels = reference_kernels()
    check(kernels, num_rows, out_features, in_features, dtype, has_bias=has_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(576, 576), (200, 333)])
def test_a_row_has_the_same_bits_in_any_company(
    native: Kernels, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    weight = native.pack_weight(torch.randn(out_features, in_features).to(dtype))
    bias = torch.randn(out_features).to(dtype)
    x = torch.randn(512, in_features).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([native.linear(x[i : i + 1], weight, bias) for i in range(130)])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 18), 31, 32, 33, 64, 65, 130):
            assert torch.equal(native.linear(x[:num_rows], weight, bias), alone[:num_rows])
        assert torch.equal(native.linear(x, weight, bias)[:130], alone)
        assert torch.equal(native.linear(x[100:130], weight, bias), alone[100:])


@settings(max_examples=60, deadline=None)
@given(
    unit=st.sampled_from([2, 6, 32, 64]),
    num_units=st.integers(1, 7),
    out_features=st.integers(1, 70),
    num_rows=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    data=st.data(),
)
def test_sums_of_units_are_the_whole_in_any_parts_and_order(
    native: Kernels,
    unit: int,
    num_units: int,
    out_features: int,
    num_rows: int,
    dtype: torch.dtype,
    has_bias: bool,
    data: st.DataObject,
) -> None:
    """What lets ranks that share a layer's inputs have the bits of one."""
    x = torch.randn(num_rows, unit * num_units).to(dtype)
    weight = torch.randn(out_features, unit * num_units).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    cuts = data.draw(st.sets(st.integers(1, num_units), max_size=3)) | {0, num_units}
    bounds = [unit * cut for cut in sorted(cuts)]
    parts = [
        native.linear(
            x[:, start:stop],
            native.pack_weight(weight[:, start:stop], unit),
            bias if start == 0 else None,
            native.summand_dtype,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    assert parts[0].dtype == torch.float64
    order = data.draw(st.permutations(range(len(parts))))
    total = torch.zeros(num_rows, out_features, dtype=torch.float64)
    for index in order:
        total += parts[index]
    whole = native.pack_weight(weight, unit)
    for out_dtype in DTYPES:
        expected = total.float().to(out_dtype)
        assert torch.equal(native.linear(x, whole, bias, out_dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unit_is_one_sum_in_float32(native: Kernels, dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 96).to(dtype), torch.randn(40, 96).to(dtype)
    parts = [
        native.linear(
            x[:, part], native.pack_weight(weight[:, part].contiguous()), None, torch.float32
        )
        for part in (slice(0, 32), slice(32, 64), slice(64, 96))
    ]
    expected = torch.stack(parts).double().sum(0)
    got = native.linear(x, native.pack_weight(weight, 32), None, torch.float64)
    assert torch.equal(got, expected)
    assert not torch.equal(got, native.linear(x, native.pack_weight(weight), None, torch.float64))


def test_units_that_cut_a_pair_are_refused(native: Kernels) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        native.pack_weight(torch.randn(8, 18).bfloat16(), 9)
    with pytest.raises(ValueError, match="positive"):
        native.pack_weight(torch.randn(8, 18), 0)


def test_rows_may_be_a_view_of_wider_ones(native: Kernels) -> None:
    weight = native.pack_weight(torch.randn(40, 24))
    x = torch.randn(6, 60)
    assert torch.equal(
        native.linear(x[:, 10:34], weight), native.linear(x[:, 10:34].contiguous(), weight)
    )


def test_a_wrong_shape_is_refused(kernels: Kernels) -> None:
    weight = kernels.pack_weight(torch.randn(8, 16))
    with pytest.raises(ValueError, match="expected"):
        kernels.linear(torch.randn(2, 15), weight)
    with pytest.raises(ValueError, match="in_features"):
        kernels.pack_weight(torch.randn(8))
