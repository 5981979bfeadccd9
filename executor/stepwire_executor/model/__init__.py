"""The model: config, weights and the decoder that computes with them.

load_model and LoadedModel are imported on first use, so that what needs no torch (the
tokenizer's converter) does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepwire_executor.model.loader import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from stepwire_executor.model import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
