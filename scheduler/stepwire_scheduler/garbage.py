"""Keeps Python's garbage collector out of the steps."""

from __future__ import annotations

import gc

GENERATION_THRESHOLDS = (50_000, 20, 50)
"""Allocations before a young collection, and how many of each before an older one.

A step makes a few objects for every sequence and drops them without a cycle; Python's 700 would
collect several times in each step of a large batch.
"""


def settle() -> None:
    """Take what lives as long as the process out of all later collections, and make those rare.

    Call once, when the process is ready to serve.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GENERATION_THRESHOLDS)
