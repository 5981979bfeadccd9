"""A TCP proxy that breaks connections: at random bytes, all at once, or by silence."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_CHUNK_BYTES = 4_096


class CuttingProxy:
    """Forwards connections to one address until it is told, or drawn, to stop."""

    def __init__(self, target: str, rng: random.Random) -> None:
        self.num_connections = 0
        self.num_cuts = 0
        self.max_bytes: int | None = None
        """New connections break after a random number of bytes up to this, in either direction."""
        self._host, _, self._port = target.rpartition(":")
        self._rng = rng
        self._is_swallowing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.transport.abort()
        self.num_cuts += len(self._writers) // 2

    def swallow(self) -> None:
        """Take bytes and pass none on, as a partitioned network does."""
        self._is_swallowing = True

    def heal(self) -> None:
        """Forget the connections that lost bytes, and forward new ones."""
        self.cut()
        self._is_swallowing = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until either end, or chance, closes it."""
        self.num_connections += 1
        budget = self._rng.randint(1, self.max_bytes) if self.max_bytes else None
        try:
            up_reader, up_writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        left = [budget]
        flows = [
            asyncio.create_task(self._forward(reader, up_writer, left)),
            asyncio.create_task(self._forward(up_reader, writer, left)),
        ]
        try:
            await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for flow in flows:
                flow.cancel()
            for each in (writer, up_writer):
                each.transport.abort()
                self._writers.discard(each)

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: list[int | None],
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                if self._is_swallowing:
                    continue
                if left[0] is not None:
                    data, left[0] = data[: left[0]], left[0] - len(data)
                writer.write(data)
                await writer.drain()
                if left[0] is not None and left[0] <= 0:
                    self.num_cuts += 1
                    return

    def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self.serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def proxying(target: str, *, seed: int) -> AsyncIterator[tuple[CuttingProxy, str]]:
    """A proxy to HOST:PORT, and its own address."""
    proxy = CuttingProxy(target, random.Random(seed))
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    try:
        yield proxy, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await proxy.close()
