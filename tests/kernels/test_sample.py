"""Sampling: the noise's definition, exact supports, penalties and the resulting distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.kernels import Kernels
from stepwire_executor.kernels.native import KernelBuildError, NativeLibrary, load_library
from stepwire_executor.kernels.sample.noise import gumbel_noise, noise_bits, philox4x32
from stepwire_executor.kernels.select import native_kernels, reference_kernels
from support.kernels_support import sampling_batch
from torch import Tensor


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers published with the generator (Random123, kat_vectors).
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert philox4x32(words(*counter), words(*key)) == words(*expected)


@pytest.mark.parametrize("vocab_size", [1, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize(
    ("seed", "position", "stream"),
    [(0, 0, 0), (-1, 2**31, 1), (2**63 - 1, 5, 7), (0x0123456789ABCDEF, 2**32 - 1, 0)],
)
def test_native_noise_has_the_reference_bits(
    library: NativeLibrary, vocab_size: int, seed: int, position: int, stream: int
) -> None:
    bits = torch.zeros(vocab_size, dtype=torch.int32)
    noise = torch.zeros(vocab_size)
    library.gumbel_noise(seed, position, stream, vocab_size, bits.data_ptr(), noise.data_ptr())
    key = words(seed, position, stream)
    assert torch.equal(bits.long() & 0xFFFFFFFF, noise_bits(*key, vocab_size)[0])
    torch.testing.assert_close(noise, gumbel_noise(*key, vocab_size)[0], rtol=2e-6, atol=1e-6)


def test_native_noise_is_accurate_over_its_whole_range(library: NativeLibrary) -> None:
    size = 2_000_000
    bits, noise = torch.zeros(size, dtype=torch.int32), torch.zeros(size)
    library.gumbel_noise(1, 2, 3, size, bits.data_ptr(), noise.data_ptr())
    uniform = (((bits.long() & 0xFFFFFFFF) >> 8).double() + 0.5) * 2.0**-24
    expected = -torch.log(-torch.log(uniform))
    assert uniform.min() < 1e-5
    assert uniform.max() > 1 - 1e-5
    assert (noise.double() - expected).abs().max() < 1e-5
    assert noise.isfinite().all()


def ids(kernels: Kernels, logits: Tensor, **parameters: object) -> list[int]:
    batch = sampling_batch(len(logits), **parameters)  # type: ignore[arg-type] # by keyword
    return [int(x) for x in kernels.sample(logits.clone(), batch).token_ids]


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 33, 1000])
def test_greedy_takes_the_largest_and_of_equals_the_smaller_id(
    kernels: Kernels, vocab_size: int
) -> None:
    logits = torch.randint(-3, 3, (20, vocab_size)).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert ids(kernels, logits, temperature=0.0, top_k=3, top_p=0.1) == expected


def test_rows_that_cannot_be_sampled_are_told_apart(kernels: Kernels) -> None:
    logits = torch.randn(6, 50)
    logits[1, 30] = torch.nan
    logits[2] = -torch.inf
    logits[3, :49] = -torch.inf
    logits[4, 7] = torch.inf
    for temperature in (0.0, 1.0):
        for top_p in (1.0, 0.5):
            batch = sampling_batch(6, temperature=temperature, top_p=top_p)
            out = kernels.sample(logits.clone(), batch)
            assert out.is_finite.tolist() == [True, False, False, True, False, True]
            assert int(out.token_ids[3]) == 49


def support(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """Tokens that may be sampled, from the definition in float64."""
    largest = max(row)
    weight = {i: math.exp((x - largest) / temperature) for i, x in enumerate(row)}
    order = sorted(weight, key=lambda i: (-weight[i], i))
    if top_k:
        order = order[:top_k]
    order = [i for i in order if weight[i] >= min_p]
    total, mass, kept = sum(weight[i] for i in order), 0.0, set()
    for i in order:
        if mass >= top_p * total and kept and top_p < 1:
            break
        kept.add(i)
        mass += weight[i]
    return kept


def observed_support(
    kernels: Kernels, row: Tensor, num_draws: int, **parameters: float
) -> set[int]:
    logits = row.expand(num_draws, -1).contiguous()
    batch = sampling_batch(num_draws, **parameters)  # type: ignore[arg-type] # by keyword
    return set(kernels.sample(logits, batch).token_ids.tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (12, 1.0, 0.0),
        (0, 0.3, 0.0),
        (0, 0.8, 0.0),
        (0, 1e-6, 0.0),
        (0, 1.0, 0.3),
        (0, 1.0, 1.0),
        (6, 0.7, 0.0),
        (0, 0.8, 0.2),
        (4, 0.9, 0.2),
        (100, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("has_ties", [False, True])
def test_exactly_the_allowed_tokens_are_drawn(
    kernels: Kernels, top_k: int, top_p: float, min_p: float, has_ties: bool
) -> None:
    row = torch.randint(0, 3, (12,)).float() * 0.7 if has_ties else torch.randn(12)
    expected = support(row.tolist(), 1.3, top_k, top_p, min_p)
    got = observed_support(
        kernels, row, 4000, temperature=1.3, top_k=top_k, top_p=top_p, min_p=min_p
    )
    assert got == expected


def gumbel_argmax(kernels: Kernels, logits: Tensor, allowed: set[int], temperature: float) -> int:
    """Draw row 0's token with seed 0 from allowed, by definition."""
    noise = gumbel_noise(*words(0, 0, 0), logits.shape[0]).double()[0]
    scores = (logits.double() - logits.max()) / temperature + noise
    return max(allowed, key=lambda i: float(scores[i]))


