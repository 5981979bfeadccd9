"""Linear layers in Triton: right against float64, and bit-equal rows whatever their number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.triton_interpreter import DEVICE, DTYPES, requires_triton
from torch import Tensor

pytestmark = requires_triton
pytest.importorskip("triton")

from stepwire_executor.kernels.linear import triton as linear_triton  # noqa: E402 # after the skip
from stepwire_executor.kernels.linear import triton_tiles  # noqa: E402
from stepwire_executor.kernels.linear.triton_count import (  # noqa: E402
    LAYERS,
    count_launch,
    main,
)
from stepwire_executor.kernels.linear.triton_tiles import (  # noqa: E402
    BLOCK_K,
    ONE_WIDTH_TILES,
    Chunks,
    Tiles,
    chunks,
    num_stages_of,
    tile_of,
)

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS = (1, 16, 17, 32, 33, 64, 65, 129, 256, 257)
"""Numbers of rows on either side of every border between tiles."""
SPLIT = (66, 1030)
"""[out_features, in_features] of a layer of two chunks, neither a multiple of a tile."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all memory that is not set hold NaN: what is read must have been written."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))  # type: ignore[call-overload] # any form

    monkeypatch.setattr(torch, "empty", poisoned)


def pack(weight: Tensor, chunk_size: int | None = None) -> linear_triton.ChunkedWeight:
    """Pack weight, its sums cut at multiples of chunk_size if it is given."""
    packed = linear_triton.pack_weight(weight.to(DEVICE))
    if chunk_size is None:
        return packed
    cuts = Chunks(size=chunk_size, count=-(-weight.shape[1] // chunk_size))
    arrivals = torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    return replace(packed, chunks=cuts, arrivals=arrivals)


def assert_is_product(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compare with float64, allowing for float32 sums and one rounding of the result."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + 1
    bound = EPSILON[got.dtype] * expected.abs() + 2.0**-21 * magnitude
    assert got.shape == expected.shape
    assert bool(((got.cpu().double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 130, 260])
@pytest.mark.parametrize(
    ("out_features", "in_features", "chunk_size"),
    [
        (1, 1, None),
        (33, 65, None),
        (*SPLIT, None),
        (33, 65, 64),
        (130, 192, 64),
        (65, 300, 128),
    ],
)
def test_any_shape_multiplies_right(
    num_rows: int,
    out_features: int,
    in_features: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(num_rows, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    packed = pack(weight, chunk_size)
    got = linear_triton.linear(x.to(DEVICE), packed, bias.to(DEVICE))
    assert got.dtype == dtype
    assert_is_product(got, x, weight, bias)
    if num_rows in (1, 130):
        wide = linear_triton.linear(x.to(DEVICE), packed, None, torch.float32)
        assert wide.dtype == torch.float32
        assert_is_product(wide, x, weight, None)


@pytest.mark.parametrize(
    ("out_features", "in_features", "chunk_size", "dtype"),
    [
        *((100, 333, None, dtype) for dtype in DTYPES),
        *((70, 200, 64, dtype) for dtype in DTYPES),
        *((*SPLIT, None, dtype) for dtype in DTYPES if dtype != torch.float32),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(
    out_features: int, in_features: int, chunk_size: int | None, dtype: torch.dtype
) -> None:
    weight = pack(torch.randn(out_features, in_features).to(dtype), chunk_size)
    bias = torch.randn(out_features).to(dtype).to(DEVICE)
    x = torch.randn(max(ROWS) + 3, in_features).to(dtype).to(DEVICE)
    together = linear_triton.linear(x, weight, bias)
    for num_rows in ROWS:
        got = linear_triton.linear(x[3 : 3 + num_rows], weight, bias)
        assert torch.equal(got, together[3 : 3 + num_rows]), num_rows


def test_small_numbers_of_rows_give_the_same_bits() -> None:
    weight = pack(torch.randn(17, 100).half(), 64)
    x = torch.randn(130, 100).half().to(DEVICE)
    together = linear_triton.linear(x, weight)
    for num_rows in range(1, 131, 3):
        got = linear_triton.linear(x[-num_rows:], weight)
        assert torch.equal(got, together[-num_rows:]), num_rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_is_summed_alone_and_then_added(dtype: torch.dtype) -> None:
    # 2^24, and then 1 in each of two steps: lost one by one, kept if they are summed first.
    weight = torch.zeros(5, 256, dtype=dtype)
    weight[:, 0], weight[:, 128], weight[:, 192] = 4096, 1, 1
    packed = {size: pack(weight, size) for size in (128, 256)}
    for num_rows in ROWS:
        x = torch.ones(num_rows, 256, dtype=dtype)
        x[:, 0] = 4096
        sums = {
            size: linear_triton.linear(x.to(DEVICE), weight, None, torch.float32).unique().tolist()
            for size, weight in packed.items()
        }
        assert sums == {128: [2.0**24 + 2], 256: [2.0**24]}


def test_arrivals_are_zero_after_every_launch() -> None:
    weight = pack(torch.randn(70, 130), 64)
    assert weight.arrivals is not None
    for num_rows in ROWS:
        x = torch.randn(num_rows, 130, device=DEVICE)
        linear_triton.linear(x, weight)
        assert not weight.arrivals.any()


def test_tiles_of_one_width_for_all_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(SPLIT).half()
    x = torch.randn(257, SPLIT[1]).half().to(DEVICE)
    expected = linear_triton.linear(x, pack(tensor))
    table = dict.fromkeys(triton_tiles.HALF_TILES, ONE_WIDTH_TILES)
    monkeypatch.setattr(triton_tiles, "HALF_TILES", table)
    weight = pack(tensor)
    for num_rows in (1, 70, 257):
        assert torch.equal(linear_triton.linear(x[:num_rows], weight), expected[:num_rows])


def test_tiles_of_one_width_are_of_one_width() -> None:
    tiles = ONE_WIDTH_TILES
    few = {tile.rows for _, tile in tiles.few_rows}
    assert few == {tiles.many_rows.rows} == {tiles.many_rows_one_chunk.rows}


def test_rows_may_be_a_view_of_wider_ones() -> None:
    weight = pack(torch.randn(40, 24))
    x = torch.randn(6, 60, device=DEVICE)
    assert torch.equal(
        linear_triton.linear(x[:, 10:34], weight),
        linear_triton.linear(x[:, 10:34].contiguous(), weight),
    )


def test_nothing_beyond_the_rows_is_read() -> None:
    x = torch.full((20, 80), float("nan"), device=DEVICE)
    x[2:5, 3:73] = 1
    weight = pack(torch.ones(9, 70))
    assert linear_triton.linear(x[2:5, 3:73], weight).unique().tolist() == [70]


def test_wrong_arguments_are_refused() -> None:
    weight = pack(torch.randn(8, 16))
    x = torch.randn(2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x.half(), weight)
    with pytest.raises(ValueError, match="bias"):
        linear_triton.linear(x, weight, torch.zeros(7, device=DEVICE))
    with pytest.raises(ValueError, match="result must be"):
        linear_triton.linear(x, weight, None, torch.float64)


@pytest.mark.parametrize("out_features", [1, 64, 896, 4096, 6144, 28_672, 152_064])
def test_chunks_are_whole_steps_that_cover_the_inputs(out_features: int) -> None:
    for in_features in (1, 63, 64, 512, 896, 1025, 3584, 4096, 4864, 14_336, 18_944):
        cuts = chunks(out_features, in_features)
        assert cuts.size % BLOCK_K == 0
        assert (cuts.count - 1) * cuts.size < in_features <= cuts.count * cuts.size


def test_only_layers_of_few_outputs_are_cut() -> None:
    shapes = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096)]
    assert [chunks(*shape).count for shape in shapes] == [2, 4, 1, 4, 1]


@pytest.mark.parametrize(
    "tiles", [*triton_tiles.HALF_TILES.values(), *triton_tiles.FLOAT_TILES.values()]
)
def test_few_rows_share_a_tile_and_many_rows_a_program(tiles: Tiles) -> None:
    bounds = [max_rows for max_rows, _ in tiles.few_rows]
    assert bounds == sorted(bounds)
    for bound, tile in tiles.few_rows:
        assert tile_of(tiles, bound, 2) == (tile, True)
        assert tile_of(tiles, bound, 1) == (tile, False)
    assert tile_of(tiles, bounds[-1] + 1, 2) == (tiles.many_rows, False)
    assert tile_of(tiles, bounds[-1] + 1, 1) == (tiles.many_rows_one_chunk, False)


@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("layer", [name for name in LAYERS if "0.5B" not in name])
def test_decoding_keeps_enough_weights_in_flight(layer: str, num_rows: int) -> None:
    count = count_launch(*LAYERS[layer], num_rows)
    assert count.bytes_in_flight >= 50_000
    assert count.input_traffic + count.sum_traffic <= 0.8
    assert count.num_waves <= 1.2 or "head" in layer


def test_a_deeper_pipeline_is_for_programs_that_share_less() -> None:
    for tiles in triton_tiles.HALF_TILES.values():
        for _, tile in tiles.few_rows:
            depths = [num_stages_of(tile, 132 * sharing, 132) for sharing in (1, 2, 3, 4, 5)]
            assert depths == sorted(depths, reverse=True)
            assert depths[0] == tile.num_stages[0]
            assert depths[-1] == tile.num_stages[-1]


def test_the_count_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert all(printed.count(name) == 3 for name in LAYERS)
