"""Sampling in Triton draws what the reference draws."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.kernels import SampleOutput, SamplingBatch
from stepwire_executor.kernels.sample import noise, reference
from support.kernels_support import sampling_batch
from support.triton_interpreter import DEVICE, requires_triton
from torch import Tensor

pytestmark = requires_triton
pytest.importorskip("triton")

import triton  # noqa: E402 # after the skip
import triton.language as tl  # noqa: E402
from stepwire_executor.kernels.sample import triton as sample_triton  # noqa: E402
from stepwire_executor.kernels.sample.triton_noise import gumbel_noise, noise_bits  # noqa: E402


@triton.jit
def noise_kernel(bits_ptr, noise_ptr, key_ptr, first_id, BLOCK: tl.constexpr):
    seed, position, stream = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    bits = noise_bits(first_id, seed, position, stream, BLOCK)
    tl.store(bits_ptr + tl.arange(0, BLOCK), bits.to(tl.int64))
    tl.store(noise_ptr + tl.arange(0, BLOCK), gumbel_noise(bits))


@triton.jit
def gumbel_kernel(bits_ptr, noise_ptr, BLOCK: tl.constexpr):
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise_ptr + ids, gumbel_noise(tl.load(bits_ptr + ids).to(tl.uint32)))


@pytest.mark.parametrize("first_id", [0, 4096])
@pytest.mark.parametrize(
    ("seed", "position", "stream"),
    [(0, 0, 0), (-1, 2**31, 1), (2**63 - 1, 5, 7), (0x0123456789ABCDEF, 2**32 - 1, 2**32 - 1)],
)
def test_noise_has_the_references_bits(
    seed: int, position: int, stream: int, first_id: int
) -> None:
    key = torch.tensor([seed, position, stream])
    bits = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    values = torch.zeros(64, device=DEVICE)
    noise_kernel[(1,)](bits, values, key.to(DEVICE), first_id, BLOCK=64)
    arguments = key[0:1], key[1:2], key[2:3], first_id + 64
    assert torch.equal(bits.cpu(), noise.noise_bits(*arguments)[0, first_id:])
    expected = noise.gumbel_noise(*arguments)[0, first_id:]
    torch.testing.assert_close(values.cpu(), expected, rtol=2e-6, atol=1e-6)


def test_noise_is_accurate_over_its_whole_range() -> None:
    ends = torch.arange(2048)
    steps = torch.cat((ends, 2**24 - 1 - ends, 2**23 - 1024 + ends, ends * 8191))
    values = torch.zeros(len(steps), device=DEVICE)
    gumbel_kernel[(len(steps) // 1024,)]((steps << 8).to(DEVICE), values, BLOCK=1024)
    uniform = (steps.double() + 0.5) * 2.0**-24
    expected = -torch.log(-torch.log(uniform))
    assert (values.cpu().double() - expected).abs().max() < 4e-6


def draw(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Sample on the device under test; return tensors of the CPU."""
    tensors = {
        x.name: getattr(batch, x.name).to(DEVICE)
        for x in dataclasses.fields(batch)
        if isinstance(getattr(batch, x.name), Tensor)
    }
    moved = dataclasses.replace(batch, **tensors)
    out = sample_triton.sample(logits.clone().to(DEVICE), moved)
    return dataclasses.replace(out, token_ids=out.token_ids.cpu(), is_finite=out.is_finite.cpu())


def assert_draws_as_the_reference(logits: Tensor, batch: SamplingBatch) -> None:
    expected = reference.sample(logits.clone(), batch)
    got = draw(logits, batch)
    assert got.is_finite.tolist() == expected.is_finite.tolist()
    assert got.token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 1000, 4097])
def test_greedy_takes_the_largest_and_of_equals_the_smaller_id(vocab_size: int) -> None:
    logits = torch.randint(-3, 3, (5, vocab_size)).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    batch = sampling_batch(5, temperature=0.0, top_k=3, top_p=0.1)
    assert draw(logits, batch).token_ids.tolist() == expected


