"""Which tokens to guess for each sequence, and how many: speculation as the planner sees it."""

from stepwire_scheduler.speculation.config import SpeculationConfig
from stepwire_scheduler.speculation.counters import SpeculationCounters
from stepwire_scheduler.speculation.factory import make_speculator
from stepwire_scheduler.speculation.interface import Speculator

__all__ = ["SpeculationConfig", "SpeculationCounters", "Speculator", "make_speculator"]
