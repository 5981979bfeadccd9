"""A model's tokens and log-probabilities with drafts are those without, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_executor.runner import Runner
from support.draft_runs import (
    BLOCKS_PER_SLOT,
    HOW_TO_ADJUST,
    HOW_TO_DRAW,
    MAX_DRAFTS,
    check_drafts_leave_no_trace,
    params_of,
    run_alone,
)
from support.executor_fakes import admission, step
from support.model_runner import (
    BUILDERS,
    MAX_NUM_SEQS,
    VOCAB_SIZE,
    make_model_runner,
    save_model,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    yield path
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=BUILDERS)
def runner(request: pytest.FixtureRequest, directory: Path) -> Runner:
    return make_model_runner(directory, request.param)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(sorted(HOW_TO_DRAW)),
            st.sampled_from(sorted(HOW_TO_ADJUST)),
            st.sampled_from([None, 0, 3]),
        ),
        min_size=1,
        max_size=MAX_NUM_SEQS,
    ),
    seed=st.integers(0, 2**32),
)
def test_tokens_and_logprobs_do_not_know_that_there_were_drafts(
    runner: Runner, kinds: list[tuple[str, str, int | None]], seed: int
) -> None:
    check_drafts_leave_no_trace(runner, kinds, seed)


@pytest.mark.parametrize("how_to_adjust", HOW_TO_ADJUST)
@pytest.mark.parametrize("how_to_draw", HOW_TO_DRAW)
@pytest.mark.parametrize("num_right", range(MAX_DRAFTS + 1))
def test_right_drafts_are_accepted_up_to_the_first_wrong_one(
    runner: Runner, how_to_draw: str, how_to_adjust: str, num_right: int
) -> None:
    params = params_of(how_to_draw, how_to_adjust, None)
    prompt = [5, 17, 3]
    alone = run_alone(runner, prompt, params).output
    runner.open_epoch(1)
    joined = admission(1, prompt, list(range(BLOCKS_PER_SLOT)), params=params)
    drafts = alone[:MAX_DRAFTS]
    if num_right < MAX_DRAFTS:
        drafts[num_right:] = [(drafts[num_right] + 1) % VOCAB_SIZE] * (MAX_DRAFTS - num_right)
    result = runner.execute(step(1, 1, {1: 3}, admissions=[joined], drafts={1: drafts}))
    assert list(result.num_draft_tokens) == [MAX_DRAFTS]
    assert list(result.num_sampled_tokens) == [num_right + 1]
    assert list(result.sampled_token_ids) == alone[: num_right + 1]
