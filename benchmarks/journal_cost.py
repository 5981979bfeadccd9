"""What the journal costs a step: delivering and reading tokens with it and without.

Run: python -m benchmarks.journal_cost [--sizes N ...] [--blocks N]

Streams that may be resumed get a token each at every step, and their readers read it, without
gRPC and without a planner. With and without a journal take turns, a block of steps at a time, and
the CPU's time of each block is taken, the kernel's for the writes included: a machine with other
work beside it says nothing else that can be compared. The file is in the temporary folder.
"""

from __future__ import annotations

import argparse
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

from benchmarks.common import Figures, finish, markdown_table, show, spread

CLAIM = "The journal costs a few microseconds a token."
SIZES = (32, 256)
PROMPT_LEN = 128
BLOCK_TOKENS = 12_800
"""Of the steps in a row with, and without."""
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

    def run(self, num_steps: int) -> float:
        """Deliver a token to each and read it, so many times; returns CPU microseconds a step."""
        started = time.thread_time()
        for token_id in range(num_steps):
            self._requests.deliver(
                [SequenceUpdate(sequence, (token_id,)) for sequence in self._sequences]
            )
            for reader in self._readers:
                try:
                    reader.__anext__().send(None)
                except StopIteration:
                    continue
                raise AssertionError("a reader had nothing to read")
        return (time.thread_time() - started) * 1e6 / num_steps


def measure(num_streams: int, num_blocks: int) -> Figures:
    """CPU microseconds a step both ways, by block, and bytes written a token."""
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    num_steps = max(1, BLOCK_TOKENS // num_streams)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), max_bytes=1 << 40)
        journal.saved = None
        streams = {"without": Streams(num_streams, None), "with": Streams(num_streams, journal)}
        garbage.settle()  # as the scheduler's process does before its first request
        started_bytes = journal.num_bytes
        for block in range(num_blocks):
            for way in WAYS if block % 2 else reversed(WAYS):
                samples[way].append(streams[way].run(num_steps))
        num_bytes = journal.num_bytes - started_bytes
        journal.close()
    differences = [b - a for a, b in zip(samples["without"], samples["with"], strict=True)]
    return {
        **{way: spread(values) for way, values in samples.items()},
        "us_per_token": spread([difference / num_streams for difference in differences]),
        "bytes_per_token": num_bytes / (num_streams * num_steps * num_blocks),
    }


def markdown(figures: Figures) -> str:
    """Microseconds a step by streams."""
    rows = [
        (
            size,
            *(show(figure[way], 0) for way in WAYS),
            show(figure["us_per_token"], 2),
            f"{figure['bytes_per_token']:.1f}",
        )
        for size, figure in figures["by_streams"].items()
    ]
    header = (
        "streams",
        "a step without, CPU µs, median (least to most)",
        "with a journal",
        "more a token, µs",
        "bytes a token",
    )
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journal_cost")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--blocks", type=int, default=30)
    options = parser.parse_args(arguments)
    by_streams = {str(size): measure(size, options.blocks) for size in options.sizes}
    finish(
        "journal_cost",
        parameters=vars(options),
        figures={"by_streams": by_streams},
        table=markdown({"by_streams": by_streams}),
    )


if __name__ == "__main__":
    main()
