"""Linear layers over weights in integers: the arithmetic that is laid down, bit for bit."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.native import KernelBuildError, load_library
from stepwire_executor.kernels.native.build import FLAGS, SOURCE_DIR, find_compiler
from stepwire_executor.kernels.select import native_kernels, reference_kernels
from torch import Tensor

Bits = Literal[4, 8]
Offsets = Literal["one zero", "zeros", "minimums"]
BITS: tuple[Bits, ...] = (4, 8)
OFFSETS: tuple[Offsets, ...] = ("one zero", "zeros", "minimums")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make_groups(
    out_features: int,
    in_features: int,
    *,
    bits: Bits = 4,
    group_size: int = 32,
    offsets: Offsets = "minimums",
    dtype: torch.dtype = torch.float16,
    is_ordered: bool = False,
) -> GroupQuantized:
    groups = (out_features, in_features // group_size)
    zeros = minimums = None
    if offsets == "minimums":
        minimums = (-torch.rand(groups) * 0.3).to(dtype)
    elif offsets == "zeros":
        zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8)
    else:
        zeros = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    return GroupQuantized(
        codes=torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        scales=(torch.randn(groups) / 2**bits).to(dtype),
        zeros=zeros,
        minimums=minimums,
        input_order=torch.randperm(in_features) if is_ordered else None,
    )


def columns(weight: GroupQuantized, start: int, stop: int) -> GroupQuantized:
    groups = slice(start // weight.group_size, stop // weight.group_size)
    return GroupQuantized(
        codes=weight.codes[:, start:stop],
        bits=weight.bits,
        group_size=weight.group_size,
        scales=weight.scales[:, groups],
        zeros=None if weight.zeros is None else weight.zeros[:, groups],
        minimums=None if weight.minimums is None else weight.minimums[:, groups],
    )


def expected_of(x: Tensor, weight: GroupQuantized) -> tuple[Tensor, Tensor]:
    """The product of x and what the weight stands for, and the magnitude of what is added up."""
    values = x.double()
    if weight.input_order is not None:
        values = values[:, weight.input_order]
    codes, wide = weight.codes.double(), weight.scales.double()
    offsets = weight.minimums
    if weight.zeros is not None:
        offsets = -wide * weight.zeros.double()
    assert offsets is not None
    scales = wide.repeat_interleave(weight.group_size, dim=1)
    minimums = offsets.double().repeat_interleave(weight.group_size, dim=1)
    dense = codes * scales + minimums
    # Code and offset are each larger than the weight, and cancel out.
    magnitude = values.abs() @ (codes * scales.abs() + minimums.abs()).T
    return values @ dense.T, magnitude


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, in float32, rounded twice if the exact sum lies within 2^-29 of a tie."""
    return (a.double() * b.double() + c.double()).float()


def laid_down(x: Tensor, weight: GroupQuantized) -> Tensor:
    """The arithmetic of quantized_linear.cpp, one operation after the other; no chains."""
    x = (x if weight.input_order is None else x[:, weight.input_order]).float()
    size, codes, scales = weight.group_size, weight.codes.float(), weight.scales.float()
    minimums, zero = weight.minimums, 0.0
    if weight.zeros is not None:
        if bool((weight.zeros == weight.zeros[0, 0]).all()):
            zero = float(weight.zeros[0, 0])
        else:
            minimums = -(scales * weight.zeros.float())
    acc = torch.zeros(x.shape[0], weight.out_features)
    for group in range(scales.shape[1]):
        dot = torch.zeros_like(acc)
        for pair in range(group * size, group * size + size, 2):
            for k in (pair + 1, pair):
                dot = fma(x[:, k, None], codes[None, :, k] - zero, dot)
        acc = fma(scales[None, :, group], dot, acc)
        if minimums is not None:
            lanes = x[:, group * size :][:, :size].reshape(x.shape[0], -1, 16)
            total = lanes[:, 0]
            for k in range(1, lanes.shape[1]):
                total = total + lanes[:, k]
            while total.shape[1] > 1:
                total = total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :]
            acc = fma(minimums[None, :, group].float(), total, acc)
    return acc


