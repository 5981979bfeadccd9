"""The real model as its own draft model, and a copy of it with fewer layers, in float32."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stepwire_client import Client, ClusterConfig, Generation, LocalCluster, SamplingParams
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.loading import load_runner
from support import drafting_scenarios as scenarios
from support.drafting import BLOCK_SIZE, DraftingExecutor, Tally
from support.drafting_scenarios import Scenario
from support.executor_fakes import sampling_params

from benchmarks.truncated_model import write_truncated_model

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "smollm2_135m_greedy.json"
NUM_BLOCKS = 1024


def _prompts() -> list[list[int]]:
    cases = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["cases"]
    return [case["prompt_token_ids"] for case in cases]


def _executor(model: Path, draft: Path | None) -> DraftingExecutor:
    config = ExecutorConfig(
        model=str(model),
        speculative_model=None if draft is None else str(draft),
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_kv_blocks=NUM_BLOCKS,
        max_num_seqs=4,
        max_num_batched_tokens=512,
    )
    runner, _ = load_runner(config, lambda phase, fraction: None)
    return DraftingExecutor(runner=runner, num_blocks=NUM_BLOCKS)


@pytest.fixture(scope="module")
def own_draft(smollm2_dir: Path) -> DraftingExecutor:
    return _executor(smollm2_dir, smollm2_dir)


@pytest.mark.parametrize(
    "scenario",
    [scenarios.prefix_hit_without_drafts, scenarios.preemption, scenarios.pause],
    ids=lambda each: each.__name__,
)
def test_the_real_model_is_right_about_itself_after(
    own_draft: DraftingExecutor, scenario: Scenario
) -> None:
    own_draft.open_epoch()
    tally = scenario(own_draft)
    assert tally == Tally(
        num_asked=tally.num_asked, num_drafts=tally.num_asked, num_accepted=tally.num_asked
    )


@pytest.mark.long
def test_the_real_model_is_right_about_itself_for_500_steps(own_draft: DraftingExecutor) -> None:
    own_draft.open_epoch()
    greedy, seeded, *_ = _prompts()
    sequences = [
        own_draft.join(0, greedy),
        own_draft.join(1, seeded, params=scenarios.PENALISED),
    ]
    for _ in range(500):
        own_draft.step({0: 1, 1: 3})
    assert [sequence.tally for sequence in sequences] == [
        Tally(num_asked=500, num_drafts=500, num_accepted=500),
        Tally(num_asked=1500, num_drafts=1500, num_accepted=1500),
    ]


@pytest.mark.long
def test_a_copy_with_fewer_layers_changes_no_token(smollm2_dir: Path, tmp_path: Path) -> None:
    layers = [layer for layer in range(30) if layer not in (12, 14, 16, 18, 20)]
    write_truncated_model(smollm2_dir, tmp_path, layers=layers, dtype="float32")
    params = [
        sampling_params(),
        sampling_params(temperature=0.8, seed=9, top_p=0.9, frequency_penalty=0.3),
    ]
    outputs = []
    for draft in (None, tmp_path):
        executor = _executor(smollm2_dir, draft)
        executor.open_epoch()
        sequences = [
            executor.join(slot, _prompts()[slot], params=each) for slot, each in enumerate(params)
        ]
        while min(len(sequence.output) for sequence in sequences) < 40:
            executor.step(0 if draft is None else 3)
        outputs.append([sequence.output[:40] for sequence in sequences])
        if draft is not None:
            assert all(0 < s.tally.num_accepted < s.tally.num_drafts for s in sequences), [
                s.tally for s in sequences
            ]
    assert outputs[0] == outputs[1]


def test_a_served_draft_model_changes_no_id_and_a_copy_of_the_model_is_never_wrong(
    smollm2_dir: Path,
) -> None:
    config = ClusterConfig(
        model=smollm2_dir, speculative_model=smollm2_dir, dtype="float32", max_num_seqs=8
    )

    def generate(client: Client, num_speculative_tokens: int | None) -> list[Generation]:
        def one(index: int) -> Generation:
            params = SamplingParams(
                temperature=0.0 if index % 2 else 0.8,
                seed=index,
                max_tokens=32,
                ignore_eos=True,
                frequency_penalty=0.3 if index % 3 == 0 else None,
                num_speculative_tokens=num_speculative_tokens,
            )
            return client.generate(_prompts()[index], params)

        with ThreadPoolExecutor(6) as threads:
            return list(threads.map(one, range(6)))

    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(240)
        with Client(cluster.address) as client:
            without, drafted = generate(client, 0), generate(client, None)
    assert [each.token_ids for each in without] == [each.token_ids for each in drafted]
    assert sum(each.usage.num_draft_tokens for each in without) == 0
    assert sum(each.usage.num_draft_tokens for each in drafted) > 0
    for each in drafted:
        assert each.usage.num_accepted_tokens == each.usage.num_draft_tokens
