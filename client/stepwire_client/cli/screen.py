"""What people read while a command works: all of it on stderr, stdout is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stepwire_client.cli import host
from stepwire_client.events import ModelInfo, ModelState

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from stepwire_client.cli.options import Setting
    from stepwire_client.events import Timings, Usage


def note(line: str) -> None:
    """Print one line."""
    print(line, file=sys.stderr, flush=True)


def banner(settings: Sequence[Setting]) -> None:
    """Say what runs where, before anything slow begins."""
    memory = host.available_memory_bytes()
    free = f", {host.in_bytes(memory)} free" if memory is not None else ""
    cores = host.num_cores()
    note(f"stepwire on {cores} core{'s' if cores != 1 else ''}{free}")
    note("  " + " · ".join(str(setting) for setting in settings))


def describe_model(model: ModelInfo) -> str:
    """One line: what was loaded, and what of it is in memory."""
    pool = model.num_blocks * model.block_size
    num_ranks = len(model.rank_weight_bytes)
    on_ranks = ""
    if num_ranks > 1:
        on_ranks = (
            f" ({host.in_bytes(max(model.rank_weight_bytes))} at most on each of {num_ranks} ranks)"
        )
    quantization = ""
    if model.quantization not in ("", "none"):
        quantization = f" ({model.quantization})"
    drafts = ""
    if model.speculative_method:
        drafts = f", up to {model.num_speculative_tokens} drafts by {model.speculative_method}"
    return (
        f"{model.model}: {model.architecture}, {model.dtype} on {model.device}, weights "
        f"{host.in_bytes(model.weight_bytes)}{quantization}{on_ranks}, KV {model.kv_cache_dtype} "
        f"{host.in_bytes(model.kv_cache_bytes)} = {model.num_blocks} blocks of "
        f"{model.block_size} = {pool} tokens, up to {model.max_num_seqs} sequences"
        f"{drafts}"
    )


def closing_line(usage: Usage, timings: Timings, *, first_token_s: float | None) -> str:
    """What the request took; times are the scheduler's."""
    parts = [
        f"{usage.num_prompt_tokens} prompt tokens ({usage.num_cached_tokens} cached)",
        f"{usage.num_output_tokens} output tokens",
        f"TTFT {timings.ttft_ms:.0f} ms",
        f"TPOT {timings.tpot_ms:.1f} ms",
    ]
    if usage.num_draft_tokens:
        share = usage.num_accepted_tokens / usage.num_draft_tokens
        parts.append(
            f"{usage.num_accepted_tokens} of {usage.num_draft_tokens} drafted tokens accepted "
            f"({share:.0%})"
        )
    if timings.e2e_ms > 0:
        parts.append(f"{usage.num_output_tokens / timings.e2e_ms * 1000:.1f} tok/s")
    if first_token_s is not None:
        parts.append(f"first token {first_token_s:.2f} s after exec")
    return " · ".join(parts)


class PhaseProgress:
    """Named phases: a line for each that ends, and on a terminal a bar for the one that runs.

    Nothing is imported or drawn before the first phase.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._phase_started_at = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._close_phase()
        if self._progress is not None:
            self._progress.stop()

    def update(self, phase: str, fraction: float) -> None:
        """Show a phase; fraction: how much is done, 0 to 1."""
        if phase != self._phase:
            self._close_phase()
            self._phase, self._phase_started_at = phase, time.monotonic()
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = _new_bar()
            self._task = self._progress.add_task(phase, total=1.0)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, description=phase, completed=fraction)

    def update_from(self, model: ModelInfo) -> None:
        """Show how far a server has come."""
        progress = model.load_progress
        if model.state is ModelState.LOADING and progress is not None:
            self.update(f"load: {progress.phase}" if progress.phase else "load", progress.fraction)
        elif model.state is ModelState.CONNECTING:
            self.update("start", 0.0)

    def _close_phase(self) -> None:
        if not self._phase:
            return
        line = f"  {self._phase}: {time.monotonic() - self._phase_started_at:.1f} s"
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            note(line)


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
