"""The speculator that the settings ask for."""

from __future__ import annotations

from stepwire_scheduler.speculation.adaptive import LookupSpeculator
from stepwire_scheduler.speculation.config import SpeculationConfig
from stepwire_scheduler.speculation.draft_model import DraftModelSpeculator
from stepwire_scheduler.speculation.interface import Speculator
from stepwire_scheduler.speculation.lookup import Lookup
from stepwire_scheduler.speculation.ngram import NgramLookup
from stepwire_scheduler.speculation.suffix import SuffixLookup


def make_speculator(config: SpeculationConfig) -> Speculator | None:
    """Make what config.method names, None where it names nothing.

    draft_model needs executors that have one; whether they do is the caller's to check.
    """
    lookup: Lookup
    match config.method:
        case None:
            return None
        case "draft_model":
            return DraftModelSpeculator(num_speculative_tokens=config.num_speculative_tokens)
        case "ngram":
            lookup = NgramLookup(min_length=config.ngram_min, max_length=config.ngram_max)
        case "suffix":
            lookup = SuffixLookup(min_length=config.ngram_min, history_tokens=config.history_tokens)
    return LookupSpeculator(lookup, num_speculative_tokens=config.num_speculative_tokens)
