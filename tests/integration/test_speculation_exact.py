"""Speculation changes how fast tokens come and nothing else.

Real processes, real sockets, the real model in float32. A cluster without speculation is the
reference. The clusters that speculate take every draft that is found for free
(see support/eager_scheduler.py), so that steps are full of them, right and wrong. Whatever a client
sees must be equal to the last bit: ids, text, log-probabilities, why it ended, the count of tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from stepwire_client import (
    AsyncClient,
    ChatMessage,
    Choice,
    ClusterConfig,
    Completed,
    FinishReason,
    LocalCluster,
    Output,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from stepwire_client.errors import InvalidArgumentError

from benchmarks.cluster import free_address, read_metrics
from benchmarks.speculation_prompts import WORKLOADS, Task
from benchmarks.truncated_model import write_truncated_model

EAGER_SCHEDULER = Path(__file__).parents[1] / "support" / "eager_scheduler.py"
MAX_NUM_SEQS = 24
NUM_DRAFTS = 6
TIMEOUT_S = 280.0
METHODS = ("ngram", "suffix", "draft_model")
DRAFT_LAYERS = [layer for layer in range(30) if layer not in (12, 14, 16, 18, 20)]
"""Of the draft model, a copy of the model with fewer layers: it is right about half of the time."""
ALONE = (0, 6, 8)
"""Of the short cases, those that are sent one at a time as well."""

Prompt = str | list[ChatMessage]


@dataclass(frozen=True)
class Case:
    """A request."""

    prompt: Prompt
    params: SamplingParams
    num_speculative_tokens: int | None = None
    """Which only a server that speculates takes."""


@dataclass(frozen=True)
class Answer:
    """All that a client sees of a request, but for times and how tokens were cut into events."""

    choices: tuple[Choice, ...]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass
class Drafts:
    """Of many requests."""

    num_tokens: int = 0
    num_accepted: int = 0

    def add(self, usage: Usage) -> None:
        self.num_tokens += usage.num_draft_tokens
        self.num_accepted += usage.num_accepted_tokens

    @property
    def num_rejected(self) -> int:
        return self.num_tokens - self.num_accepted


FRUIT = "apple, banana, cherry, date, elderberry, fig, grape, hazelnut"
CODE = '    def area(self):\n        """Area."""\n        return self.width * self.height\n\n'
PLACES = (
    "1. Paris is the capital of France.\n"
    "2. Rome is the capital of Italy.\n"
    "3. Madrid is the capital of Spain.\n"
)
REPEATING: tuple[Prompt, ...] = (
    f"{FRUIT}\n{FRUIT}\napple, banana,",
    f"class Square:\n{CODE}class Rectangle:\n{CODE}class Field:\n    def area",
    f"{PLACES}{PLACES}1. Paris",
    "1 2 3 4 5 6 7 8\n1 2 3 4 5 6 7 8\n1 2 3",
    [
        ChatMessage("user", "Say: the quick brown fox jumps over the lazy dog"),
        ChatMessage("assistant", "the quick brown fox jumps over the lazy dog"),
        ChatMessage("user", "Say it again."),
    ],
)
OPEN: tuple[Prompt, ...] = (
    "Once upon a time there was a",
    [ChatMessage("user", "What is a prime number?")],
    "The three most surprising facts about whales are",
)

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.8}
NUCLEUS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "logprobs": 3}
PENALISED: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.05,
    "logprobs": 0,
}
"""Tokens that come again are less likely each time, within a draft as well."""
BIASED: dict[str, Any] = {"temperature": 0.6, "min_p": 0.02, "logit_bias": {28: 1.0, 30: -1.0}}
SEVERAL: dict[str, Any] = {"temperature": 0.5, "n": 2}


def short_cases() -> list[Case]:
    """16 requests that have every option somewhere."""
    cases = [
        *[(prompt, {"logprobs": 2, **GREEDY}) for prompt in REPEATING],
        (REPEATING[0], NUCLEUS),
        (REPEATING[1], PENALISED),
        (REPEATING[2], {**GREEDY, "stop": ["Madrid is", "never said"]}),
        (REPEATING[2], {**SEVERAL, "logprobs": 1}),
        (REPEATING[3], {**BIASED, "min_tokens": 20, "ignore_eos": False}),
        (REPEATING[4], {**GREEDY, "min_tokens": 14}),
        (REPEATING[0], {**SEEDED, "frequency_penalty": 0.5}),
        (OPEN[0], PENALISED),
        (OPEN[1], NUCLEUS),
        (OPEN[2], {**GREEDY, "logprobs": 5}),
        (REPEATING[3], GREEDY),
    ]
    made = [
        Case(prompt, SamplingParams(**{"max_tokens": 28, "seed": 100 + i, **params}))
        for i, (prompt, params) in enumerate(cases)
    ]
    # The last two say how many drafts they want.
    return [
        *made[:-2],
        replace(made[-2], num_speculative_tokens=0),
        replace(made[-1], num_speculative_tokens=1),
    ]


def long_cases() -> list[Case]:
    """50 prompts of the four workloads that are measured, each greedy and with seeded options."""
    options = itertools.cycle([SEEDED, NUCLEUS, PENALISED, BIASED, SEVERAL])
    cases: list[Case] = []
    for workload, count in (("edit", 13), ("summary", 13), ("completion", 12), ("chat", 12)):
        tasks: Sequence[Task] = WORKLOADS[workload]()[:count]
        for number, task in enumerate(tasks):
            for params in (GREEDY, next(options)):
                stop = {"stop": ["):\n"]} if workload == "completion" and number % 3 == 0 else {}
                late = {"min_tokens": 40} if workload == "chat" and number % 3 == 0 else {}
                settings = {"max_tokens": 64, "seed": len(cases), **params, **stop, **late}
                cases.append(Case(task.prompt, SamplingParams(**settings)))
    return cases


class Server:
    """A cluster, and what was sent to it."""

    def __init__(
        self,
        cluster: LocalCluster,
        metrics_address: str,
        method: str | None,
        *,
        is_eager: bool = False,
    ) -> None:
        self.cluster = cluster
        self.is_eager = is_eager
        self.method = method
        self._metrics_address = metrics_address

    async def metrics(self) -> dict[str, float]:
        return await asyncio.to_thread(read_metrics, self._metrics_address)

    def params(self, case: Case) -> SamplingParams:
        if self.method is None or case.num_speculative_tokens is None:
            return case.params
        return replace(case.params, num_speculative_tokens=case.num_speculative_tokens)

    async def answer(self, client: AsyncClient, case: Case, drafts: Drafts) -> Answer:
        """Read a stream to its end."""
        outputs: dict[int, list[Output]] = {}
        usage: Usage | None = None
        async with client.stream(case.prompt, self.params(case), timeout_s=TIMEOUT_S) as stream:
            async for event in stream:
                if isinstance(event, Output):
                    outputs.setdefault(event.index, []).append(event)
                elif isinstance(event, Completed):
                    usage = event.usage
        assert usage is not None
        drafts.add(usage)
        return Answer(
            choices=tuple(_choice(outputs[index]) for index in sorted(outputs)),
            num_prompt_tokens=usage.num_prompt_tokens,
            num_output_tokens=usage.num_output_tokens,
        )

    async def answers(self, cases: Sequence[Case], *, batch: int, drafts: Drafts) -> list[Answer]:
        """Of all cases, so many at a time."""
        slots = asyncio.Semaphore(batch)
        async with AsyncClient(self.cluster.address) as client:

            async def one(case: Case) -> Answer:
                async with slots:
                    return await self.answer(client, case, drafts)

            return list(await asyncio.gather(*map(one, cases)))

    async def until(self, name: str, condition: Callable[[float], bool]) -> None:
        """Wait for a metric."""
        async with asyncio.timeout(60):
            while not condition((await self.metrics())[name]):  # noqa: ASYNC110 - it is scraped
                await asyncio.sleep(0.01)


def _choice(outputs: list[Output]) -> Choice:
    last = outputs[-1]
    assert last.finish_reason is not None
    assert all(output.finish_reason is None for output in outputs[:-1])
    logprobs: tuple[TokenLogprob, ...] = sum((output.logprobs for output in outputs), ())
    return Choice(
        index=last.index,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        finish_reason=last.finish_reason,
        stop_cause=last.stop_cause,
        logprobs=logprobs,
    )


@contextmanager
def serving(
    model: Path, method: str | None, *, draft: Path | None = None, is_eager: bool = True
) -> Iterator[Server]:
    """A cluster that is ready; method: None speculates not. draft: what draft_model drafts with."""
    metrics_address = free_address()
    settings: dict[str, Any] = {}
    if method is not None:
        settings = {"speculative_method": method, "num_speculative_tokens": NUM_DRAFTS}
        if method == "draft_model":
            settings |= {"speculative_model": draft, "num_speculative_tokens": 3}
        if is_eager:
            settings["scheduler_command"] = (sys.executable, str(EAGER_SCHEDULER))
    config = ClusterConfig(
        model=model,
        dtype="float32",
        max_num_seqs=MAX_NUM_SEQS,
        num_kv_blocks=1024,
        metrics_listen=metrics_address,
        **settings,
    )
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(240)
        yield Server(cluster, metrics_address, method, is_eager=is_eager)


def check_equal(cases: Sequence[Case], expected: Sequence[Answer], got: Sequence[Answer]) -> None:
    """Compare answers, and name the first that differs."""
    for number, (case, one, other) in enumerate(zip(cases, expected, got, strict=True)):
        assert other == one, f"request {number}: {case}"


def _plain(model: Path, cases: Sequence[Case], *, batch: int) -> list[Answer]:
    """What each case gives without speculation."""
    with serving(model, None) as server:
        drafts = Drafts()
        answers = asyncio.run(server.answers(cases, batch=batch, drafts=drafts))
        assert drafts == Drafts()
    return answers


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return short_cases()


@pytest.fixture(scope="module")
def draft(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    write_truncated_model(smollm2_dir, folder, layers=DRAFT_LAYERS, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def plain(smollm2_dir: Path, cases: list[Case]) -> list[Answer]:
    """Of all at once, which takes less time: test_determinism has that alone is no other."""
    return _plain(smollm2_dir, cases, batch=16)


@pytest.fixture(scope="module")
def plain_answers(smollm2_dir: Path) -> list[Answer]:
    """Of the long cases, one at a time."""
    return _plain(smollm2_dir, long_cases(), batch=1)


def servers(*, short: set[str]) -> pytest.MarkDecorator:
    """Run a test on every method: on those of short always, on others in the long form."""
    # In one order everywhere, so that each cluster is started once.
    kinds = [(method, kind) for kind in ("eager", "stock") for method in METHODS]
    params = [
        pytest.param(
            each, marks=() if each[1] == "eager" and each[0] in short else pytest.mark.long
        )
        for each in kinds
    ]
    return pytest.mark.parametrize("server", params, ids="-".join, indirect=True)


@pytest.fixture(scope="module")
def server(
    smollm2_dir: Path, draft: Path, plain: list[Answer], request: pytest.FixtureRequest
) -> Iterator[Server]:
    """Each method in turn; the reference's cluster is gone by then."""
    method, kind = request.param
    with serving(smollm2_dir, method, draft=draft, is_eager=kind == "eager") as server:
        yield server


