"""Prompts, checks and tables of the speculation benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from stepwire_client import ChatMessage
from support.fake_generation_service import FakeGenerationService, serving

from benchmarks import speculation
from benchmarks.speculation import (
    HELD_AT_0,
    NUM_REQUESTS,
    OFF,
    IdsDifferError,
    Run,
    Variant,
    check_ids,
    markdown,
    measure,
    method_figures,
)
from benchmarks.speculation_prompts import WORKLOADS, Task, shared_ngrams

DEFAULT_ROUNDS = 3


@pytest.fixture(scope="module")
def workloads() -> dict[str, list[Task]]:
    return {name: make() for name, make in WORKLOADS.items()}


def test_there_are_prompts_for_every_batch_of_every_round(
    workloads: dict[str, list[Task]],
) -> None:
    needed = max(NUM_REQUESTS) + DEFAULT_ROUNDS * sum(NUM_REQUESTS.values())
    assert {name: len(tasks) >= needed for name, tasks in workloads.items()} == dict.fromkeys(
        WORKLOADS, True
    )


def test_no_prompt_comes_twice(workloads: dict[str, list[Task]]) -> None:
    for tasks in workloads.values():
        assert len({str(task.prompt) for task in tasks}) == len(tasks)


def test_an_edit_shows_the_code_twice_and_asks_for_a_third(
    workloads: dict[str, list[Task]],
) -> None:
    for task in workloads["edit"][:20]:
        assert not isinstance(task.prompt, str)
        first, shown, ask = task.prompt
        assert [each.role for each in task.prompt] == ["user", "assistant", "user"]
        name = ask.content.split()[3]
        assert name.endswith("_1")
        assert f"def {name}(" in shown.content
        assert f"def {name.removesuffix('_1')}(" in first.content
        # Beside the name, nothing differs.
        code = first.content[first.content.index("```") :]
        assert shown.content.replace(name, name.removesuffix("_1")) == code


def test_only_chats_are_sampled_and_each_has_a_seed(workloads: dict[str, list[Task]]) -> None:
    for name, tasks in workloads.items():
        assert {task.temperature > 0 for task in tasks} == {name == "chat"}
    seeds = [task.seed for task in workloads["chat"]]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("prompt", "answer", "counts"),
    [
        ([1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], (2, 3)),
        ([1, 2, 3, 4], [4, 3, 2, 1], (0, 1)),
        ([1, 2, 3], [1, 2, 3], (0, 0)),
    ],
)
def test_ngrams_of_the_answer_are_looked_up_in_the_prompt(
    prompt: list[int], answer: list[int], counts: tuple[int, int]
) -> None:
    assert shared_ngrams(prompt, answer) == counts


@pytest.mark.parametrize("got", [[[1, 2], [3, 5]], [[1, 2], [3]], [[1, 2], [3, 4, 5]]])
def test_one_token_that_differs_is_named(got: list[list[int]]) -> None:
    check_ids([[1, 2], [3, 4]], [[1, 2], [3, 4]], "run")
    with pytest.raises(IdsDifferError, match=r"run: request 1 has token .* at [12], and"):
        check_ids([[1, 2], [3, 4]], got, "run")


def run(seconds: float, *, drafts: int = 0, drafted: int = 0, accepted: int = 0) -> Run:
    return Run(
        seconds=seconds,
        token_ids=[(1, 2, 3), (4, 5, 6, 7, 8)],
        num_drafts=drafts,
        num_draft_tokens=drafted,
        num_accepted_tokens=accepted,
    )


def test_figures_of_a_method_are_over_its_rounds_and_against_off_in_each() -> None:
    rounds = [
        {OFF: run(4.0), "ngram": run(1.0, drafts=1, drafted=4, accepted=4)},
        {OFF: run(2.0), "ngram": run(1.0, drafts=3, drafted=12, accepted=2)},
    ]
    figures = method_figures(rounds, "ngram")
    assert figures["ratio"]["values"] == [4.0, 2.0]
    assert figures["tokens_per_s"]["median"] == 8.0
    assert figures["acceptance_length"] == pytest.approx(2.5)
    assert figures["wasted_percent"] == pytest.approx(62.5)
    off = method_figures(rounds, OFF)
    assert (off["acceptance_length"], off["wasted_percent"]) == (None, None)
    assert off["ratio"]["values"] == [1.0, 1.0]


def cell(workload: str, batch: int) -> dict[str, Any]:
    rounds = [{OFF: run(4.0), "ngram": run(1.0, drafts=2, drafted=8, accepted=6)}]
    return {
        "workload": workload,
        "batch": batch,
        "num_requests": 2,
        "num_output_tokens": 8,
        "repeated_percent": 50.0,
        "methods": {name: method_figures(rounds, name) for name in (OFF, "ngram")},
    }


def test_each_workload_has_a_table_with_a_row_for_each_batch_and_method() -> None:
    page = markdown(
        {
            "dtype": "bfloat16",
            "num_speculative_tokens": 5,
            "truncated_layers": None,
            "cells": [cell("edit", 1), cell("edit", 16), cell("chat", 1)],
        }
    )
    rows = [line for line in page.splitlines() if line.startswith(("| 1", "| 16"))]
    assert [row.split(" | ")[0] for row in rows] == [
        *("| 1, off", "| 1, ngram", "| 16, off", "| 16, ngram"),
        *("| 1, off", "| 1, ngram"),
    ]
    assert "4.00 times" in rows[1]
    assert "| 4.00 | 1.00 | 25% |" in rows[1]
    assert "edit: 4 requests, 4 tokens each on average; of their 4-grams 50% " in page


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Off and K held at 0 on a server that echoes; its metrics never change."""
    monkeypatch.setattr(
        speculation, "read_metrics", lambda address: {"stepwire_spec_drafts_total": 0.0}
    )
    service = FakeGenerationService()
    with serving(service) as address:
        both = [
            Variant(name=OFF, address=address, metrics_address=""),
            Variant(name=HELD_AT_0, address=address, metrics_address="", num_speculative_tokens=0),
        ]
        yield both, service


