"""A scheduler process that is killed and started again on its journal, under clients of ours."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2, executor_pb2_grpc
from stepwire_client import (
    AsyncClient,
    Client,
    ClusterConfig,
    Completed,
    Credentials,
    Event,
    Generation,
    LocalCluster,
    Output,
    SamplingParams,
)
from stepwire_client.errors import NotRetainedError, RpcError
from stepwire_client.resumption import Resumption
from stepwire_scheduler.tenants import digest_of
from stepwire_scheduler.tokenizer import load_tokenizer
from support.hashing_executor import HashingExecutor, expected_output, repeating_sample
from support.scheduler_tokenizers import write_tokenizer

NUM_TOKENS = 120


class MortalScheduler:
    """A scheduler process on one port that is killed and started again."""

    def __init__(self, folder: Path, executor_port: int, *flags: str) -> None:
        self.folder = folder
        self.address = "127.0.0.1:0"
        self._command = (
            *(sys.executable, "-m", "stepwire_scheduler"),
            *("--model", str(write_tokenizer(folder / "model"))),
            *("--executor", f"127.0.0.1:{executor_port}", *flags),
        )
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return once it listens."""
        self._process = await asyncio.create_subprocess_exec(
            *(*self._command, "--listen", self.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        self.address = line.decode().split()[-1]

    async def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Return once it has ended."""
        assert self._process is not None
        self._process.send_signal(how)
        await asyncio.wait_for(self._process.wait(), 20)

    async def until_ready(self) -> None:
        async with AsyncClient(self.address) as client:
            await client.wait_until_ready(30)


@asynccontextmanager
async def scheduling(
    folder: Path, executor: HashingExecutor, *flags: str
) -> AsyncIterator[MortalScheduler]:
    """A scheduler with a journal, ready."""
    (folder / "model").mkdir()
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    scheduler = MortalScheduler(folder, port, "--journal", str(folder / "journal"), *flags)
    await scheduler.start()
    try:
        await scheduler.until_ready()
        yield scheduler
    finally:
        if scheduler._process is not None and scheduler._process.returncode is None:
            await scheduler.end()
        await server.stop(None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.005)


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    outputs = [event for event in events if isinstance(event, Output) and event.index == index]
    return [token for output in outputs for token in output.token_ids]


async def test_eight_streams_survive_six_kills_of_their_scheduler(tmp_path: Path) -> None:
    """No event is lost, doubled or changed, and the tokens are those of an undisturbed run.

    The client library checks the events' numbers, and raises where one is missing or comes twice.
    """
    executor = HashingExecutor(step_seconds=0.01, num_blocks=512, max_num_seqs=16)
    moments = random.Random(7)
    events: list[list[Event]] = [[] for _ in range(8)]
    async with (
        scheduling(tmp_path, executor, "--journal-max-bytes", "20000") as scheduler,
        AsyncClient(scheduler.address) as client,
    ):

        async def read(number: int) -> None:
            n = 1 + number % 2
            params = SamplingParams(
                max_tokens=NUM_TOKENS, n=n, seed=number, logprobs=2 if number == 3 else None
            )
            async with client.stream([number, 2, 3], params, timeout_s=120) as stream:
                async for event in stream:
                    events[number].append(event)

        async def generate(number: int) -> Generation:
            params = SamplingParams(max_tokens=NUM_TOKENS, seed=number)
            return await client.generate([number, 9], params, timeout_s=120)

        readers = asyncio.gather(*map(read, range(8)))
        answers = asyncio.gather(*map(generate, range(2)))
        await until(lambda: all(len(each) > 3 for each in events))
        for _ in range(6):
            kill_at = executor.num_steps + moments.randrange(2, 16)
            await until(lambda: executor.num_steps >= kill_at)  # noqa: B023 - it ends in here
            await scheduler.end()
            await scheduler.start()
        await readers
        generations = await answers
    for number, each in enumerate(events):
        for index in range(1 + number % 2):
            assert tokens_of(each, index) == expected_output([number, 2, 3], NUM_TOKENS, index)
        last = each[-1]
        assert isinstance(last, Completed)
        assert last.usage.num_output_tokens == NUM_TOKENS * (1 + number % 2)
    for number, generation in enumerate(generations):
        assert list(generation.token_ids) == expected_output([number, 9], NUM_TOKENS)
    text = "".join(event.text for event in events[0] if isinstance(event, Output))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert text == await tokenizer.decode(tokens_of(events[0]), skip_special_tokens=True)


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model"])
async def test_drafts_leave_no_mark_on_streams_whose_scheduler_is_killed(
    tmp_path: Path, method: str
) -> None:
    """A restored scheduler goes on behind the last token told, whatever was drafted after it."""
    executor = HashingExecutor(
        step_seconds=0.01, num_blocks=512, sample=repeating_sample, max_num_batched_tokens=256
    )
    if method == "draft_model":
        executor.description["draft_model"] = "tiny"
    results: list[Generation] = []
    async with (
        scheduling(tmp_path, executor, "--speculative-method", method) as scheduler,
        AsyncClient(scheduler.address) as client,
    ):
        requests = asyncio.gather(
            *(
                client.generate(
                    [number, 2, 3],
                    SamplingParams(max_tokens=NUM_TOKENS, seed=number),
                    timeout_s=120,
                )
                for number in range(4)
            )
        )
        for _ in range(3):
            kill_at = executor.num_steps + 12
            await until(lambda: executor.num_steps >= kill_at)  # noqa: B023 - it ends in here
            await scheduler.end()
            await scheduler.start()
        results = await requests
    for number, result in enumerate(results):
        expected = expected_output([number, 2, 3], NUM_TOKENS, sample=repeating_sample)
        assert list(result.token_ids) == expected
        assert result.usage.num_output_tokens == NUM_TOKENS
    assert sum(result.usage.num_accepted_tokens for result in results) > 0


async def test_streams_survive_their_scheduler_and_its_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor still loads when the scheduler comes back: streams wait for it."""
    executor = HashingExecutor(step_seconds=0.01)
    reasons: list[str] = []
    delay_after = Resumption.delay_after

    def noting(resumption: Resumption, error: RpcError) -> float | None:
        reasons.append(error.reason)
        return delay_after(resumption, error)

    monkeypatch.setattr(Resumption, "delay_after", noting)
    async with (
        scheduling(tmp_path, executor) as scheduler,
        AsyncClient(scheduler.address) as client,
    ):
        events: list[Event] = []

        async def read() -> None:
            params = SamplingParams(max_tokens=NUM_TOKENS)
            async with client.stream([5, 6], params, timeout_s=60) as stream:
                async for event in stream:
                    events.append(event)

        reader = asyncio.create_task(read())
        await until(lambda: len(events) > 5)
        await scheduler.end()
        executor.description["load_state"] = executor_pb2.LOAD_STATE_LOADING
        await scheduler.start()
        await until(lambda: reasons.count("MODEL_NOT_READY") > 1)
        del executor.description["load_state"]
        await reader
    assert tokens_of(events) == expected_output([5, 6], NUM_TOKENS)


async def test_an_answer_that_nobody_fetched_is_there_after_a_kill(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.01)
    async with scheduling(tmp_path, executor) as scheduler:
        async with AsyncClient(scheduler.address) as client:
            params = SamplingParams(max_tokens=20)
            first = await client.generate([1, 2], params, request_id="kept")
        await scheduler.end()
        seen = executor.num_steps
        await scheduler.start()
        await scheduler.until_ready()
        async with AsyncClient(scheduler.address) as client:
            again = await client.generate([1, 2], params, request_id="kept")
    assert again == first
    assert executor.num_steps == seen


async def test_what_was_cancelled_or_expired_does_not_come_back(tmp_path: Path) -> None:
    executor = HashingExecutor(step_seconds=0.02)
    journal = tmp_path / "journal" / "journal"
    async with scheduling(tmp_path, executor, "--resume-retention-ms", "300") as scheduler:
        async with AsyncClient(scheduler.address) as client:
            stream = client.stream([1, 2], SamplingParams(max_tokens=200))
            for _ in range(4):
                await anext(stream)
            assert journal.stat().st_size > 100
            stream.cancel()
        # Nothing lives any more, so nothing of it stays on disk.
        await until(lambda: journal.stat().st_size < 30)
        await scheduler.end()
        await scheduler.start()
        await scheduler.until_ready()
        async with AsyncClient(scheduler.address) as client:
            stream = client.stream([1, 2], SamplingParams(max_tokens=200), request_id="lost")
            for _ in range(4):
                await anext(stream)
            await scheduler.end()
            await scheduler.start()
            await scheduler.until_ready()
            # Its window has passed before the client comes back.
            await until(lambda: journal.stat().st_size < 30)
            with pytest.raises(NotRetainedError, match="anew"):
                async for _ in stream:
                    pass


async def test_two_schedulers_do_not_share_a_journal(tmp_path: Path) -> None:
    async with scheduling(tmp_path, HashingExecutor()) as scheduler:
        process = await asyncio.create_subprocess_exec(
            *scheduler._command,
            *("--listen", "127.0.0.1:0"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"in use by another scheduler" in said
    assert os.stat(tmp_path / "journal" / "journal").st_mode & 0o777 == 0o600


def test_a_cluster_whose_scheduler_is_killed_goes_on_alone_and_with_its_executor(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    """The real model behind a supervisor, which asks at a socket that is bound again."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"tenant sha256:{digest_of('s').hex()}\n")
    config = ClusterConfig(model=smollm2_dir, max_num_seqs=4, auth_tokens_file=tokens, journal=True)
    params = SamplingParams(temperature=0.9, seed=11, max_tokens=60, ignore_eos=True)
    prompt = "Once upon a time"
    credentials = Credentials(token="s")
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(240)
        with Client(cluster.address, credentials=credentials) as client:
            undisturbed = client.generate(prompt, params, timeout_s=120)
            for victims in (["scheduler"], ["scheduler", "executor"]):
                token_ids: list[int] = []
                text = ""
                pids = cluster.pids
                with client.stream(prompt, params, timeout_s=240) as stream:
                    for event in stream:
                        if not isinstance(event, Output):
                            continue
                        token_ids += event.token_ids
                        text += event.text
                        if len(token_ids) > 8 and cluster.pids == pids and victims:
                            for name in victims:
                                os.kill(pids[name], signal.SIGKILL)
                            victims = []
                assert token_ids == list(undisturbed.token_ids)
                assert text == undisturbed.text
                assert cluster.pids["scheduler"] != pids["scheduler"]
                cluster.wait_until_ready(240)
        journal = cluster.log_dir / "journal"
        assert (journal / "journal").exists()
    assert not journal.exists()