def test_the_requests_end_in_every_way_and_say_something_else_each(plain: list[Answer]) -> None:
    """What the other tests compare is worth comparing."""
    choices = [choice for answer in plain for choice in answer.choices]
    assert {choice.finish_reason for choice in choices} == {FinishReason.STOP, FinishReason.LENGTH}
    assert {type(choice.stop_cause) for choice in choices} == {str, int, type(None)}
    assert len({choice.token_ids for choice in choices}) > len(choices) / 2
    assert sum(len(choice.logprobs) for choice in choices) > 200


@servers(short=set(METHODS))
async def test_speculation_changes_nothing_that_a_client_sees(
    server: Server, cases: list[Case], plain: list[Answer]
) -> None:
    """One request at a time, then all at once."""
    both = Drafts()
    for numbers, batch in ((ALONE, 1), (range(len(cases)), 16)):
        drafts = Drafts()
        chosen = [cases[number] for number in numbers]
        answers = await server.answers(chosen, batch=batch, drafts=drafts)
        check_equal(chosen, [plain[number] for number in numbers], answers)
        assert drafts.num_accepted > 0, (batch, drafts)
        both.num_tokens += drafts.num_tokens
        both.num_accepted += drafts.num_accepted
    if server.is_eager:
        assert both.num_accepted >= 80, both
        assert both.num_rejected >= 40, both
    await server.until("stepwire_kv_blocks_used", lambda n: n == 0)