def test_rows_that_cannot_be_sampled_are_told_apart() -> None:
    logits = torch.randn(6, 50)
    logits[1, 30] = torch.nan
    logits[2] = -torch.inf
    logits[3, :49] = -torch.inf
    logits[4, 7] = torch.inf
    for temperature, top_p in itertools.product((0.0, 1.0), (1.0, 0.5)):
        batch = sampling_batch(6, temperature=temperature, top_p=top_p)
        out = draw(logits, batch)
        assert out.is_finite.tolist() == [True, False, False, True, False, True]
        assert out.token_ids[[1, 2, 4]].tolist() == [0, 0, 0]
        assert int(out.token_ids[3]) == 49


LIMITS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.3, 0.0),
    (0, 0.95, 0.0),
    (0, 1e-6, 0.0),
    (0, 0.0, 0.0),
    (0, 1.0, 0.3),
    (0, 1.0, 1.0),
    (6, 0.7, 0.0),
    (40, 0.9, 0.02),
    (100, 1.0, 0.0),
    (690, 0.9999, 0.0),
]


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("vocab_size", [12, 1500])
def test_every_limit_draws_as_the_reference(vocab_size: int, has_ties: bool) -> None:
    spread = 5.0 if has_ties else 1.0
    logits = torch.randn(len(LIMITS), vocab_size) * spread
    if has_ties:
        logits = torch.round(logits * 4) / 4
    top_k, top_p, min_p = (list(column) for column in zip(*LIMITS, strict=True))
    for seed in range(2):
        batch = sampling_batch(
            len(LIMITS), temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p,
            seeds=[seed * 100 + i for i in range(len(LIMITS))],
        )  # fmt: skip
        assert_draws_as_the_reference(logits, batch)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@settings(max_examples=20, deadline=None)
@given(
    row=st.lists(st.sampled_from([-1e30, -5.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=80),
    temperature=st.sampled_from([1e-30, 0.1, 1.0, 50.0]),
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([0.01, 0.37, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.77]),
)
def test_rows_of_ties_draw_as_the_reference(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.tensor(row).unsqueeze(0)
    batch = sampling_batch(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_draws_as_the_reference(logits, batch)


def test_a_row_draws_the_same_token_in_any_company() -> None:
    parameters = list(itertools.product([0.0, 0.7], [0, 50], [1.0, 0.9], [0.0, 0.02]))
    num_rows = len(parameters)
    logits = torch.randn(num_rows, 4200)
    columns = [list(column) for column in zip(*parameters, strict=True)]

    def ids(rows: list[int]) -> list[int]:
        temperature, top_k, top_p, min_p = ([column[i] for i in rows] for column in columns)
        batch = sampling_batch(
            len(rows), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seeds=[i * 77 - 5 for i in rows], positions=[i + 1 for i in rows],
            streams=[i % 2 for i in rows],
        )  # fmt: skip
        return draw(logits[rows], batch).token_ids.tolist()

    together = ids(list(range(num_rows)))
    assert ids(list(range(num_rows))[::-1]) == together[::-1]
    assert [ids([i])[0] for i in range(0, num_rows, 5)] == together[::5]


def test_rows_may_be_a_view_of_wider_ones_and_none_is_none() -> None:
    wide = torch.randn(3, 80, device=DEVICE)
    batch = sampling_batch(3, temperature=0.0)
    assert torch.equal(draw(wide[:, 8:60], batch).token_ids, wide[:, 8:60].argmax(dim=1).cpu())
    out = draw(wide[:0], sampling_batch(0))
    assert out.token_ids.shape == out.is_finite.shape == (0,)
    with pytest.raises(ValueError, match="float32"):
        draw(wide.double(), batch)
    with pytest.raises(ValueError, match="parameter"):
        draw(wide, sampling_batch(2))
