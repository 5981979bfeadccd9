"""The storm's own HTTP/2 speaks to gRPC, and reads the statuses that it is sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc.aio

from benchmarks.request_storm import StormConnection

CODES = list(grpc.StatusCode)
NUM_CALLS = 60


class WatchedConnection(StormConnection):
    """Says when all calls have ended."""

    def __init__(self, address: str, path: str) -> None:
        super().__init__(address, path)
        self.all_ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.codes.total() == NUM_CALLS:
            self.all_ended.set()


async def test_every_call_arrives_whole_and_its_status_is_counted() -> None:
    received: list[bytes] = []

    async def answer(data: bytes, context: Any) -> None:
        received.append(data)
        await context.write(b"x" * len(data))
        context.set_code(CODES[len(data) % len(CODES)])

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection = WatchedConnection(f"127.0.0.1:{port}", "/a.B/C")
    await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", port)
    messages = [bytes([i]) * i for i in range(NUM_CALLS)]
    for message in messages:
        connection.send(message)
    async with asyncio.timeout(20):
        await connection.all_ended.wait()
    connection.close()
    await server.stop(0)
    assert sorted(received) == messages
    expected = Counter(CODES[i % len(CODES)].value[0] for i in range(NUM_CALLS))
    assert connection.codes == expected