@servers(short=set(METHODS))
async def test_a_request_for_more_drafts_than_the_server_allows_is_refused(server: Server) -> None:
    async with AsyncClient(server.cluster.address) as client:
        most = (await client.get_model()).num_speculative_tokens
        params = SamplingParams(max_tokens=4, num_speculative_tokens=most + 1)
        with pytest.raises(InvalidArgumentError) as raised:
            await client.generate("1, 2, 3,", params)
    assert "input.sampling_params.num_speculative_tokens" in str(raised.value)
    assert f"must be in [0, {most}]" in str(raised.value)


@servers(short={"ngram"})
async def test_nor_does_it_when_the_executor_is_killed_and_neighbours_are_cancelled(
    server: Server, cases: list[Case], plain: list[Answer]
) -> None:
    victim = server.cluster.pids["executor"]
    before = (await server.metrics())["stepwire_spec_accepted_tokens_total"]
    drafts = Drafts()
    async with AsyncClient(server.cluster.address) as client:
        generating = asyncio.create_task(server.answers(cases, batch=16, drafts=drafts))
        cancelling = asyncio.create_task(_begin_and_cancel(client, cases))
        await server.until("stepwire_spec_accepted_tokens_total", lambda n: n >= before + 20)
        assert not generating.done(), "the kill came too late to test anything"
        os.kill(victim, signal.SIGKILL)
        num_cancelled = await cancelling
        answers = await generating
    assert num_cancelled == len(REPEATING) + len(OPEN)
    assert server.cluster.pids["executor"] != victim
    check_equal(cases, plain, answers)
    assert drafts.num_accepted > 20, drafts
    await server.until("stepwire_kv_blocks_used", lambda n: n == 0)
    check_equal(cases, plain, await server.answers(cases, batch=16, drafts=drafts))
    await server.until("stepwire_kv_blocks_used", lambda n: n == 0)


