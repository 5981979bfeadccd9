"""Linear layers in Triton: right against float64, and bit-equal rows whatever their number."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import DEVICE, DTYPES, requires_triton

pytestmark = requires_triton
pytest.importorskip("triton")

from stepwire_executor.kernels.linear import triton as linear_triton  # noqa: E402 # after the skip

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 70, 130])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (33, 65), (70, 128)])
def test_any_shape_multiplies_right(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x = torch.randn(num_rows, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    packed = linear_triton.pack_weight(weight.to(DEVICE))
    for has_bias, out_dtype in ((True, None), (False, torch.float32)):
        got = linear_triton.linear(
            x.to(DEVICE), packed, bias.to(DEVICE) if has_bias else None, out_dtype
        ).cpu()
        expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
        assert got.shape == expected.shape
        assert got.dtype == (out_dtype or dtype)
        magnitude = x.double().abs() @ weight.double().abs().T + 1
        bound = EPSILON[got.dtype] * expected.abs() + 2.0**-21 * magnitude
        assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [128, 333])
def test_a_row_has_the_same_bits_in_any_company(in_features: int, dtype: torch.dtype) -> None:
    weight = linear_triton.pack_weight(torch.randn(100, in_features).to(dtype).to(DEVICE))
    bias = torch.randn(100).to(dtype).to(DEVICE)
    x = torch.randn(140, in_features).to(dtype).to(DEVICE)
    together = linear_triton.linear(x, weight, bias)
    for start, stop in ((0, 1), (7, 9), (20, 37), (60, 93), (3, 103), (139, 140)):
        got = linear_triton.linear(x[start:stop], weight, bias)
        assert torch.equal(got, together[start:stop])


def test_rows_may_be_a_view_of_wider_ones() -> None:
    weight = linear_triton.pack_weight(torch.randn(40, 24, device=DEVICE))
    x = torch.randn(6, 60, device=DEVICE)
    assert torch.equal(
        linear_triton.linear(x[:, 10:34], weight),
        linear_triton.linear(x[:, 10:34].contiguous(), weight),
    )


def test_wrong_arguments_are_refused() -> None:
    weight = linear_triton.pack_weight(torch.randn(8, 16, device=DEVICE))
    x = torch.randn(2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match="expected"):
        linear_triton.linear(x.half(), weight)
    with pytest.raises(ValueError, match="bias"):
        linear_triton.linear(x, weight, torch.zeros(7, device=DEVICE))
    with pytest.raises(ValueError, match="result must be"):
        linear_triton.linear(x, weight, None, torch.float64)
