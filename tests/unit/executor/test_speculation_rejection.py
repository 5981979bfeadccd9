"""Verification by rejection, one part at a time."""

from __future__ import annotations

import pytest
import torch
from stepwire_executor.kernels.sample import noise
from stepwire_executor.kernels.sample.noise import Purpose, uniforms
from stepwire_executor.kernels.sample.reference import sample
from stepwire_executor.speculation.distributions import draw, probabilities_of
from stepwire_executor.speculation.interface import NO_DRAFT, DraftRows
from stepwire_executor.speculation.rejection import (
    PositionKeyedDraws,
    RejectionVerification,
    residual,
    select,
)
from support.kernels_support import sampling_batch
from torch import Tensor

VOCAB_SIZE = 49_152


@pytest.fixture
def rule() -> RejectionVerification:
    return RejectionVerification(PositionKeyedDraws(sample))


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("total", [1.0, 1.0 + 2.0**-52, 1.5, 3.0, 2.0**-1000])
def test_a_uniform_number_is_inside_its_interval(
    word: int, total: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "philox4x32", lambda counter, key: (numbers(word),) * 4)
    u = float(uniforms(numbers(1), numbers(2), numbers(3), Purpose.ACCEPT))
    assert 0 < u < 1
    assert 0 < u * total < total


def test_uniform_numbers_differ_in_everything_that_keys_them() -> None:
    keys = torch.cartesian_prod(numbers(0, 1, 2**40), numbers(0, 1, 9), numbers(0, 1))
    drawn = torch.cat([uniforms(*keys.unbind(1), purpose) for purpose in Purpose])
    assert drawn.unique().numel() == drawn.numel() == 4 * len(keys)


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 0.0]).expand(3, -1)
    drawn = draw(weights, torch.tensor([2.0**-53, 1 / 3, 1 - 2.0**-53], dtype=torch.float64))
    assert set(drawn.tolist()) <= {2, 4}
    assert drawn[0] == 2
    assert drawn[2] == 4


def test_probabilities_of_a_row_do_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, VOCAB_SIZE, generator=generator)
    batch = sampling_batch(
        9,
        temperature=[0.0, 0.5, 1.0] * 3,
        top_k=[0, 0, 0, 50, 50, 50, 0, 0, 0],
        top_p=[1.0] * 6 + [0.9] * 3,
        min_p=[0.0, 0.0, 0.01] * 3,
    )
    together = probabilities_of(logits, batch)
    torch.testing.assert_close(together.double().sum(dim=1), torch.ones(9).double())
    for row in range(9):
        alone = probabilities_of(logits[row : row + 1], select(batch, numbers(row)))
        assert torch.equal(alone[0], together[row])


def test_a_greedy_row_is_all_on_the_likeliest_token_of_smallest_id() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0]])
    assert probabilities_of(logits, sampling_batch(1, temperature=0.0)).tolist() == [[0, 1, 0, 0]]


def test_a_row_that_cannot_be_sampled_has_no_probabilities() -> None:
    logits = torch.zeros(4, 3)
    logits[0, 1], logits[1, 1], logits[2] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        probabilities = probabilities_of(logits, sampling_batch(4, temperature=temperature))
        assert probabilities[:3].isnan().all()
        assert probabilities[3].isfinite().all()


def test_a_rejected_draft_that_was_looked_up_is_not_drawn_again() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    weights = residual(p, None, numbers(2, 1), numbers(1, 0))
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.0, 0.7], [0.5, 0.25, 0.0]]).double())


def test_what_rounding_leaves_of_equal_distributions_is_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(residual(p, p, numbers(0), numbers(0)), p)


def test_a_draft_of_a_broken_draft_model_gives_way_to_a_token_of_the_model(
    rule: RejectionVerification,
) -> None:
    num_draws = 2000
    drawn = rule.draw(torch.full((num_draws, 4), torch.nan), sampling_batch(num_draws))
    assert drawn.probabilities is not None
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < 4)).all()
    logits = torch.tensor([0.0, 1.0, 1.0, -torch.inf]).expand(2 * num_draws, -1)
    verified = rule.verify(
        logits,
        sampling_batch(2 * num_draws),
        DraftRows(
            first_rows=torch.arange(0, 2 * num_draws, 2),
            next_drafts=torch.stack(
                (drawn.token_ids, torch.full_like(drawn.token_ids, NO_DRAFT)), dim=1
            ).flatten(),
            probabilities=drawn.probabilities,
        ),
    )
    assert not verified.num_accepted.any()
    assert verified.is_finite.all()
    shares = verified.token_ids[::2].bincount(minlength=4) / num_draws
    torch.testing.assert_close(shares, logits[0].softmax(dim=0), atol=0.04, rtol=0)


def test_a_row_that_is_not_finite_fails_the_sequence_that_reaches_it_alone(
    rule: RejectionVerification,
) -> None:
    logits = torch.zeros(8, 4)
    logits[:, 2] = 100.0  # Every draft of token 2 is accepted.
    logits[3] = torch.nan  # The second draft's row of the second sequence,
    logits[7] = torch.nan  # and the last row of the third, behind a rejected draft.
    verified = rule.verify(
        logits,
        sampling_batch(8),
        DraftRows(
            first_rows=numbers(0, 2, 5),
            next_drafts=numbers(2, NO_DRAFT, 2, 2, NO_DRAFT, 2, 1, NO_DRAFT),
        ),
    )
    assert verified.num_accepted.tolist() == [1, 1, 1]
    last_rows = numbers(0, 2, 5) + verified.num_accepted
    assert verified.is_finite[last_rows].tolist() == [True, False, True]
    assert verified.token_ids[:2].tolist() == [2, 2]
    assert verified.token_ids[5:7].tolist() == [2, 2]


def test_a_sequence_without_drafts_gets_the_token_that_sampling_gives(
    rule: RejectionVerification,
) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    batch = sampling_batch(64, temperature=0.8, top_p=0.9)
    next_drafts = torch.full((64,), NO_DRAFT)
    next_drafts[10:13] = 7
    first_rows = torch.cat((torch.arange(11), torch.arange(14, 64)))
    verified = rule.verify(
        logits.clone(), batch, DraftRows(first_rows=first_rows, next_drafts=next_drafts)
    )
    is_free = (first_rows < 10) | (first_rows > 13)
    expected = sample(logits, batch).token_ids
    assert torch.equal(verified.token_ids[first_rows[is_free]], expected[first_rows[is_free]])
    assert not verified.num_accepted[is_free].any()


def test_a_step_without_any_draft_is_sampled(rule: RejectionVerification) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    rows = DraftRows(first_rows=torch.arange(5), next_drafts=torch.full((5,), NO_DRAFT))
    verified = rule.verify(logits.clone(), sampling_batch(5), rows)
    assert torch.equal(verified.token_ids, sample(logits, sampling_batch(5)).token_ids)
    assert verified.num_accepted.tolist() == [0] * 5
