"""Client of stepwire: generate text with a scheduler, or with a cluster of your own.

    from stepwire_client import LLM, SamplingParams

    with LLM(model="smollm2-135m") as llm:
        for generation in llm.generate(["The sky is", "1, 2, 3,"], SamplingParams(max_tokens=16)):
            print(generation.text)

Names are imported when they are first used, so that the command line starts without gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwire_client.aio import AsyncClient
    from stepwire_client.aio_streams import AsyncGenerationStream
    from stepwire_client.client import Client
    from stepwire_client.credentials import Credentials
    from stepwire_client.errors import StepwireError
    from stepwire_client.events import (
        Choice,
        Completed,
        Event,
        FinishReason,
        Generation,
        ModelInfo,
        ModelState,
        Output,
        Queued,
        Scheduled,
        Timings,
        TokenLogprob,
        Usage,
    )
    from stepwire_client.generation_stream import GenerationStream
    from stepwire_client.llm import LLM
    from stepwire_client.local_cluster import ClusterConfig, LocalCluster
    from stepwire_client.params import ChatMessage, Prompt, SamplingParams
    from stepwire_client.pending_generation import PendingGeneration

_MODULES = {
    "aio": ("AsyncClient",),
    "aio_streams": ("AsyncGenerationStream",),
    "client": ("Client",),
    "credentials": ("Credentials",),
    "errors": ("StepwireError",),
    "events": (
        "Choice",
        "Completed",
        "Event",
        "FinishReason",
        "Generation",
        "ModelInfo",
        "ModelState",
        "Output",
        "Queued",
        "Scheduled",
        "Timings",
        "TokenLogprob",
        "Usage",
    ),
    "generation_stream": ("GenerationStream",),
    "llm": ("LLM",),
    "local_cluster": ("ClusterConfig", "LocalCluster"),
    "params": ("ChatMessage", "Prompt", "SamplingParams"),
    "pending_generation": ("PendingGeneration",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncGenerationStream",
    "ChatMessage",
    "Choice",
    "Client",
    "ClusterConfig",
    "Completed",
    "Credentials",
    "Event",
    "FinishReason",
    "Generation",
    "GenerationStream",
    "LocalCluster",
    "ModelInfo",
    "ModelState",
    "Output",
    "PendingGeneration",
    "Prompt",
    "Queued",
    "SamplingParams",
    "Scheduled",
    "StepwireError",
    "Timings",
    "TokenLogprob",
    "Usage",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
