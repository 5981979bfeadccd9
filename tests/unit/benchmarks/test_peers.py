"""Peers are asked for the same, in turns, and refused where they compute something else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from stepwire_client.events import ModelInfo, ModelState

from benchmarks import batch_invariance, context_length, peers
from benchmarks.common import write_result
from benchmarks.peer_systems import (
    PeerError,
    Run,
    ServerSystem,
    WorkerSystem,
    decode_tokens_per_s,
    has_module,
    same_start,
    start_worker,
)
from benchmarks.peers import (
    NUM_CHECKED_TOKENS,
    Cell,
    Rate,
    cell_figures,
    check_same_start,
    markdown,
    measure,
    run_checked,
)

MODEL = ModelInfo(
    model="m",
    state=ModelState.READY,
    load_progress=None,
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    max_model_len=2048,
    eos_token_ids=(2,),
    dtype="bfloat16",
    kv_cache_dtype="bfloat16",
    block_size=16,
    num_blocks=64,
    weight_bytes=1,
    rank_weight_bytes=(1,),
    kv_cache_bytes=1,
    device="cpu",
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    has_chat_template=True,
)
Asked = list[tuple[str, tuple[tuple[int, ...], ...], int]]


class FakeSystem:
    """Takes a second for every batch and says `output` for every prompt."""

    def __init__(
        self, name: str, asked: Asked, output: Callable[[int], list[int]] = lambda n: [7] * n
    ) -> None:
        self.name = name
        self.described: Mapping[str, Any] = {"versions": {name: "1"}}
        self._asked = asked
        self._output = output

    async def run(self, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
        self._asked.append((self.name, tuple(map(tuple, prompts)), output_len))
        return Run(
            seconds=1.0,
            token_ids=[self._output(output_len) for _ in prompts],
            decode_tokens_per_s=None,
        )


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
async def test_all_systems_get_the_same_prompts_and_nobody_gets_a_prompt_twice(
    num_rounds: int,
) -> None:
    asked: Asked = []
    systems = [FakeSystem(name, asked) for name in ("stepwire", "a", "b")]
    cells = [
        Cell(batch=1, input_len=16, output_len=128),
        Cell(batch=2, input_len=16, output_len=128),
        Cell(batch=2, input_len=32, output_len=1),
    ]
    await measure(systems, MODEL, cells, num_rounds)
    by_name = {system.name: [a[1:] for a in asked if a[0] == system.name] for system in systems}
    assert by_name["stepwire"] == by_name["a"] == by_name["b"]
    prompts = [prompt for batch, _ in by_name["a"] for prompt in batch]
    assert len(prompts) == len(set(prompts))


async def test_each_round_begins_with_another_system() -> None:
    asked: Asked = []
    systems = [FakeSystem(name, asked) for name in ("stepwire", "a", "b")]
    await measure(systems, MODEL, [Cell(batch=8, input_len=16, output_len=128)], 3)
    measured = [name for name, *_ in asked][len(systems) :]
    assert measured[0::3] == ["stepwire", "a", "b"]


def test_a_small_batch_is_repeated_until_it_has_made_enough_tokens() -> None:
    repeats = {
        batch: Cell(batch=batch, input_len=128, output_len=128).num_repeats for batch in (1, 2, 8)
    }
    assert repeats == {1: 4, 2: 2, 8: 1}
    assert Cell(batch=8, input_len=512, output_len=1).num_repeats == 1


def rates(*values: float) -> list[Rate]:
    return [Rate(tokens_per_s=value, decode_tokens_per_s=None) for value in values]


def test_the_best_peer_is_the_fastest_of_each_round_and_never_stepwire_itself() -> None:
    cell = Cell(batch=8, input_len=128, output_len=128)
    measured = cell_figures(
        cell,
        {
            "stepwire": rates(40.0, 60.0),
            "stepwire, dense weights": rates(400.0, 400.0),
            "a": rates(10.0, 20.0),
            "b": rates(20.0, 10.0),
        },
    )
    assert measured["ratio_to_best_peer"]["values"] == [2.0, 3.0]
    assert measured["systems"]["a"]["ratio"]["values"] == [4.0, 3.0]


async def test_an_output_of_another_length_is_an_error() -> None:
    short = FakeSystem("short", [], lambda n: [7] * (n - 1))
    with pytest.raises(PeerError, match=r"short: 2 outputs of \[7\] tokens instead of 2 of 8"):
        await run_checked(short, [[1], [2]], 8)


async def test_a_system_that_computes_something_else_is_refused() -> None:
    ours = FakeSystem("stepwire", [], lambda n: list(range(n)))
    late = FakeSystem("late", [], lambda n: [*range(n // 2), *[999] * (n - n // 2)])
    other = FakeSystem("other", [], lambda n: [999] * n)
    found = await check_same_start([ours, late], [[1], [2]])
    assert found == {"late": [NUM_CHECKED_TOKENS // 2] * 2}
    with pytest.raises(PeerError, match="other computes something else than stepwire"):
        await check_same_start([ours, late, other], [[1], [2]])


def test_only_tokens_after_every_first_one_count_as_decoded() -> None:
    assert decode_tokens_per_s([[1.0, 2.0, 3.0], [2.0, 4.0]]) == pytest.approx(2 / 2.0)
    assert decode_tokens_per_s([[1.0], [2.0]]) is None
    assert same_start([1, 2, 3], [1, 2, 4]) == 2
    assert same_start([], [1]) == 0


def test_a_table_names_every_system_and_its_version() -> None:
    cell = Cell(batch=8, input_len=128, output_len=128)
    figures = {
        "num_threads": 2,
        "systems": {"stepwire": {"settings": {}}, "a": {"versions": {"pkg": "1.5"}}},
        "same_start": {"a": [16, 3]},
        "cells": [cell_figures(cell, {"stepwire": rates(30.0), "a": rates(20.0)})],
    }
    shown = markdown(figures)
    assert "stepwire over the fastest peer: 1.50 times (1.50 to 1.50)." in shown
    assert "a (pkg 1.5)" in shown
    assert "a 16/3" in shown


def test_a_module_is_found_by_the_interpreter_that_is_asked() -> None:
    assert has_module(sys.executable, "json")
    assert not has_module(sys.executable, "no_such_module_anywhere")
    assert not has_module("/no/such/python", "json")


def test_no_path_of_this_machine_gets_into_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(peers.__file__)
    monkeypatch.setattr(sys, "argv", [str(script), "--vllm-python", "/home/x/env/bin/python"])
    file = write_result("peers", parameters={}, figures={}, directory=tmp_path)
    assert json.loads(file.read_text())["command"] == (
        "python -m benchmarks.peers --vllm-python python"
    )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


async def test_a_worker_answers_until_its_input_ends(tiny_model: Path) -> None:
    with ExitStack() as stack:
        worker = start_transformers(stack, tiny_model)
        await worker.wait_until_ready()
        wait_until_stopped(worker)
        assert worker.described["versions"].keys() == {"transformers", "torch"}
        together = await run_checked(worker, [[3, 4, 5], [6, 7, 8]], 5)
        again = await run_checked(worker, [[3, 4, 5], [6, 7, 8]], 5)
        assert together.token_ids == again.token_ids
        assert together.seconds > 0
        wait_until_stopped(worker)
        process = worker._process
    assert process.poll() == 0


async def test_a_worker_ends_with_the_task_that_waits_for_it(tiny_model: Path) -> None:
    with ExitStack() as stack:
        worker = start_transformers(stack, tiny_model)
        waiting = asyncio.create_task(worker.wait_until_ready())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(worker._process.wait) == -signal.SIGKILL


async def test_a_worker_that_fails_says_why_in_its_own_words(tmp_path: Path) -> None:
    with ExitStack() as stack:
        worker = start_transformers(stack, tmp_path)
        with pytest.raises(PeerError, match=r"^transformers: .*config"):
            await worker.wait_until_ready()
        with pytest.raises(PeerError, match="the worker has ended"):
            await worker.run([[1]], 1)


def wait_until_stopped(worker: WorkerSystem) -> None:
    """Return once the process has been stopped again."""
    os.waitid(os.P_PID, worker._process.pid, os.WSTOPPED)


def start_transformers(stack: ExitStack, model: Path) -> WorkerSystem:
    return start_worker(
        stack, "transformers", sys.executable, "transformers_worker", [str(model), "1"], {}
    )


class CompletionsHandler(BaseHTTPRequestHandler):
    """Answers with as many words as tokens were asked for."""

    asked: list[dict[str, Any]]
    num_tokens: int | None = None

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        num_tokens = self.num_tokens or body["max_tokens"]
        self._answer(
            {
                "choices": [{"text": " 7" * num_tokens}],
                "usage": {"completion_tokens": num_tokens},
            }
        )

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def completions_server(num_tokens: int | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (CompletionsHandler,), {"asked": asked, "num_tokens": num_tokens})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


async def test_a_server_gets_token_ids_and_must_not_end_early() -> None:
    with completions_server() as (url, asked):
        server = await asyncio.to_thread(ServerSystem, url, encode)
        run = await run_checked(server, [[3, 4], [5, 6]], 4)
    assert run.token_ids == [[7] * 4] * 2
    assert sorted(request["prompt"] for request in asked) == [[3, 4], [5, 6]]
    for request in asked:
        assert request["model"] == "served"
        assert request["ignore_eos"] is True
        assert (request["max_tokens"], request["temperature"]) == (4, 0)


async def test_a_server_that_ends_early_or_is_not_there_is_an_error() -> None:
    with completions_server(num_tokens=3) as (url, _):
        server = await asyncio.to_thread(ServerSystem, url, encode)
        with pytest.raises(PeerError, match="3 tokens instead of 4"):
            await server.run([[3, 4]], 4)
    with pytest.raises(PeerError, match="server: http://127"):
        await asyncio.to_thread(ServerSystem, url, encode)


def test_the_slope_of_times_that_follow_the_bytes_is_the_bandwidth() -> None:
    contexts, output_len, bytes_per_token, bandwidth = (256, 1024, 8192), 64, 23040.0, 2e10
    seconds = [0.004 + (c - output_len / 2) * bytes_per_token / bandwidth for c in contexts]
    line = context_length.fit(contexts, output_len, seconds, bytes_per_token)
    assert line["bytes_per_s"] == pytest.approx(bandwidth)
    assert line["intercept_ms"] == pytest.approx(4.0)
    assert line["largest_error_ms"] == pytest.approx(0.0, abs=1e-9)
    seconds[-1] += 0.001
    line = context_length.fit(contexts, output_len, seconds, bytes_per_token)
    assert line["bytes_per_s"] < bandwidth
    assert line["largest_error_ms"] > 0.01


def test_contexts_are_beginnings_of_one_prompt_and_leave_room_for_the_output() -> None:
    items = context_length.contexts_of(MODEL, (64, 128, 256), 32)
    prompts = [list(item.prompt) for item in items]  # type: ignore[arg-type]
    assert [len(prompt) + item.output_len for prompt, item in zip(prompts, items, strict=True)] == [
        64,
        128,
        256,
    ]
    assert all(prompts[-1][: len(prompt)] == prompt for prompt in prompts)


def test_tables_of_slopes_and_of_identical_ids_show_what_was_measured() -> None:
    caches = [context_length.Cache(name="fp8", address="", bytes_per_token=100.0)]
    memory = {"copy": [4e6], "read": [2e6]}
    contexts = (64, 128)
    figures = {
        "contexts": contexts,
        "output_len": 0,
        "weights": "1 MB",
        "memory_bytes_per_s": {name: context_length.spread(v) for name, v in memory.items()},
        "by_cache": {
            "fp8": context_length.cache_figures(caches[0], [[0.0064, 0.0128]], memory, contexts, 0)
        },
    }
    shown = context_length.markdown(figures)
    assert "| 64 | 6.40 (6.40 to 6.40) |" in shown
    assert "25% (25 to 25) | 50% (50 to 50)" in shown

    invariance = batch_invariance.markdown(
        {
            "dtype": "bfloat16",
            "num_prompts": 2,
            "max_tokens": 9,
            "by_weights": {"w": {"greedy": {"num_identical": 1, "same_start": [9, 4]}}},
        }
    )
    assert "| w, greedy | 1 of 2 | 4 of 9 |" in invariance
