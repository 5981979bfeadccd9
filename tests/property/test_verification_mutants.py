"""Bugs planted in verification: each must leave a trace in tokens, log-probabilities or blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stepwire_executor.engine import device, host
from stepwire_executor.engine.device import DeviceEngine
from stepwire_executor.errors import PlanError
from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.runner import Runner
from stepwire_executor.sampling.device_state import DeviceSampling
from stepwire_executor.sampling.host_state import HostSampling, TokenCounts
from stepwire_executor.slots import SlotTable
from stepwire_executor.speculation import verification
from stepwire_executor.speculation.interface import DraftRows, VerifiedRows
from stepwire_executor.speculation.verification import SampledVerification
from support.draft_runs import check_drafts_leave_no_trace
from support.model_runner import BUILDERS, make_model_runner, save_model
from torch import Tensor

Plant = Callable[[pytest.MonkeyPatch], None]
Change = Callable[[Tensor, DraftRows], Tensor]

KINDS: list[tuple[str, str, int | None]] = [
    ("greedy", "frequency", 2),
    ("seeded", "nothing", None),
    ("seeded", "min_tokens", 0),
    ("narrow", "bias", None),
]
"""In which every one of the bugs shows."""
NUM_SEEDS = 12


def _change_acceptance(patch: pytest.MonkeyPatch, change: Change) -> None:
    verify = SampledVerification.verify

    def changed(
        rule: SampledVerification, logits: Tensor, batch: SamplingBatch, rows: DraftRows
    ) -> VerifiedRows:
        verified = verify(rule, logits, batch, rows)
        return replace(verified, num_accepted=change(verified.num_accepted, rows))

    patch.setattr(SampledVerification, "verify", changed)


def accept_one_too_many(patch: pytest.MonkeyPatch) -> None:
    def change(num_accepted: Tensor, rows: DraftRows) -> Tensor:
        ends = torch.cat((rows.first_rows[1:], torch.tensor([len(rows.next_drafts)])))
        return torch.minimum(num_accepted + 1, ends - rows.first_rows - 1)

    _change_acceptance(patch, change)


def accept_every_draft(patch: pytest.MonkeyPatch) -> None:
    def accept(is_accepted: Tensor, first_rows: Tensor) -> Tensor:
        ends = torch.cat((first_rows[1:], torch.tensor([len(is_accepted)])))
        return ends - first_rows - 1

    patch.setattr(verification, "count_accepted", accept)


def accept_behind_a_wrong_draft(patch: pytest.MonkeyPatch) -> None:
    def accept(is_accepted: Tensor, first_rows: Tensor) -> Tensor:
        sums = torch.cat((torch.tensor([0]), is_accepted.long().cumsum(0)))
        ends = torch.cat((first_rows[1:], torch.tensor([len(is_accepted)])))
        return sums[ends] - sums[first_rows]

    patch.setattr(verification, "count_accepted", accept)


def take_the_noise_of_the_row(patch: pytest.MonkeyPatch) -> None:
    verify = SampledVerification.verify

    def changed(
        rule: SampledVerification, logits: Tensor, batch: SamplingBatch, rows: DraftRows
    ) -> VerifiedRows:
        return verify(rule, logits, replace(batch, positions=torch.arange(len(logits))), rows)

    patch.setattr(SampledVerification, "verify", changed)


def take_the_noise_of_the_last_known_token(patch: pytest.MonkeyPatch) -> None:
    verify = SampledVerification.verify

    def changed(
        rule: SampledVerification, logits: Tensor, batch: SamplingBatch, rows: DraftRows
    ) -> VerifiedRows:
        starts = torch.zeros(len(logits), dtype=torch.int64)
        starts[rows.first_rows] = rows.first_rows
        positions = batch.positions[starts.cummax(dim=0).values]
        return verify(rule, logits, replace(batch, positions=positions), rows)

    patch.setattr(SampledVerification, "verify", changed)


def penalise_without_the_drafts_before(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        TokenCounts,
        "with_drafts",
        lambda counts, drafts: (counts.seen_token_ids, counts.output_counts),
    )
    patch.setattr(DeviceSampling, "_counted_drafts", lambda *_: None)


def keep_the_counts_of_refused_drafts(patch: pytest.MonkeyPatch) -> None:
    count_host, count_device = HostSampling.count, DeviceSampling.count
    patch.setattr(
        HostSampling,
        "count",
        lambda sampling, slots, token_ids, kept: count_host(
            sampling, slots, token_ids, np.ones_like(kept)
        ),
    )
    patch.setattr(
        DeviceSampling,
        "count",
        lambda sampling, token_ids, special, kept: count_device(sampling, token_ids, special, None),
    )


def count_generated_tokens_without_drafts(patch: pytest.MonkeyPatch) -> None:
    gather, special_rows = HostSampling.gather, DeviceSampling.special_rows

    def gather_late(
        sampling: HostSampling, slots: Any, positions: Any, num_generated: Any, drafts: Any
    ) -> Any:
        late = num_generated - [len(drafts(row)) for row in range(len(slots))]
        return gather(sampling, slots, positions, late, drafts)

    patch.setattr(HostSampling, "gather", gather_late)
    patch.setattr(
        DeviceSampling,
        "special_rows",
        lambda sampling, slots, num_generated, starts, before: special_rows(
            sampling, slots, num_generated - before, starts, before
        ),
    )


def leave_the_block_table(patch: pytest.MonkeyPatch) -> None:
    settle = SlotTable.settle

    def keep_blocks(slots: SlotTable, work: Any, num_accepted: Any) -> None:
        table, num_blocks = slots.block_table.copy(), slots.num_table_blocks.copy()
        settle(slots, work, num_accepted)
        slots.block_table[:], slots.num_table_blocks[:] = table, num_blocks

    patch.setattr(SlotTable, "settle", keep_blocks)


def leave_accepted_drafts_to_be_computed_again(patch: pytest.MonkeyPatch) -> None:
    settle = SlotTable.settle

    def keep_computed(slots: SlotTable, work: Any, num_accepted: Any) -> None:
        num_computed = slots.num_computed_tokens.copy()
        settle(slots, work, num_accepted)
        slots.num_computed_tokens[:] = num_computed

    patch.setattr(SlotTable, "settle", keep_computed)


def feed_the_first_sample(patch: pytest.MonkeyPatch) -> None:
    verify_rows = DeviceEngine._verify_rows

    def changed(engine: DeviceEngine, hidden: Any, arrays: Any, special: Any, given: Any) -> Any:
        outputs = verify_rows(engine, hidden, arrays, special, given)
        first = outputs[0][0][given.rows.first_rows]
        engine._last_tokens.index_copy_(0, given.slots, first)
        return outputs

    patch.setattr(DeviceEngine, "_verify_rows", changed)


def describe_the_next_row(patch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of another row than the token's."""
    for engine in (host, device):
        describe = engine.describe_rows
        patch.setattr(
            engine,
            "describe_rows",
            lambda logits, token_ids, num_top, describe=describe: describe(
                logits.roll(1, 0), token_ids, num_top
            ),
        )