async def _begin_and_cancel(client: AsyncClient, cases: Sequence[Case]) -> int:
    """Long answers that are cancelled, or left, at different places; returns how many."""

    async def one(number: int, prompt: Prompt) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
        num_tokens = 0
        request_id = f"cancelled-{number}"
        async with client.stream(
            prompt, params, request_id=request_id, timeout_s=TIMEOUT_S
        ) as stream:
            async for event in stream:
                if not isinstance(event, Output):
                    continue
                num_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    assert event.finish_reason is FinishReason.CANCELLED
                elif num_tokens > 2 * number and number % 2:
                    return  # which leaves the stream
                elif num_tokens > 2 * number:
                    await client.cancel(request_id)

    prompts = [*REPEATING, *OPEN]
    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    return len(prompts)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["eager", "stock"])
def test_50_prompts_are_answered_as_without_speculation(
    smollm2_dir: Path, draft: Path, plain_answers: list[Answer], kind: str, method: str
) -> None:
    """Greedy and seeded each, alone and 16 at once."""
    cases = long_cases()
    assert len({str(case.prompt) for case in cases}) == 50
    assert len(cases) == 100
    with serving(smollm2_dir, method, draft=draft, is_eager=kind == "eager") as server:
        drafts = Drafts()  # of both: suffix finds the first batch's answers in its history
        for batch in (1, 16):
            answers = asyncio.run(server.answers(cases, batch=batch, drafts=drafts))
            check_equal(cases, plain_answers, answers)
            print(f"{kind}, {method}, up to batch {batch}: {drafts}")
        least = 200 if kind == "eager" else 20
        assert drafts.num_accepted >= least, (method, drafts)
        assert drafts.num_rejected >= least // 2, (method, drafts)
        asyncio.run(server.until("stepwire_kv_blocks_used", lambda n: n == 0))
