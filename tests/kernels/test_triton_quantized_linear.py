"""Linear layers in 4 and 8 bits in Triton: right against the dequantised weight, rows bit-equal."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from support.triton_interpreter import DEVICE, DTYPES, requires_triton
from torch import Tensor

pytestmark = requires_triton
pytest.importorskip("triton")

from stepwire_executor.kernels.linear import triton as linear_triton  # noqa: E402 # after the skip
from stepwire_executor.kernels.linear import triton_quantized  # noqa: E402
from stepwire_executor.kernels.linear import triton_quantized_kernel as kernel  # noqa: E402
from stepwire_executor.kernels.linear.triton_quantized_count import (  # noqa: E402
    LAYERS,
    count_launch,
    main,
)
from stepwire_executor.kernels.linear.triton_quantized_tiles import (  # noqa: E402
    FLOAT_TILES,
    HALF_TILES,
    OUTPUTS_UNIT,
    QuantizedTiles,
    cut,
    num_stages_of,
    tile_of,
)
from stepwire_executor.kernels.linear.triton_tiles import Chunks  # noqa: E402

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS = (1, 16, 17, 32, 33, 64, 65, 129)
"""Numbers of rows on either side of every border between tiles."""
WHOLE = 0
"""Stands for a group of a whole row."""
SPLIT = (66, 2080)
"""(out_features, in_features) of a layer of two chunks, neither a multiple of a tile or a step."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all memory that is not set hold NaN: what is read must have been written."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))  # type: ignore[call-overload] # any form

    monkeypatch.setattr(torch, "empty", poisoned)


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.float16,
    minimum_dtype: torch.dtype | None = None,
    has_order: bool = False,
) -> GroupQuantized:
    size = group_size or in_features
    grid = (out_features, in_features // size)
    return GroupQuantized(
        codes=torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8),
        bits=8 if bits == 8 else 4,
        group_size=size,
        scales=torch.randn(grid).to(scale_dtype),
        zeros=None if minimum_dtype else torch.randint(2**bits, grid, dtype=torch.uint8),
        minimums=(4 * torch.randn(grid)).to(minimum_dtype) if minimum_dtype else None,
        input_order=torch.randperm(in_features) if has_order else None,
    )


def on_device(weight: GroupQuantized) -> GroupQuantized:
    tensors = {
        name: tensor.to(DEVICE)
        for name in ("codes", "scales", "zeros", "minimums", "input_order")
        if (tensor := getattr(weight, name)) is not None
    }
    return replace(weight, **tensors)


