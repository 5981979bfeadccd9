"""Prefix hits are exact: same tokens, same parent, same tenant."""

from __future__ import annotations

from array import array

import pytest
from stepwire_scheduler.prefix_cache import PrefixCache


def _register_all(cache: PrefixCache, tokens: array[int], tenant: str, first_block: int) -> None:
    hashes: list[bytes] = []
    cache.extend_hashes(hashes, tokens, tenant)
    for position in range(len(hashes)):
        cache.register(first_block + position, position, hashes, tokens, tenant)


def _match(cache: PrefixCache, tokens: array[int], tenant: str = "") -> list[int]:
    hashes: list[bytes] = []
    cache.extend_hashes(hashes, tokens, tenant)
    return cache.match(hashes, tokens, tenant)


def test_only_full_blocks_of_the_same_prefix_match() -> None:
    cache = PrefixCache(block_size=2, key=b"k")
    _register_all(cache, array("I", [1, 2, 3, 4, 5]), "", first_block=10)
    assert _match(cache, array("I", [1, 2, 3, 4, 5, 6])) == [10, 11]
    assert _match(cache, array("I", [1, 2, 3, 9])) == [10]
    assert _match(cache, array("I", [3, 4])) == [], "same tokens behind another parent"
    assert _match(cache, array("I", [1])) == []


def test_tenants_do_not_share() -> None:
    cache = PrefixCache(block_size=2, key=b"k")
    _register_all(cache, array("I", [1, 2, 3, 4]), "a", first_block=0)
    assert _match(cache, array("I", [1, 2, 3, 4]), "b") == []
    assert _match(cache, array("I", [1, 2, 3, 4]), "a") == [0, 1]


def test_a_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(block_size=2, key=b"k")
    monkeypatch.setattr(PrefixCache, "_hash", lambda self, parent, content: b"same")
    _register_all(cache, array("I", [1, 2]), "", first_block=7)
    assert _match(cache, array("I", [1, 2])) == [7]
    assert _match(cache, array("I", [8, 9])) == [], "another prompt's KV"


def test_a_forgotten_block_breaks_the_chain_behind_it() -> None:
    cache = PrefixCache(block_size=1, key=b"k")
    _register_all(cache, array("I", [1, 2, 3]), "", first_block=0)
    cache.forget(1)
    assert _match(cache, array("I", [1, 2, 3])) == [0]
    assert 1 not in cache
    assert len(cache) == 2


def test_hashes_differ_between_keys() -> None:
    tokens = array("I", [1, 2])
    hashes: list[list[bytes]] = [[], []]
    for key, into in zip((b"k", b"l"), hashes, strict=True):
        PrefixCache(block_size=2, key=key).extend_hashes(into, tokens, "")
    assert hashes[0] != hashes[1]


def test_hashes_extend_as_tokens_are_appended() -> None:
    cache = PrefixCache(block_size=2, key=b"k")
    grown: list[bytes] = []
    for end in range(1, 8):
        cache.extend_hashes(grown, array("I", range(end)), "")
        at_once: list[bytes] = []
        cache.extend_hashes(at_once, array("I", range(end)), "")
        assert grown == at_once
        assert len(grown) == end // 2