def tasks(count: int) -> list[Task]:
    return [
        Task(prompt=[ChatMessage("user", f"say word {number}")], max_tokens=9, seed=number)
        for number in range(count)
    ]


async def test_every_prompt_is_used_once_by_each_variant_in_one_run(variants: Any) -> None:
    both, service = variants
    (measured,) = await measure(
        both, workloads={"edit": tasks(5 + 2 * 4)}, batches=[1], num_rounds=2
    )
    assert measured["num_requests"] == 2 * NUM_REQUESTS[1]
    sent: dict[str, int] = {}
    for each in service.inputs:
        if each.sampling_params.max_tokens == 9:
            text = each.chat.messages[0].content
            held = each.sampling_params.HasField("num_speculative_tokens")
            sent[f"{text}, {held}"] = sent.get(f"{text}, {held}", 0) + 1
    # One to warm up and two rounds, with and without drafts, and no prompt again.
    assert len(sent) == 2 * (1 + 2 * NUM_REQUESTS[1])
    assert set(sent.values()) == {1}


async def test_too_few_prompts_are_an_error(variants: Any) -> None:
    both, _ = variants
    with pytest.raises(ValueError, match="run fewer rounds"):
        await measure(both, workloads={"edit": tasks(6)}, batches=[1], num_rounds=2)


async def test_other_ids_leave_no_figure(variants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both, service = variants
    honest = service._tokens

    def lying(message: Any) -> list[tuple[int, str]]:
        made: list[tuple[int, str]] = honest(message)
        if message.sampling_params.HasField("num_speculative_tokens"):
            made[-1] = (99, "other")
        return made

    monkeypatch.setattr(service, "_tokens", lying)
    with pytest.raises(IdsDifferError, match="held at 0"):
        await measure(both, workloads={"edit": tasks(9)}, batches=[1], num_rounds=1)
