"""The machine of requests that are resumed, whose scheduler is killed and goes on from its journal.

A kill takes what is in memory, at any moment between two calls. What a client has seen, and what
was delivered, must be there afterwards, event by event; what was over must not come back.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from hypothesis.stateful import rule
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.output_log import LogCursor, OutputLog
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import FinishReason
from stepwire_scheduler.sequence import Sequence as TokenSequence
from support.resume_machine import MAX_UNREAD_BYTES, SELDOM, Fragments, ResumeMachine, Sent


class JournalMachine(ResumeMachine):
    """Requests by name over schedulers that follow one another."""

    def make_requests(self) -> RunningRequests:
        """Over an empty journal, at the start."""
        self.folder = Path(tempfile.mkdtemp())
        self.journal = self._open()
        self.journal.saved = None
        return self._requests_over(self.journal)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "journal"):
            self._drop(self.journal)
            shutil.rmtree(self.folder)

    def num_sealed_of(self, sent: Sent) -> int:
        """Also those that a reader was about to get."""
        return max(sent.num_seen, sent.stream._log.num_sealed)

    def _open(self) -> Journal:
        return Journal(self.folder, max_bytes=2_000)

    def _drop(self, journal: Journal) -> None:
        """As the kernel does for a process that is killed: what was not written is lost."""
        os.close(journal._file)
        os.close(journal._lock)

    def _requests_over(self, journal: Journal) -> RunningRequests:
        return RunningRequests(
            cast(Any, self.metrics),
            max_unread_bytes=MAX_UNREAD_BYTES,
            max_retained_bytes=self.max_retained_bytes,
            finish_sequence=self._finish_sequence,
            journal=journal,
        )

    @rule(really=SELDOM)
    def rotate(self, really: bool) -> None:
        """It would happen by itself where the file is large."""
        if really:
            self.journal.rotate(self.requests.images())

    @rule()
    def kill(self) -> None:
        """The scheduler is killed and started again."""
        was_there = {name for name, sent in self.sent.items() if self._is_there(sent)}
        self._drop(self.journal)
        self.journal = self._open()
        self.requests = self._requests_over(self.journal)
        assert self.journal.saved is not None
        saved_by_name = {key[1]: saved for key, saved in self.journal.saved.items()}
        for name, sent in self.sent.items():
            sent.reader, sent.reader_is_slow = None, False
            saved = saved_by_name.pop(name, None)
            if saved is None:
                is_lasting = sent.stream.is_resumable and name in was_there
                assert not is_lasting, "it is lost"
                self._note_lost(sent, was_there=name in was_there)
                continue
            assert name in was_there, "it came back"
            self._check_log(sent, saved.log)
            assert saved.resume_window_ms == sent.window_ms, "the window"
            assert (saved.ending is not None) == sent.stream.has_ended, "its end"
            sequences = []
            if saved.ending is None:
                sequences = [
                    TokenSequence(saved.request, i, order_key=(0, i), stop_ids=frozenset())
                    for i in range(len(sent.sequences))
                ]
                for sequence in sequences:
                    sequence.finish_reason = saved.log.output_of(sequence.index).finish_reason
                sent.sequences = sequences
            self.requests.restore(saved, sequences, Fragments())
            sent.alone_since = self.now
            entry = self.requests._entries.get(sent.request.key)
            stream = entry.stream if entry else self.requests._retained.get(sent.request.key)
            if stream is not None:  # memory may be short
                sent.stream = stream
        assert not saved_by_name, "unknown requests"
        self.journal.saved = None
        self.journal.rotate(self.requests.images())

    def _note_lost(self, sent: Sent, *, was_there: bool) -> None:
        """Without a window it ends with its scheduler."""
        if was_there and not sent.stream.has_ended:
            self.num_sent -= 1
        sent.is_gone = True
        for sequence in sent.sequences:
            sequence.finish_reason = sequence.finish_reason or FinishReason.CANCELLED

    def _check_log(self, sent: Sent, log: OutputLog) -> None:
        for index, made in enumerate(sent.token_ids):
            assert log.output_of(index).token_ids == made, "tokens are lost"
        copy = OutputLog.load(log.dump())
        cursor = LogCursor(copy, 0)
        assert log.num_sealed >= sent.num_seen, "what a client has seen is not"
        for seq in range(1, sent.num_seen + 1):
            event = cursor.read()
            assert sent.events.get(seq, event) == event, "an event changed"
