"""Speculation on whole engines: options that look at earlier tokens, and draws of a draft model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from stepwire_executor.sampling.device_state import DeviceSampling
from stepwire_executor.sampling.host_state import HostSampling
from stepwire_executor.speculation.rules import RuleName
from support.executor_fakes import ENGINES, VOCAB_SIZE, EngineName, expected_token
from support.speculation_engine import PARAMS, PROMPTS, generate

RULES: tuple[RuleName, ...] = ("sampled", "rejection")


def ones(slot: int, known: list[int]) -> list[int]:
    """Draft the same token three times, as a repetitive text would have it."""
    return [1, 1, 1]


def right_then_wrong(without: list[list[int]]) -> Callable[[int, list[int]], list[int]]:
    """Draft what comes without drafts, and at a place that changes something else."""

    def drafts(slot: int, known: list[int]) -> list[int]:
        start = len(known) - len(PROMPTS[slot])
        continuation = without[slot][start : start + 1 + (start + slot) % 4]
        wrong = expected_token(known) % 6
        if wrong < len(continuation):
            continuation[wrong] = (continuation[wrong] + 1) % VOCAB_SIZE
        return continuation

    return drafts


def check_ids_do_not_depend_on_drafts(engine_name: EngineName, params: str) -> None:
    without = generate(engine_name, "sampled", PARAMS[params])
    for drafts_of in (ones, right_then_wrong(without.token_ids)):
        outputs = generate(engine_name, "sampled", PARAMS[params], drafts_of=drafts_of)
        assert outputs.token_ids == without.token_ids
    assert outputs.num_drafts > outputs.num_accepted > 0


def check_the_model_itself_is_accepted(
    engine_name: EngineName, rule: RuleName, params: str
) -> None:
    outputs = generate(engine_name, rule, PARAMS[params], num_proposed=(4, 1, 0, 3))
    assert outputs.num_accepted == outputs.num_drafts > 0


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("params", PARAMS)
def test_ids_do_not_depend_on_drafts(engine_name: EngineName, params: str) -> None:
    check_ids_do_not_depend_on_drafts(engine_name, params)


@pytest.mark.parametrize("engine_name", ENGINES)
def test_greedy_ids_of_rejection_do_not_depend_on_drafts(engine_name: EngineName) -> None:
    params = PARAMS["greedy with penalties"]
    without = generate(engine_name, "sampled", params)
    for drafts_of in (ones, right_then_wrong(without.token_ids)):
        outputs = generate(engine_name, "rejection", params, drafts_of=drafts_of)
        assert outputs.token_ids == without.token_ids


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_draft_model_that_is_the_model_is_always_accepted(
    engine_name: EngineName, rule: RuleName, params: str
) -> None:
    check_the_model_itself_is_accepted(engine_name, rule, params)


def ignore_drafts_on_a_host(patch: pytest.MonkeyPatch) -> None:
    gather = HostSampling.gather
    none = np.zeros(0, np.int64)

    def blind(self: Any, slots: Any, positions: Any, num_generated: Any, _: Any) -> Any:
        return gather(self, slots, positions, num_generated, lambda row: none)

    patch.setattr(HostSampling, "gather", blind)


def ignore_drafts_on_a_device(patch: pytest.MonkeyPatch) -> None:
    adjust = DeviceSampling.adjust
    patch.setattr(
        DeviceSampling,
        "adjust",
        lambda self, logits, special, _: adjust(self, logits, special, None),
    )


@pytest.mark.parametrize(
    ("engine_name", "plant"),
    [("host", ignore_drafts_on_a_host), ("device", ignore_drafts_on_a_device)],
)
def test_penalties_that_ignore_drafts_are_caught(
    engine_name: EngineName, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check_ids_do_not_depend_on_drafts(engine_name, "greedy with penalties")