MUTANTS: dict[str, list[Plant]] = {
    "host": [
        accept_one_too_many,
        accept_every_draft,
        accept_behind_a_wrong_draft,
        take_the_noise_of_the_row,
        take_the_noise_of_the_last_known_token,
        penalise_without_the_drafts_before,
        keep_the_counts_of_refused_drafts,
        count_generated_tokens_without_drafts,
        leave_the_block_table,
        leave_accepted_drafts_to_be_computed_again,
        describe_the_next_row,
    ],
}
MUTANTS["device"] = [*MUTANTS["host"], feed_the_first_sample]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Runner]]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    yield {name: make_model_runner(path, name) for name in BUILDERS}
    torch.set_num_threads(num_threads)


def _check(runner: Runner) -> None:
    for seed in range(NUM_SEEDS):
        check_drafts_leave_no_trace(runner, KINDS, seed)


@pytest.mark.parametrize("engine_name", BUILDERS)
def test_what_finds_the_bugs_finds_none_where_there_are_none(
    runners: dict[str, Runner], engine_name: str
) -> None:
    _check(runners[engine_name])


@pytest.mark.parametrize(
    ("engine_name", "plant"),
    [(name, plant) for name, plants in MUTANTS.items() for plant in plants],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_bug_leaves_a_trace(
    runners: dict[str, Runner],
    engine_name: str,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, PlanError)):
        _check(runners[engine_name])
