"""How far the load has come; written by the compute thread, read by the event loop.

Once it has ended, by the event loop alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from stepwire.executor.v1.executor_pb2 import LoadState


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What Describe says of a loaded model; fields as in DescribeResponse."""

    model_fingerprint: str
    """Hash of the model and of what changes results."""
    architecture: str
    """Name of the model's class in its config."""
    dtype: str
    """What is computed in."""
    quantization: str
    """Which weights are integers: "none", "int4 in groups of 32"."""
    kv_cache_dtype: str
    """Dtype of KV pages."""
    device: str
    """For people: "cpu"."""
    vocab_size: int
    """Token ids are below this."""
    max_position_embeddings: int
    """Longest sequence in tokens that this rank can run."""
    eos_token_ids: tuple[int, ...]
    """End-of-sequence tokens."""
    block_size: int
    """Tokens a KV block."""
    num_blocks: int
    """Blocks of the KV pool."""
    max_num_seqs: int
    """Rows of the slot table."""
    max_num_batched_tokens: int
    """Most tokens a step."""
    weight_bytes: int
    """Bytes of the packed weights."""
    kv_cache_bytes: int
    """Bytes of the KV pool."""
    draft_model: str = ""
    """Name of the draft model's directory or file; empty where there is none."""
    draft_weight_bytes: int = 0
    """Part of weight_bytes."""
    draft_kv_cache_bytes: int = 0
    """Part of kv_cache_bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """One moment of a load."""

    state: LoadState.ValueType = LoadState.LOAD_STATE_LOADING
    phase: str = "start"
    """What is being done, for people."""
    fraction: float = 0.0
    """0 to 1 over the whole load."""
    error: str = ""
    """One line that names the fix, where the load failed."""
    description: ModelDescription | None = None
    """Set once ready."""
    finished_s: float | None = None
    """When the load ended, by time.monotonic."""


class LoadStatus:
    """The load's latest moment; assignment of one reference makes it safe between threads."""

    def __init__(self) -> None:
        """Start the clock."""
        self._started_s = time.monotonic()
        self._progress = LoadProgress()

    @property
    def progress(self) -> LoadProgress:
        """The latest moment."""
        return self._progress

    @property
    def load_ms(self) -> float:
        """Wall time of the load so far, or of all of it."""
        finished_s = self._progress.finished_s
        return 1e3 * ((time.monotonic() if finished_s is None else finished_s) - self._started_s)

    def advance(self, phase: str, fraction: float) -> None:
        """Say what is being done; the fraction never goes back."""
        fraction = min(1.0, max(self._progress.fraction, fraction))
        self._progress = replace(self._progress, phase=phase, fraction=fraction)

    def succeed(self, description: ModelDescription) -> None:
        """The model is ready."""
        self._progress = LoadProgress(
            state=LoadState.LOAD_STATE_READY,
            phase="ready",
            fraction=1.0,
            description=description,
            finished_s=time.monotonic(),
        )

    def drain(self) -> None:
        """The process is to end, and opens no further epoch."""
        self._progress = replace(self._progress, state=LoadState.LOAD_STATE_DRAINING, phase="drain")

    def fail(self, error: str) -> None:
        """The model cannot be had; error is one line that names the fix."""
        self._progress = replace(
            self._progress,
            state=LoadState.LOAD_STATE_FAILED,
            error=error,
            finished_s=time.monotonic(),
        )
