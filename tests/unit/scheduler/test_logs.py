"""Logs are JSON lines with request ids, and never hold prompts."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.logs import bound_request, configure_logging, get_logger
from stepwire_scheduler.request_stream import RequestStream
from support.scheduler_fakes import FakeStepLoop, served, tiny_tokenizer

SECRET = "xylophone-on-the-roof"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    configure_logging("debug", stream)
    structlog.configure(cache_logger_on_first_use=False)
    yield stream
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_is_an_object_with_event_level_and_time(stream: io.StringIO) -> None:
    get_logger("a").info("happened", count=3)
    logging.getLogger("grpc").warning("from a %s", "library")
    first, second = lines(stream)
    assert (first["event"], first["level"], first["component"]) == ("happened", "info", "a")
    assert (second["event"], second["level"]) == ("from a library", "warning")
    assert all("timestamp" in line for line in (first, second))


async def test_lines_inside_a_request_carry_its_id_and_no_other(stream: io.StringIO) -> None:
    log = get_logger("a")
    events = {"step", "also", "outside"}

    async def work(request_id: str) -> None:
        with bound_request(request_id):
            await asyncio.sleep(0)
            log.info("step", expected=request_id)
            logging.getLogger("library").info("also")

    await asyncio.gather(*(work(f"r{i}") for i in range(5)))
    log.info("outside")
    *inside, outside = [line for line in lines(stream) if line["event"] in events]
    assert len(inside) == 10
    assert all(line["request_id"] == line.get("expected", line["request_id"]) for line in inside)
    assert len({line["request_id"] for line in inside}) == 5
    assert "request_id" not in outside


def test_tracebacks_hold_no_local_variables(stream: io.StringIO) -> None:
    def fail(prompt: str) -> None:
        raise ValueError("broken")

    try:
        fail(SECRET)
    except ValueError:
        get_logger("a").exception("failed")
    assert "broken" in stream.getvalue()
    assert SECRET not in stream.getvalue()


async def test_prompts_are_never_logged(stream: io.StringIO, tmp_path: Path) -> None:
    """Not where a request is fine, is refused, or runs into a defect."""

    def fail(stream: RequestStream) -> None:
        raise RuntimeError("defect")

    text = pb.GenerationInput(text=SECRET)
    chat = pb.GenerationInput(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=SECRET)]))
    refused = pb.GenerationInput(text=SECRET, sampling_params=pb.SamplingParams(top_p=9))
    bad_role = pb.GenerationInput(chat=pb.Chat(messages=[pb.ChatMessage(role="x", content=SECRET)]))
    too_long = pb.GenerationInput(text=SECRET * 100)
    tokenizer = tiny_tokenizer(tmp_path)
    for step_loop in (FakeStepLoop(), FakeStepLoop(fail)):
        async with served(tokenizer, step_loop) as harness:
            for message in (text, chat, refused, bad_role, too_long):
                calls = (
                    harness.stub.Generate(pb.GenerateRequest(input=message)),
                    harness.stub.GenerateStream(pb.GenerateStreamRequest(input=message)).read(),
                )
                for call in calls:
                    try:
                        await call
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is not grpc.StatusCode.UNKNOWN  # noqa: PT017
            await harness.channel.unary_unary("/stepwire.scheduler.v1.GenerationService/Tokenize")(
                pb.TokenizeRequest(text=SECRET).SerializeToString()
            )
    logged = stream.getvalue()
    assert "request rejected" in logged
    assert "handler failed" in logged
    assert SECRET not in logged
