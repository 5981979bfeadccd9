"""What happens to logits around the sampler: adjustments and log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.sampling.adjustments import RowAdjustments, apply_adjustments
from stepwire_executor.sampling.logprobs import describe_rows


def test_adjustments_are_applied_in_order() -> None:
    logits = torch.tensor([[7.0] * 5, [2.0, -2.0, 1.0, 0.0, 0.5]])
    change = RowAdjustments(
        row=1,
        bias_token_ids=torch.tensor([1, 3]),
        bias_values=torch.tensor([1.0, 4.0]),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seen_token_ids=torch.tensor([0, 1, 3]),
        output_counts=torch.tensor([3.0, 0.0, 1.0]),
        suppressed_token_ids=torch.tensor([2]),
    )
    apply_adjustments(logits, [change])
    # 0: 2/2 - 0.5 - 3/4; 1: (-2+1)*2, never generated; 2: suppressed; 3: 4/2 - 0.5 - 1/4.
    assert logits.tolist() == [[7.0] * 5, [-0.25, -2.0, -math.inf, 1.25, 0.5]]


def test_logprobs_of_ties_go_by_smaller_id() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, 0.0, 1.0, 2.0]])
    first, second = describe_rows(rows, torch.tensor([2, 3]), 3).rows([3, 0])
    expected = rows.double().log_softmax(dim=-1)
    assert (first.rank, first.top_token_ids) == (2, (1, 2, 0))
    assert first.logprob == pytest.approx(float(expected[0, 2]), abs=1e-6)
    assert first.top_logprobs == pytest.approx([float(expected[0, i]) for i in (1, 2, 0)], abs=1e-6)
    assert (second.rank, second.top_token_ids) == (1, ())
    assert second.logprob == pytest.approx(float(expected[1, 3]), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(
        st.sampled_from([-math.inf, -1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3e38]),
        min_size=1,
        max_size=12,
    ),
    num_top=st.integers(0, 14),
    data=st.data(),
)
def test_rank_and_rivals_are_those_of_a_stable_sort(
    row: list[float], num_top: int, data: st.DataObject
) -> None:
    token_id = data.draw(st.integers(0, len(row) - 1))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    (described,) = describe_rows(torch.tensor([row]), torch.tensor([token_id]), num_top).rows(
        [num_top]
    )
    assert described.top_token_ids == tuple(order[:num_top])
    assert described.rank == 1 + order.index(token_id)
