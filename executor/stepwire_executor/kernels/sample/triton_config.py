"""Sizes of the sampler's kernels, chosen by reasoning and not yet measured."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_GROUPS = 8192
"""Groups whose likeliest one program holds in registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes; all are powers of two, and none changes what is drawn but by rounding of sums."""

    group: int = 32
    """Tokens a group: 128 bytes, a cache line."""
    block: int = 4096
    """Tokens that a program over part of a row looks at."""
    num_warps: int = 8
    """Warps of those programs."""
    max_listed: int = 2048
    """Groups that may hold candidates, a row."""
    capacity: int = 4096
    """Candidates a row."""
    few: int = 512
    """Candidates that are looked at in a narrower loop, where there are no more."""
    gather_block: int = 2048
    """Tokens that are compared with a row's bound together."""
    search_block: int = 4096
    """Tokens that the search for limits looks at together."""

    def group_size(self, vocab_size: int) -> int:
        """Return the tokens a group in a vocabulary: more where it is very large."""
        size = self.group
        while size * _MAX_GROUPS < vocab_size:
            size *= 2
        return min(size, self.gather_block, self.block)

    def row_warps(self, width: int) -> int:
        """Return the warps of a program that holds width values: 8 a thread, 1 to 16 warps."""
        return min(max(width // 256, 1), 16)


CONFIG = Config()
"""The sizes in use."""
