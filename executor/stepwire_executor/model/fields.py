"""Typed reading of untrusted key-value metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepwire_executor.errors import ModelLoadError

_MISSING: Any = object()
LARGEST_COUNT = (1 << 31) - 1
"""No size in a model's metadata is larger; guards arithmetic and allocation."""
MAX_LAYERS = 4096
"""Far above any model; a damaged count must not become a list of that length."""


class Fields:
    """A mapping whose values are checked as they are read.

    A key that holds None reads as absent. Every method raises ModelLoadError naming the file
    and the key where the value is absent without a default, or of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], *, file_name: str, prefix: str = "") -> None:
        """file_name and prefix (of keys, with its dot) serve the messages."""
        self._values = values
        self._file_name = file_name
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key holds anything."""
        return self._values.get(self._prefix + key) is not None

    def keys(self) -> tuple[str, ...]:
        """The keys that hold something, without the prefix."""
        start = len(self._prefix)
        return tuple(
            key[start:]
            for key, value in self._values.items()
            if key.startswith(self._prefix) and value is not None
        )

    def positive_int(
        self, key: str, default: int = _MISSING, *, largest: int = LARGEST_COUNT
    ) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            bound = "" if largest == LARGEST_COUNT else f" up to {largest}"
            raise self.wrong(key, f"a positive integer{bound}")
        return value

    def integer(self, key: str, default: int = _MISSING) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        return value

    def positive_float(self, key: str, default: float = _MISSING) -> float:
        value = self._get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool = _MISSING) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def string(self, key: str, default: str = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._get(key, _MISSING)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; empty where the key is absent."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(key, "a token id or a list of them")
        return tuple(ids)

    def child(self, key: str) -> Fields:
        """The object below a key; empty where the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, file_name=f"{self._file_name}: {key}")

    def wrong(self, key: str, expected: str) -> ModelLoadError:
        """The error of a value that is not what it should be."""
        shown = repr(self._values.get(self._prefix + key))
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return ModelLoadError(
            f"{self._file_name}: {self._prefix}{key} must be {expected}, is {shown}; "
            "get the model again from its source"
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(self._prefix + key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ModelLoadError(
                f"{self._file_name}: {self._prefix}{key} is missing; "
                "get the model again from its source"
            )
        return default
