"""An executor that also notes when CUDA graphs were replayed: between replays is the host's gap.

Run: python -m benchmarks.gpu.traced_executor TRACE [executor's flags]

TRACE gets a line a replay: the host's time.time(), the milliseconds that the graph took on the
device, and those from the end of the graph before it to its start.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

_FLUSH_INTERVAL_S = 0.2
_MAX_PENDING = 4_096


class ReplayTrace:
    """Events around every replay, written once the device has passed them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._pending: deque[tuple[float, Any, Any]] = deque(maxlen=_MAX_PENDING)
        self._last_end: Any = None
        self._lock = threading.Lock()

    def install(self) -> None:
        """Wrap CUDAGraph.replay."""
        import torch

        replay = torch.cuda.CUDAGraph.replay

        def traced(graph: torch.cuda.CUDAGraph) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay(graph)
            end.record()
            self._pending.append((time.time(), start, end))

        torch.cuda.CUDAGraph.replay = traced  # type: ignore[method-assign]
        threading.Thread(target=self._run, name="replay trace", daemon=True).start()

    def flush(self) -> None:
        """Write what has finished."""
        with self._lock:
            lines = []
            while self._pending and self._pending[0][2].query():
                at, start, end = self._pending.popleft()
                gap_ms = None if self._last_end is None else self._last_end.elapsed_time(start)
                lines.append(json.dumps([at, start.elapsed_time(end), gap_ms]))
                self._last_end = end
            if lines:
                with self._file.open("a", encoding="utf-8") as out:
                    out.write("\n".join(lines) + "\n")

    def _run(self) -> None:
        while True:
            time.sleep(_FLUSH_INTERVAL_S)
            self.flush()


def main() -> int:
    """Serve until the executor ends."""
    trace, *flags = sys.argv[1:]
    ReplayTrace(Path(trace)).install()
    from stepwire_executor.__main__ import main as serve

    return serve(flags)


if __name__ == "__main__":
    sys.exit(main())
