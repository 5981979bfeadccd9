"""Settings of speculation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

SpeculativeMethod: TypeAlias = Literal["ngram", "suffix", "draft_model"]

DEFAULT_SPECULATIVE_TOKENS = 7
"""With the token before them eight rows, which cost a step about as much as one."""
MAX_SPECULATIVE_TOKENS = 16
"""A longer draft is hardly ever accepted to its end."""
MAX_NGRAM = 32
MAX_HISTORY_TOKENS = 4_194_304


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What to speculate with; complete and validated where a scheduler starts."""

    method: SpeculativeMethod | None = None
    """ngram continues the longest recent repetition, suffix lets repetitions vote, draft_model asks
    the executor's; None: no speculation."""
    num_speculative_tokens: int = DEFAULT_SPECULATIVE_TOKENS
    """Most draft tokens of one sequence in one step."""
    ngram_min: int = 2
    """Fewest tokens that must repeat before a draft."""
    ngram_max: int = 16
    """ngram: tokens that are compared; a longer repetition is no better than one of so many."""
    history_tokens: int = 65_536
    """suffix: tokens of finished sequences that are kept for each tenant; 0: none."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that makes no sense, with what would."""
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"num_speculative_tokens must be 1 to {MAX_SPECULATIVE_TOKENS}, "
                f"not {self.num_speculative_tokens}"
            )
        if not 1 <= self.ngram_min <= self.ngram_max <= MAX_NGRAM:
            raise ValueError(
                f"ngram_min and ngram_max must be 1 <= min <= max <= {MAX_NGRAM}, "
                f"not {self.ngram_min} and {self.ngram_max}"
            )
        if not 0 <= self.history_tokens <= MAX_HISTORY_TOKENS:
            raise ValueError(
                f"history_tokens must be 0 to {MAX_HISTORY_TOKENS}, not {self.history_tokens}"
            )
