"""Finds KV blocks that already hold a prompt's leading tokens."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Entry:
    block_id: int
    parent_hash: bytes
    token_bytes: bytes


class PrefixCache:
    """An index from the chain hash of full blocks to the block that holds their KV.

    A block's hash covers its tokens and its parent's hash, keyed with a secret of the process
    and salted by tenant, so that hits cannot be forged and do not cross tenants. A hit also
    compares tokens and parent: a collision is a miss, never another prompt's KV.
    """

    def __init__(self, *, block_size: int, key: bytes) -> None:
        """key: up to 64 secret bytes, drawn by the caller at start."""
        self._block_size = block_size
        self._key = key
        self._entries: dict[bytes, _Entry] = {}
        self._hash_of_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hash_of_block

    def extend_hashes(self, hashes: list[bytes], token_ids: array[int], tenant: str) -> None:
        """Append to hashes those of the full blocks of token_ids that it does not cover yet."""
        size = self._block_size
        parent = hashes[-1] if hashes else self._root(tenant)
        for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
            parent = self._hash(parent, token_ids[start : start + size].tobytes())
            hashes.append(parent)

    def match(self, hashes: list[bytes], token_ids: array[int], tenant: str) -> list[int]:
        """Return the blocks of the longest cached prefix, given the hashes of token_ids."""
        size = self._block_size
        blocks: list[int] = []
        parent = self._root(tenant)
        for i, block_hash in enumerate(hashes):
            entry = self._entries.get(block_hash)
            if (
                entry is None
                or entry.parent_hash != parent
                or entry.token_bytes != token_ids[i * size : (i + 1) * size].tobytes()
            ):
                break
            blocks.append(entry.block_id)
            parent = block_hash
        return blocks

    def register(
        self, block_id: int, position: int, hashes: list[bytes], token_ids: array[int], tenant: str
    ) -> None:
        """Say that block_id holds the KV of full block number position of token_ids.

        A prefix that is known already stays with the block that has it.
        """
        assert block_id not in self._hash_of_block, block_id
        block_hash = hashes[position]
        if block_hash in self._entries:
            return
        start = position * self._block_size
        self._entries[block_hash] = _Entry(
            block_id=block_id,
            parent_hash=hashes[position - 1] if position else self._root(tenant),
            token_bytes=token_ids[start : start + self._block_size].tobytes(),
        )
        self._hash_of_block[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Drop a block whose content is about to change; unknown blocks are ignored."""
        block_hash = self._hash_of_block.pop(block_id, None)
        if block_hash is not None:
            del self._entries[block_hash]

    def clear(self) -> None:
        """Forget every block: the executor's pages are gone."""
        self._entries.clear()
        self._hash_of_block.clear()

    def _root(self, tenant: str) -> bytes:
        return self._hash(b"", tenant.encode())

    def _hash(self, parent: bytes, content: bytes) -> bytes:
        return hashlib.blake2b(
            parent + content, digest_size=_DIGEST_BYTES, key=self._key, usedforsecurity=False
        ).digest()