def pack(weight: GroupQuantized, chunk_size: int | None = None) -> triton_quantized.GroupedWords:
    """Pack weight, its sums cut at multiples of chunk_size inputs, or of a step if that is more."""
    packed = linear_triton.pack_weight(on_device(weight))
    assert isinstance(packed, triton_quantized.GroupedWords)
    if chunk_size is None:
        return packed
    cuts = packed.cuts
    num_steps = max(1, chunk_size // cuts.step)
    chunks = Chunks(size=num_steps, count=-(-cuts.num_steps // num_steps))
    arrivals = torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    return replace(packed, cuts=replace(cuts, chunks=chunks), arrivals=arrivals)


def assert_is_product(
    got: Tensor, x: Tensor, weight: GroupQuantized, bias: Tensor | None = None
) -> None:
    """Compare with float64, allowing for float32 sums and one rounding of the result."""
    values = weight.dequantize().double()
    expected = x.double() @ values.T + (0 if bias is None else bias.double())
    # Sums of codes and of minimums may both be large where they cancel.
    largest = 2**weight.bits * weight.scales.double().abs()
    if weight.minimums is not None:
        largest += weight.minimums.double().abs()
    magnitude = x.double().abs().sum(1, keepdim=True) * largest.amax(1)
    bound = EPSILON[got.dtype] * expected.abs() + 2.0**-21 * (magnitude + 1)
    assert got.shape == expected.shape
    assert bool(((got.cpu().double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("offsets", ["zeros", "minimums"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, WHOLE])
def test_every_kind_of_group_multiplies_right(group_size: int, bits: int, offsets: str) -> None:
    scale_dtype = torch.float32 if group_size == 64 else torch.float16
    weight = random_weight(
        40,
        384,
        bits=bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
        minimum_dtype=scale_dtype if offsets == "minimums" else None,
    )
    packed = pack(weight)
    for dtype in DTYPES:
        x = torch.randn(3, 384).to(dtype)
        bias = torch.randn(40).to(dtype)
        got = linear_triton.linear(x.to(DEVICE), packed, bias.to(DEVICE))
        assert got.dtype == dtype
        assert_is_product(got, x, weight, bias)


SHAPES = [
    (1, 1, WHOLE, None),
    (33, 67, WHOLE, None),
    (131, 333, WHOLE, 256),
    (5, 96, 32, None),
    (130, 416, 32, 128),
    (65, 448, 64, 256),
    (*SPLIT, 32, None),
]
"""(out_features, in_features, group_size, chunk_size) of layers that no tile or step divides."""


def multiply_any_shape(
    num_rows: int,
    out_features: int,
    in_features: int,
    group_size: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(num_rows, in_features).to(dtype)
    for minimum_dtype in (None, torch.bfloat16):
        weight = random_weight(
            out_features, in_features, group_size=group_size, scale_dtype=torch.bfloat16,
            minimum_dtype=minimum_dtype,
        )  # fmt: skip
        got = linear_triton.linear(x.to(DEVICE), pack(weight, chunk_size), None, torch.float32)
        assert got.dtype == torch.float32
        assert_is_product(got, x, weight)


@pytest.mark.parametrize(
    ("num_rows", "shape", "dtype"),
    [
        *((rows, shape, torch.float16) for shape in SHAPES[:4] for rows in (0, 1, 17, 65)),
        *((rows, shape, torch.float16) for shape in SHAPES[4:6] for rows in (1, 65)),
        (17, SHAPES[6], torch.float16),
        *((3, shape, torch.float32) for shape in SHAPES[:4]),
        (33, SHAPES[5], torch.float32),
    ],
)
def test_any_shape_multiplies_right(
    num_rows: int, shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    multiply_any_shape(num_rows, *shape, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 65])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_multiply_right_at_all_numbers_of_rows(
    num_rows: int, shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    multiply_any_shape(num_rows, *shape, dtype)


def test_scales_and_minimums_of_two_dtypes_lose_no_digit() -> None:
    weight = random_weight(9, 256, scale_dtype=torch.bfloat16, minimum_dtype=torch.float16)
    packed = pack(weight)
    assert packed.scale_dtype == torch.float32
    x = torch.randn(2, 256, dtype=torch.float32)
    assert_is_product(linear_triton.linear(x.to(DEVICE), packed), x, weight)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *((4, dtype) for dtype in DTYPES),
        *((8, dtype) for dtype in DTYPES if dtype != torch.float32),
        pytest.param(8, torch.float32, marks=pytest.mark.long),
    ],
)
def test_every_code_and_zero_point_is_exact(bits: int, dtype: torch.dtype) -> None:
    # One input a row: what comes out is one weight, and in float32 nothing is rounded.
    size = 2**bits
    codes = torch.arange(size).repeat(size, 1).to(torch.uint8)
    weight = GroupQuantized(
        codes=codes if bits == 8 else codes.repeat(1, 2),
        bits=8 if bits == 8 else 4,
        group_size=max(32, size),
        scales=torch.full((size, 1), 0.37, dtype=torch.float16),
        zeros=torch.arange(size, dtype=torch.uint8).unsqueeze(1),
    )
    x = torch.eye(weight.in_features, dtype=dtype, device=DEVICE)
    got = linear_triton.linear(x, pack(weight), None, torch.float32)
    assert torch.equal(got.cpu(), weight.dequantize().T)


def test_inputs_in_an_order_of_their_own_meet_their_codes() -> None:
    weight = random_weight(40, 320, group_size=64, has_order=True)
    x = torch.randn(5, 320).half()
    assert_is_product(linear_triton.linear(x.to(DEVICE), pack(weight)), x, weight)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.long) if dtype == torch.float32 else dtype
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize(
    ("kind", "chunk_size"),
    [
        ({"group_size": 32}, 128),
        ({"group_size": 32, "minimum_dtype": torch.float16}, None),
        ({"group_size": WHOLE, "bits": 8}, 128),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(
    kind: dict[str, object], chunk_size: int | None, dtype: torch.dtype
) -> None:
    weight = pack(random_weight(40, 224, **kind), chunk_size)  # type: ignore[arg-type] # of one kind
    bias = torch.randn(40).to(dtype).to(DEVICE)
    x = torch.randn(max(ROWS) + 3, 224).to(dtype).to(DEVICE)
    together = linear_triton.linear(x, weight, bias)
    for num_rows in ROWS:
        got = linear_triton.linear(x[3 : 3 + num_rows], weight, bias)
        assert torch.equal(got, together[3 : 3 + num_rows]), num_rows


@pytest.mark.long
def test_every_number_of_rows_gives_the_same_bits() -> None:
    weight = pack(random_weight(17, 96, group_size=32))
    x = torch.randn(66, 96).half().to(DEVICE)
    together = linear_triton.linear(x, weight)
    for num_rows in range(1, 66):
        got = linear_triton.linear(x[-num_rows:], weight)
        assert torch.equal(got, together[-num_rows:]), num_rows


def test_a_chunk_is_summed_alone_and_then_added() -> None:
    # 2^24, and then 1 in each of two steps: lost one by one, kept if they are summed first.
    codes = torch.zeros(5, 512, dtype=torch.uint8)
    codes[:, 0], codes[:, 256], codes[:, 384] = 8, 1, 1
    weight = GroupQuantized(
        codes=codes,
        bits=4,
        group_size=128,
        scales=torch.ones(5, 4, dtype=torch.float16),
        zeros=torch.zeros(5, 4, dtype=torch.uint8),
    )
    weight.scales[:, 0] = 1024
    packed = {size: pack(weight, size) for size in (256, 512)}
    for num_rows in ROWS:
        x = torch.ones(num_rows, 512, dtype=torch.float16)
        x[:, 0] = 2048
        sums = {
            size: linear_triton.linear(x.to(DEVICE), weight, None, torch.float32).unique().tolist()
            for size, weight in packed.items()
        }
        assert sums == {256: [2.0**24 + 2], 512: [2.0**24]}


def test_arrivals_are_zero_after_every_launch() -> None:
    weight = pack(random_weight(70, 256), 128)
    assert weight.arrivals is not None
    assert weight.cuts.chunks.count == 2
    for num_rows in ROWS:
        linear_triton.linear(torch.randn(num_rows, 256).half().to(DEVICE), weight)
        assert not weight.arrivals.any()


def test_results_may_lie_side_by_side() -> None:
    x = torch.randn(20, 256).half().to(DEVICE)
    parts = [random_weight(40, 256), random_weight(24, 256, bits=8, group_size=64)]
    together = torch.full((20, 64), float("nan"), dtype=torch.float16, device=DEVICE)
    start = 0
    for part in parts:
        packed = pack(part, 128)
        place = together[:, start : start + part.out_features]
        assert triton_quantized.linear(x, packed, out=place) is place
        assert torch.equal(place, linear_triton.linear(x, packed))
        start += part.out_features
    assert not together.isnan().any()


def test_stacked_weights_give_what_each_gives_alone() -> None:
    dense = torch.randn(9, 256).half().to(DEVICE)
    parts = (
        on_device(random_weight(40, 256)),
        dense,
        on_device(random_weight(24, 256, bits=8, group_size=64, has_order=True)),
    )
    bias = torch.randn(73).half().to(DEVICE)
    x = torch.randn(5, 256).half().to(DEVICE)
    for out_dtype in (None, torch.float32):
        together = linear_triton.linear(x, linear_triton.pack_weight(parts), bias, out_dtype)
        alone = [
            linear_triton.linear(x, linear_triton.pack_weight(part), part_bias, out_dtype)
            for part, part_bias in zip(parts, bias.split((40, 9, 24)), strict=True)
        ]
        assert torch.equal(together, torch.cat(alone, dim=1))


def test_nothing_beyond_the_rows_is_read() -> None:
    x = torch.full((20, 240), float("nan"), dtype=torch.float16, device=DEVICE)
    x[2:5, 8:232] = 1
    weight = random_weight(9, 224, group_size=32)
    got = linear_triton.linear(x[2:5, 8:232], pack(weight))
    assert torch.equal(got, linear_triton.linear(torch.ones_like(x[2:5, 8:232]), pack(weight)))
    assert not got.isnan().any()


def test_a_row_that_is_not_finite_stays_alone() -> None:
    weight = pack(random_weight(9, 256, minimum_dtype=torch.float16))
    x = torch.randn(18, 256).half().to(DEVICE)
    expected = linear_triton.linear(x, weight)
    x[4, 100], x[7, 3] = float("nan"), float("inf")
    got = linear_triton.linear(x, weight)
    is_other = torch.ones(18, dtype=torch.bool, device=DEVICE)
    is_other[[4, 7]] = False
    assert torch.equal(got[is_other], expected[is_other])
    assert not got[~is_other].isfinite().any()


def test_wrong_arguments_are_refused() -> None:
    weight = pack(random_weight(8, 256))
    x = torch.randn(2, 256, device=DEVICE)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x.double(), weight)
    with pytest.raises(ValueError, match="bias"):
        linear_triton.linear(x, weight, torch.zeros(7, device=DEVICE))
    with pytest.raises(ValueError, match="result must be"):
        linear_triton.linear(x, weight, None, torch.float64)
    with pytest.raises(ValueError, match="out is"):
        triton_quantized.linear(x, weight, out=torch.zeros(2, 9, device=DEVICE))
    with pytest.raises(ValueError, match="a multiple of 32 inputs or of a whole row, not of 16"):
        pack(random_weight(8, 256, group_size=16))


def test_a_packed_weight_takes_its_bits_and_its_groups() -> None:
    packed = pack(random_weight(OUTPUTS_UNIT, 1024))
    assert packed.num_bytes == OUTPUTS_UNIT * (1024 // 2 + 4 * 1024 // 128)
    packed = pack(random_weight(OUTPUTS_UNIT, 1024, bits=8, scale_dtype=torch.float32))
    assert packed.num_bytes == OUTPUTS_UNIT * (1024 + 8 * 1024 // 128)


@pytest.mark.parametrize(("magic", "dtype"), [(0x6400, torch.float16), (0x4300, torch.bfloat16)])
@pytest.mark.parametrize("shift", [0, 4, 8, 12])
def test_the_instructions_make_two_words_nibbles_floats(
    magic: int, dtype: torch.dtype, shift: int
) -> None:
    # The interpreter runs no PTX: here each instruction is, on all pairs of a sample of words.
    words = torch.arange(2**16)
    other = words.flip(0)
    result = _run_ptx(kernel.pair_instructions(shift, magic), words | (other << 16))
    for half, expected in ((result & 0xFFFF, words), (result >> 16, other)):
        signed = torch.where(half >= 2**15, half - 2**16, half).to(torch.int16)
        floats = signed.view(dtype).double()
        bias = {torch.float16: 1024, torch.bfloat16: 128}[dtype]
        assert torch.equal(floats - bias, ((expected >> shift) & 15).double())


def _run_ptx(text: str, argument: Tensor) -> Tensor:
    """Run instructions of registers of 32 bits, of which $1 is given, and return $0."""
    registers = {"$1": argument}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for statement in text.strip("{} ").split(";"):
        operation, _, names = statement.strip("{} ").partition(" ")
        operands = [name.strip() for name in names.split(",")]
        if operation == "shr.u32":
            registers[operands[0]] = value(operands[1]) >> int(operands[2])
        elif operation == "lop3.b32":
            a, b, c = (value(name) for name in operands[1:4])
            table = int(operands[4], 0)
            result = torch.zeros_like(argument)
            for bits in itertools.product((0, 1), repeat=3):
                if table >> int("".join(map(str, bits)), 2) & 1:
                    terms = [x if bit else ~x for x, bit in zip((a, b, c), bits, strict=True)]
                    result |= terms[0] & terms[1] & terms[2]
            registers[operands[0]] = result & 0xFFFFFFFF
        else:
            assert re.fullmatch(r"\.reg|", operation), operation
    return registers["$0"]


@pytest.mark.parametrize("capability", [0, 80, 89, 90, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_cuts_are_whole_steps_and_part_no_group(bits: int, capability: int) -> None:
    for out_features, in_features, group_size in (
        (64, 32, 32),
        (896, 4864, 128),
        (4096, 4096, 128),
        (4096, 14_336, 64),
        (6144, 4096, 4096),
        (3584, 18_944, 32),
        (128_256, 4096, 128),
        (100, 333, 333),
    ):
        cuts = cut(
            out_features, in_features, bits=bits, group_size=group_size, capability=capability
        )
        assert cuts.step == cuts.block_words * 16 // bits
        assert (cuts.num_steps - 1) * cuts.step < in_features <= cuts.num_steps * cuts.step
        assert (cuts.chunks.count - 1) * cuts.chunks.size < cuts.num_steps
        assert cuts.num_steps <= cuts.chunks.count * cuts.chunks.size
        assert cuts.step % cuts.span == 0
        assert cuts.span % cuts.block_words == 0
        assert group_size == in_features or group_size % cuts.span == 0


@pytest.mark.parametrize("tiles", [*HALF_TILES.values(), *FLOAT_TILES.values()])
def test_few_rows_share_a_tile_and_many_rows_a_program(tiles: QuantizedTiles) -> None:
    bounds = [max_rows for max_rows, _ in tiles.few_rows]
    assert bounds == sorted(bounds)
    for bound, tile in tiles.few_rows:
        assert bound == tile.rows
        assert tile_of(tiles, bound, 2) == (tile, True)
        assert tile_of(tiles, bound, 1) == (tile, False)
    above = bounds[-1] + 1
    assert tile_of(tiles, above, 2) == (tiles.many_rows, False)
    assert all(
        OUTPUTS_UNIT % tile.outputs == 0
        for tile in (*dict(tiles.few_rows).values(), tiles.many_rows)
    )


def test_a_deeper_pipeline_is_for_programs_that_share_less() -> None:
    for capability in (0, 80, 90, 100):
        cuts = cut(4096, 4096, bits=4, group_size=128, capability=capability)
        for _, tile in HALF_TILES[0].few_rows:
            depths = [
                num_stages_of(
                    tile, cuts, x_bytes=2, group_bytes=4, num_sharing=n, capability=capability
                )
                for n in (0, 1, 2, 3, 9)
            ]
            assert depths == sorted(depths, reverse=True)
            assert depths[-1] >= 2


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_decoding_keeps_enough_weights_in_flight(layer: str, num_rows: int) -> None:
    count = count_launch(*LAYERS[layer], num_rows)
    assert count.bytes_in_flight >= 25_000
    assert count.input_traffic + count.sum_traffic <= 1.6


def test_the_count_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert all(printed.count(name) == 3 for name in LAYERS)
