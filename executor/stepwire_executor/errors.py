"""What can go wrong in an executor.

ExecutorError
└── ModelLoadError    the model cannot be served as it is; one line that names the fix
"""

from __future__ import annotations


class ExecutorError(Exception):
    """Base of every error that an executor raises on purpose."""


class ModelLoadError(ExecutorError):
    """The model's files are missing, damaged or of a kind that is not supported.

    The message is one line for the operator and names the fix; it is safe to send to a client,
    so it names files but not where they are.
    """
