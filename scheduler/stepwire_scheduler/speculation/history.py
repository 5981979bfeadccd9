"""The tokens of each tenant's finished sequences, the most recent ones."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque

from stepwire_scheduler.speculation.occurrences import OccurrenceIndex

SEPARATOR = 0xFFFFFFFF
"""Stands between sequences; no token has this id."""
_NUM_LEADING_TOKENS = 8
"""Of the prompt, kept before the output so that its first tokens have something to match."""
_MAX_TENANTS = 64


class History:
    """Two generations of tokens for each tenant: where the younger is full it becomes the older.

    So a tenant keeps half of max_tokens to all of it, in memory that is bounded. Tenants are
    apart: no lookup of one sees another's. Only outputs are kept, since whoever has the prompt
    again finds it in its own tokens. Of more than _MAX_TENANTS tenants the one that has not
    finished a sequence for longest is forgotten.
    """

    def __init__(self, *, max_tokens: int, length: int) -> None:
        """max_tokens: of one tenant. length: tokens of the n-grams that are looked up."""
        self._capacity = max_tokens // 2
        self._length = length
        self._generations: OrderedDict[str, list[OccurrenceIndex]] = OrderedDict()
        """Younger first; the least recently used tenant first."""
        self._behind: deque[OccurrenceIndex] = deque()
        """Those with tokens that are not indexed yet."""

    def num_tokens(self, tenant: str) -> int:
        """Tokens kept for a tenant, a separator behind each sequence included."""
        return sum(len(index.tokens) for index in self.generations(tenant))

    @property
    def num_behind(self) -> int:
        """Tokens, over all tenants, that cannot be found yet."""
        return sum(len(index.tokens) - index.num_tokens for index in self._behind)

    def generations(self, tenant: str) -> list[OccurrenceIndex]:
        """Return the indices of what a tenant's finished sequences left, younger first."""
        return self._generations.get(tenant, [])

    def add(self, tenant: str, token_ids: array[int], *, num_prompt_tokens: int) -> None:
        """Keep the output of a finished sequence, as much of its end as there is room for."""
        begin = max(0, num_prompt_tokens - _NUM_LEADING_TOKENS, len(token_ids) - self._capacity + 1)
        if len(token_ids) <= num_prompt_tokens or len(token_ids) - begin <= self._length:
            return
        kept = token_ids[begin:]
        kept.append(SEPARATOR)
        generations = self._generations.setdefault(tenant, [])
        self._generations.move_to_end(tenant)
        if not generations or len(generations[0].tokens) + len(kept) > self._capacity:
            generations.insert(
                0, OccurrenceIndex(array("I"), length=self._length, capacity=self._capacity)
            )
            self._drop(generations[2:])
            del generations[2:]
        youngest = generations[0]
        if youngest.num_tokens == len(youngest.tokens):
            self._behind.append(youngest)
        youngest.tokens.extend(kept)
        if len(self._generations) > _MAX_TENANTS:
            self._drop(self._generations.popitem(last=False)[1])

    def catch_up(self, num_tokens: int) -> None:
        """Index about so many of the tokens that are not."""
        while self._behind and num_tokens > 0:
            index = self._behind[0]
            num_before = index.num_tokens
            index.extend(num_before + num_tokens)
            num_tokens -= index.num_tokens - num_before
            if index.num_tokens == len(index.tokens):
                self._behind.popleft()

    def _drop(self, indices: list[OccurrenceIndex]) -> None:
        for index in indices:
            if index.num_tokens < len(index.tokens):
                self._behind.remove(index)
