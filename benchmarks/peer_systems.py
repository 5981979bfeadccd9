"""What benchmarks.peers measures, each behind the same call: prompts in, so many tokens out.

A peer is a worker process of an interpreter of its own (benchmarks/peer_workers), or a server that
somebody has started; stepwire is a local cluster, asked over gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from stepwire_client.aio import AsyncClient
from stepwire_client.events import Output
from stepwire_client.params import SamplingParams

from benchmarks.cluster import REQUEST_TIMEOUT_S

ROOT = Path(__file__).parents[1]
STOP_TIMEOUT_S = 10.0


class PeerError(Exception):
    """A system failed, or made something else than what it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a system made of prompts that it got at the same time."""

    seconds: float
    """From the first prompt sent to the last token."""
    token_ids: list[list[int]]
    """Of the outputs, by prompt."""
    decode_tokens_per_s: float | None
    """Tokens after the first ones, and the time since; None where the system does not tell."""


class System(Protocol):
    """Continues prompts of equal length, greedily, all to the same length."""

    @property
    def name(self) -> str:
        """As the table has it."""

    @property
    def described(self) -> Mapping[str, Any]:
        """Versions and settings, for the result file."""

    async def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Raises PeerError; the number of tokens is for the caller to check."""


class StepwireSystem:
    """A cluster, over gRPC: what a client waits for, with scheduler, executor and streams."""

    def __init__(self, name: str, client: AsyncClient, described: Mapping[str, Any]) -> None:
        self.name = name
        self.described = described
        self._client = client

    async def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Every prompt is a stream of its own."""
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        times: list[list[float]] = [[] for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]

        async def one(index: int) -> None:
            prompt = list(prompts[index])
            async with self._client.stream(prompt, params, timeout_s=REQUEST_TIMEOUT_S) as stream:
                async for event in stream:
                    if isinstance(event, Output):
                        token_ids[index] += event.token_ids
                        times[index] += [time.perf_counter()] * len(event.token_ids)

        started = time.perf_counter()
        await asyncio.gather(*map(one, range(len(prompts))))
        seconds = time.perf_counter() - started
        return Run(
            seconds=seconds, token_ids=token_ids, decode_tokens_per_s=decode_tokens_per_s(times)
        )


def decode_tokens_per_s(times: Sequence[Sequence[float]]) -> float | None:
    """Rate of the tokens that arrive once every sequence has its first; None where there is none.

    times: of the tokens of each sequence, rising.
    """
    prefilled = max(of_sequence[0] for of_sequence in times)
    later = [time_s for of_sequence in times for time_s in of_sequence if time_s > prefilled]
    return len(later) / (max(later) - prefilled) if later else None


class WorkerSystem:
    """A process that holds a peer, and is stopped while it is not asked: some of them spin."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name = name
        self.described: Mapping[str, Any] = {}
        self._process = process
        self._log = log

    async def wait_until_ready(self) -> None:
        """Read what the worker says first; raises PeerError."""
        self.described = await self._until_done(self._read)
        self._signal(signal.SIGSTOP)

    async def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """The worker's own clock counts: what stands between is not the peer's."""
        request = {"prompts": [list(prompt) for prompt in prompts], "output_len": output_len}
        self._signal(signal.SIGCONT)
        answer = await self._until_done(lambda: self._ask(json.dumps(request)))
        self._signal(signal.SIGSTOP)
        decode_s = answer["decode_s"]
        num_later = len(prompts) * (output_len - 1)
        return Run(
            seconds=answer["seconds"],
            token_ids=answer["token_ids"],
            decode_tokens_per_s=num_later / decode_s if decode_s and num_later else None,
        )

    def close(self) -> None:
        """End the worker and whatever it has started."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _until_done(self, talk: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Talk in a thread, which ends with the worker where this task is cancelled."""
        try:
            return await asyncio.to_thread(talk)
        except asyncio.CancelledError:
            self._signal(signal.SIGKILL)
            raise

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed("the worker has ended") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("the worker has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, why: str) -> PeerError:
        said = self._log.read_text(errors="replace").strip().splitlines()[-20:]
        return PeerError("\n".join([f"{self.name}: {why}; it said at last:", *said]))


def start_worker(
    stack: contextlib.ExitStack,
    name: str,
    python: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> WorkerSystem:
    """Start `PYTHON -m benchmarks.peer_workers.MODULE`; it ends with the stack.

    environment: beside this process's own, less where that looks for Python's packages.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    log: IO[str] = stack.enter_context((folder / "log").open("w"))
    # Without resolving links: an environment's interpreter is one.
    found = os.path.abspath(shutil.which(python) or python)
    process = subprocess.Popen(
        [found, "-m", f"benchmarks.peer_workers.{module}", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    system = WorkerSystem(name, process, folder / "log")
    stack.callback(system.close)
    return system


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two outputs have in common before they part."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def has_module(python: str, module: str) -> bool:
    """Whether an interpreter finds a module; False too where there is no such interpreter."""
    if shutil.which(python) is None:
        return False
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0


class ServerSystem:
    """A server that speaks OpenAI's completions protocol, as llama.cpp's and vLLM's do."""

    def __init__(self, url: str, encode: Callable[[str], Awaitable[Sequence[int]]]) -> None:
        """encode: token ids of a text; servers answer with text."""
        self.name = "server"
        self._url = url.rstrip("/").removesuffix("/v1")
        self._encode = encode
        models = self._call("/v1/models")["data"]
        self._model = models[0]["id"] if models else ""
        self.described: Mapping[str, Any] = {"settings": {"model": self._model}}

    async def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        """Every prompt is a connection of its own."""
        requests = [
            {
                "model": self._model,
                "prompt": list(prompt),
                "max_tokens": output_len,
                "temperature": 0,
                "ignore_eos": True,
            }
            for prompt in prompts
        ]
        with ThreadPoolExecutor(len(requests)) as threads:
            loop = asyncio.get_running_loop()
            started = time.perf_counter()
            calls = [
                loop.run_in_executor(threads, self._call, "/v1/completions", request)
                for request in requests
            ]
            answers = await asyncio.gather(*calls)
            seconds = time.perf_counter() - started
        outputs: list[list[int]] = []
        for answer in answers:
            num_tokens = answer["usage"]["completion_tokens"]
            if num_tokens != output_len:
                raise PeerError(f"server: {num_tokens} tokens instead of {output_len}")
            ids = list(await self._encode(answer["choices"][0]["text"]))
            # Another split of the same text: its length is what the server counted.
            outputs.append((ids + [-1] * output_len)[:output_len])
        return Run(seconds=seconds, token_ids=outputs, decode_tokens_per_s=None)

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            detail = error.read(300).decode() if isinstance(error, urllib.error.HTTPError) else ""
            raise PeerError(f"server: {self._url}{path}: {error} {detail}".rstrip()) from error
