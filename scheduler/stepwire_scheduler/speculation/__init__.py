"""Which tokens to guess for each sequence, and how many: speculation as the planner sees it."""

from stepwire_scheduler.speculation.interface import Speculator

__all__ = ["Speculator"]