@pytest.mark.parametrize("vocab_size", [700, 5000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 5.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (40, 1.0, 0.0), (690, 1.0, 0.0), (0, 0.95, 0.0),
     (0, 0.2, 0.0), (0, 0.9999, 0.0), (0, 1.0, 0.05), (50, 0.9, 0.01), (0, 0.9, 0.02)],
)  # fmt: skip
def test_large_vocabularies_draw_what_the_definition_draws(
    kernels: Kernels, vocab_size: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    for has_ties in (False, True):
        logits = torch.randn(vocab_size) * spread
        if has_ties:
            logits = torch.round(logits * 4) / 4
        allowed = support(logits.tolist(), 0.7, top_k, top_p, min_p)
        [got] = ids(
            kernels, logits.unsqueeze(0), temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p
        )
        assert got == gumbel_argmax(kernels, logits, allowed, 0.7)


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(st.sampled_from([-1e30, -5.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=80),
    temperature=st.sampled_from([1e-30, 0.1, 1.0, 50.0]),
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([0.01, 0.37, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.77]),
)
def test_native_draws_what_the_reference_draws(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    try:
        native = native_kernels(load_library())
    except KernelBuildError:
        pytest.skip("no compiler")
    logits = torch.tensor(row).expand(16, -1).contiguous()
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert ids(native, logits, **parameters) == ids(reference_kernels(), logits, **parameters)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.7)]
)
def test_draws_follow_the_softmax(
    kernels: Kernels, temperature: float, top_k: int, top_p: float
) -> None:
    num_draws = 200_000
    row = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -1.0, 0.7])
    allowed = support(row.tolist(), temperature, top_k, top_p, 0.0)
    batch = sampling_batch(
        num_draws, temperature=temperature, top_k=top_k, top_p=top_p,
        seeds=[i // 1000 for i in range(num_draws)],
        positions=[i % 1000 for i in range(num_draws)],
    )  # fmt: skip
    drawn = kernels.sample(row.expand(num_draws, -1).contiguous(), batch).token_ids
    counts = torch.bincount(drawn, minlength=7).double()
    weights = torch.tensor(
        [math.exp(x / temperature) if i in allowed else 0.0 for i, x in enumerate(row.tolist())]
    ).double()
    expected = weights / weights.sum() * num_draws
    assert bool((counts[expected == 0] == 0).all())
    is_possible = expected > 0
    chi_square = ((counts - expected)[is_possible] ** 2 / expected[is_possible]).sum()
    degrees = int(is_possible.sum()) - 1
    # Ten standard deviations; the noise is fixed, so this passes always or never.
    assert chi_square < degrees + 10 * math.sqrt(2 * degrees)


def test_tokens_and_streams_have_independent_noise() -> None:
    seeds = torch.full((64,), 9)
    positions = torch.arange(64) // 2
    streams = torch.arange(64) % 2
    noise = gumbel_noise(seeds, positions, streams, 4096)
    correlation = np.corrcoef(noise.numpy())
    off_diagonal = correlation[~np.eye(64, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.1
    shifted = np.corrcoef(noise[:, 1:].flatten(), noise[:, :-1].flatten())[0, 1]
    assert abs(shifted) < 0.02


def test_a_row_draws_the_same_token_in_any_company(kernels: Kernels) -> None:
    num_rows = 24
    logits = torch.randn(num_rows, 3000)
    parameters = list(itertools.product([0.0, 0.7, 1.3], [0, 50], [1.0, 0.9], [0.0, 0.02]))
    columns = [list(column) for column in zip(*parameters, strict=True)]

    def draw(rows: list[int]) -> list[int]:
        temperature, top_k, top_p, min_p = ([column[i] for i in rows] for column in columns)
        return ids(
            kernels, logits[rows], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seeds=[i * 77 - 5 for i in rows], positions=[i + 1 for i in rows],
        )  # fmt: skip

    together = draw(list(range(num_rows)))
    assert [draw([i])[0] for i in range(num_rows)] == together
    assert draw(list(range(num_rows))[::-1]) == together[::-1]


def test_noise_changes_with_seed_position_and_stream_alone(kernels: Kernels) -> None:
    logits = torch.zeros(1, 10_000)
    base = {"seeds": [1], "positions": [1], "streams": [1]}
    first = ids(kernels, logits, **base)
    assert ids(kernels, logits, **base) == first
    for name in base:
        assert ids(kernels, logits, **{**base, name: [2]}) != first
