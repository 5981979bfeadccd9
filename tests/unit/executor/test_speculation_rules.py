"""The operator's choice of a rule reaches the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepwire_executor.config import ExecutorConfig, parse_config
from stepwire_executor.errors import ConfigError
from stepwire_executor.loading import load_runner
from stepwire_executor.runner import Runner
from stepwire_executor.speculation.rules import RuleName
from support.executor_fakes import admission, sampling_params, step
from support.model_runner import BLOCK_SIZE, MAX_NUM_SEQS, NUM_BLOCKS, save_model

NUM_SEEDS = 40
PROMPT = [3, 1, 4]


def test_a_rule_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="--speculative-verification must be one of sampled, rej"):
        parse_config(["--model", "m", "--speculative-verification", "maybe"], {})


def token_ids(runner: Runner, drafts: list[int]) -> list[list[int]]:
    """Return what a step gives behind PROMPT, seed by seed."""
    runner.open_epoch(1)
    results = []
    for seed in range(NUM_SEEDS):
        # Two tokens, about equally likely: a draft of one of them is accepted about half the time.
        params = sampling_params(temperature=100.0, top_k=2, seed=seed)
        plan = step(
            1,
            seed + 1,
            {0: len(PROMPT)},
            released=[0] if seed else [],
            admissions=[admission(0, PROMPT, [0, 1], params=params)],
            drafts={0: drafts} if drafts else None,
        )
        results.append(list(runner.execute(plan).sampled_token_ids))
    return results


def test_the_rule_is_the_operators_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    save_model(tmp_path)

    def load(rule: RuleName) -> tuple[Runner, str]:
        config = ExecutorConfig(
            model=str(tmp_path),
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_kv_blocks=NUM_BLOCKS,
            max_num_seqs=MAX_NUM_SEQS,
            speculative_verification=rule,
        )
        runner, description = load_runner(config, lambda phase, fraction: None)
        return runner, description.model_fingerprint

    (sampled, sampled_fingerprint), (rejection, rejection_fingerprint) = (
        load("sampled"),
        load("rejection"),
    )
    assert sampled_fingerprint != rejection_fingerprint
    without = token_ids(sampled, [])
    assert token_ids(rejection, []) == without
    draft = without[0]
    assert [tokens[:1] for tokens in token_ids(sampled, draft)] == without
    by_rejection = token_ids(rejection, draft)
    assert [tokens[:1] for tokens in by_rejection] != without
    assert {len(tokens) for tokens in by_rejection} == {1, 2}
