"""A control: GenerationService without stepwire, on nothing but grpc.aio.

Run: python -m benchmarks.plain_server [--token-ms MS]

It answers GenerateStream with an event every so often until the tokens asked for are out or the
client leaves, and Cancel; it checks, batches, keeps and logs nothing. What memory it takes for
each call, grpc.aio takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client.managed_process import ManagedProcess

from benchmarks.steady_executor import SteadyProcess


class PlainService(pb_grpc.GenerationServiceServicer):
    """Counts to max_tokens."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._cancelled: dict[str, asyncio.Event] = {}

    async def GenerateStream(  # type: ignore[override]
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> None:
        request_id = request.input.request_id
        cancelled = self._cancelled.setdefault(request_id, asyncio.Event())
        try:
            for seq in range(1 + request.input.sampling_params.max_tokens):
                await context.write(pb.GenerateStreamResponse(request_id=request_id, seq=seq))
                await asyncio.sleep(self._token_s)
                if cancelled.is_set():
                    return
        finally:
            self._cancelled.pop(request_id, None)

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        for request_id in request.request_ids:
            if request_id in self._cancelled:
                self._cancelled[request_id].set()
        return pb.CancelResponse()


@contextlib.contextmanager
def plain_server(*, log: Path, token_ms: float) -> Iterator[SteadyProcess]:
    """Run one as a process."""
    command = [sys.executable, "-m", "benchmarks.plain_server", f"--token-ms={token_ms}"]
    process = ManagedProcess("plain server", command, log=log)
    try:
        address = process.wait_for_address(30.0, threading.Event())
        assert address is not None
        yield SteadyProcess(address=address, pid=process.pid)
    finally:
        process.stop(2.0)


async def _serve(options: argparse.Namespace) -> None:
    server = grpc.aio.server()
    service = PlainService(options.token_ms / 1e3)
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_server")
    parser.add_argument("--token-ms", type=float, default=2.0)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