def check(
    kernels: Kernels,
    num_rows: int,
    weight: GroupQuantized,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    x = torch.randn(num_rows, weight.in_features).to(dtype)
    bias = torch.randn(weight.out_features).to(dtype) if has_bias else None
    packed = kernels.pack_weight(weight)
    assert (packed.out_features, packed.in_features) == (weight.out_features, weight.in_features)
    got = kernels.linear(x, packed, bias, out_dtype)
    assert got.shape == (num_rows, weight.out_features)
    assert got.dtype == (out_dtype or dtype)
    expected, magnitude = expected_of(x, weight)
    if bias is not None:
        expected = expected + bias.double()
        magnitude = magnitude + bias.double().abs()
    bound = EPSILON[got.dtype] * expected.abs() + 2.0**-19 * magnitude + 2.0**-24
    assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 384])
@pytest.mark.parametrize("out_features", [1, 33, 100])
def test_every_kind_of_weight_multiplies_right(
    kernels: Kernels, bits: Bits, offsets: Offsets, group_size: int, out_features: int
) -> None:
    weight = make_groups(out_features, 384, bits=bits, group_size=group_size, offsets=offsets)
    for num_rows in (0, 1, 2, 9):
        check(kernels, num_rows, weight, torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    out_features=st.integers(1, 130),
    num_groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96]),
    bits=st.sampled_from(BITS),
    offsets=st.sampled_from(OFFSETS),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    is_ordered=st.booleans(),
    has_bias=st.booleans(),
)
def test_random_shapes_multiply_right(
    num_rows: int,
    out_features: int,
    num_groups: int,
    group_size: int,
    bits: Bits,
    offsets: Offsets,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    is_ordered: bool,
    has_bias: bool,
) -> None:
    try:
        kernels = native_kernels(load_library())
    except KernelBuildError:
        kernels = reference_kernels()
    weight = make_groups(
        out_features,
        group_size * num_groups,
        bits=bits,
        group_size=group_size,
        offsets=offsets,
        dtype=scale_dtype,
        is_ordered=is_ordered,
    )
    check(kernels, num_rows, weight, dtype, has_bias=has_bias)
    check(kernels, num_rows, weight, dtype, has_bias=has_bias, out_dtype=torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_bits_are_those_that_are_laid_down(
    native: Kernels, bits: Bits, offsets: Offsets, dtype: torch.dtype
) -> None:
    """Equal but where the test's multiply-add rounds twice, which is rare and one ulp."""
    weight = make_groups(70, 192, bits=bits, group_size=64, offsets=offsets, is_ordered=True)
    x = torch.randn(21, 192).to(dtype)
    packed = native.pack_weight(weight)
    for num_rows in (1, 3, 8, 21):
        got = native.linear(x[:num_rows], packed, None, torch.float32)
        expected = laid_down(x[:num_rows], weight)
        assert int((got != expected).sum()) <= 3
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["-march=haswell", "-mno-avx512bf16"])
def narrower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The native kernels with the one under test for fewer instructions, built in a hurry."""
    try:
        library, compiler = load_library(), find_compiler()
    except KernelBuildError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("narrower") / "quantized_linear.so"
    source = SOURCE_DIR / "quantized_linear.cpp"
    flags = [*FLAGS, "-O1", request.param, "-shared", "-o", str(path), str(source)]
    subprocess.run([compiler, *flags], check=True, timeout=120)
    multiply = ctypes.CDLL(str(path)).stepwire_quantized_linear
    multiply.restype = None
    multiply.argtypes = library.quantized_linear.argtypes  # type: ignore[attr-defined]  # ctypes
    return native_kernels(replace(library, quantized_linear=multiply))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_every_instruction_set_gives_the_same_bits(
    native: Kernels, narrower: Kernels, bits: Bits, offsets: Offsets
) -> None:
    weight = make_groups(77, 320, bits=bits, offsets=offsets)
    # The largest sums of products there can be, and their negatives.
    weight.codes[:2] = 2**bits - 1
    for dtype in DTYPES:
        x = torch.randn(25, 320).to(dtype)
        x[0], x[1] = 5.0, -5.0
        for num_rows in (1, 5, 25):
            got, expected = (
                kernels.linear(x[:num_rows], kernels.pack_weight(weight, 64), None, torch.float64)
                for kernels in (narrower, native)
            )
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("bits", "offsets"), [(4, "minimums"), (4, "zeros"), (8, "one zero")])
def test_a_row_has_the_same_bits_in_any_company(
    native: Kernels, bits: Bits, offsets: Offsets
) -> None:
    weight = native.pack_weight(make_groups(200, 352, bits=bits, offsets=offsets))
    bias = torch.randn(200)
    x = torch.randn(512, 352).bfloat16()
    torch.set_num_threads(1)
    alone = torch.cat([native.linear(x[i : i + 1], weight, bias) for i in range(70)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in range(1, 71):
            assert torch.equal(native.linear(x[:num_rows], weight, bias), alone[:num_rows])
        assert torch.equal(native.linear(x, weight, bias)[:70], alone)
        assert torch.equal(native.linear(x[31:70], weight, bias), alone[31:])


def test_tiles_of_rows_have_the_bits_of_rows_alone(native: Kernels) -> None:
    """512 rows of 2048 inputs are more than are worked on together."""
    weight = native.pack_weight(make_groups(70, 2048))
    x = torch.randn(512, 2048).bfloat16()
    together = native.linear(x, weight)
    for row in (0, 1, 170, 233, 234, 300, 511):
        assert torch.equal(native.linear(x[row : row + 1], weight)[0], together[row])


@settings(max_examples=60, deadline=None)
@given(
    num_units=st.integers(1, 6),
    out_features=st.integers(1, 70),
    num_rows=st.integers(1, 11),
    bits=st.sampled_from(BITS),
    offsets=st.sampled_from(OFFSETS),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    data=st.data(),
)
def test_sums_of_units_are_the_whole_in_any_parts_and_order(
    native: Kernels,
    num_units: int,
    out_features: int,
    num_rows: int,
    bits: Bits,
    offsets: Offsets,
    dtype: torch.dtype,
    has_bias: bool,
    data: st.DataObject,
) -> None:
    """What lets ranks that share a layer's inputs have the bits of one."""
    unit = 64
    x = torch.randn(num_rows, unit * num_units).to(dtype)
    weight = make_groups(out_features, unit * num_units, bits=bits, offsets=offsets)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    cuts = data.draw(st.sets(st.integers(1, num_units), max_size=3)) | {0, num_units}
    bounds = [unit * cut for cut in sorted(cuts)]
    parts = [
        native.linear(
            x[:, start:stop],
            native.pack_weight(columns(weight, start, stop), unit),
            bias if start == 0 else None,
            native.summand_dtype,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    assert parts[0].dtype == torch.float64
    total = torch.zeros(num_rows, out_features, dtype=torch.float64)
    for index in data.draw(st.permutations(range(len(parts)))):
        total += parts[index]
    whole = native.pack_weight(weight, unit)
    for out_dtype in DTYPES:
        expected = total.float().to(out_dtype)
        assert torch.equal(native.linear(x, whole, bias, out_dtype), expected)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_in_its_row(kernels: Kernels, bits: Bits) -> None:
    for offsets in OFFSETS:
        weight = kernels.pack_weight(make_groups(40, 96, bits=bits, offsets=offsets))
        x = torch.randn(9, 96)
        clean = kernels.linear(x, weight)
        x[2, 5], x[4, 95], x[8, 40] = math.inf, math.nan, -math.inf
        got = kernels.linear(x, weight)
        bad = torch.tensor([2, 4, 8])
        assert not got[bad].isfinite().any()
        good = torch.tensor([0, 1, 3, 5, 6, 7])
        assert bool(got[good].isfinite().all())
        if kernels.is_row_invariant:
            assert torch.equal(got[good], clean[good])


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-45, 3.4e38])
def test_rows_of_any_magnitude_stay_finite(kernels: Kernels, scale: float) -> None:
    values = torch.zeros(40, 64, dtype=torch.uint8)
    weight = GroupQuantized(
        codes=values + 9,
        bits=4,
        group_size=32,
        scales=torch.full((40, 2), 2.0**-8),
        zeros=torch.full((40, 2), 8, dtype=torch.uint8),
    )
    x = torch.zeros(3, 64)
    x[1, 7] = scale
    got = kernels.linear(x, kernels.pack_weight(weight))
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got[1], torch.full((40,), scale * 2.0**-8), rtol=1e-2, atol=1e-30)
    assert not got[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_a_view_of_wider_ones(native: Kernels, dtype: torch.dtype) -> None:
    weight = native.pack_weight(make_groups(40, 64))
    x = torch.randn(6, 100).to(dtype)
    assert torch.equal(
        native.linear(x[:, 10:74], weight), native.linear(x[:, 10:74].contiguous(), weight)
    )


def test_stacked_weights_write_side_by_side(kernels: Kernels) -> None:
    parts = (
        make_groups(40, 64, is_ordered=True),
        make_groups(33, 64, bits=8, offsets="zeros", group_size=64),
        torch.randn(17, 64),
    )
    stacked = kernels.pack_weight(parts)
    x, bias = torch.randn(5, 64), torch.randn(90)
    assert (stacked.out_features, stacked.in_features) == (90, 64)
    alone = [kernels.pack_weight(part) for part in parts]
    assert stacked.num_bytes == sum(part.num_bytes for part in alone)
    expected = torch.cat(
        [
            kernels.linear(x, part, part_bias)
            for part, part_bias in zip(alone, bias.split([40, 33, 17]), strict=True)
        ],
        dim=1,
    )
    assert torch.equal(kernels.linear(x, stacked, bias), expected)
    with pytest.raises(ValueError, match="same number of inputs"):
        kernels.pack_weight((torch.randn(4, 32), torch.randn(4, 64)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_read_back_are_the_dequantised_ones(
    kernels: Kernels, bits: Bits, offsets: Offsets, dtype: torch.dtype
) -> None:
    assert kernels.quantized_rows is not None
    for scale_dtype, is_ordered in itertools.product(DTYPES, (False, True)):
        weight = make_groups(
            70, 160, bits=bits, offsets=offsets, dtype=scale_dtype, is_ordered=is_ordered
        )
        packed = kernels.pack_weight(weight)
        rows = torch.tensor([0, 69, 31, 32, 31, 5])
        got = kernels.quantized_rows(packed, rows, dtype)
        assert torch.equal(got, weight.dequantize()[rows].to(dtype))
        assert kernels.quantized_rows(packed, rows[:0], dtype).shape == (0, 160)
        for row in (-1, 70):
            with pytest.raises(IndexError, match="70"):
                kernels.quantized_rows(packed, torch.tensor([0, row]), dtype)


def test_a_packed_weight_takes_its_bits_and_no_more(native: Kernels) -> None:
    weight = make_groups(96, 256)
    assert native.pack_weight(weight).num_bytes == 96 * (256 // 2 + 256 // 32 * 4)
    wide = make_groups(96, 256, bits=8, offsets="one zero", dtype=torch.float32)
    narrow = GroupQuantized(
        codes=wide.codes,
        bits=8,
        group_size=32,
        scales=wide.scales.half().float(),  # which float16 holds
        zeros=wide.zeros,
    )
    assert native.pack_weight(narrow).num_bytes == 96 * (256 + 256 // 32 * 2)
    assert native.pack_weight(wide).num_bytes == 96 * (256 + 256 // 32 * 4)


def test_what_cannot_be_multiplied_is_refused(kernels: Kernels) -> None:
    weight = kernels.pack_weight(make_groups(8, 64))
    with pytest.raises(ValueError, match="expected"):
        kernels.linear(torch.randn(2, 32), weight)
    with pytest.raises(ValueError, match="no multiple of 32"):
        kernels.pack_weight(make_groups(8, 64, group_size=16))


def test_units_that_cut_a_block_are_refused(native: Kernels) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        native.pack_weight(make_groups(8, 96), 48)
