"""What can go wrong in an executor.

ExecutorError
├── ConfigError        a flag or environment variable is wrong
├── ListenError        the address cannot be served
├── ModelLoadError     the model or its memory cannot be had
├── PlanLogError       a file is not a plan log, or is damaged; for the operator of a replay
└── PlanError          a step plan contradicts the executor's state; ends the epoch
    └── PlanOrderError     a plan of another epoch, or out of order

Messages are one line, name the fix and hold nothing internal: they reach the peer.
"""

from __future__ import annotations


class ExecutorError(Exception):
    """Base of every error that an executor raises on purpose."""


class ConfigError(ExecutorError):
    """Flags or environment variables are wrong."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        """Keep one line for each bad setting."""
        super().__init__("; ".join(problems))
        self.problems = problems


class ListenError(ExecutorError):
    """The listen address cannot be bound."""


class ModelLoadError(ExecutorError):
    """The model's files are missing, damaged, unsupported, or do not fit in memory.

    The message is one line for the operator and names the fix; it is safe to send to a client,
    so it names files but not where they are.
    """


class PlanLogError(ExecutorError):
    """A file is not a plan log of this version, or is damaged."""


class PlanError(ExecutorError):
    """A plan contradicts the slot table; applying it would be undefined."""


class PlanOrderError(PlanError):
    """A plan came outside its epoch or out of sequence."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not to be had: Python's, a device's, or torch's of the host."""
    # torch tells a device's by a type and the host's by a text; neither is imported here.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
