"""What the journal costs a step: delivering and reading tokens with it and without.

Run: python -m benchmarks.journal_cost [--sizes N ...] [--steps N] [--rounds N]

Streams that may be resumed get a token each at every step, and their readers read it, without
gRPC and without a planner. With and without a journal take turns, so many steps at a time; a step
is timed from the executor's result to the last reader's event. The file is on the disk of the
temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

from stepwire_scheduler import garbage
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.plan import SequenceUpdate
from stepwire_scheduler.request_stream import Queued, StreamReader
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import Request, SamplingParams
from stepwire_scheduler.sequence import Sequence as TokenSequence

from benchmarks.common import Figures, finish, markdown_table, percentile

CLAIM = "The journal costs a few microseconds a token."
SIZES = (32, 256)
PROMPT_LEN = 128
BLOCK_STEPS = 50
"""Steps in a row with, and without."""
WAYS = ("without", "with")


class Letters:
    """A tokenizer whose every token is four letters."""

    token_bytes: Sequence[bytes] = [b"%4d" % i for i in range(1_000)]


class Streams:
    """So many requests whose readers have read all there is."""

    def __init__(self, num_streams: int, journal: Journal | None) -> None:
        self._requests = RunningRequests(
            Metrics("m"),
            max_unread_bytes=65_536,
            max_retained_bytes=1 << 30,
            finish_sequence=lambda sequence, reason: None,
            journal=journal,
        )
        self._sequences: list[TokenSequence] = []
        self._readers: list[StreamReader] = []
        for number in range(num_streams):
            request = Request(
                request_id=str(number),
                prompt_token_ids=array("I", range(PROMPT_LEN)),
                sampling_params=SamplingParams(max_tokens=1_000_000),
                arrival_ms=now_ms(),
                resume_window_ms=10_000,
                input_digest=bytes(16),
            )
            sequence = TokenSequence(request, 0, order_key=(0, number), stop_ids=frozenset())
            stream = self._requests.add(request, [sequence], Letters())
            stream.announce(Queued(queued_unix_ms=1, num_prompt_tokens=PROMPT_LEN, num_waiting=0))
            self._sequences.append(sequence)
            self._readers.append(stream.attach())

    def step(self, token_id: int) -> float:
        """Deliver a token to each and read it; returns microseconds."""
        updates = [SequenceUpdate(sequence, (token_id,)) for sequence in self._sequences]
        started = time.perf_counter()
        self._requests.deliver(updates)
        for reader in self._readers:
            try:
                reader.__anext__().send(None)
            except StopIteration:
                continue
            raise AssertionError("a reader had nothing to read")
        return (time.perf_counter() - started) * 1e6


def measure(num_streams: int, num_steps: int, num_rounds: int) -> Figures:
    """Microseconds a step both ways, and bytes written a token."""
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    num_bytes = 0
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder), max_bytes=1 << 40)
            journal.saved = None
            streams = {"without": Streams(num_streams, None), "with": Streams(num_streams, journal)}
            garbage.settle()  # as the scheduler's process does before its first request
            started_bytes = journal.num_bytes
            for step in range(0, num_steps, BLOCK_STEPS):
                for way in WAYS if step // BLOCK_STEPS % 2 else reversed(WAYS):
                    samples[way] += [streams[way].step(i) for i in range(BLOCK_STEPS)]
            num_bytes = journal.num_bytes - started_bytes
            journal.close()
    figures: Figures = {
        way: {
            "mean": statistics.fmean(values),
            **{f"p{p}": percentile(values, p) for p in (50, 99)},
        }
        for way, values in samples.items()
    }
    figures["us_per_token"] = (figures["with"]["p50"] - figures["without"]["p50"]) / num_streams
    figures["bytes_per_token"] = num_bytes / (num_streams * num_steps)
    return figures


def markdown(figures: Figures) -> str:
    """Microseconds a step by streams."""
    rows = [
        (
            size,
            *(f"{figure[way]['p50']:,.0f} / {figure[way]['p99']:,.0f}" for way in WAYS),
            f"{figure['us_per_token']:.2f}",
            f"{figure['bytes_per_token']:.1f}",
        )
        for size, figure in figures["by_streams"].items()
    ]
    header = (
        "streams",
        "a step without, µs p50 / p99",
        "with a journal",
        "more a token, µs",
        "bytes a token",
    )
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journal_cost")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    by_streams = {str(size): measure(size, options.steps, options.rounds) for size in options.sizes}
    finish(
        "journal_cost",
        parameters=vars(options),
        figures={"by_streams": by_streams},
        table=markdown({"by_streams": by_streams}),
    )


if __name__ == "__main__":
    main()
